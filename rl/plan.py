"""What a run will do and need, worked out and shown before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from plumbline.kernels.nsa.cache import slot_rows
from plumbline.models.config import PolicyConfig
from plumbline.models.load import policy_config
from plumbline.rl.config import RunConfig
from plumbline.rl.optimizers import MOMENT_BITS
from plumbline.rl.output import lost_with_the_job

TRAINING_RUNS_OF_A_PIPELINE = 4


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes unless named otherwise.

    Attributes:
        parameters: of the policy.
        learner: on its device: weights and gradients in float32, AdamW's two moments unless they are on the host, reference
            policy and critic if any, one microbatch, and published weights in the engine's precision.
        host: what an offloaded optimizer keeps in the host's memory: weights, gradients and moments.
        rollout: weights and cache of one worker.
        transfer: weights in the object store while they pass.
        checkpoint: copy in the host's memory of what is being written.
        disk: checkpoints and completions that will be on disk at once.
        rollouts: completions of one training run.
        tokens_per_step: completion tokens of a step at most.
    """

    parameters: int
    learner: int
    host: int
    rollout: int
    transfer: int
    checkpoint: int
    disk: int
    rollouts: int
    tokens_per_step: int

    @property
    def memory(self) -> int:
        return self.learner + self.host + self.transfer + self.rollout + self.checkpoint


def make_plan(config: RunConfig, *, training_runs: int = 1) -> Plan:
    """Count parameters from the policy's configuration and derive the rest; loads no weights."""
    shape = policy_config(config.policy.path, attention=config.policy.attention)
    parameters = count_parameters(shape)
    heads, dim, layers = shape.num_key_value_heads, shape.head_dim, shape.num_hidden_layers
    longest = config.prompt.max_tokens + config.rollout.max_new_tokens
    rows = sum(slot_rows(shape.nsa_config, longest).values()) if shape.attention == "nsa" else longest
    rollout_width = 2 if config.rollout.precision == "bfloat16" else 4
    cache = config.rollout.slots * rows * layers * heads * dim * 2 * rollout_width
    width = 2 if config.learner.precision == "bfloat16" else 4
    kept = 2 if config.learner.gradient_checkpointing else 34
    activations = config.learner.tokens_per_microbatch * shape.hidden_size * layers * kept * width
    logits = config.learner.logprob_chunk_tokens * shape.vocab_size * 4 * 3
    lora = config.learner.lora.rank > 0
    reference = 4 * parameters if config.algorithm.kl_coefficient > 0 and not lora else 0
    critic = config.algorithm.advantage == "gae"
    # Two moments a parameter; in 8 bits with one float32 scale for each 256 of them.
    moments = 2 * (1 + 4 / 256) if MOMENT_BITS[config.learner.optimizer] == 8 else 8
    offloaded = config.learner.optimizer == "adamw_offload"
    whole = 8 if offloaded else 8 + moments
    # What belongs to adapters is so small that it is left out.
    trained = (4 if lora else whole) * parameters + (whole * parameters if critic else 0)
    host = 16 * parameters * ((not lora) + critic) if offloaded else 0
    rollouts = config.rollout.prompts_per_step * config.rollout.completions_per_prompt
    tokens = rollouts * config.rollout.max_new_tokens
    # policy/, and what training goes on from: weights and two moments (adapters left out again).
    checkpoint = int((4 if lora else 8 + moments) * parameters + ((4 + moments) * parameters if critic else 0))
    published = rollout_width * parameters
    completions = config.steps * (tokens * 4 + rollouts * 1024)
    return Plan(
        parameters=parameters,
        learner=int(trained) + reference + activations + logits + published,
        host=host,
        rollout=rollout_width * parameters + cache,
        transfer=published,
        checkpoint=checkpoint,
        disk=training_runs * (checkpoint * (config.checkpoint.keep + 1) + completions),
        rollouts=rollouts * config.steps,
        tokens_per_step=tokens,
    )


def count_parameters(shape: PolicyConfig) -> int:
    """Parameters of a policy configuration, without allocating them."""
    import torch

    from plumbline.models.policy import Policy

    with torch.device("meta"):
        policy = Policy(shape)
    return sum(parameter.numel() for parameter in policy.parameters())


def print_plan(config: RunConfig, plan: Plan, samples: int, console: Console, *, title: str) -> None:
    """One table: who works, on what, how much it takes, where it goes."""
    rollout, learner = config.rollout, config.learner
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "policy",
        f"{config.policy.path}, {plan.parameters / 1e6:.2f} M parameters, {learner.precision}, device {config.policy.device}",
    )
    table.add_row("data", f"{config.data.source}: {samples:,} problems, drawn {config.selection.sampler.name}")
    table.add_row(
        "workers",
        f"{rollout.workers} rollout, {config.reward.workers} reward ({config.reward.processes_per_worker} process each), {learner.workers} learner",
    )
    table.add_row(
        "step",
        f"{rollout.prompts_per_step} prompts x {rollout.completions_per_prompt} completions of at most {rollout.max_new_tokens} tokens "
        f"= at most {plan.tokens_per_step:,} tokens",
    )
    table.add_row(
        "work",
        f"{config.steps} steps, {plan.rollouts:,} rollouts, {config.algorithm.advantage}, learning rate {learner.learning_rate:g}",
    )
    table.add_row(
        "memory",
        f"at most about {plan.memory / 1e9:.2f} GB for tensors: learner {plan.learner / 1e9:.2f}, "
        + (f"its optimizer on the host {plan.host / 1e9:.2f}, " if plan.host else "")
        + f"each rollout worker {plan.rollout / 1e9:.2f}, weights in transit {plan.transfer / 1e9:.2f}, "
        f"a checkpoint being written {plan.checkpoint / 1e9:.2f}",
    )
    table.add_row("output", f"{config.folder}, at most about {plan.disk / 1e9:.2f} GB")
    console.print(table)
    if warning := lost_with_the_job(config.folder):
        console.print(f"[yellow]{warning}[/]", highlight=False)
