"""`plumbline select` on our histories, imported logs and tables: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from plumbline.cli.select import select
from plumbline.errors import InputError
from plumbline.selection.history import HistoryWriter

N, EPOCHS, ROLLOUTS = 48, 5, 4


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(select)

    def call(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, InputError | SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def recorded(tmp_path):
    """A run's folder: a third learns on the average, a third is never right (its golds are bad), a third always is."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "run"
    with HistoryWriter(folder / "history", "prerun") as writer:
        for epoch in range(EPOCHS):
            rows = []
            for i in range(N):
                p = [0.2 + 0.15 * epoch, 0.0, 1.0][i % 3]
                for rollout in range(ROLLOUTS):
                    correct = bool(rng.random() < p)
                    reason = "correct" if correct else ("bad_gold" if i % 3 == 1 else "wrong")
                    rows.append(
                        {
                            "step": epoch,
                            "epoch": epoch,
                            "sample_id": f"s{i}",
                            "rollout": rollout,
                            "policy_version": epoch,
                            "reward": 1.0 if correct else -0.5,
                            "correct": correct,
                            "reason": reason,
                            "tokens": 10 + i,
                            "truncated": False,
                            "mean_logprob": -0.5,
                        }
                    )
            writer.append(rows)
    problems = [
        {"id": f"s{i}", "problem": f"What is {i} < {i} + 1?", "answer": str(i), "level": i % 3 + 1, "source": "made"}
        for i in range(N)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    return folder


def test_our_runs(tmp_path, run, recorded):
    out = tmp_path / "out"
    result = run("lim", "--history", recorded, "--data", tmp_path / "data.jsonl", "--output", out)
    assert result.exit_code == 0, result.output
    ids = (out / "ids.txt").read_text().split()
    assert set(ids) <= {f"s{i}" for i in range(0, N, 3)}
    assert len(ids) > 8
    assert f"lim keeps {len(ids)} of 48 samples" in result.output
    assert "LIM score >= 0.6" in result.output
    assert "bad_gold" in result.output
    assert "Kept by level" in result.output
    assert "Kept by source" not in result.output
    assert f"next: plumbline train CONFIG data.subset={out / 'ids.txt'}" in result.output
    lines = [json.loads(line) for line in (out / "subset.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ids
    assert lines[0].keys() == {"id", "problem", "answer", "level", "source", "selection_score"}
    assert pq.read_table(out / "subset.parquet").to_pylist() == lines
    scores = pq.read_table(out / "scores.parquet").to_pylist()
    assert len(scores) == N
    assert [s["id"] for s in scores if s["kept"]] == ids
    page = (out / "report.html").read_text()
    assert "&lt; 0 + 1" in page
    assert page.count("data:image/png;base64,") >= 5
    assert "samples mostly ungradable, dropped" in page
    assert "| verdict: bad_gold |" in (out / "report.md").read_text()
    from datasets import load_from_disk

    assert load_from_disk(str(out / "dataset")).to_list() == lines


@pytest.mark.parametrize(
    "arguments",
    [
        ["random", "--count", "7"],
        ["variance", "--share", "0.25"],
        ["pass_rate"],
        ["linear"],
        ["p(1-p)", "--count", "3"],
        ["lim", "--variant", "paper"],
        ["lim", "--epochs", "3"],
        ["lim", "--run", "prerun"],
        ["guess"],
    ],
)
def test_every_method_runs(tmp_path, run, recorded, arguments):
    result = run(*arguments, "--history", recorded / "history", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "ids.txt").read_text()
    if "--count" in arguments:
        assert len((tmp_path / "out" / "ids.txt").read_text().split()) == int(arguments[-1])


def test_tables_and_logs(tmp_path, run):
    (tmp_path / "curves.csv").write_text(
        "id,1,2,3\n" + "".join(f"s{i},{i / 40},{i / 30},{i / 20}\n" for i in range(20))
    )
    assert run("lim", "--history", tmp_path / "curves.csv", "--output", tmp_path / "a").exit_code == 0
    log = tmp_path / "log"
    log.mkdir()
    for step in range(1, 4):
        rows = [{"input": f"q{i}", "score": float(i < 3 * step), "step": step} for i in range(12) for _ in range(2)]
        (log / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("linear", "--threshold", "0.5", "--history", log, "--output", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert "72 graded completions" in result.output
    assert len((tmp_path / "b" / "ids.txt").read_text().split()) == 6
    again = run("linear", "--history", log, "--output", tmp_path / "b")
    assert "earlier import" in str(again.exception)
    (log / "4.jsonl").write_text('{"input": "q0"}\n')
    for _ in range(2):
        bad = run("linear", "--history", log, "--output", tmp_path / "c")
        assert "a row has no 'score'" in str(bad.exception)
    (log / "4.jsonl").unlink()
    assert run("linear", "--threshold", "0.5", "--history", log, "--output", tmp_path / "c").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["limm"], "unknown selection method 'limm'; did you mean 'lim'"),
        (["lim", "--history", "nowhere"], "history nowhere does not exist"),
        (["lim", "--threshold", "1.5"], "lim selects nothing: no score of 48 samples fits (reward curve"),
        (["variance"], "only ranks samples: say how many"),
        (["lim", "--count", "999"], "cannot keep 999 of 48"),
        (["lim", "--variant", "other"], "unknown variant 'other'"),
        (["lim", "--run", "prerum"], "it holds prerun"),
        (["lim", "--data", "data.json"], "does not exist"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, run, recorded, arguments, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history = [] if "--history" in arguments else ["--history", recorded]
    result = run(*arguments, *history, "--output", tmp_path / "out")
    assert isinstance(result.exception, InputError), result.output
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "out" / "ids.txt").exists()


def test_data_of_another_set_is_refused(tmp_path, run, recorded):
    (tmp_path / "other.jsonl").write_text('{"id": "x", "problem": "p", "answer": "1"}\n')
    result = run("lim", "--history", recorded, "--data", tmp_path / "other.jsonl", "--output", tmp_path / "out")
    assert "none of the 48 samples of the history is in" in str(result.exception)


def test_a_folder_that_is_no_history(tmp_path, run):
    result = run("lim", "--history", tmp_path, "--output", tmp_path / "out")
    assert "is no reward history" in str(result.exception)


def test_a_folder_of_runs_names_them(tmp_path, run, recorded):
    result = run("lim", "--history", recorded.parent, "--output", tmp_path / "out")
    assert f"holds 1 runs: name one of {recorded}" in str(result.exception)


def test_the_run_itself_says_where_its_problems_are(tmp_path, run, recorded):
    (recorded / "run.json").write_text("{}")
    (recorded / "config.yaml").write_text(f"name: prerun\ndata: {{source: {tmp_path}/data.jsonl}}\n")
    for history in (recorded, recorded / "history"):
        result = run("lim", "--history", history, "--output", tmp_path / "out")
        assert "Kept by level" in result.output
        assert json.loads((tmp_path / "out" / "subset.jsonl").read_text().split("\n")[0])["problem"].startswith(
            "What is"
        )
    (tmp_path / "data.jsonl").unlink()
    result = run("lim", "--history", recorded, "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert "without problems and levels, which --data would give" in result.output
    assert "Kept by level" not in result.output
