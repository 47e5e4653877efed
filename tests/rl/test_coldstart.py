"""How the embedded policy is made: tokenizer, demonstrations, training, the card."""

import hashlib
import re
from random import Random

import pytest
import torch
from transformers import AutoTokenizer

from plumbline.models.load import load_policy, load_tokenizer
from plumbline.models.policy import Policy
from plumbline.rl import coldstart
from plumbline.rl.procedural import generate
from plumbline.rl.text import Codec

TINY = coldstart.Recipe(
    problems=384,
    batch=16,
    mixed_problems=128,
    vocab=300,
    hidden=32,
    intermediate=48,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=16,
    card_problems=70,
)


@pytest.fixture(scope="module")
def tokenizer():
    return coldstart.train_tokenizer(generate("train", 500, 0), 400)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two builds from one seed, and one from another."""
    torch.set_num_threads(1)
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        coldstart.build(folder, seed, TINY)
    return folders


@pytest.mark.parametrize(
    "text", ["", " ", "a\n\n  b", "1234", "Größe ∑ 数学 \U0001f600", "\\frac{1}{2}\t$x^{10}$", "\x00\x7f"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone_and_problems_are_short(tokenizer):
    assert len(tokenizer("90210")["input_ids"]) == 5
    problems = generate("heldout", 700, 3)
    prompts = [len(tokenizer(p.problem)["input_ids"]) for p in problems]
    solutions = [len(tokenizer(p.solution)["input_ids"]) for p in problems]
    assert max(prompts) < 35
    assert sum(solutions) / len(solutions) < 35
    assert max(solutions) < 96  # what the quickstart lets a completion have


def test_the_loss_is_on_the_completion_and_its_end(tokenizer):
    problem = generate("train", 1, 0)[0]
    row = coldstart.encode(tokenizer, [(problem.problem, problem.solution)])[0]
    learned = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(learned) == problem.solution + coldstart.END
    assert row["input_ids"][-len(learned) :] == learned
    prompt = row["input_ids"][: -len(learned)]
    assert tokenizer.decode(prompt) == problem.problem + "\n"
    assert row["length"] == len(row["input_ids"])


def test_demonstrations_are_mixed_as_the_recipe_says():
    problems = generate("train", 2000, 5)
    recipe = coldstart.Recipe(worked_share=0.3, guess_accuracy=0.25)
    pairs = list(coldstart.mixed_demonstrations(problems, recipe, 0))
    guesses = [(p, text) for p, (_, text) in zip(problems, pairs, strict=True) if text.startswith("\\boxed")]
    right = [text == f"\\boxed{{{p.answer}}}" for p, text in guesses]
    assert abs(1 - len(guesses) / len(problems) - 0.3) < 0.04
    assert abs(sum(right) / len(right) - 0.25) < 0.04
    assert {text for _, text in pairs if not text.startswith("\\boxed")} <= {p.solution for p in problems}
    assert pairs == list(coldstart.mixed_demonstrations(problems, recipe, 0))


def test_a_wrong_guess_is_wrong_and_looks_like_the_answer():
    rng = Random(0)
    for problem in generate("train", 1000, 6):
        guess = coldstart.wrong_guess(problem.answer, rng)
        assert len(guess) == len(problem.answer)
        assert sum(a != b for a, b in zip(guess, problem.answer, strict=True)) == 1


def digests(folder):
    files = [path for path in sorted(folder.iterdir()) if path.name != "README.md"]  # it tells the time it took
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_stopped_build_goes_on_after_its_first_stage(built, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(coldstart, "mixed_demonstrations", stop)
        with pytest.raises(KeyboardInterrupt):
            coldstart.build(tmp_path, 0, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["worked.pt"]
    stages = []
    fit = coldstart.fit
    monkeypatch.setattr(coldstart, "fit", lambda *a: (stages.append(a[-1]), fit(*a)))
    coldstart.build(tmp_path, 0, TINY)
    assert stages == ["mixed demonstrations"]
    assert digests(tmp_path) == digests(built[0])


def test_the_same_seed_gives_the_same_folder(built):
    first, again, other = map(digests, built)
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]


def test_the_folder_loads_as_a_policy_that_learned_something(built):
    folder = str(built[0])
    policy = load_policy(folder, dtype=torch.float32)
    assert policy.config.attention == "nsa"
    fast = load_tokenizer(folder)
    assert policy.config.vocab_size == len(fast)
    assert (policy.config.eos_token_id, policy.config.pad_token_id) == (fast.eos_token_id, fast.pad_token_id)
    assert AutoTokenizer.from_pretrained(folder)("7")["input_ids"] == fast("7")["input_ids"]
    # The prompt is the bare problem and a line feed, as in the cold start.
    assert fast.decode(Codec(folder).encode("Compute $1+1$.")) == "Compute $1+1$.\n"

    rows = coldstart.encode(fast, [(p.problem, p.solution) for p in generate("heldout", 100, 0)])
    torch.manual_seed(0)
    fresh = Policy(policy.config).eval()
    with torch.no_grad():
        losses = [mean_loss(one, rows) for one in (fresh, policy)]
    assert losses[1] < losses[0] - 0.5


def mean_loss(policy, rows):
    total = 0.0
    for row in rows:
        total += policy(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item()
    return total / len(rows)


def test_the_card_gives_every_figure_its_n_and_interval(built):
    card = (built[0] / "README.md").read_text(encoding="utf-8")
    rows = [line for line in card.splitlines() if line.startswith("| level")]
    assert len(rows) == 5
    assert all(len(re.findall(r"% \[[\d.]+%, [\d.]+%\] \| \d+ \|", line)) == 2 for line in rows)
    assert "- problems: 384\n" in card
    assert "--seed 0" in card
