"""rl_step.py, several_gpus.py, long_rollout.py and weight_sync.py on small policies on a CPU."""

import json

import pytest
import torch

from benchmarks import long_rollout, rl_ours, rl_step, several_gpus, weight_sync

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")

WORK = ["--policy", "embedded", "--prompts", "2", "--completions", "2", "--max-new-tokens", "4", "--graders", "1"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Work this small gains nothing from more, and waits for them on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"id": f"p{i}", "problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_mode_that_fails_is_named_and_costs_no_other_its_figures(problems, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(rl_step.PACKAGES, "vllm-alone", ["no_such_package"])
    monkeypatch.setitem(rl_step.MODES, "trl-vllm", "benchmarks.rl_others:no_such_mode")
    monkeypatch.setitem(rl_step.PACKAGES, "trl-vllm", [])
    out = tmp_path / "results" / "rl_step.json"
    modes = ["vllm-alone", "native", "trl-vllm"]
    code = rl_step.main(
        [*WORK, "--data", str(problems), "--warmup", "1", "--steps", "2", "--modes", *modes, "--out", str(out)]
    )
    assert code == 1
    made = json.loads(out.read_text())["modes"]
    assert made["vllm-alone"] == {"failed": "not installed: no_such_package"}
    assert "no_such_mode" in made["trl-vllm"]["failed"]
    native = made["native"]
    assert "failed" not in native
    assert len(native["steps"]) == 2
    assert len(native["warmup_steps"]) == 1
    for step in native["steps"]:
        assert 4 <= step["completion_tokens"] <= 16
        parts = step["rollout"] + step["reward_wait"] + step["update"] + step["sync"]
        assert step["step"] == pytest.approx(parts)
    assert len(native["update_all_rows"]["each_seconds"]) == 2
    printed = capsys.readouterr().out
    assert "not installed: no_such_package" in printed
    assert "FAILED: AttributeError" in printed
    # One mode again, beside what is there.
    monkeypatch.setitem(rl_step.PACKAGES, "trl-vllm", ["no_other_package"])
    again = [*WORK, "--data", str(problems), "--modes", "trl-vllm", "--out", str(out), "--add"]
    assert rl_step.main([*again, "--warmup", "1", "--steps", "2"]) == 1
    added = json.loads(out.read_text())["modes"]
    assert added == made | {"trl-vllm": {"failed": "not installed: no_other_package"}}
    with pytest.raises(SystemExit, match="other work"):
        rl_step.main(again)


def test_the_engine_alone_answers_what_is_not_too_long(problems, capsys):
    from benchmarks.rl_bench import Bench

    arguments = vars(rl_step.parser().parse_args([*WORK, "--data", str(problems), "--slots", "2", "--warmup", "1"]))
    lengths = [len(Bench(arguments).codec.encode(f"What is {i} + 1?")) for i in range(6)]
    with problems.open("a") as file:
        file.write(json.dumps({"id": "long", "problem": "1 + " * 50, "answer": "1"}) + "\n")
    settings = arguments | {"max_prompt_tokens": max(lengths), "steps": 2}
    assert [row["id"] for row in Bench(settings).rows] == [f"p{i}" for i in range(6)]
    record = {}
    rl_ours.native_alone(settings, record.update)
    assert len(record["steps"]) == 2
    for step in record["steps"]:
        assert 4 <= step["completion_tokens"] <= 16
        assert step["rollout_tokens_per_second"] == pytest.approx(step["completion_tokens"] / step["rollout"])
    alone = {
        "with_logprobs": {"median": {"rollout_tokens_per_second": record["median"]["rollout_tokens_per_second"] / 2}}
    }
    (line,) = rl_step.compared({"native-alone": record, "vllm-alone": alone})
    assert line.endswith("2.00x")


@pytest.mark.parametrize(("layout", "workers"), [("1", 1), ("2", 2), ("apart", 1)])
def test_the_work_of_a_step_is_the_same_on_any_number_of_gpus(layout, workers):
    settings = vars(several_gpus.parser().parse_args(["--policy", "embedded"])) | {"layout": layout}
    run = several_gpus.config(settings)
    assert run.learner.workers == run.rollout.workers == workers
    assert run.rollout.slots * workers == 512 == run.rollout.prompts_per_step * run.rollout.completions_per_prompt


def test_measured_steps_see_the_same_prompts_however_many_warm_up(problems):
    from benchmarks.rl_bench import Bench

    seen = []
    for warmup in (0, 2):
        arguments = rl_step.parser().parse_args([*WORK, "--data", str(problems), "--warmup", str(warmup)])
        bench = Bench(vars(arguments) | {"data": str(problems), "steps": 2})
        windows = [[row["id"] for row in bench.problems(window)] for window in bench.order]
        seen.append(windows[warmup:])
        assert len(windows) == warmup + 2
    assert seen[0] == seen[1] == [["p0", "p1"], ["p2", "p3"]]


def test_long_responses_of_both_kinds(tmp_path):
    arguments = long_rollout.parser().parse_args(["--shape", "tiny", "--lengths", "96", "--prompt-tokens", "8"])
    settings = vars(arguments) | {"sequences": 2, "contexts": 3, "measure_tokens": 16, "updates": 1}
    kinds = {}
    for kind in long_rollout.KINDS:
        kinds[kind] = record = {}
        long_rollout.measure(settings | {"attention": kind, "policy": str(tmp_path / "policy")}, record.update)
        rolled = record["rollout"]["96"]
        assert list(rolled["seconds_a_token"]) == ["8", "40", "72"]
        assert rolled["tokens_per_second"] == pytest.approx(2 * 96 / rolled["rollout_seconds"])
        assert len(record["update"]["96"]["seconds"]) == 1
    table = long_rollout.ratios(kinds)
    full, nsa = (kinds[kind]["update"]["96"]["tokens_per_second"] for kind in long_rollout.KINDS)
    assert table["96"]["update"] == pytest.approx(nsa / full)


def test_a_length_that_does_not_fit_is_named(tmp_path, monkeypatch):
    def part(settings, length):
        if length == 64:
            raise torch.OutOfMemoryError("too\nmuch")
        return {"seconds": [0.5], "tokens_per_second": 10.0, "torch_peak_gib": 0.0}

    monkeypatch.setattr(long_rollout, "rollout", part)
    monkeypatch.setattr(long_rollout, "update", part)
    settings = vars(long_rollout.parser().parse_args(["--shape", "tiny", "--lengths", "64", "32"]))
    record = {"process_seconds": 1.0}
    long_rollout.measure(settings | {"attention": "full", "policy": str(tmp_path / "policy")}, record.update)
    assert record["update"]["64"] == {"failed": "too much"}
    assert record["update"]["32"]["tokens_per_second"] == 10.0
    assert long_rollout.ratios({"full": record, "nsa": record}) == {"32": {"rollout": 1.0, "update": 1.0}}
    record["rollout"] = {"64": record["rollout"]["64"]}
    printed = list(long_rollout.shown("full", record))
    assert "  rollout of 64 FAILED: too much" in printed
    assert any("update on 32" in line for line in printed)


def test_the_sum_over_a_response():
    # 0.1 s a token up to 100 tokens, then on a line to 0.3 s at 200, then level.
    assert long_rollout.over_response({100: 0.1, 200: 0.3}, 50, 200) == pytest.approx(50 * 0.1 + 100 * 0.2 + 50 * 0.3)


def test_weights_arrive_in_process(tmp_path):
    record = {}
    weight_sync.in_process({"shape": "tiny", "policy": str(tmp_path / "policy"), "repeats": 2}, record.update)
    assert len(record["seconds"]) == 2
    assert record["parameters"] > 0
