"""The reward history: appends, crashes, growth, resume, and the curves read out of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plumbline.selection import history
from plumbline.selection.history import HistoryWriter, TornTail, curves, export_parquet, iterate_history, read_history


def rows(step: int, epoch: int, outcomes: dict[str, list[bool]], /, **changes):
    return [
        {
            "step": step,
            "epoch": epoch,
            "sample_id": sample_id,
            "rollout": number,
            "policy_version": step - 1,
            "reward": 1.0 if correct else -0.5,
            "correct": correct,
            "reason": "correct" if correct else "wrong",
            "tokens": 10 + number,
            "truncated": False,
            "mean_logprob": -0.25,
            **changes,
        }
        for sample_id, values in outcomes.items()
        for number, correct in enumerate(values)
    ]


def test_what_was_appended_is_read_back(tmp_path):
    first = rows(1, 0, {"a": [True, False], "ü\n\u2028b": [False, False]})
    second = rows(2, 1, {"a": [True, True]}, reason=None, tokens=None, mean_logprob=None)
    with HistoryWriter(tmp_path, "run-1") as writer:
        writer.append(first)
        assert writer.offset == 4
        writer.append(second)
    table = read_history(tmp_path)
    assert table.schema.names == history.SCHEMA.names
    assert table.to_pylist() == [{"run": "run-1", **row} for row in first + second]
    assert history.count_rows(tmp_path, "run-1") == 6


def test_tables_are_appended_as_dicts_are(tmp_path):
    data = rows(1, 0, {"a": [True], "b": [False]})
    with HistoryWriter(tmp_path, "dicts") as one, HistoryWriter(tmp_path, "table") as two:
        one.append(data)
        two.append(pa.Table.from_pylist(data))
    assert read_history(tmp_path, "dicts").drop(["run"]).equals(read_history(tmp_path, "table").drop(["run"]))


def test_runs_in_one_folder_keep_apart(tmp_path):
    with HistoryWriter(tmp_path, "one") as one, HistoryWriter(tmp_path, "two") as two:
        for step in range(3):
            one.append(rows(step, step, {"a": [True]}))
            two.append(rows(step, step, {"b": [False], "a": [False]}))
    assert history.runs(tmp_path) == ["one", "two"]
    assert read_history(tmp_path).num_rows == 9
    assert read_history(tmp_path, "one")["sample_id"].to_pylist() == ["a"] * 3
    with pytest.raises(ValueError, match=r"holds 2 runs.*one, two"):
        curves(tmp_path)
    ids, values = curves(tmp_path, run=["one", "two"])
    assert ids == ["a", "b"]
    np.testing.assert_array_equal(values, [[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])


def test_a_run_has_one_writer(tmp_path):
    with HistoryWriter(tmp_path, "run"), pytest.raises(ValueError, match="being written already"):
        HistoryWriter(tmp_path, "run")
    HistoryWriter(tmp_path, "run").close()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_a_run_needs_a_plain_name(tmp_path, name):
    with pytest.raises(ValueError, match="plain name"):
        HistoryWriter(tmp_path, name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": float("nan")}, "reward.*NaN"),
        ({"reward": "one"}, "does not fit"),
        ({"sample_id": None}, "sample_id.*empty"),
        ({"epoch": -1}, "negative"),
    ],
)
def test_bad_rows_are_refused_and_leave_nothing(tmp_path, change, words):
    with HistoryWriter(tmp_path, "run") as writer:
        writer.append(rows(1, 0, {"a": [True]}))
        with pytest.raises(ValueError, match=words):
            writer.append(rows(2, 1, {"b": [True]}) + rows(2, 1, {"c": [True]}, **change))
        writer.append(rows(2, 1, {"a": [True]}))
    assert read_history(tmp_path)["sample_id"].to_pylist() == ["a", "a"]


def test_a_missing_column_is_named(tmp_path):
    bad = rows(1, 0, {"a": [True]})
    del bad[0]["reason"]
    with HistoryWriter(tmp_path, "run") as writer, pytest.raises(ValueError, match="lack the column 'reason'"):
        writer.append(bad)


def test_a_torn_tail_is_dropped_and_said_wherever_it_was_cut(tmp_path):
    whole = tmp_path / "whole"
    with HistoryWriter(whole, "run") as writer:
        writer.append(rows(1, 0, {"a": [True, False]}))
        first = (whole / "run" / "000001.arrows").stat().st_size
        writer.append(rows(2, 1, {"a": [True, True]}))
        second = (whole / "run" / "000001.arrows").stat().st_size
    data = (whole / "run" / "000001.arrows").read_bytes()
    for cut in range(first, second + 1, 37):
        folder = tmp_path / str(cut) / "run"
        folder.mkdir(parents=True)
        (folder / "000001.arrows").write_bytes(data[:cut])
        (folder / "samples.txt").write_bytes(b'"a"\n"half a na')
        torn = first < cut < second
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert read_history(folder.parent).num_rows == 2, cut
        with warnings.catch_warnings(record=True) as said_by_writer:
            warnings.simplefilter("always")
            writer = HistoryWriter(folder.parent, "run")
        assert any(w.category is TornTail for w in said) == torn or cut - first < 8
        assert any(w.category is TornTail for w in said_by_writer) == torn
        assert writer.offset == 2
        writer.append(rows(2, 1, {"a": [False], "new": [True]}))
        writer.close()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_history(folder.parent)["sample_id"].to_pylist() == ["a", "a", "a", "new"]


def test_kill_loses_at_most_the_step_being_written(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        from plumbline.selection.history import HistoryWriter
        writer = HistoryWriter(sys.argv[1], "run")
        step = 0
        while True:
            step += 1
            writer.append([dict(step=step, epoch=0, sample_id=f"s{i % 97}", rollout=i, policy_version=0, reward=0.0,
                                correct=False, reason=None, tokens=1, truncated=False, mean_logprob=None)
                           for i in range(500)])
            print(step, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    # Somewhere inside a step.
    time.sleep(0.003)
    os.kill(process.pid, signal.SIGKILL)
    reported = [int(line) for line in process.stdout.read().split()]
    process.wait()
    last = reported[-1] if reported else 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TornTail)
        steps = read_history(tmp_path)["step"].to_numpy()
        writer = HistoryWriter(tmp_path, "run")
    assert last <= steps.max() <= last + 1
    assert (np.bincount(steps)[1:] == 500).all()
    assert writer.offset == len(steps)
    writer.append(rows(99, 1, {"s0": [True]}))
    writer.close()


def test_a_store_is_readable_while_it_grows(tmp_path):
    with HistoryWriter(tmp_path, "run") as writer:
        for step in range(1, 6):
            writer.append(rows(step, step - 1, {"a": [True], f"new-{step}": [False]}))
            table = read_history(tmp_path)
            assert table.num_rows == 2 * step
            ids, values = curves(tmp_path)
            assert ids == ["a", *[f"new-{i}" for i in range(1, step + 1)]]
            assert values.shape == (step + 1, step)


def test_truncate_goes_back_to_a_checkpoint(tmp_path):
    offsets = []
    for part in range(2):
        with HistoryWriter(tmp_path, "run") as writer:
            for step in range(1, 4):
                writer.append(rows(3 * part + step, part, {f"s{3 * part + step}": [True, False]}))
                offsets.append(writer.offset)
    everything = read_history(tmp_path)
    for offset in reversed([0, *offsets]):
        writer = HistoryWriter(tmp_path, "run")
        writer.truncate(offset)
        assert writer.offset == offset
        writer.close()
        if offset:
            assert read_history(tmp_path).equals(everything.slice(0, offset))
            assert len(curves(tmp_path)[0]) == offset // 2
    with HistoryWriter(tmp_path, "run") as writer:
        writer.append(rows(1, 0, {"s1": [True]}))
        writer.append(rows(2, 0, {"s2": [True, False]}))
        with pytest.raises(ValueError, match="inside an append"):
            writer.truncate(2)
        with pytest.raises(ValueError, match="holds 3 rows"):
            writer.truncate(4)
        writer.truncate(1)
        writer.append(rows(2, 0, {"s3": [True]}))
    assert read_history(tmp_path)["sample_id"].to_pylist() == ["s1", "s3"]


def test_append_costs_the_same_as_the_store_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "SEGMENT_BYTES", 200_000)
    step = pa.Table.from_pylist(rows(1, 0, {f"s{i}": [True] * 8 for i in range(100)}))
    sizes = []
    with HistoryWriter(tmp_path, "run") as writer:
        for _ in range(60):
            before = sum(path.stat().st_size for path in (tmp_path / "run").iterdir())
            writer.append(step)
            sizes.append(sum(path.stat().st_size for path in (tmp_path / "run").iterdir()) - before)
    assert len(list((tmp_path / "run").glob("*.arrows"))) > 5
    # Bytes written stand for time, which a shared machine cannot promise.
    assert max(sizes[1:]) < min(sizes[1:]) + 2048
    assert read_history(tmp_path).num_rows == 60 * 800


def test_a_failed_write_does_not_hide_later_ones(tmp_path, monkeypatch):
    with HistoryWriter(tmp_path, "run") as writer:
        writer.append(rows(1, 0, {"a": [True]}))
        real = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space"):
            writer.append(rows(2, 1, {"a": [True]}))
        monkeypatch.setattr(os, "fsync", real)
        assert writer.offset == 1
        writer.append(rows(2, 1, {"a": [False]}))
    assert read_history(tmp_path)["correct"].to_pylist() == [True, False]


def test_curves_are_means_with_gaps(tmp_path):
    with HistoryWriter(tmp_path, "run") as writer:
        writer.append(rows(1, 0, {"a": [True, False, True, True], "b": [False, False]}))
        writer.append(rows(2, 2, {"a": [True]}))
        # The same sample again in the same epoch counts with the first.
        writer.append(rows(3, 2, {"a": [False], "c": [True]}))
    ids, values = curves(tmp_path)
    assert ids == ["a", "b", "c"]
    nan = np.nan
    np.testing.assert_array_equal(values, [[0.75, nan, 0.5], [0, nan, nan], [nan, nan, 1]])
    np.testing.assert_allclose(curves(tmp_path, value="reward")[1][0], [(3 - 0.5) / 4, nan, 0.25])
    short_ids, short = curves(tmp_path, epochs=1)
    assert short_ids == ["a", "b"]
    np.testing.assert_array_equal(short, [[0.75], [0]])
    with pytest.raises(ValueError, match="correct or reward"):
        curves(tmp_path, value="loss")


def test_missing_histories_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no reward history"):
        curves(tmp_path / "absent")
    with HistoryWriter(tmp_path, "run") as writer:
        writer.append(rows(1, 0, {"a": [True]}))
    with pytest.raises(FileNotFoundError, match=r"no reward history of run 'rnu'.*it holds run"):
        read_history(tmp_path, "rnu")


def test_export_writes_parquet(tmp_path):
    with HistoryWriter(tmp_path, "run") as writer:
        for step in range(5):
            writer.append(rows(step, 0, {"a": [True, False]}))
    assert export_parquet(tmp_path, tmp_path / "out.parquet") == 10
    assert pq.read_table(tmp_path / "out.parquet").equals(read_history(tmp_path))
    assert sum(batch.num_rows for batch in iterate_history(tmp_path)) == 10
