"""Recipes: a YAML file sets the values, and ``dotted.key=value`` arguments override them.

A recipe is checked as a whole before anything heavy is imported: unknown keys and impossible
combinations raise ``ConfigError``. Keys of ``training`` keep TRL's names.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from delethink.chunking import ChunkSpec
from delethink.config_faults import unknown_key, wrong_values, yaml_fault
from delethink.errors import ConfigError, MissingExtraError, did_you_mean
from delethink.json_io import read_text
from delethink.redaction import hide_settings, register_settings
from delethink.registry import make, names, search_folder
from delethink.thinking_marks import AUTO, check_mark_setting
from delethink.yaml_io import YAML_ERRORS, YamlLimitError, dump_yaml, load_yaml

try:
    from pydantic import (
        BaseModel,
        ConfigDict,
        Field,
        FiniteFloat,
        ValidationError,
        ValidationInfo,
        field_validator,
        model_validator,
    )
except ImportError as error:
    raise MissingExtraError(error.name or "pydantic", "train") from None

Order = Literal["breadth", "depth"]
WeightTransfer = Literal["store", "nccl", "ipc"]


class _Section(BaseModel):
    model_config = ConfigDict(
        ser_json_inf_nan="constants", extra="forbid", frozen=True, use_attribute_docstrings=True
    )


class NamedConfig(_Section):
    """A registered object and its arguments."""

    name: str
    """Registered name, or module:object."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor."""

    @model_validator(mode="before")
    @classmethod
    def _accept_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ThinkingConfig(_Section):
    """Chunk sizes and what is carried from one chunk to the next."""

    context_size: int = Field(gt=0)
    """Thinking tokens in one context, carried and new ones together (C)."""
    carryover_size: int = Field(ge=0)
    """Maximum thinking tokens carried over a boundary (m)."""
    max_chunks: int = Field(ge=1)
    """Maximum chunks of a trace (I)."""
    head_size: int | None = Field(None, ge=0)
    """Carried tokens taken from the start of the trace; unset, min(100, carryover_size // 4)."""
    head_outside: bool = False
    """Add the head on top of carryover_size, as in the paper's listing."""
    carryover: NamedConfig | None = None
    """Registered carryover policy; unset, a head and the latest tokens."""
    boundary: NamedConfig | None = None
    """Registered boundary policy, which may end a chunk before the context is full."""

    def spec(self) -> ChunkSpec:
        """Return the chunk spec. Policies reading text still need ``bind(tokenizer)``."""
        values = self.model_dump(exclude_none=True)
        for key, group in (("carryover", "carryovers"), ("boundary", "boundaries")):
            values[key] = make(f"delethink.{group}", values.get(key))
        return ChunkSpec(**values)

    @field_validator("carryover", mode="before")
    @classmethod
    def _refuse_size(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            raise ValueError(
                f"a carryover is a registered name, or a mapping with name and args, got {value}. "
                "Did you mean 'carryover_size'?"
            )
        return value

    @model_validator(mode="after")
    def _check_spec(self) -> ThinkingConfig:
        self.spec()
        return self


class TaskConfig(NamedConfig):
    """Source of the problems: a registered task, or family/member."""

    max_query_tokens: int | None = Field(None, gt=0)
    """Skip longer queries, and report how many; unset, a query that does not fit is an error."""
    end_of_thinking: str | None = AUTO
    """Mark between thinking and answer, such as "[/THINK]"; null: none, the whole output is the
    answer; "auto": as the chat template and the tokens show it."""

    @field_validator("end_of_thinking", mode="before")
    @classmethod
    def _check_mark(cls, value: Any) -> Any:
        try:
            return check_mark_setting(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None


class RewardConfig(_Section):
    """A reward; a bare number stands for one with that weight."""

    weight: FiniteFloat = 1.0
    """Factor of its value in the sum; 0 only records the value."""
    reward: str | None = None
    """Registered name if the key is another; allows one reward to occur twice."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the reward."""
    isolated: bool | None = None
    """Run it in a killable process; unset, as the reward itself declares."""

    @model_validator(mode="before")
    @classmethod
    def _accept_weight(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"weight": value}
        if not isinstance(value, dict | RewardConfig):
            raise ValueError(
                f"a reward is a weight, or a section with {', '.join(cls.model_fields)}; "
                f"got {value!r}"
            )
        return value


class ScoringConfig(_Section):
    """Exceptions to the sum of rewards, and the limits of verifiers."""

    out_of_budget: Literal["score", "zero", "mask", "penalty"] = "score"
    """Score of a trace that used up its budget: as any other ("score"), 0 ("zero"), less a penalty
    ("penalty"), or scored for the baseline of its group but left out of the loss ("mask")."""
    penalty: FiniteFloat = 1.0
    """Amount subtracted from the score by "penalty"."""
    error: FiniteFloat | None = None
    """Score of a failed trace, or of one without a computable reward; unset, no score."""
    num_verifiers: int | None = Field(None, gt=0)
    """Processes for isolated rewards; unset, one per core and at most eight."""
    timeout: float = Field(10.0, gt=0, allow_inf_nan=False)
    """Time limit of an isolated reward, in seconds."""
    memory_mb: int = Field(2048, ge=64)
    """Memory limit of an isolated reward, in megabytes."""
    allow_unsafe_code: bool = False
    """Run the code of the model with the rights of your user where the machine has no isolation."""


_CUTS = ("top_p", "top_k", "min_p")  # names of TRL
_REFUSED_LOSS_TYPES = {
    "bnpo": "it divides by the tokens of a micro-batch, so the result would depend on how traces "
    "are split into micro-batches",
    "vespo": "it weighs a trace with the product of its ratios, which is always at its bounds over "
    "thousands of tokens",
}


class LoraConfig(_Section):
    """Low-rank adapters, with PEFT's names."""

    r: int = Field(16, gt=0)
    """Rank."""
    lora_alpha: float = Field(32, gt=0, allow_inf_nan=False)
    """Scale: the output of the adapters is multiplied by lora_alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Layers with adapters; by default every linear layer but the output head."""


class TrainingConfig(_Section):
    """Optimizer and objective, with TRL's names. Batch sizes count traces."""

    max_steps: int = Field(gt=0)
    """Optimizer steps."""
    num_generations: int = Field(8, ge=2)
    """Traces per problem (G)."""
    per_device_train_batch_size: int = Field(8, gt=0)
    """Traces per micro-batch; changes memory, not the result."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    """Micro-batches per optimizer step, shared by all ranks."""
    learning_rate: float = Field(1e-6, ge=0, allow_inf_nan=False)
    """Learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    """Learning-rate schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of warm-up."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight decay of AdamW."""
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    """Second-moment decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Maximum global gradient norm."""
    temperature: float = Field(0.6, gt=0, allow_inf_nan=False)
    """Temperature of sampling and of the log-probs in the loss; all tokens can be sampled, as
    top-p, top-k and min-p would bias the gradient."""
    epsilon: float = Field(0.2, gt=0, lt=1)
    """Lower clip range of the probability ratio, which is 1 in the first step on a batch."""
    epsilon_high: float = Field(0.26, gt=0, allow_inf_nan=False)
    """Upper clip range of the probability ratio ("clip-higher")."""
    beta: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the KL divergence from the initial weights."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divisor of advantages: a standard deviation, or none."""
    loss_type: Literal["grpo", "grpo_chunk", "dr_grpo", "dapo", "cispo", "sapo", "luspo"] = "grpo"
    """Loss; "grpo" divides each trace by its own number of sampled tokens, "grpo_chunk" each
    chunk."""
    delta: float | None = Field(None, gt=1, allow_inf_nan=False)
    """Upper bound of the ratio for negative advantages ("dual clip"); the authors use 3."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Unit of the probability ratio: a token, or a whole trace."""
    vllm_importance_sampling_correction: bool = True
    """Weight tokens by the ratio of the trainer's to the engine's probabilities."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask"] = "token_truncate"
    """Truncate a correction weight at its bound, or mask the token."""
    vllm_importance_sampling_clip_max: float = Field(2.0, ge=1, allow_inf_nan=False)
    """Bound of the correction weight."""
    num_iterations: int = Field(1, ge=1)
    """Passes over each batch."""
    steps_per_generation: int | None = Field(None, gt=0)
    """Micro-batches sampled at once; unset, those of one optimizer step."""
    max_sampling_rounds: int = Field(1, ge=1)
    """Maximum sampling rounds per batch; above 1, groups of equal rewards are replaced."""
    max_staleness: int = Field(0, ge=0)
    """Prefetch rollouts while training, at most this many weight updates ahead."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights; true takes the defaults."""
    bf16: bool = False
    """Compute in bfloat16; weights, log-probs and the loss stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    report_to: list[Literal["wandb", "tensorboard", "trackio"]] = Field(default_factory=list)
    """Experiment trackers to send the metrics to: one name, or a list."""
    forward_tokens: int = Field(16_384, gt=0)
    """Maximum tokens per forward and backward pass; changes memory, not the result."""
    max_failed_share: float = Field(0.1, ge=0, le=1)
    """Stop the run if a larger share of a step's traces failed."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Stop the run or skip the step if a loss, gradient or log-prob is NaN or infinite."""
    trace_token_stats: bool = False
    """Keep the trainer's log-prob and entropy of each token, for `delethink view`."""
    save_steps: int | None = Field(10, gt=0)
    """Steps between checkpoints to resume from; null saves the final weights only."""
    save_total_limit: int = Field(2, gt=0)
    """Number of latest checkpoints to keep."""

    @field_validator("lora", mode="before")
    @classmethod
    def _accept_switch(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _accept_tracker(cls, value: Any) -> Any:
        if value is None or value == "none":
            return []
        return [value] if isinstance(value, str) else value

    @property
    def traces_per_step(self) -> int:
        """Traces of an optimizer step over all ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def traces_per_batch(self) -> int:
        """Traces sampled at once."""
        micro_batches = self.steps_per_generation or self.gradient_accumulation_steps
        return self.per_device_train_batch_size * micro_batches

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps on a batch."""
        return self.traces_per_batch // self.traces_per_step * self.num_iterations

    def rows_per_step(self, num_ranks: int) -> int:
        """Return the rows of an optimizer step over ranks that have equally many, in whole groups.

        Rows beyond ``traces_per_step`` hold no trace and cost nothing.
        """
        if self.traces_per_step % num_ranks == 0:
            return self.traces_per_step
        whole = math.lcm(num_ranks, self.num_generations)
        return -(-self.traces_per_step // whole) * whole

    @property
    def num_batches(self) -> int:
        """Batches sampled in the run."""
        return -(-self.max_steps // self.steps_per_batch)

    @model_validator(mode="before")
    @classmethod
    def _refuse_cut_distributions(cls, values: Any) -> Any:
        cut = [key for key in _CUTS if isinstance(values, Mapping) and key in values]
        if cut:
            raise ValueError(
                f"{cut[0]} is not a key of training, which samples from the full distribution: the "
                "gradient would be biased towards the tokens left in; delethink eval has an option"
            )
        return values

    @field_validator("loss_type", mode="before")
    @classmethod
    def _refuse_loss_type(cls, value: Any) -> Any:
        if reason := _REFUSED_LOSS_TYPES.get(str(value)):
            raise ValueError(f"{value!r} is not defined for traces: {reason}")
        return value

    @model_validator(mode="after")
    def _check_batch_sizes(self) -> TrainingConfig:
        if self.traces_per_batch % self.traces_per_step:
            raise ValueError(
                "steps_per_generation counts micro-batches and must hold whole optimizer steps: "
                f"{self.steps_per_generation} is not divisible by gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}"
            )
        if self.traces_per_batch % self.num_generations:
            key = "steps_per_generation" if self.steps_per_generation else ""
            raise ValueError(
                f"per_device_train_batch_size x {key or 'gradient_accumulation_steps'} must hold "
                f"whole groups: {self.traces_per_batch} traces are not divisible by "
                f"num_generations={self.num_generations}"
            )
        if 0 < self.max_staleness < self.steps_per_batch:
            raise ValueError(
                f"max_staleness={self.max_staleness} must be 0 or at least the "
                f"{self.steps_per_batch} optimizer steps on a batch"
            )
        if self.loss_type == "luspo" and self.importance_sampling_level != "sequence":
            raise ValueError("loss_type=luspo needs importance_sampling_level=sequence")
        return self


class TrainerConfig(_Section):
    """Trainer processes (ranks), each with the model."""

    num_ranks: int = Field(1, ge=1)
    """Trainer processes under Ray Train; 1 without a reserved GPU trains in the main process."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """"ddp" keeps the whole model in every rank, "fsdp2" shards it over the ranks."""
    cpus_per_rank: float = Field(1.0, gt=0, allow_inf_nan=False)
    """CPUs reserved in Ray for each rank."""
    gpus_per_rank: int = Field(0, ge=0, le=1)
    """GPUs reserved in Ray for each rank; with 1, the engines get the other GPUs."""

    @property
    def uses_ray_train(self) -> bool:
        """True if the ranks run under Ray Train instead of in the main process."""
        return self.num_ranks > 1 or self.gpus_per_rank > 0

    @model_validator(mode="after")
    def _check_ranks(self) -> TrainerConfig:
        if self.num_ranks > 1:
            return self
        if self.strategy == "fsdp2":
            raise ValueError(
                "strategy=fsdp2 shards the model over ranks and needs trainer.num_ranks of 2 or "
                "more, got num_ranks=1"
            )
        default = type(self).model_fields["cpus_per_rank"].default
        if self.cpus_per_rank != default and not self.uses_ray_train:
            raise ValueError(
                "cpus_per_rank applies to ranks under Ray Train, and num_ranks=1 without a GPU "
                "trains in the main process: set trainer.num_ranks to 2 or more or "
                "trainer.gpus_per_rank to 1, or leave cpus_per_rank out"
            )
        return self


class EvaluationConfig(_Section):
    """Held-out problems: a few at intervals, all of them in the table at the end."""

    num_problems: int = Field(256, ge=0)
    """Problems in each row of the final table; 0 trains without any evaluation."""
    reward: str | None = None
    """Reward for right (1) or wrong (0); unset, the recipe's first."""
    task: TaskConfig | None = None
    """Source of held-out problems, scored by its own rewards; unset, the recipe's task."""
    every: int = Field(10, ge=1)
    """Steps between evaluations."""
    num_problems_at_intervals: int = Field(64, ge=0)
    """Problems in each of those; 0 evaluates before and after training only."""

    @field_validator("num_problems", "num_problems_at_intervals")
    @classmethod
    def _check_number(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one problem has no interval: take 0 (no evaluation), or 2 or more")
        return value


class EngineConfig(_Section):
    """Sampling engines and their workers. Times are in seconds."""

    name: str = "auto"
    """Registered engine: "transformers" samples in the main process, "vllm" in Ray workers; "auto"
    takes vLLM if vLLM and Ray are installed."""
    num_engines: int = Field(1, ge=1)
    """Engines, each in a Ray worker of its own; "transformers" has one, in the main process."""
    gpus_per_engine: float = Field(0.0, ge=0, allow_inf_nan=False)
    """GPUs reserved in Ray for each engine: a fraction shares one, 0 samples on the CPU."""
    cpus_per_engine: float | None = Field(None, gt=0, allow_inf_nan=False)
    """CPUs reserved in Ray for each engine; unset, 1 on GPUs and an equal share of the cores but
    one otherwise."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs (on CPUs: processes) of each engine."""
    placement: Literal["separate", "colocated"] = "separate"
    """"separate" places engines anywhere in Ray; "colocated" gives each rank of the trainer an
    engine of its own, on its GPU if it has one, with weights handed over in shared memory: all
    sample, then all train."""
    node_placement: Literal["pack", "spread"] | None = None
    """Place workers on as few nodes as possible ("pack") or as many ("spread"); unset, as Ray
    does."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the engine's weights; unset, bfloat16 on GPUs and float32 on CPUs."""
    max_batch_size: int | None = Field(None, ge=1)
    """Chunks sampled at once by an engine; unset, the engine's own default."""
    max_model_tokens: int | None = Field(None, gt=0)
    """Longest sequence of an engine, prompt and new tokens together; unset, that of the run's
    longest context. vLLM starts only if its cache has room for one."""
    kv_cache_gib: float = Field(1.0, gt=0, allow_inf_nan=False)
    """GiB of KV cache of each engine, on CPUs."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of GPU memory for each engine."""
    sleep: bool = False
    """Free the engines' GPU memory while the trainer trains."""
    order: Order = "breadth"
    """Sample the traces with the fewest chunks first ("breadth"), which starts long
    traces early, or those already begun ("depth"), which completes groups sooner."""
    chunks_per_engine: int | None = Field(None, ge=1)
    """Chunks held by a worker at a time; unset, a quarter more than its batch."""
    weight_transfer: WeightTransfer = "store"
    """Path of new weights to the engines: Ray's object store ("store"), vLLM's transfer between
    GPUs ("nccl"), or memory shared with the trainer ("ipc"; colocated engines always)."""
    weight_sync_timeout: float = Field(60.0, gt=0, allow_inf_nan=False)
    """Limit for loading new weights."""
    verify_weights: Literal["first", "every"] = "first"
    """Compare the engines' weights with the trainer's after the first update, or after every
    update."""
    startup_timeout: float = Field(300.0, gt=0, allow_inf_nan=False)
    """Limit for the start of a worker."""
    rollout_timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Limit for the rollouts of a step; unfinished traces are then aborted. Unset, no limit."""
    chunk_timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Limit for a chunk; its trace is then aborted. Unset, no limit."""
    heartbeat_timeout: float = Field(15.0, gt=0, allow_inf_nan=False)
    """Move the chunks of a worker without a heartbeat for this long to other workers."""
    hang_timeout: float = Field(120.0, gt=0, allow_inf_nan=False)
    """Restart a worker without a heartbeat or engine progress for this long."""
    slow_factor: float = Field(8.0, ge=1, allow_inf_nan=False)
    """Restart a worker if a chunk takes this many times longer than on other workers."""
    lost_timeout: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Stop the run after this long without any worker."""
    max_restarts: int = Field(5, ge=0)
    """Maximum restarts of a worker in a row, without a chunk sampled in between."""
    max_attempts: int = Field(5, ge=1)
    """Maximum attempts at a chunk if workers fail; its trace has then failed."""

    @property
    def engine_dtype(self) -> str:
        """Data type of the engine's weights, resolved."""
        return self.dtype or ("bfloat16" if self.gpus_per_engine else "float32")

    @model_validator(mode="before")
    @classmethod
    def _accept_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        known = ["auto", *names("delethink.engines")]
        if value not in known and ":" not in value:
            raise ValueError(f"unknown engine {value!r}.{did_you_mean(value, known)}")
        return value

    @model_validator(mode="after")
    def _check_gpus(self) -> EngineConfig:
        gpus, parallel = self.gpus_per_engine, self.tensor_parallel_size
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"gpus_per_engine must be a fraction of one GPU or a whole number, got {gpus}"
            )
        if parallel > 1 and gpus not in (0, parallel):
            raise ValueError(
                f"tensor_parallel_size={parallel} needs as many GPUs per engine, got "
                f"gpus_per_engine={gpus:g}"
            )
        if self.placement == "colocated":  # the recipe knows the GPUs
            return self
        if self.sleep and not gpus:
            raise ValueError("sleep=true frees GPU memory and needs gpus_per_engine above 0")
        if self.weight_transfer != "store" and not gpus:
            raise ValueError(
                f"weight_transfer={self.weight_transfer} copies from GPU to GPU and needs "
                "gpus_per_engine above 0; on CPUs use weight_transfer=store"
            )
        if self.weight_transfer == "nccl" and gpus < 1:
            raise ValueError(
                f"weight_transfer=nccl needs a whole GPU per engine, got gpus_per_engine={gpus:g}; "
                "for a shared GPU use weight_transfer=ipc"
            )
        if self.weight_transfer == "ipc" and gpus > 1:
            raise ValueError(
                "weight_transfer=ipc needs the engine on the trainer's GPU, got gpus_per_engine="
                f"{gpus:g}; for several GPUs use weight_transfer=nccl"
            )
        return self


class Recipe(_Section):
    """All settings of a run."""

    name: str
    """Name of the run."""
    model: str
    """A folder, a Hugging Face id (ID@REVISION for a branch, tag or commit), or "toy" for the
    shipped reasoner."""
    task: TaskConfig
    rewards: dict[str, RewardConfig] = Field(default_factory=dict)
    """Registered rewards: a weight each, or a section; left out, those of the task."""
    scoring: ScoringConfig = ScoringConfig()
    thinking: ThinkingConfig
    training: TrainingConfig
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the model's chat template, such as enable_thinking."""
    trust_remote_code: bool = False
    """Allow code from the model's repository to run."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of problems, sampling and training."""
    preflight: Literal["refuse", "warn"] = "refuse"
    """Refuse to start if a preflight check fails, or warn and start."""
    output: Path | None = None
    """Run directory, also of a run to resume; relative to DELETHINK_OUTPUT if set."""

    @property
    def accuracy_reward(self) -> str:
        """Name of the reward for right or wrong; ``""`` if rewards are the task's."""
        return self.evaluation.reward or next(iter(self.rewards), "")

    @field_validator("engine", mode="after")
    @classmethod
    def _give_ranks_engines(cls, engine: EngineConfig, info: ValidationInfo) -> EngineConfig:
        trainer = info.data.get("trainer")  # missing if it is invalid itself
        if engine.placement != "colocated" or trainer is None:
            return engine
        return _colocated(engine, trainer)

    @model_validator(mode="after")
    def _check_ranks(self) -> Recipe:
        if self.trainer.strategy == "fsdp2" and self.training.lora is not None:
            raise ValueError(
                "trainer.strategy=fsdp2 cannot train training.lora: merging adapters for the "
                "engine needs whole weights; set trainer.strategy=ddp"
            )
        traces, ranks = self.training.traces_per_step, self.trainer.num_ranks
        if traces % ranks and (ranks > traces or traces % self.training.num_generations):
            fitting = [n for n in range(1, traces + 1) if traces % n == 0]
            near = sorted(fitting, key=lambda n: abs(n - ranks))[:3]
            raise ValueError(
                f"an optimizer step of {traces} traces (training.per_device_train_batch_size x "
                f"gradient_accumulation_steps) is not divisible by trainer.num_ranks={ranks}, and "
                "is less than a trace for each rank or no multiple of training.num_generations="
                f"{self.training.num_generations}; {', '.join(map(str, sorted(near)))} ranks would "
                "fit"
            )
        colocated = self.engine.placement == "colocated"
        if self.engine.weight_transfer == "ipc" and ranks > 1 and not colocated:
            raise ValueError(
                f"engine.weight_transfer=ipc needs a single rank, got trainer.num_ranks={ranks}; "
                "use engine.weight_transfer=nccl, or engine.placement=colocated for an engine "
                "beside each rank"
            )
        if colocated and self.training.max_staleness:
            raise ValueError(
                "engine.placement=colocated samples and trains in turn, and training.max_staleness="
                f"{self.training.max_staleness} overlaps them: leave it out, or set "
                "engine.placement=separate"
            )
        return self

    @model_validator(mode="after")
    def _check_mark_is_one(self) -> Recipe:
        other = self.evaluation.task
        if other is not None and other.end_of_thinking not in (AUTO, self.task.end_of_thinking):
            raise ValueError(
                "evaluation.task.end_of_thinking differs from that of task, and the mark is the "
                "model's: set task.end_of_thinking alone"
            )
        return self

    @model_validator(mode="after")
    def _check_accuracy_reward(self) -> Recipe:
        if "rewards" in self.model_fields_set and not self.rewards:
            raise ValueError(
                "'rewards' is {}: name at least one reward, or leave the key out for the task's own"
            )
        if self.rewards and self.accuracy_reward not in self.rewards:
            raise ValueError(
                f"evaluation.reward={self.accuracy_reward!r} is not one of the recipe's rewards."
                f"{did_you_mean(self.accuracy_reward, self.rewards)}"
            )
        return self


def _colocated(engine: EngineConfig, trainer: TrainerConfig) -> EngineConfig:
    """Return the settings of engines beside the ranks: as many, with their GPUs.

    Raises:
        ValueError: a given setting contradicts that.
    """
    ranks, gpus = trainer.num_ranks, trainer.gpus_per_rank
    if engine.tensor_parallel_size > 1:
        raise ValueError(
            "placement=colocated gives each rank an engine on its one GPU, got "
            f"tensor_parallel_size={engine.tensor_parallel_size}: leave it out, or set "
            "placement=separate"
        )
    if engine.node_placement is not None:
        raise ValueError(
            f"placement=colocated puts engines on the nodes of their ranks, got node_placement="
            f"{engine.node_placement}: leave it out"
        )
    if engine.sleep and not gpus:
        raise ValueError("sleep=true frees GPU memory and needs trainer.gpus_per_rank=1")
    settings: dict[str, tuple[Any, str]] = {
        "num_engines": (ranks, f"trainer.num_ranks={ranks}"),
        "gpus_per_engine": (float(gpus), f"trainer.gpus_per_rank={gpus}"),
        "weight_transfer": ("ipc", "memory shared with the rank"),
    }
    for key, (value, reason) in settings.items():
        given = getattr(engine, key)
        if key in engine.model_fields_set and given != value:
            raise ValueError(
                f"placement=colocated takes {key}={value} ({reason}), got {given}: leave {key} out"
            )
    update: dict[str, Any] = {key: value for key, (value, _) in settings.items()}
    if "sleep" not in engine.model_fields_set:
        update["sleep"] = gpus > 0
    return engine.model_copy(update=update)


# Keys of earlier releases; the section "rollout" became "engine".
_RENAMED = {
    "num_workers": "engine.num_engines",
    "gpus_per_worker": "engine.gpus_per_engine",
    "dtype": "engine.dtype",
    "weight_sync_timeout": "engine.weight_sync_timeout",
    "rollout.placement": "engine.node_placement",
    "rollout.chunks_per_worker": "engine.chunks_per_engine",
    "rollout.step_timeout": "engine.rollout_timeout",
    "rollout.silence_timeout": "engine.heartbeat_timeout",
    "trainer.num_workers": "trainer.num_ranks",
    "trainer.cpus_per_worker": "trainer.cpus_per_rank",
    "trainer.gpus_per_worker": "trainer.gpus_per_rank",
    "scoring.num_workers": "scoring.num_verifiers",
    "thinking.border": "thinking.boundary",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``dotted.key=value`` overrides; modules beside it are found.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the text names the nearest one), or an
            impossible value.
    """
    values = _read(Path(path))
    search_folder(Path(path).parent)
    for override in overrides:
        _override(values, override)
    return _validate(Recipe, values, f"{path}: ")


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML without secrets; ``load_recipe`` reads it back."""
    unnamed = set() if recipe.rewards else {"rewards"}
    values = hide_settings(recipe.model_dump(mode="json", exclude=unnamed))
    return dump_yaml(values)


def with_rewards(recipe: Recipe, weights: Mapping[str, float]) -> Recipe:
    """Return the recipe with these rewards instead of its own.

    Raises:
        ConfigError: evaluation.reward is not one of them.
    """
    return _validate(Recipe, recipe.model_dump() | {"rewards": dict(weights)})


def parse_engine(overrides: Sequence[str]) -> EngineConfig:
    """Return the engine settings of ``engine=NAME`` and ``engine.key=value`` arguments.

    Raises:
        ConfigError: an argument of another section, an unknown key, or an impossible value.
    """
    values = parse_values(["engine={}", *overrides])
    for key in values:
        if key != "engine":
            raise ConfigError(
                f"unknown setting {key!r}: allowed here are engine=NAME and engine.key=value"
            )
    return _validate(EngineConfig, values["engine"], inside=["engine"])


def parse_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the nested mapping of ``dotted.key=value`` arguments.

    Raises:
        ConfigError: an argument of another form.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        _override(values, override)
    return values


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path, ConfigError)
    try:
        values = load_yaml(text)
    except YAML_ERRORS as error:
        raise ConfigError(
            f"the recipe {path} cannot be used as YAML: {yaml_fault(error)}"
        ) from None
    if values is None:
        raise ConfigError(
            f"the recipe {path} is empty; begin with a copy of recipes/quickstart/recipe.yaml"
        )
    if not isinstance(values, dict):
        raise ConfigError(f"the recipe {path} must be a mapping of keys to values")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"an override is written dotted.key=value, got {override!r}")
    *sections, key = dotted.split(".")
    register_settings({key: text})
    for depth, section in enumerate(sections):
        inner = values.setdefault(section, {})
        if depth == 0 and section == "engine" and isinstance(inner, str):
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
        values = inner
    try:
        value = load_yaml(text)
    except YamlLimitError as error:
        raise ConfigError(f"the value of {dotted!r:.80} cannot be used: {error}") from None
    except YAML_ERRORS:  # 2024-13-45 is not a date, but a valid string
        value = text
    if dotted == "engine" and isinstance(value, str) and isinstance(values.get(key), dict):
        values[key]["name"] = value
    else:
        values[key] = value


Section = typing.TypeVar("Section", bound=_Section)


def _validate(
    section: type[Section], values: Mapping[str, Any], where: str = "", inside: Sequence[str] = ()
) -> Section:
    """Return the values as a section; ``where`` and ``inside`` locate them in the error text."""
    register_settings(values)
    for key in _keys(values, list(inside)):
        new = re.sub(r"^rollout\.", "engine.", _RENAMED.get(key, key))
        if new != key:
            raise ConfigError(f"{where}the key {key!r} was renamed: write {new!r}")
    try:
        return section.model_validate(values)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        explained = [_explain(e, section, inside) for e in faults if e["type"] in _EXPLAINED]
        explained += wrong_values([e for e in faults if e["type"] not in _EXPLAINED], inside)
        raise ConfigError(where + "; ".join(explained)) from None


def _keys(values: Any, inside: list[str]) -> Iterator[str]:
    """Yield the dotted keys of a nested mapping, two levels deep."""
    if isinstance(values, Mapping) and len(inside) < 2:
        for key, value in values.items():
            yield ".".join([*inside, str(key)])
            yield from _keys(value, [*inside, str(key)])


_EXPLAINED = ("extra_forbidden", "missing", "value_error")  # kinds of pydantic


def _explain(error: Any, section: type[BaseModel], inside: Sequence[str]) -> str:
    path = [str(part) for part in error["loc"]]
    dotted = ".".join([*inside, *path])
    if error["type"] == "extra_forbidden":
        return unknown_key(dotted, _keys_of(section, path[:-1]))
    if error["type"] == "missing":
        return f"{dotted!r} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{dotted}: {message}" if dotted else message


def _keys_of(section: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        if part not in section.model_fields:
            continue  # A name chosen by the user, such as a reward's.
        annotation = section.model_fields[part].annotation
        kinds = (annotation, *typing.get_args(annotation))  # of a mapping: the values' type too
        section = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(section.model_fields)
