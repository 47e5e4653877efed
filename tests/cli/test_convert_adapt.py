"""plumbline convert and plumbline adapt as a user runs them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from plumbline.cli import main
from plumbline.models.adapt import sparse_layers
from plumbline.models.load import load_policy


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the command line; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["plumbline", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def dense(tmp_path):
    """A random Llama of 262 bytes and pairs, with its tokenizer."""
    folder = tmp_path / "dense"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["one two two"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_convert(run, dense, tmp_path):
    code, out, error = run("convert", dense, "sparse", "--attention", "nsa", "--dtype", "float32")
    assert code == 0, error
    assert "nsa attention" in out
    assert "everything, up to 1,024 tokens" in out
    ids = torch.randint(0, 262, (1024,), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, 1024], dtype=torch.int32)
    sparse, full = load_policy(tmp_path / "sparse"), load_policy(dense, dtype=torch.float32)
    torch.testing.assert_close(sparse(ids, ends), full(ids, ends), atol=1e-5, rtol=1e-5)
    gates = sparse_layers(sparse)[0].gates(torch.randn(3, 32))
    torch.testing.assert_close(gates, torch.tensor([0.0, 1.0, 0.0]).expand(3, 4, 3), atol=1e-7, rtol=0)


def test_adapt(run, dense, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one two three, and so on. " * 200, encoding="utf-8")
    arguments = ["--context", 1280, "--layer-steps", 2, "--gate-steps", 1, "--all-steps", 2]
    arguments += ["--tokens-per-step", 2560, "--tokens-per-microbatch", 1280, "--device", "cpu"]
    code, out, error = run("adapt", dense, "adapted", "--text", "texts", *arguments)
    assert code == 0, error
    assert "12,794 tokens of training" in out
    records = [json.loads(line) for line in (tmp_path / "adapted" / "adaptation.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["step"]) for record in records] == [(1, 1), (1, 2), (2, 1), (3, 1), (3, 2)]
    assert records[1]["output_error"] < 1
    assert records[2]["divergence"] > 0
    policy = load_policy(tmp_path / "adapted")
    assert policy.dtype == torch.bfloat16
    assert policy.config.attention == "nsa"
    gates = sparse_layers(policy.float())[0].gates(torch.randn(3, 32))
    assert 0.005 < gates[..., 0].max() < 0.1
    code, out, error = run("adapt", "adapted", "again", "--text", "texts/a.txt", *arguments)
    assert code == 0, error
    # Its gates have been trained, so it is no longer the dense policy with tokens left out.
    records = [json.loads(line) for line in (tmp_path / "again" / "adaptation.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == [2, 3, 3]
    assert all("loss" in record for record in records)
    arguments[5], arguments[7] = 1, 0
    code, out, error = run("adapt", "adapted", "taught", "--text", "texts/a.txt", "--teacher", dense, *arguments)
    assert code == 0, error
    (record,) = map(json.loads, (tmp_path / "taught" / "adaptation.jsonl").read_text().splitlines())
    assert record["divergence"] > 0
    code, out, error = run("adapt", dense, "bad", "--text", "texts/a.txt", "--teacher", "adapted", *arguments)
    assert code == 2
    assert "a teacher has full attention, this one has nsa" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "none", "out"], "unknown model 'none'"),
        (["convert", "gpt2", "out"], "unknown architecture 'gpt2'"),
        (["convert", "broken", "out"], "model.layers.1.mlp.up_proj.weight is [3, 3]"),
        (["convert", "dense", "texts"], "texts exists and is not an empty folder"),
        (["convert", "dense", "out", "--attention", "linear"], "attention must be full or nsa"),
        (["convert", "dense", "out", "--dtype", "int8"], "--dtype must be"),
        (["adapt", "dense", "out", "--text", "none.txt", "--context", "2048"], "no text file none.txt"),
        (["adapt", "dense", "out", "--text", "empty", "--context", "2048"], "no .txt file there"),
        (["adapt", "dense", "out", "--text", "texts", "--context", "2048"], "no text has 2048 tokens"),
        (["adapt", "dense", "out", "--text", "long.txt", "--context", "512"], "selection reaches 1024 tokens"),
        (["adapt", "dense", "out", "--text", "long.txt", "--context", "4096"], "max_position_embeddings (2048)"),
        (
            ["adapt", "dense", "out", "--text", "long.txt", "--context", "1500"],
            "tokens_per_step (32768) must be a multiple",
        ),
        (["adapt", "dense", "texts", "--text", "long.txt"], "texts exists and is not an empty folder"),
    ],
)
def test_bad_input_is_one_clear_line(run, dense, tmp_path, arguments, words):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("short", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "long.txt").write_text("abc " * 4000, encoding="utf-8")
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "broken").mkdir()
    for file in dense.iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    code, _, error = run(*arguments)
    lines = [line for line in error.splitlines() if line.startswith("plumbline: ")]
    assert code == 2, error
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "out").exists()
