"""On one batch, the learner's loss and the gradient of every parameter equal those of TRL's GRPO trainer."""

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from plumbline.models.load import load_policy, load_tokenizer
from plumbline.models.policy import Policy
from plumbline.rl import coldstart
from plumbline.rl.batch import TrainingBatch
from plumbline.rl.config import parse_config
from plumbline.rl.experience import Experience
from plumbline.rl.learner import Learner
from plumbline.rl.packing import completion_mask, padded
from plumbline.rl.procedural import generate

RECIPE = coldstart.Recipe(vocab=300, hidden=32, intermediate=48, layers=2, heads=2, kv_heads=1, head_dim=16)
MAX_LENGTH = 11


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = coldstart.train_tokenizer(generate("train", 200, 0), RECIPE.vocab)
    policy = Policy(coldstart.policy_config(tokenizer, RECIPE))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # sharper than a fresh policy
    folder = tmp_path_factory.mktemp("policy")
    coldstart.save(policy, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def trainer(policy_path, tmp_path_factory):
    arguments = GRPOConfig(
        str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=MAX_LENGTH,
        entropy_coef=0.02,
        temperature=0.9,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = GRPOTrainer(
        load_policy(policy_path, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1 + 1"}] * 4),
        processing_class=load_tokenizer(policy_path),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


@pytest.fixture(scope="module")
def data():
    """A batch of four completions of different lengths, and log-probabilities that disagree with the policy's."""
    generator = torch.Generator().manual_seed(5)

    def draw(length):
        return torch.randint(10, 290, (length,), generator=generator).tolist()

    lengths = [5, 11, 1, 8]
    batch = TrainingBatch(
        prompt_ids=[draw(length) for length in (4, 4, 7, 7)],
        completion_ids=[draw(length) for length in lengths],
        logprobs=[[0.0] * length for length in lengths],
        rewards=[1.0, 0.0, 0.0, 1.0],
        group_size=2,
    )
    mask = completion_mask(lengths, "cpu")
    noise = [torch.randn(mask.shape, generator=generator) * 0.4 for _ in range(3)]
    return batch, mask, noise


def trl_loss(trainer, data, old, reference, advantages, weights, **settings):
    batch, mask, _ = data
    defaults = {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "entropy_coef": 0.0}
    trainer.args.use_bias_correction_kl = settings.pop("use_bias_correction_kl", False)
    for name, value in {**defaults, "epsilon_low": 0.2, "epsilon_high": 0.2, **settings}.items():
        setattr(trainer, name, value)
    trainer._entropy_bonus_enabled = trainer.entropy_coef > 0
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = weights is not None
    width = max(len(ids) for ids in batch.prompt_ids)
    pads = [width - len(ids) for ids in batch.prompt_ids]
    inputs = {
        "prompt_ids": torch.tensor([[0] * pad + ids for pad, ids in zip(pads, batch.prompt_ids, strict=True)]),
        "prompt_mask": torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
        "completion_ids": padded(batch.completion_ids, "cpu").long(),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "importance_sampling_ratio": weights,
        "num_items_in_batch": mask.sum(),
    }
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def our_loss(policy_path, output, data, old, reference, advantages, weights, **algorithm):
    batch, mask, _ = data
    config = parse_config(
        {
            "name": "parity",
            "output": str(output),
            "policy": {"path": policy_path, "device": "cpu"},
            "rollout": {"max_new_tokens": MAX_LENGTH, "temperature": 0.9},
            # Three microbatches, and log-probabilities in chunks: neither may show.
            "learner": {"clipping": {"method": "none"}, "tokens_per_microbatch": 24, "logprob_chunk_tokens": 4},
            "algorithm": algorithm,
        }
    )
    learner = Learner(config, "cpu")
    experience = Experience(batch, mask, old, advantages[:, None], weights, reference)
    metrics = learner._optimizer_step(experience, list(range(len(batch))))
    return metrics["learner/loss"], {name: p.grad for name, p in learner.policy.named_parameters()}


CASES = {
    "grpo": ({"loss_type": "grpo"}, {"aggregation": "sequence"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"aggregation": "constant"}),
    "bnpo": ({"loss_type": "bnpo"}, {"aggregation": "token"}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"aggregation": "token", "clip_high": 0.28}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
        {"aggregation": "sequence", "ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    ),
    # TRL gives the largest weight itself, we its distance from 1.
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {"surrogate": "cispo", "aggregation": "token", "clip_low": 1.0, "clip_high": 0.1},
    ),
    "kl": ({"loss_type": "grpo", "beta": 0.3}, {"aggregation": "sequence", "kl_coefficient": 0.3}),
    "kl_unbiased": (
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True},
        {"aggregation": "sequence", "kl_coefficient": 0.3, "kl_unbiased": True},
    ),
    "kl_tokens": ({"loss_type": "dapo", "beta": 0.3}, {"aggregation": "token", "kl_coefficient": 0.3}),
    "entropy": (
        {"loss_type": "grpo", "entropy_coef": 0.2},
        {"aggregation": "sequence", "entropy_coefficient": 0.2},
    ),
    "correction": ({"loss_type": "dapo"}, {"aggregation": "token"}),
    "correction_sequence": ({"loss_type": "grpo"}, {"aggregation": "sequence", "ratio": "token"}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_trl(case, trainer, policy_path, data, tmp_path):
    theirs, ours = CASES[case]
    batch, mask, noise = data
    policy = load_policy(policy_path, dtype=torch.float32)
    rows = [prompt + completion for prompt, completion in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
    now = torch.zeros(mask.shape)
    with torch.no_grad():
        for b, ids in enumerate(rows):
            logits = policy(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32)) / 0.9
            start = len(batch.prompt_ids[b])
            chosen = torch.log_softmax(logits[start - 1 : -1], -1).gather(1, torch.tensor(ids[start:])[:, None])
            now[b, : len(chosen)] = chosen[:, 0]
    old, reference = now + noise[0] * mask, now + noise[1] * mask
    advantages = torch.tensor([1.2, -0.8, 0.5, -1.4])
    weights = None
    if case == "correction":
        weights = (noise[2].exp()).clamp(max=1.2)
    elif case == "correction_sequence":
        weights = noise[2][:, :1].exp().expand(mask.shape).contiguous()
    want, want_gradients = trl_loss(trainer, data, old, reference, advantages, weights, **theirs)
    got, gradients = our_loss(policy_path, tmp_path, data, old, reference, advantages, weights, **ours)
    assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert gradients.keys() == want_gradients.keys()
    scale = max(gradient.abs().max() for gradient in want_gradients.values())
    assert scale > 1e-3
    for name, gradient in want_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
