"""A random policy small enough to train for real in a test."""

import pytest
import torch

from plumbline.models.policy import Policy
from plumbline.rl import coldstart
from plumbline.rl.procedural import generate

RECIPE = coldstart.Recipe(vocab=300, hidden=32, intermediate=48, layers=1, heads=2, kv_heads=1, head_dim=16)


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory):
    """Folder of a random policy. It boxes nothing: rewards come from plumbline.testing's shaping."""
    torch.manual_seed(0)
    tokenizer = coldstart.train_tokenizer(generate("train", 200, 0), RECIPE.vocab)
    folder = tmp_path_factory.mktemp("policy")
    coldstart.save(Policy(coldstart.policy_config(tokenizer, RECIPE)), tokenizer, folder)
    return str(folder)
