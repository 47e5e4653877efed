"""Losses on text: equal to transformers', every token predicted once, bad text refused, and points for scaling."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config
from typer.testing import CliRunner

from plumbline.cli import app
from plumbline.errors import InputError
from plumbline.models.load import load_policy, load_tokenizer
from plumbline.rl.text_loss import launch_losses, origin, record_losses, text_loss, windows
from plumbline.rl.text_sets import TextSet, read_text_sets
from plumbline.selection.history import HistoryWriter

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
DOCUMENTS = [
    "Seven times six is forty-two; the sum of the digits is six.",
    "x",
    "Eine Zahl ist gerade, wenn 2 sie teilt – größer als null. " * 5,
    "def f(n):\n    return n * (n + 1) // 2\n",
]


def save(folder, kind=LlamaConfig, seed=0, sharpness=1.0):
    """A random public checkpoint with a byte-level tokenizer; a sharper one is surer of what it says, right or not."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**SHAPE, head_dim=16, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{c: i for i, c in enumerate(alphabet)}, "<s>": 256, "</s>": 257}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return model


@torch.no_grad()
def reference(model, tokenizer, documents, window):
    """Transformers' own loss of every window, summed in float64: (nats, tokens) of each document."""
    found = []
    for document in documents:
        ids = [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False)["input_ids"]]
        nats = 0.0
        for first in range(0, len(ids) - 1, window):
            part = torch.tensor([ids[first : first + window + 1]])
            nats += model(part, labels=part).loss.double().item() * (part.shape[1] - 1)
        found.append((nats, len(ids) - 1))
    return np.array(found)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("window", [64, 24])
def test_equals_transformers(tmp_path, kind, window):
    public = save(tmp_path, kind)
    policy, tokenizer = load_policy(tmp_path), load_tokenizer(tmp_path)
    wanted = reference(public, tokenizer, DOCUMENTS, window)
    seen = []
    loss = text_loss(
        policy, tokenizer, TextSet("t", "-", DOCUMENTS), window=window, tokens_per_batch=100, chunk_tokens=16,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    bytes_ = sum(len(document.encode()) for document in DOCUMENTS)
    assert (loss.tokens, loss.bytes, loss.documents) == (int(wanted[:, 1].sum()), bytes_, 4)
    assert loss.per_token == pytest.approx(wanted[:, 0].sum() / wanted[:, 1].sum(), rel=1e-5)
    assert loss.per_byte == pytest.approx(wanted[:, 0].sum() / bytes_, rel=1e-5)
    assert loss.per_token_interval[0] < loss.per_token < loss.per_token_interval[1]
    assert loss.unknown_tokens == 0
    assert seen[-1] == (loss.tokens, loss.tokens)
    alone = text_loss(policy, tokenizer, TextSet("t", "-", DOCUMENTS[2:3]), window=window)
    assert alone.per_token == pytest.approx(wanted[2, 0] / wanted[2, 1], rel=1e-5)
    assert alone.per_token_interval is None


def test_windows_predict_every_token_once():
    found = list(windows([1, 2, 3, 4, 5, 6, 7], 0, 3))
    assert found == [([0, 1, 2], [1, 2, 3]), ([3, 4, 5], [4, 5, 6]), ([6], [7])]
    assert list(windows([], 0, 3)) == []


def test_the_embedded_policy_is_measured(tmp_path):
    text = TextSet("words", "-", ["What is 12 + 30?", "12 + 30 = 42"])
    found = record_losses("embedded", [text], tmp_path, device="cpu")["words"]
    record = json.loads((tmp_path / "losses.json").read_text())
    assert record["losses"]["words"]["per_byte"] == found.per_byte > 0
    assert record["params"] == sum(p.numel() for p in load_policy("embedded").parameters())
    assert record["architecture"] == "nsa attention"
    assert record["window"] == 1024
    assert (record["data"], record["tokens"]) == (None, None)
    with pytest.raises(InputError, match="beyond the 1024 positions"):
        record_losses("embedded", [text], tmp_path, device="cpu", window=1025)


def test_a_checkpoint_says_what_it_was_trained_on(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    save(checkpoint / "policy")
    assert origin(str(checkpoint)) == (None, None)
    row = {"step": 0, "epoch": 0, "sample_id": "a", "rollout": 0, "policy_version": 0, "reward": 1.0, "correct": True,
           "reason": None, "tokens": 7, "truncated": False, "mean_logprob": None}  # fmt: skip
    with HistoryWriter(tmp_path / "history", "mine") as history:
        history.append([row, row])
        history.append([{**row, "tokens": 100}])
    config = {"name": "mine", "data": {"source": "train.jsonl", "subset": None}}
    state = {"step": 2, "history_offset": 2, "config": config}
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    assert origin(str(checkpoint)) == ("train.jsonl", 14)
    assert origin(str(checkpoint / "policy")) == ("train.jsonl", 14)
    config["data"]["subset"] = "ids.txt"
    state["history_offset"] = 3
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    assert origin(str(checkpoint)) == ("train.jsonl (ids.txt)", 114)


def test_text_sets_of_every_kind(tmp_path):
    (tmp_path / "one.txt").write_text("a\u2028b\n\nc", encoding="utf-8")
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n\n{"text": ""}\n{"text": "b"}\n', encoding="utf-8")
    pq.write_table(pa.table({"body": ["x", "y", "z"]}), tmp_path / "three.parquet")
    one, two = read_text_sets([f"{tmp_path}/one.txt", f"wiki={tmp_path}/two.jsonl"])
    assert (one.name, one.documents) == ("one", ["a\u2028b\n\nc"])
    assert (two.name, two.documents) == ("wiki", ["a", "b"])
    (three,) = read_text_sets([f"{tmp_path}/three.parquet"], column="body", limit=2)
    assert three.documents == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "none.txt does not exist"),
        ("a.csv", b"text\nx\n", "unknown file type '.csv'"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "line 2 has no 'text'; it has txt"),
        ("a.jsonl", b'{"text": "x"}\nnope\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": 3}\n', "row 1: expected text, found int"),
        ("a.parquet", b"no", "not a readable Parquet file"),
    ],
)
def test_bad_text_is_refused(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_text_sets([str(tmp_path / name)])


def test_two_sets_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="need names that differ"):
        read_text_sets([str(tmp_path / "a.txt"), f"a={tmp_path}/a.txt"])


def test_a_model_that_is_none_leaves_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="unknown model"):
        launch_losses("no-such-model", [TextSet("t", "-", ["x"])], Console(quiet=True), output=tmp_path / "out",
                      prepared=False, overwrite=False)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_evaluations_become_a_scaling_report(tmp_path):
    """Checkpoints on the command line to losses, losses to a line: what a user with checkpoints of their own does."""
    (tmp_path / "wiki.txt").write_text(DOCUMENTS[2], encoding="utf-8")
    rows = "".join(json.dumps({"text": document}) + "\n" for document in (DOCUMENTS[0], DOCUMENTS[3]))
    (tmp_path / "code.jsonl").write_text(rows, encoding="utf-8")
    run = CliRunner().invoke
    for number, sharpness in enumerate((0.0, 0.3, 0.6, 0.9, 1.2, 1.5)):
        save(tmp_path / f"m{number}", sharpness=sharpness)
        result = run(app, ["evaluate", str(tmp_path / f"m{number}"), "--device", "cpu", "--trained-on", "web",
                           "--loss-on", f"{tmp_path}/wiki.txt", "--loss-on", f"{tmp_path}/code.jsonl",
                           "--trained-tokens", str(10**6 + number), "--output", str(tmp_path / "e" / str(number))])  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "wiki" in result.output
    record = json.loads((tmp_path / "e" / "0" / "losses.json").read_text())
    # All logits 0: every token costs log of the vocabulary.
    assert record["losses"]["wiki"]["per_token"] == pytest.approx(np.log(258), rel=1e-6)
    assert (record["data"], record["tokens"]) == ("web", 10**6)
    folders = [str(tmp_path / "e" / str(number)) for number in range(6)]
    options = ["--x", "wiki per byte", "--y", "code per byte", "--e-x", "0", "--e-y", "0", "--resamples", "20",
               "--group", "data", "--output", str(tmp_path / "report")]  # fmt: skip
    result = run(app, ["scaling", *folders, *options])
    assert result.exit_code == 0, result.output
    assert "web: K =" in result.output
    assert "6 rows" in (tmp_path / "report" / "report.md").read_text()
    result = run(app, ["scaling", *folders[:2], *options])
    assert "2 pairs, fewer than 5" in str(result.exception)
