"""Evaluating for real: what is kept, that resuming and repeating change nothing, and what two evaluations show."""

import json
import shutil

import pytest
from rich.console import Console

from plumbline.errors import InputError
from plumbline.rewards.workers import Grader
from plumbline.rl.batch import Sampling
from plumbline.rl.data import load_problems
from plumbline.rl.evaluation import evaluate
from plumbline.rl.evaluation.compare import compare, compare_benchmark, print_comparison
from plumbline.rl.evaluation.launch import launch_evaluation
from plumbline.rl.evaluation.manifest import read_manifest
from plumbline.rl.evaluation.presets import PRESETS, Settings, choose
from plumbline.rl.evaluation.request import Request, benchmark_name, resolve
from plumbline.rl.files import read_rows
from plumbline.rl.grading import binary, grade_group
from plumbline.rl.rollout.native import NativeEngine
from plumbline.rl.tasks import TaskSet
from plumbline.rl.text import Codec

QUIET = Console(quiet=True)


class Killed(Exception):
    pass


class Local:
    """The native engine and a grader in this process."""

    def __init__(self, slots=6):
        codec = Codec("embedded")
        self.engine = NativeEngine("embedded", attention=None, codec=codec, slots=slots, device="cpu")
        self.grader = Grader()
        self.asked = []
        self.die_after = None

    def graded_groups(self, prompts, completions, sampling):
        self.asked.append([prompt.sample_id for prompt in prompts])
        for group in self.engine.generate(prompts, completions, sampling):
            if self.die_after == 0:
                raise Killed
            if self.die_after is not None:
                self.die_after -= 1
            yield grade_group(group, self.grader, binary)


@pytest.fixture(scope="module")
def local():
    found = Local()
    yield found
    found.grader.close()


@pytest.fixture
def source(local):
    local.asked, local.die_after = [], None
    return local


@pytest.fixture(scope="module")
def tasks():
    problems, _ = load_problems("procedural:heldout", limit=10)
    return TaskSet(problems, Codec("embedded"), 512, "procedural:heldout")


SAMPLING = Sampling(24, temperature=1.0, seed=3)


def answer(tasks, source, folder, **changes):
    return evaluate("p", tasks, source, SAMPLING, 3, folder, **({"shard_problems": 4} | changes))


def test_everything_is_kept_in_order(tasks, source, tmp_path):
    seen = []
    result = answer(tasks, source, tmp_path, progress=lambda *pair: seen.append(pair))
    rows = read_rows(tmp_path / "p.jsonl")
    assert [(row["sample_id"], row["rollout"]) for row in rows] == [(s, r) for s in tasks for r in range(3)]
    assert [len(part) for part in source.asked] == [4, 4, 2]
    assert seen == [(n, 10) for n in range(11)]
    assert result.accuracy.mean == pytest.approx(sum(row["correct"] for row in rows) / 30)
    assert json.loads((tmp_path / "p.json").read_text())["accuracy"]["mean"] == result.accuracy.mean
    assert result.majority is not None
    assert not (tmp_path / "p.partial.jsonl").exists()


@pytest.mark.parametrize("groups", [0, 5, 9])
def test_a_killed_evaluation_goes_on_as_if_it_had_not_been(tasks, source, tmp_path, groups):
    answer(tasks, source, tmp_path / "whole")
    source.die_after = groups
    with pytest.raises(Killed):
        answer(tasks, source, tmp_path / "parts")
    partial = tmp_path / "parts" / "p.partial.jsonl"
    with partial.open("a") as file:
        file.write('{"sample_id": "torn')
    source.die_after, source.asked = None, []
    result = answer(tasks, source, tmp_path / "parts", resume=True)
    assert len(source.asked) == 3 - groups // 4
    assert (tmp_path / "whole" / "p.jsonl").read_bytes() == (tmp_path / "parts" / "p.jsonl").read_bytes()
    source.asked = []
    again = answer(tasks, source, tmp_path / "parts", resume=True)
    assert source.asked == []
    assert again.per_problem == result.per_problem
    assert again.seconds >= result.seconds


def test_independent_completions_are_kept_one_by_one(tasks, source, tmp_path):
    source.die_after = 5
    with pytest.raises(Killed):
        answer(tasks, source, tmp_path, independent=True)
    source.die_after, source.asked = None, []
    answer(tasks, source, tmp_path, independent=True, resume=True)
    assert [len(part) for part in source.asked] == [5]
    assert len(read_rows(tmp_path / "p.jsonl")) == 30


def test_presets():
    _, limr = choose("limr", [])
    assert limr == {
        "aime24": Settings(4, 0.4, 0.95, 3072),
        "math500": Settings(1, 0.0, 0.95, 3072),
        "amc23": Settings(4, 0.4, 0.95, 3072),
    }
    _, own = choose("avg32", ["math500"], completions=8, temperature=None)
    assert own == {"math500": Settings(8, 0.6, 0.95, 32768)}
    with pytest.raises(InputError, match="unknown preset 'avg64'; use limr, avg32, greedy"):
        choose("avg64", [])
    assert PRESETS["limr"].system.startswith("Please reason step by step")


def test_a_benchmark_is_known_by_hub_id_and_file_too():
    assert benchmark_name("math500") == benchmark_name("HuggingFaceH4/MATH-500") == benchmark_name("x/math500.jsonl")
    assert benchmark_name("my/own set.jsonl") == "own-set"
    assert benchmark_name("procedural:heldout") == "procedural-heldout"
    assert benchmark_name("run.jsonl") == "run-problems"


@pytest.fixture(scope="module")
def benchmark_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "own.jsonl"
    problems, _ = load_problems("procedural:heldout", limit=6, seed=1)
    rows = [{"id": p.id, "problem": p.problem, "answer": p.answer, "level": n % 2} for n, p in enumerate(problems)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(benchmark_file, tmp_path_factory):
    """An evaluation through Ray, by the command's own path."""
    folder = tmp_path_factory.mktemp("evaluation") / "a"
    asked = Request(
        "embedded",
        [str(benchmark_file)],
        completions=2,
        temperature=1.0,
        max_new_tokens=24,
        device="cpu",
        training=[str(benchmark_file)],
        output=folder,
    )
    assert launch_evaluation(asked, QUIET)
    return folder


def test_the_manifest_says_all(finished):
    manifest = read_manifest(finished)
    assert set(manifest.model.files) >= {"config.json", "model.safetensors", "tokenizer.json"}
    (part,) = manifest.benchmarks
    assert (part.name, part.problems, part.completions, part.temperature) == ("own", 6, 2, 1.0)
    assert manifest.results["own"].accuracy["n"] == 6
    assert {"torch", "plumbline", "transformers"} <= set(manifest.versions)
    figures = json.loads((finished / "own.json").read_text())
    assert set(figures["by_level"]) == {"0", "1"}
    overlap = json.loads((finished / "overlap.json").read_text())
    assert overlap["own"][0]["same"] == 6


def test_a_repetition_is_bit_for_bit(finished, tmp_path):
    console = Console(record=True, quiet=False, file=(tmp_path / "out").open("w"), width=200)
    assert launch_evaluation(Request(manifest=finished, output=tmp_path / "again"), console)
    assert "repeated bit for bit: own" in console.export_text()
    assert (tmp_path / "again" / "own.jsonl").read_bytes() == (finished / "own.jsonl").read_bytes()


def test_another_model_or_other_data_is_no_repetition(finished, benchmark_file, tmp_path):
    tree = json.loads((finished / "manifest.json").read_text())
    tree["model"]["files"]["model.safetensors"] = "0" * 64
    (tmp_path / "m.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"not that of the manifest .*model.files.model.safetensors: 0000"):
        launch_evaluation(Request(manifest=tmp_path / "m.json", output=tmp_path / "x"), QUIET)
    tree = json.loads((finished / "manifest.json").read_text())
    tree["benchmarks"][0]["source"] = str(tmp_path / "own.jsonl")
    (tmp_path / "m.json").write_text(json.dumps(tree))
    (tmp_path / "own.jsonl").write_text(benchmark_file.read_text().replace('"answer": "', '"answer": "1'))
    with pytest.raises(InputError, match=r"benchmarks.own.fingerprint"):
        launch_evaluation(Request(manifest=tmp_path / "m.json", output=tmp_path / "x"), QUIET)
    assert not (tmp_path / "x").exists()
    tree["colour"] = "red"
    (tmp_path / "m.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="not an evaluation's manifest: colour"):
        launch_evaluation(Request(manifest=tmp_path / "m.json", output=tmp_path / "x"), QUIET)


def test_resuming_with_other_settings_is_refused(finished, benchmark_file, tmp_path):
    shutil.copytree(finished, tmp_path / "a")
    asked = Request("embedded", [str(benchmark_file)], completions=3, temperature=1.0, max_new_tokens=24, device="cpu")
    with pytest.raises(InputError, match=r"benchmarks.own.completions: 2 -> 3"):
        launch_evaluation(Request(**{**asked.__dict__, "output": tmp_path / "a", "resume": True}), QUIET)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "tgi"}, "unknown engine 'tgi'; use native, vllm, endpoint"),
        ({"engine": "endpoint"}, "--url http://HOST:PORT/v1 belong together"),
        ({"model": None}, "name a MODEL"),
        ({"preset": "none"}, "unknown preset 'none'"),
        ({"benchmarks": ["a/own.jsonl", "b/own.jsonl"]}, "have one name; evaluate them in separate folders"),
    ],
)
def test_requests_that_do_not_fit(changes, words):
    with pytest.raises(InputError, match=words.replace("(", "\\(")):
        resolve(Request(**({"model": "embedded", "benchmarks": ["procedural:heldout"]} | changes)), QUIET)


def test_comparing_pairs_by_problem(finished, tmp_path):
    other = tmp_path / "b"
    shutil.copytree(finished, other)
    rows = read_rows(other / "own.jsonl")
    for row in rows[:2]:
        row["correct"] = not rows[0]["correct"]
    (other / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = compare(finished, other)
    before, after = found.a.per_problem[rows[0]["sample_id"]], found.b.per_problem[rows[0]["sample_id"]]
    assert found.difference.mean == pytest.approx((after - before) / 6)
    assert [change.sample_id for change in found.changed] == [rows[0]["sample_id"]]
    assert found.better + found.worse == 1
    console = Console(record=True, file=(tmp_path / "out").open("w"), width=200)
    print_comparison([found], "a", "b", console)
    assert rows[0]["sample_id"] in console.export_text()


def test_comparing_what_does_not_pair(finished, tmp_path):
    rows = read_rows(finished / "own.jsonl")
    with pytest.raises(InputError, match="no problem in common"):
        compare_benchmark("own", rows, [row | {"sample_id": "other"} for row in rows])
    with pytest.raises(InputError, match="evaluate on the same data"):
        compare_benchmark("own", rows, [row | {"gold": "never"} for row in rows])
    with pytest.raises(InputError, match="not the folder of an evaluation"):
        compare(finished, tmp_path)
