"""`plumbline scaling` from table to answer, on made-up worlds whose truth is known, and its refusals."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from plumbline.cli.scaling import scaling
from plumbline.errors import InputError
from plumbline.selection.loss_tables import load_rows
from plumbline.selection.scaling_analysis import Columns, compare, factor_effects, families, held_out


def world(seed=0):
    """Runs whose downstream loss depends on the data and on nothing else; the tokenizer goes with the data."""
    rng = np.random.default_rng(seed)
    rows = []
    for data, level in (("web", 0.9), ("books", 0.7), ("code", 0.5)):
        for size in (2e7, 6e7, 2e8, 6e8, 2e9):
            for tokens in (1e9, 4e9, 1.6e10):
                loss = 1.9 + ((7e7 / size) ** (0.41 / 0.46) + 9e8 / tokens) ** 0.46
                rows.append(
                    {
                        "data": data,
                        "N": size,
                        "D": tokens,
                        "val": loss * np.exp(rng.normal(0, 0.002)),
                        "test": (level * (loss - 1.8) ** 1.1 + 2.0) * np.exp(rng.normal(0, 0.002)),
                        "tokenizer": {"web": "a", "books": "b", "code": "c"}[data],
                        "architecture": str(rng.choice(["mamba", "llama"])),
                    }
                )
    return rows


def write(rows, path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def run():
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(scaling)

    def call(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return call


def test_groups_are_told_apart_and_the_cause_is_named():
    rows = world()
    columns = Columns("val", "test", "data")
    found, left_out = families(rows, columns, e_x=1.8, e_y=2.0, resamples=60)
    assert left_out == []
    assert [f.name for f in found] == ["web", "books", "code"]
    for family, level in zip(found, (0.9, 0.7, 0.5), strict=True):
        assert pytest.approx(level, rel=0.03) == family.fit.K
        assert family.fit.kappa == pytest.approx(1.1, rel=0.05)
    assert all(test.p_value < 1e-4 for _, _, test in compare(found)[0])
    effects = factor_effects(rows, columns, ["architecture", "data", "tokenizer"], resamples=60)
    assert {effects[0].factor, effects[1].factor} == {"data", "tokenizer"}
    assert effects[0].share.low > 0.8
    assert effects[0].determined_by
    assert effects[2].factor == "architecture"
    assert effects[2].share.value < 0.3
    assert effects[2].determined_by == []


def test_offsets_from_scaling_laws_and_held_out_runs():
    rows = world()
    columns = Columns("val", "val", "data", "N", "D", reference="web", pair_on=("N", "D"))
    small = [row for row in rows if row["N"] < 1e9]
    found, _ = families(small, columns, resamples=20)
    assert [f.name for f in found] == ["books", "code"]
    assert all(f.offsets == "scaling laws" and f.laws is not None for f in found)
    predictions = held_out(found, [row for row in rows if row["N"] > 1e9], columns)
    assert len(predictions) == 6
    for _, _, predicted, measured in predictions:
        assert predicted == pytest.approx(measured, rel=0.02)


def test_the_command_writes_a_report_and_says_what_to_change(tmp_path, run):
    table = write(world(), tmp_path / "runs.csv")
    result = run(table, "--x", "val", "--y", "test", "--group", "data", "--factors", "data,architecture",
                 "--e-x", "1.8", "--e-y", "2.0", "--resamples", "40", "--output", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Change data first" in result.output
    assert "data code gives the lowest test" in " ".join(result.output.split())
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "| code |" in (tmp_path / "out" / "report.md").read_text()


def test_ill_conditioned_input_is_said(tmp_path, run):
    rows = [row for row in world() if row["N"] == 2e8] + [row for row in world(1) if row["N"] == 2e8]
    table = write(rows, tmp_path / "runs.csv")
    result = run(table, "--x", "val", "--y", "test", "--group", "data", "--params", "N", "--tokens", "D",
                 "--resamples", "20", "--output", tmp_path / "out")  # fmt: skip
    said = " ".join(result.output.split()) + str(result.exception or "")
    assert "share one size N" in said or "gave no fit" in said


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ({}, ["--x", "valu", "--y", "test"], "no column 'valu'; did you mean 'val'"),
        ({}, ["--x", "val"], "--y is missing"),
        ({}, ["--x", "val", "--y", "test", "--e-x", "1"], "both e_x and e_y"),
        ({"test": ""}, ["--x", "val", "--y", "test"], "runs.csv, row 23: column 'test' is empty"),
        ({"test": "nan"}, ["--x", "val", "--y", "test"], "row 23: column 'test' is nan"),
        ({"test": "-1"}, ["--x", "val", "--y", "test"], "row 23: column 'test' is -1"),
        ({"test": "x"}, ["--x", "val", "--y", "test"], "'x' is not a number"),
        ({}, ["--x", "val", "--reference", "web", "--group", "data"], "columns to pair runs on"),
        ({}, ["--x", "val", "--reference", "moon", "--group", "data", "--pair-on", "N"], "no run has data = 'moon'"),
        ({}, ["--x", "val", "--y", "test", "--e-x", "3", "--e-y", "1"], "e_x = 3 is not below every x"),
    ],
)
def test_bad_tables_are_refused(tmp_path, run, change, arguments, words):
    rows = world()
    rows[22] |= change
    result = run(write(rows, tmp_path / "runs.csv"), *arguments, "--output", tmp_path / "out")
    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)


def test_runs_pair_by_value_and_never_by_chance(tmp_path):
    """Two tables that spell one number differently pair; runs that the named columns do not tell apart are refused."""
    rows = world()
    web = [{**row, "D": f"{row['D']:.1f}"} for row in rows if row["data"] == "web"]
    books = [{**row, "D": f"{row['D']:g}"} for row in rows if row["data"] == "books"]
    columns = Columns("val", "val", "data", reference="web", pair_on=("N", "D"))
    found, _ = families([*web, *books], columns, e_x=1.5, e_y=1.5, resamples=20)
    assert found[0].fit.n == 15
    with pytest.raises(ValueError, match=r"two runs of web agree on D \(1000000000\.0\): name more"):
        families([*web, *books], Columns("val", "val", "data", reference="web", pair_on=("D",)), e_x=1.5, e_y=1.5)


def test_incomplete_rows_are_dropped_only_when_asked(tmp_path, run):
    rows = world()
    rows[2]["test"] = ""
    table = write(rows, tmp_path / "runs.csv")
    result = run(table, "--x", "val", "--y", "test", "--drop-incomplete", "--e-x", "1.5", "--e-y", "1.5",
                 "--resamples", "20", "--output", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "44 rows. 1 incomplete rows were left out" in (tmp_path / "out" / "report.html").read_text()


def test_evaluations_become_rows(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        losses = {"wiki": {"per_token": 3.0, "per_byte": 0.7, "tokens": 10, "bytes": 43}}
        record = {"model": name, "data": "web", "params": 100, "tokens": 1000, "losses": losses}
        (tmp_path / name / "losses.json").write_text(json.dumps(record))
    rows = load_rows([tmp_path])
    assert [row["model"] for row in rows] == ["a", "b"]
    assert rows[0]["wiki"] == 3.0
    assert rows[0]["wiki per byte"] == 0.7
    (tmp_path / "empty").mkdir()
    (tmp_path / "b" / "losses.json").write_text("{}")
    with pytest.raises(ValueError, match="not a record of losses"):
        load_rows([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"holds no losses\.json"):
        load_rows([tmp_path / "empty"])
