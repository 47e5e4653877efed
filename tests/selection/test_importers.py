"""Logs of other trainers and tables of curves become the same curves; the TRL callback records a training run."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plumbline.selection.history import curves, read_history
from plumbline.selection.importers import (
    detect,
    import_openrlhf,
    import_trl,
    import_verl,
    prompt_id,
    read_curves_table,
)

nan = np.nan
# Two prompts over three steps, two rollouts each; `b` sits out the second.
REWARDS = {1: {"a": [1, 0], "b": [0, 0]}, 2: {"a": [1, 1]}, 3: {"a": [1, 1], "b": [0, 1]}}
EXPECTED = {"a": [0.5, 1, 1], "b": [0, 0.5, nan]}


def entries(step):
    return [(prompt, reward) for prompt, rewards in REWARDS[step].items() for reward in rewards]


def trl(folder, extra=None):
    folder.mkdir(parents=True)
    for step in REWARDS:
        rows = entries(step)
        columns = {
            "step": [step] * len(rows),
            "prompt": [[{"role": "system", "content": "s"}, {"role": "user", "content": p}] for p, _ in rows],
            "completion": ["x"] * len(rows),
            "accuracy_reward": [float(r) for _, r in rows],
            "advantage": [0.1] * len(rows),
        }
        columns |= {name: value * len(rows) for name, value in (extra or {}).items()}
        pq.write_table(pa.table(columns), folder / f"completions_{step:05d}.parquet")


def verl(folder, **extra):
    folder.mkdir(parents=True)
    for step in REWARDS:
        rows = [{"input": p, "output": "x", "score": float(r), "step": step, **extra} for p, r in entries(step)]
        (folder / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def openrlhf(folder):
    folder.mkdir(parents=True)
    for step in REWARDS:
        (folder / f"step_{step}.json").write_text(json.dumps([{"prompt": p, "reward": r} for p, r in entries(step)]))


@pytest.mark.parametrize(
    ("kind", "write", "read"),
    [("trl", trl, import_trl), ("verl", verl, import_verl), ("openrlhf", openrlhf, import_openrlhf)],
)
def test_logs_become_curves(tmp_path, kind, write, read):
    write(tmp_path / "log")
    assert detect(tmp_path / "log") == kind
    assert read(tmp_path / "log", tmp_path / "history", "run") == 10
    assert detect(tmp_path / "history") == "plumbline"
    ids, values = curves(tmp_path / "history")
    assert ids == [prompt_id("a"), prompt_id("b")]
    np.testing.assert_array_equal(values, [EXPECTED["a"], EXPECTED["b"]])
    assert read_history(tmp_path / "history")["rollout"].to_pylist() == [0, 1] * 5
    with pytest.raises(ValueError, match="already holds 10 rows"):
        read(tmp_path / "log", tmp_path / "history", "run")


def test_ids_come_from_a_column_where_one_is_named(tmp_path):
    trl(tmp_path / "out" / "completions", extra={"problem_id": ["p"]})
    import_trl(tmp_path / "out", tmp_path / "history", "run", id_column="problem_id")
    assert curves(tmp_path / "history")[0] == ["p"]


def test_several_rewards_must_be_told_apart(tmp_path):
    trl(tmp_path / "log", extra={"format_reward": [0.5]})
    with pytest.raises(ValueError, match=r"2 columns that may be the reward \(accuracy_reward, format_reward\)"):
        import_trl(tmp_path / "log", tmp_path / "one", "run")
    import_trl(tmp_path / "log", tmp_path / "two", "run", reward="format_reward", correct_at=0.5)
    assert np.nanmin(curves(tmp_path / "two")[1]) == 1.0


def test_verl_accuracy_decides_over_the_score(tmp_path):
    verl(tmp_path / "log", acc=True)
    import_verl(tmp_path / "log", tmp_path / "history", "run")
    assert np.nanmin(curves(tmp_path / "history")[1]) == 1.0
    assert np.nanmin(curves(tmp_path / "history", value="reward")[1]) == 0.0


@pytest.mark.parametrize(
    ("name", "text", "read", "words"),
    [
        ("1.jsonl", '{"input": "a"}\n', import_verl, "has no 'score'"),
        ("1.jsonl", '{"input": "a", "score": NaN}\n', import_verl, "reward is nan"),
        ("1.jsonl", "{oops\n", import_verl, r"line 1 is not JSON"),
        ("step_1.json", '[{"reward": 1}]', import_openrlhf, "has no 'prompt'"),
        ("completions_1.parquet", "text", import_trl, "not a readable Parquet"),
    ],
)
def test_bad_logs_are_refused(tmp_path, name, text, read, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read(tmp_path, tmp_path / "history", "run")


def test_no_log_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no TRL completion logs"):
        import_trl(tmp_path, tmp_path / "history", "run")
    assert detect(tmp_path) is None


def test_wide_and_long_tables(tmp_path):
    (tmp_path / "wide.csv").write_text("id,e1,e2,e3\na,0.5,1,1\nb,0,0.5,\n")
    ids, values = read_curves_table(tmp_path / "wide.csv")
    assert ids == ["a", "b"]
    np.testing.assert_array_equal(values, [EXPECTED["a"], EXPECTED["b"]])
    rows = [{"sample_id": i, "epoch": k + 1, "reward": r} for i, c in EXPECTED.items() for k, r in enumerate(c)]
    pq.write_table(
        pa.Table.from_pylist([*rows, {"sample_id": "a", "epoch": 1, "reward": 1.5}]), tmp_path / "long.parquet"
    )
    ids, values = read_curves_table(tmp_path / "long.parquet")
    np.testing.assert_array_equal(values, [[1, 1, 1], EXPECTED["b"]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x,e1\na,1\n", "no column id"),
        ("id,e1\na,1\na,0\n", "id 'a' stands in more than one row"),
        ("id,e1\na,x\n", "no number column"),
        ("id,epoch,reward\na,0.5,1\n", "whole numbers"),
        ("id,e1\na,inf\n", "infinity"),
        ("id,e1\n", "has no rows"),
        ("id,e1\n,1\nb,0\n", "1 rows have no id"),
        ("id,e1,e2,level\na,1,1,3\n", "columns level do not look like epochs beside e1, e2"),
    ],
)
def test_bad_tables(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_curves_table(tmp_path / "t.csv")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_curves_table(tmp_path / "other.csv")


def test_ids_stay_as_they_are_spelled_and_the_value_asked_for_is_read(tmp_path):
    (tmp_path / "t.csv").write_text("id,epoch,correct,reward\n007,0,true,0.5\n7,0,false,-1\n")
    ids, values = read_curves_table(tmp_path / "t.csv")
    assert ids == ["007", "7"]
    np.testing.assert_array_equal(values, [[1], [0]])
    np.testing.assert_array_equal(read_curves_table(tmp_path / "t.csv", "reward")[1], [[0.5], [-1]])


class State:
    def __init__(self, step):
        self.global_step = step


def test_the_callback_records_steps_and_resumes(tmp_path):
    from plumbline.selection.trl_callback import HistoryCallback

    def reward(prompts, completions, **columns):
        return [float(c == "right") if c else None for c in completions]

    def train(callback, first, last):
        recorded = callback.record(reward)
        callback.on_train_begin(None, State(first - 1), None)
        for step in range(first, last + 1):
            for _ in range(2):
                # Two accumulation passes a step.
                answers = ["right", "wrong", "wrong" if step < 3 else "right"]
                result = recorded(
                    prompts=["p", "p", "q"],
                    completions=answers,
                    completion_ids=[[1], [1, 2], [1]],
                    trainer_state=State(step - 1),
                )
                assert result[:2] == [1.0, 0.0]
            callback.on_step_end(None, State(step), None)
        recorded(prompts=["held-out"], completions=["right"], trainer_state=State(last))
        callback.on_evaluate(None, State(last), None)

    whole = HistoryCallback(tmp_path / "whole", "run")
    train(whole, 1, 4)
    whole.on_train_end(None, State(4), None)
    first = HistoryCallback(tmp_path / "resumed", "run")
    train(first, 1, 3)
    first.writer.close()
    again = HistoryCallback(tmp_path / "resumed", "run")
    train(again, 3, 4)
    again.on_train_end(None, State(4), None)
    assert read_history(tmp_path / "whole").equals(read_history(tmp_path / "resumed"))
    ids, values = curves(tmp_path / "whole")
    assert ids == [prompt_id("p"), prompt_id("q")]
    np.testing.assert_array_equal(values, [[0.5] * 4, [0, 0, 1, 1]])
    assert read_history(tmp_path / "whole")["rollout"].to_pylist()[:6] == [0, 1, 0, 2, 3, 1]


def test_the_callback_needs_its_id_column(tmp_path):
    from plumbline.selection.trl_callback import HistoryCallback

    callback = HistoryCallback(tmp_path, "run", id_column="id")
    with pytest.raises(ValueError, match="no column 'id'"):
        callback.record(lambda prompts, completions, **columns: [1.0])(prompts=["p"], completions=["x"], answer=["1"])


@pytest.mark.slow
def test_a_real_trainer_fills_the_history(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from plumbline.selection.trl_callback import HistoryCallback

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    recorder = HistoryCallback(tmp_path / "history", "grpo", id_column="id")
    settings = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        max_steps=4,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        log_completions=True,
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=LlamaForCausalLM(config),
        args=settings,
        train_dataset=Dataset.from_list([{"id": f"s{i}", "prompt": "a b c"} for i in range(4)]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **special),
        callbacks=[recorder],
        reward_funcs=recorder.record(lambda prompts, completions, **_: [float("a" in c) for c in completions]),
    )
    trainer.train()
    ids, values = curves(tmp_path / "history")
    assert sorted(ids) == ["s0", "s1", "s2", "s3"]
    assert values.shape == (4, 2)
    assert not np.isnan(values).any()
    assert read_history(tmp_path / "history").num_rows == 16
    # What the trainer logs by itself says the same of every completion; its four prompts are one text.
    assert import_trl(tmp_path / "out", tmp_path / "imported", "run") == 16
    for name in ("reward", "step"):
        ours, theirs = (sorted(read_history(tmp_path / f)[name].to_pylist()) for f in ("history", "imported"))
        assert ours == theirs
