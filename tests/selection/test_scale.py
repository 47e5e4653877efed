"""The store at size: curves and scores stream, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pytest

from plumbline.selection.history import HistoryWriter, count_rows

MEASURE = textwrap.dedent(
    """
    import json, sys, time
    from pathlib import Path
    from plumbline.selection import lim
    from plumbline.selection.history import curves, iterate_history
    def peak():  # KiB; ru_maxrss would begin with the parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    base = peak()
    began = time.perf_counter()
    if sys.argv[2] == "score":
        ids, table = curves(sys.argv[1])
        scores, _ = lim.lim_scores(lim.fill_gaps(table, out=table))
        found = len(scores)
    else:
        found = sum(batch.num_rows for batch in iterate_history(sys.argv[1]))
    seconds = time.perf_counter() - began
    print(json.dumps({"found": found, "seconds": seconds, "mib": (peak() - base) / 1024}))
    """
)


def measure(folder, what):
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), what], capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


def fill(folder, samples, epochs, rows=65_536):
    rng = np.random.default_rng(0)
    ids = pa.array([f"sample-{i:08d}" for i in range(samples)])
    with HistoryWriter(folder, "run") as writer:
        for epoch in range(epochs):
            order = rng.permutation(samples)
            for start in range(0, samples, rows):
                part = order[start : start + rows]
                zeros = np.zeros(len(part), np.int64)
                correct = rng.random(len(part)) < (epoch + 1) / (epochs + 1)
                columns = {
                    "step": zeros + epoch,
                    "epoch": zeros + epoch,
                    "sample_id": ids.take(pa.array(part)),
                    "rollout": zeros,
                    "policy_version": zeros + epoch,
                    "reward": correct.astype(float),
                    "correct": correct,
                    "reason": pa.array(["correct"]).take(pa.array(zeros)),
                    "tokens": zeros + 100,
                    "truncated": zeros > 0,
                    "mean_logprob": zeros - 0.5,
                }
                writer.append(pa.table(columns))


def test_reading_a_store_takes_the_memory_of_its_table(tmp_path):
    """A million rows of 20,000 samples: the rows are 60 MB, the table they make 5 MB."""
    fill(tmp_path, 20_000, 50, rows=20_000)
    scored = measure(tmp_path, "score")
    assert scored["found"] == 20_000
    assert scored["mib"] < 250


@pytest.mark.slow
def test_a_million_samples_by_a_hundred_epochs(tmp_path):
    """10^8 rows, 4.6 GB: scored within 3 GiB. The time is printed; the limit leaves room for a busy machine."""
    fill(tmp_path, 1_000_000, 100)
    assert count_rows(tmp_path, "run") == 100_000_000
    scored = measure(tmp_path, "score")
    print(scored)
    assert scored["found"] == 1_000_000
    assert scored["mib"] < 3 * 1024
    assert scored["seconds"] < 30
    read = measure(tmp_path, "read")
    print(read)
    assert read["found"] == 100_000_000
    assert read["mib"] < 1024
