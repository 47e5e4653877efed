"""The reward-checking stage beside a training run: real reward actors, groups with planted faults."""

import io
import threading
import time

import pytest
import ray
from rich.console import Console

from plumbline.errors import InputError, RewardsUnsound
from plumbline.rl.actors import RewardWorker
from plumbline.rl.batch import Completion, Group, Prompt
from plumbline.rl.checking import CheckingStage, WorkersOpinion
from plumbline.rl.config import parse_config
from plumbline.rl.connect import start_ray
from plumbline.rl.pool import Pool
from plumbline.rl.tasks import leave_out
from plumbline.selection.samplers import UniformSampler

LIMIT = ("ray.start_timeout_seconds", 180.0)


def config(folder, **checking):
    tree = {"name": "planted", "output": str(folder), "steps": 5, "ray": {"dashboard": False}}
    tree["reward"] = {"timeout_seconds": 60, "checking": {"share": 1.0, "minimum": 8, **checking}}
    return parse_config(tree)


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    cfg = config(tmp_path_factory.mktemp("cluster"))
    ours = start_ray(cfg)
    made = Pool("reward", 2, lambda *_: RewardWorker.options(num_cpus=0).remote(cfg), LIMIT)
    yield made
    ray.get([worker.close.remote() for worker in made])
    if ours:
        ray.shutdown()


def group(number, boxes, gold, correct=None, reasons=None):
    text = "We carry where it is needed, and add. "
    done = [Completion([1] * 30, [0.0] * 30, text + "".join(f"\\boxed{{{b}}}" for b in box), False) for box in boxes]
    made = Group(Prompt(number, f"s{number}", [1], "What is 7 plus 5?", gold), done, 0)
    made.correct = [box[-1] == gold for box in boxes] if correct is None else correct
    made.reasons = reasons or ["correct" if c else "wrong" for c in made.correct]
    made.answers = [box[-1] for box in boxes]
    made.rewards = [float(c) for c in made.correct]
    return made


def stage(folder, workers, **checking):
    folder.mkdir(exist_ok=True)
    sampler = UniformSampler([f"s{n}" for n in range(8)], 0)
    return CheckingStage(config(folder, **checking), workers, sampler, Console(quiet=True)), sampler


def test_opinions_come_back_in_order(workers):
    pairs = [(str(n), str(n if n % 3 else n + 1)) for n in range(11)]
    assert [v.correct for v in WorkersOpinion(workers, LIMIT).compare_many(pairs)] == [n % 3 != 0 for n in range(11)]
    assert WorkersOpinion(workers, LIMIT).compare_many([]) == []


def test_sound_groups_go_on(workers, tmp_path):
    checking, _ = stage(tmp_path / "run", workers)
    counters = checking.check(1, [group(n, [["12"], ["13"], ["12"], [str(n)]], "12") for n in range(4)])
    checking.enforce()
    assert counters["check/regraded"] == 16
    assert counters["check/decision"] == 0


def test_a_grader_that_accepts_any_box_stops_the_run(workers, tmp_path):
    checking, _ = stage(tmp_path / "run", workers)
    groups = [group(n, [["12"], ["13"], ["14"], ["15"]], "12", correct=[True] * 4) for n in range(4)]
    assert checking.check(1, groups)["check/false_reward"] == 12
    with pytest.raises(RewardsUnsound, match=r"step 1: rewarded answers .*check\.html"):
        checking.enforce()
    assert "STOP" in (tmp_path / "run" / "check.html").read_text()


def test_a_run_can_be_told_only_to_warn(workers, tmp_path):
    checking, _ = stage(tmp_path / "run", workers, stop=False)
    groups = [group(n, [["12"], ["13"], ["14"], ["15"]], "12", correct=[True] * 4) for n in range(4)]
    assert checking.check(1, groups)["check/decision"] == 2
    checking.enforce()


def test_each_warning_is_given_once_also_after_another(workers, tmp_path):
    checking, _ = stage(tmp_path / "run", workers, stop=False, quarantine=[], suspect_gold=4)
    checking.console = Console(record=True, width=200, file=io.StringIO())
    wrong_gold = group(7, [["12"]] * 4, "13")
    for step in (1, 2, 3):
        # From the second step on, boxes without a word of reasoning.
        groups = [group(n, [["12"], ["13"], ["12"], [str(n)]], "12") for n in range(4)] + [wrong_gold]
        for completion in (c for made in groups if step > 1 for c in made.completions):
            completion.text = completion.text[completion.text.index("\\boxed") :]
        checking.check(step, groups)
    lines = [line for line in checking.console.export_text().splitlines() if line.startswith("reward check, warn")]
    golds, bare = (
        [line for line in lines if words in line] for words in ("golds look wrong", "completions with no reasoning:")
    )
    assert len(golds) == len(bare) == 1
    assert golds[0].startswith("reward check, warn, step 1:")
    assert bare[0].startswith("reward check, warn, step 2:")


def test_the_sampler_leaves_out_what_is_quarantined(workers, tmp_path):
    checking, sampler = stage(tmp_path / "run", workers, quarantine=["suspected_gold"])
    wrong_gold = group(3, [["12"]] * 4, "13")
    checking.check(1, [group(n, [["12"], ["13"], ["12"], [str(n)]], "12") for n in range(3)] + [wrong_gold])
    assert sampler.left_out == {"s3"}
    assert "s3" not in {draw.sample_id for draw in sampler.next(40)}
    assert (tmp_path / "run" / "quarantine.txt").read_text() == "s3\n"
    again, _ = stage(tmp_path / "again", workers, quarantine=["suspected_gold"])
    again.load_state_dict(checking.state_dict())
    assert again.check(2, [])["check/quarantined"] == 1


def test_a_quarantine_that_leaves_nothing_stops_the_run(workers, tmp_path):
    checking, _ = stage(tmp_path / "run", workers, quarantine=["grading_faults"])
    faulty = [group(n, [["12"]] * 4, "12", correct=[False] * 4, reasons=["timeout"] * 4) for n in range(8)]
    with pytest.raises(RewardsUnsound, match="no sample"):
        checking.check(1, faulty)


def test_the_stage_can_be_off(workers, tmp_path):
    checking, _ = stage(tmp_path / "run", workers, share=0)
    assert checking.check(1, [group(0, [["12"]] * 4, "13", correct=[True] * 4)]) == {}
    checking.enforce()
    assert checking.state_dict() is None
    assert not list((tmp_path / "run").iterdir())


def test_listed_samples_are_left_out(tmp_path):
    class Problem:
        def __init__(self, number):
            self.id = f"s{number}"

    (tmp_path / "ids.txt").write_text("s1\n\n s3\n")
    kept = leave_out([Problem(n) for n in range(5)], tmp_path / "ids.txt")
    assert [problem.id for problem in kept] == ["s0", "s2", "s4"]
    with pytest.raises(InputError, match="leaves none"):
        leave_out([Problem(1)], tmp_path / "ids.txt")
    with pytest.raises(InputError, match="cannot be read"):
        leave_out([Problem(1)], tmp_path / "none.txt")


def test_bombs_in_a_reward_actor_cost_their_own_answer_only(tmp_path):
    """Grading inside a Ray actor: a hang there is a timeout, and the answers beside it are intact."""
    tree = {"name": "bombs", "output": str(tmp_path), "ray": {"dashboard": False}}
    start_ray(parse_config(tree))
    tree["reward"] = {"timeout_seconds": 5, "processes_per_worker": 2}
    worker = RewardWorker.options(num_cpus=0).remote(parse_config(tree))
    bombs = ["9^{9^{9^9}}", "((((100!)!)!)!)!", "\\sin(10^{10^{5}})", "(" * 50_000 + "1" + ")" * 50_000]
    hard = "\\cos\\frac{\\pi}{7}\\cos\\frac{2\\pi}{7}\\cos\\frac{3\\pi}{7}"
    began = time.monotonic()
    graded = ray.get(worker.grade.remote(group(0, [[b] for pair in bombs for b in (pair, hard)], "\\frac18")))
    assert graded.correct == [False, True] * 4
    assert time.monotonic() - began < 60
    # and from several threads of a driver at once
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(ray.get(worker.grade.remote(group(0, [[hard]], "\\frac18")))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made.correct for made in results] == [[True]] * 4
    ray.get(worker.close.remote())
