"""Problems from files, folders, the hub and generators: one schema, and every odd row reported."""

import json
import os
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plumbline.errors import InputError
from plumbline.rl.config import parse_config
from plumbline.rl.data import BENCHMARKS, load_problems
from plumbline.rl.tasks import training_tasks
from plumbline.rl.text import Codec

SHARED = Path(os.environ.get("PLUMBLINE_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
ROWS = [
    {"id": "a", "problem": "1+1?", "answer": "2", "level": 1},
    {"id": "b", "problem": "2+2?", "answer": "", "level": 1},
    {"id": "a", "problem": "3+3?", "answer": "6", "level": 2},
    {"id": "c", "problem": "4+4?", "level": 2},
    {"id": "d", "problem": " 1+1?", "answer": 2, "level": 3},
    {"id": "e", "problem": None, "answer": "1", "level": 3},
    {"id": "f", "problem": "5+5?", "answer": None, "level": 3},
    {"id": "g", "problem": "5+5?", "answer": "10", "level": 3},
]


def lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def one_line(call, *arguments, **keywords):
    """The message of the InputError that the call must raise."""
    with pytest.raises(InputError) as error:
        call(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_odd_rows_are_reported_by_row_and_never_kept_silently(tmp_path):
    problems, report = load_problems(lines(tmp_path / "x.jsonl", ROWS))
    assert [(p.id, p.answer) for p in problems] == [("a", "2"), ("d", "2"), ("g", "10")]
    assert problems[0].extras == {"level": 1}
    assert (report.rows, report.kept) == (8, 3)
    assert report.empty_golds == [2]
    assert report.duplicate_ids == [(3, 1)]
    assert report.missing == [(4, "answer"), (6, "problem"), (7, "answer")]
    assert report.same_text == [(5, 1)]
    text = "\n".join(report.lines())
    assert "3 of 8 rows kept" in text
    assert "1 empty golds dropped: rows 2" in text
    assert "rows 3 (as 1)" in text
    assert "4 (answer), 6 (problem), 7 (answer)" in text


def test_every_container_gives_the_same_problems(tmp_path):
    rows = [{"unique_id": str(i), "question": f"{i}+1?", "ground_truth": str(i + 1), "tag": "t"} for i in range(5)]
    (tmp_path / "x.json").write_text(json.dumps(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "flat"))
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:2])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "splits"))
    expected, _ = load_problems(lines(tmp_path / "x.jsonl", rows))
    assert [p.id for p in expected] == list("01234")
    assert expected[0].extras == {"tag": "t"}
    for name in ("x.json", "x.parquet", "flat", "splits"):
        assert load_problems(str(tmp_path / name))[0] == expected, name
    assert len(load_problems(str(tmp_path / "splits"), split="test")[0]) == 2
    message = one_line(load_problems, str(tmp_path / "splits"), split="dev")
    assert "has no split 'dev'; it has train, test" in message


def test_without_an_id_the_statement_gives_a_stable_one(tmp_path):
    rows = [{"prompt": "1+1?", "final_answer": 2}, {"prompt": "2+2?", "final_answer": 4}]
    forwards, _ = load_problems(lines(tmp_path / "x.jsonl", rows))
    backwards, _ = load_problems(lines(tmp_path / "y.jsonl", rows[::-1]))
    assert {p.problem: p.id for p in forwards} == {p.problem: p.id for p in backwards}
    assert forwards[0].id != forwards[1].id
    assert forwards[0].answer == "2"


def test_columns_can_be_renamed(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"key": 7, "text": "1+1?", "problem": "no", "gold_value": "2"}])
    problems, _ = load_problems(path, fields={"id": "key", "problem": "text", "answer": "gold_value"})
    assert (problems[0].id, problems[0].problem, problems[0].answer) == ("7", "1+1?", "2")
    message = one_line(load_problems, path, fields={"problem": "txet"})
    assert "has no column 'txet'" in message
    assert "key, text, problem, gold_value" in message
    assert "'idd' is no field of ours" in one_line(load_problems, path, fields={"idd": "key"})


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"question": "q", "answer": "Tom has 3 + 4 = 7.\n#### 1,007"}, "1007"),
        ({"problem": "q", "solution": "Adding, we get $\\boxed{\\frac{1}{2}}$."}, "\\frac{1}{2}"),
        ({"problem": "q", "solution": "It is \\boxed{3}.", "answer": "4"}, "4"),
        ({"problem": "q", "answer": "\\boxed{x+1}"}, "x+1"),
    ],
)
def test_golds_inside_solutions_are_found(tmp_path, row, gold):
    assert load_problems(lines(tmp_path / "x.jsonl", [row]))[0][0].answer == gold


def test_limit_counts_good_problems_and_levels_filter(tmp_path):
    path = lines(tmp_path / "x.jsonl", ROWS)
    problems, report = load_problems(path, limit=2)
    assert [p.id for p in problems] == ["a", "d"]
    assert report.kept == 2
    assert [p.id for p in load_problems(path, levels=[3])[0]] == ["d", "g"]


def test_a_line_separator_inside_a_statement_is_no_end_of_row(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"problem": "1\u2028+1?", "answer": "2"}])
    assert load_problems(path)[0][0].problem == "1\u2028+1?"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"problem": "q", "answer": "1"}\n{broken\n', "row 2 is not JSON"),
        ("x.jsonl", b"[1, 2]\n", "row 1: expected an object, found list"),
        ("x.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("x.jsonl", b"", "holds no usable problem: it has no rows"),
        ("x.jsonl", b'{"problem": "q", "answer": " "}\n', "holds no usable problem: 1 empty golds dropped: rows 1"),
        ("x.json", b"{", "is not JSON"),
        ("x.json", b'{"a": 1}', "must hold a list"),
        ("x.parquet", b"PAR1 no", "is not a readable Parquet file"),
        ("x.csv", b"a,b\n", "unknown file type '.csv'; use .jsonl, .json, .parquet"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in one_line(load_problems, str(tmp_path / name))


def test_a_folder_that_datasets_did_not_write_is_refused(tmp_path):
    assert "is not a folder written by datasets.save_to_disk" in one_line(load_problems, str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("math501", "unknown benchmark or data source 'math501'; known names: aime24, aime25, amc23, math500, gsm8k"),
        ("nowhere/x.jsonl", "data file nowhere/x.jsonl does not exist"),
        ("/nowhere/at/all", "data file /nowhere/at/all does not exist"),
        (
            "procedural:test",
            "unknown source 'procedural:test'; procedural sources are procedural:train, procedural:held",
        ),
    ],
)
def test_unknown_sources_are_one_clear_line(source, message):
    assert message in one_line(load_problems, source)


def test_hub_ids_go_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        if name == "owner/none":
            raise ConnectionError("no route\nto host")
        rows = datasets.Dataset.from_list([{"question": "1+1?", "answer": "so\n#### 2"}])
        return datasets.DatasetDict({"test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("PLUMBLINE_DATA", raising=False)
    assert load_problems("owner/set-v1.5")[0][0].answer == "2"
    assert load_problems("owner/set:part", split="test")[0][0].problem == "1+1?"
    assert load_problems("gsm8k")[0][0].answer == "2"
    assert asked == [("owner/set-v1.5", None), ("owner/set", "part"), (BENCHMARKS["gsm8k"][1], "main")]
    message = one_line(load_problems, "owner/none")
    assert (
        "data set owner/none can be read neither as a local path nor from the hub: the hub cannot be reached, and it is not in the cache"
        in message
    )


def test_benchmarks_come_from_the_data_folder_when_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMBLINE_DATA", str(tmp_path))
    lines(tmp_path / "aime24.jsonl", [{"id": "1", "problem": "q", "answer": "204"}])
    assert load_problems("aime24")[0][0].answer == "204"
    message = one_line(load_problems, "aime25")
    assert "PLUMBLINE_DATA is set, but" in message
    assert "aime25.jsonl does not exist" in message


def test_procedural_sources(tmp_path):
    train, report = load_problems("procedural:train", limit=60, seed=4)
    held_out, _ = load_problems("procedural:heldout", limit=60, seed=4, levels=[1, 2])
    assert len(train) == report.kept == 60
    assert train == load_problems("procedural:train", limit=60, seed=4)[0]
    assert {p.extras["level"] for p in held_out} == {1, 2}
    assert not {p.problem for p in train} & {p.problem for p in held_out}


def test_reasoning_gym_tasks():
    pytest.importorskip("reasoning_gym")
    problems, _ = load_problems("reasoning-gym:gcd", limit=5, seed=1)
    assert len(problems) == 5
    assert all(p.answer.isdigit() for p in problems)
    assert problems == load_problems("reasoning-gym:gcd", limit=5, seed=1)[0]
    assert "reasoning-gym has no usable task 'knots'" in one_line(load_problems, "reasoning-gym:knots", limit=5)


def test_reasoning_gym_not_installed_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert "pip install 'plumbline-rl[reasoning-gym]'" in one_line(load_problems, "reasoning-gym:gcd")


@pytest.mark.skipif(not (SHARED / "limr" / "full.jsonl").exists(), reason="the LIMR data is not here")
def test_the_limr_set():
    problems, report = load_problems(str(SHARED / "limr" / "full.jsonl"))
    assert (report.rows, report.kept, len(problems)) == (8523, 8521, 8521)
    assert len(report.empty_golds) == 2
    assert len(report.same_text) == 1
    assert report.missing == report.duplicate_ids == []


@pytest.mark.skipif(not (SHARED / "math500.jsonl").exists(), reason="the benchmarks are not here")
@pytest.mark.parametrize(
    ("name", "count"), [("aime24", 30), ("aime25", 30), ("amc23", 40), ("math500", 500), ("gsm8k", 1319)]
)
def test_the_benchmarks(monkeypatch, name, count):
    monkeypatch.setenv("PLUMBLINE_DATA", str(SHARED))
    problems, report = load_problems(name)
    assert len(problems) == report.rows == count


def test_long_prompts_are_dropped_and_named(tmp_path):
    rows = [{"id": f"p{i}", "problem": "1+1=" * (1 + 40 * (i == 2)), "answer": "2"} for i in range(4)]
    source = lines(tmp_path / "x.jsonl", rows)
    config = parse_config(
        {"name": "x", "policy": {"path": "embedded"}, "data": {"source": source}, "prompt": {"max_tokens": 30}}
    )
    tasks, report = training_tasks(config, Codec("embedded"))
    assert list(tasks) == ["p0", "p1", "p3"]
    assert report.lines()[-1] == "  1 prompts over prompt.max_tokens = 30 dropped: ids p2"
