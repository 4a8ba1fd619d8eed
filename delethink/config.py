"""Recipes: a YAML file sets the values, ``dotted.key=value`` arguments override them.

A recipe is a typed value that refuses unknown keys and impossible combinations before anything
heavy is imported. Keys of ``training`` keep TRL's names.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from delethink.chunking import ChunkSpec
from delethink.errors import ConfigError, MissingExtraError, did_you_mean
from delethink.registry import make

try:
    import yaml
    from pydantic import (
        BaseModel,
        ConfigDict,
        Field,
        FiniteFloat,
        ValidationError,
        field_validator,
        model_validator,
    )
except ImportError as error:
    raise MissingExtraError(error.name or "pydantic", "train") from None


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class NamedConfig(_Section):
    """Something registered, by its name."""

    name: str
    """What it is called."""
    args: dict[str, Any] = Field(default_factory=dict)
    """What it is made with."""

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ThinkingConfig(_Section):
    """How thinking is cut into chunks."""

    context_size: int = Field(gt=0)
    """Thinking tokens that fit in a context, carried and new ones together (C)."""
    carryover_size: int = Field(ge=0)
    """The most thinking tokens carried over a boundary (m)."""
    max_chunks: int = Field(ge=1)
    """The most chunks of a trace (I)."""
    head_size: int = Field(100, ge=0)
    """How many of the carried tokens are the first ones of the trace."""
    head_outside: bool = False
    """The head comes on top of carryover_size, as in the paper's listing."""
    carryover: NamedConfig | None = None
    """A registered carryover instead of such a head and the latest tokens."""
    boundary: NamedConfig | None = None
    """A registered boundary, which may end a chunk before it is full."""

    def spec(self) -> ChunkSpec:
        """The rule's own value; policies that read text are still to be bound to a tokenizer."""
        values = self.model_dump()
        if self.carryover is not None and "head_size" not in self.model_fields_set:
            del values["head_size"]
        for key, group in (("carryover", "carryovers"), ("boundary", "boundaries")):
            values[key] = make(f"delethink.{group}", values[key])
        return ChunkSpec(**values)

    @field_validator("carryover", mode="before")
    @classmethod
    def _is_no_size(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            raise ValueError(
                f"a carryover is a registered name, or a mapping with name and args, got {value}. "
                "Did you mean 'carryover_size'?"
            )
        return value

    @model_validator(mode="after")
    def _is_possible(self) -> ThinkingConfig:
        self.spec()
        return self


class TaskConfig(NamedConfig):
    """Where problems come from: a registered task, or family/member."""

    max_query_tokens: int | None = Field(None, gt=0)
    """Longer queries are passed over, counted and reported; unset, what does not fit is refused."""


class RewardConfig(_Section):
    """A reward; a bare number stands for one with that weight."""

    weight: FiniteFloat = 1.0
    """What its value is multiplied with in the sum; 0 only measures it."""
    reward: str | None = None
    """The registered name, where it is not the key: so one reward can be there twice."""
    args: dict[str, Any] = Field(default_factory=dict)
    """The reward's own settings."""
    isolated: bool | None = None
    """Run it in a worker that can be killed, or not; unset, as the reward itself says."""

    @model_validator(mode="before")
    @classmethod
    def _from_weight(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"weight": value}
        if not isinstance(value, dict | RewardConfig):
            raise ValueError(
                f"a reward is a weight, or a section with {', '.join(cls.model_fields)}; "
                f"got {value!r}"
            )
        return value


class ScoringConfig(_Section):
    """What stands in the place of the sum of rewards, and how far verifiers may go."""

    out_of_budget: Literal["score", "zero", "mask", "penalty"] = "score"
    """A trace that ran out of budget is scored as any other, or 0, or less a penalty, or masked:
    scored for the baseline of its group, but left out of the loss and of its mean."""
    penalty: FiniteFloat = 1.0
    """What "penalty" takes off its score."""
    error: FiniteFloat | None = None
    """Score of a trace that failed, or whose reward cannot be computed; unset, it has none."""
    num_workers: int | None = Field(None, gt=0)
    """Processes for rewards that may hang; unset, one for each core, at most eight."""
    timeout: float = Field(10.0, gt=0, allow_inf_nan=False)
    """Seconds of one such reward; it is killed then."""
    memory_mb: int = Field(2048, ge=64)
    """Megabytes of memory of one such reward; it is killed beyond."""


_REFUSED_LOSS_TYPES = {
    "bnpo": "it divides by the tokens of a micro-batch, so how traces are cut into micro-batches "
    "would change the result",
    "vespo": "it weighs a trace with the product of its ratios, which over thousands of tokens is "
    "always at its bounds",
}


class LoraConfig(_Section):
    """Low-rank adapters, under PEFT's names."""

    r: int = Field(16, gt=0)
    """Rank."""
    lora_alpha: float = Field(32, gt=0, allow_inf_nan=False)
    """Scale: what the adapters say is multiplied with lora_alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Which layers; by default every linear one but the head."""


class TrainingConfig(_Section):
    """The optimiser and the objective, under TRL's names. Batches count traces."""

    max_steps: int = Field(gt=0)
    """Optimizer steps."""
    num_generations: int = Field(8, ge=2)
    """Traces of each problem (G)."""
    per_device_train_batch_size: int = Field(8, gt=0)
    """Traces in a micro-batch; it changes memory, not the result."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    """Micro-batches in an optimizer step; several processes share them."""
    learning_rate: float = Field(1e-6, ge=0, allow_inf_nan=False)
    """Of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    """How the learning rate goes over the run."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of warm-up."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of AdamW."""
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    """Of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Gradients are clipped to this global norm."""
    temperature: float = Field(0.6, gt=0, allow_inf_nan=False)
    """Of sampling, and of the log-probs in the loss."""
    epsilon: float = Field(0.2, gt=0, lt=1)
    """Lower clip range of the probability ratio, which is 1 in the first step on a batch."""
    epsilon_high: float = Field(0.26, gt=0, allow_inf_nan=False)
    """Upper clip range of the same ratio ("clip-higher")."""
    beta: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the KL divergence from the first weights."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the advantage is divided by: a standard deviation, or nothing."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"] = "grpo"
    """What a token weighs; "grpo" divides a trace by its own number of sampled tokens."""
    delta: float | None = Field(None, gt=1, allow_inf_nan=False)
    """Upper bound of the ratio where the advantage is negative ("dual clip"; the authors' is 3)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """What the ratio is taken over: a token, or a whole trace."""
    vllm_importance_sampling_correction: bool = True
    """Weigh tokens for the difference between the engine's probabilities and the trainer's."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask"] = "token_truncate"
    """A weight beyond its bound is cut to it, or its token dropped."""
    vllm_importance_sampling_clip_max: float = Field(2.0, ge=1, allow_inf_nan=False)
    """That bound."""
    num_iterations: int = Field(1, ge=1)
    """How often a batch is trained on."""
    steps_per_generation: int | None = Field(None, gt=0)
    """Micro-batches sampled at once; unset, those of one optimizer step."""
    max_sampling_rounds: int = Field(1, ge=1)
    """With more than 1, groups of equal rewards are replaced by others, so many rounds at most."""
    max_staleness: int = Field(0, ge=0)
    """Sample the next batches while training, at most so many weight updates old when begun."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""
    bf16: bool = False
    """Compute in bfloat16; weights, log-probs and the loss stay float32."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory for one chunk, a third more time."""
    report_to: list[Literal["wandb", "tensorboard", "trackio"]] = Field(default_factory=list)
    """Where else metrics go."""
    forward_tokens: int = Field(16_384, gt=0)
    """Tokens in one forward and backward pass: what memory depends on. It changes no result."""
    max_failed_share: float = Field(0.1, ge=0, le=1)
    """A step with a larger share of failed traces stops the run."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss, gradient or log-prob that is not finite does: stop the run, or skip the step."""
    save_steps: int | None = Field(10, gt=0)
    """Steps between checkpoints, from which a run is taken up; null keeps the last weights only."""
    save_total_limit: int = Field(2, gt=0)
    """Checkpoints that are kept, the newest ones."""

    @property
    def traces_per_step(self) -> int:
        """Traces of an optimizer step, over all processes."""
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

    @property
    def num_batches(self) -> int:
        """How often is sampled in the run."""
        return -(-self.max_steps // self.steps_per_batch)

    @field_validator("loss_type", mode="before")
    @classmethod
    def _is_of_traces(cls, value: Any) -> Any:
        if reason := _REFUSED_LOSS_TYPES.get(str(value)):
            raise ValueError(f"{value!r} makes no sense for traces: {reason}")
        return value

    @model_validator(mode="after")
    def _has_whole_groups(self) -> TrainingConfig:
        micro_batches = self.steps_per_generation or self.gradient_accumulation_steps
        if micro_batches % self.gradient_accumulation_steps:
            raise ValueError(
                "steps_per_generation counts micro-batches and must hold whole optimizer steps: "
                f"{micro_batches} do not divide by gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}"
            )
        if self.traces_per_batch % self.num_generations:
            key = "steps_per_generation" if self.steps_per_generation else ""
            raise ValueError(
                f"per_device_train_batch_size x {key or 'gradient_accumulation_steps'} must hold "
                f"whole groups: {self.traces_per_batch} traces do not divide by num_generations="
                f"{self.num_generations}"
            )
        if 0 < self.max_staleness < self.steps_per_batch:
            raise ValueError(
                f"max_staleness={self.max_staleness} is less than the {self.steps_per_batch} "
                "optimizer steps on a batch: the next one cannot be begun before they are done"
            )
        if self.loss_type == "luspo" and self.importance_sampling_level != "sequence":
            raise ValueError("loss_type=luspo is defined for importance_sampling_level=sequence")
        return self


class TrainerConfig(_Section):
    """The processes that train together, each with the model; the engine has workers of its own."""

    num_workers: int = Field(1, ge=1)
    """Processes under Ray Train; 1 trains in this one, without Ray Train."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """"ddp" keeps the whole model in every process, "fsdp2" shards it over them."""
    cpus_per_worker: float = Field(1.0, gt=0, allow_inf_nan=False)
    """CPUs that Ray gives each process."""
    gpus_per_worker: int = Field(0, ge=0, le=1)
    """GPUs that Ray gives each process; 0 on a machine without."""

    @model_validator(mode="after")
    def _is_possible(self) -> TrainerConfig:
        if self.num_workers > 1:
            return self
        if self.strategy == "fsdp2":
            raise ValueError(
                "strategy=fsdp2 shards a model over processes, and num_workers=1 is one: set "
                "trainer.num_workers to 2 or more, or leave the strategy out"
            )
        for key in ("cpus_per_worker", "gpus_per_worker"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is what Ray gives each of several processes, and num_workers=1 trains "
                    "in this one, with what it has: set trainer.num_workers to 2 or more, or leave "
                    f"{key} out"
                )
        return self


class EvaluationConfig(_Section):
    """Held-out problems: a few at intervals, all of them in the table at the end."""

    num_problems: int = Field(256, ge=2)
    """Problems in each row of the table."""
    reward: str | None = None
    """The reward that says right (1) or wrong (0); by default the recipe's first."""
    task: TaskConfig | None = None
    """Where held-out problems come from, scored by that task's own rewards; by default the task."""
    every: int = Field(10, ge=1)
    """Steps between evaluations."""
    num_problems_at_intervals: int = Field(64, ge=2)
    """Problems in those."""


class RolloutConfig(_Section):
    """How traces are sampled, and how vLLM's workers are treated; times are in seconds."""

    order: Literal["breadth", "depth"] = "breadth"
    """Traces with the fewest chunks first, so that none starts late; or those that were begun."""
    chunk_timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    """For which a worker may have a chunk; then its trace is aborted. Unset, for ever."""
    step_timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    """For the sampling of a step; traces that have not ended then are aborted. Unset, none."""
    silence_timeout: float = Field(15.0, gt=0, allow_inf_nan=False)
    """After which the chunks of a worker without a sign of life go to others."""
    hang_timeout: float = Field(120.0, gt=0, allow_inf_nan=False)
    """After which a worker without a sign of life, or whose engine stands still, is restarted."""
    slow_factor: float = Field(8.0, ge=1, allow_inf_nan=False)
    """How many times longer than the others a worker may take before it is restarted."""
    lost_timeout: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Without any worker, after which the run stops."""
    max_restarts: int = Field(5, ge=0)
    """Of a worker, in a row and without a chunk in between."""
    max_attempts: int = Field(5, ge=1)
    """At a chunk whose workers die or raise, before its trace has failed."""
    startup_timeout: float = Field(300.0, gt=0, allow_inf_nan=False)
    """For a worker to start."""
    chunks_per_worker: int | None = Field(None, ge=1)
    """Chunks that a worker has at a time; unset, a quarter more than its batch takes, and twice its
    batch while many wait."""
    max_batch_size: int | None = Field(None, ge=1)
    """Chunks that an engine samples side by side; unset, as vLLM says."""
    kv_cache_gib: float = Field(1.0, gt=0, allow_inf_nan=False)
    """GiB for the KV cache of a worker, on the CPU."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory for a worker."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Ranks over which each engine is spread: on GPUs, as many as each worker has."""
    placement: Literal["pack", "spread"] | None = None
    """Workers on as few, or as many, nodes as there are; unset, as Ray likes."""
    sleep: bool = False
    """Free the workers' GPUs while the trainer trains."""
    weight_transfer: Literal["store", "nccl", "ipc"] = "store"
    """How new weights come to workers: Ray's object store, or vLLM's own transfer between GPUs."""


class Recipe(_Section):
    """Everything that decides a run."""

    name: str
    """What the run is called."""
    model: str
    """A folder, a Hugging Face id, or "toy" for the shipped reasoner."""
    task: TaskConfig
    rewards: dict[str, RewardConfig] = Field(default_factory=dict)
    """Registered rewards: a weight each, or a section. Left out, those of the task."""
    scoring: ScoringConfig = ScoringConfig()
    thinking: ThinkingConfig
    training: TrainingConfig
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What samples: "auto" takes vLLM in Ray workers where it can be imported."""
    num_workers: int = Field(1, ge=1)
    """Ray workers, each with an engine of its own; "transformers" has one, in this process."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs that Ray gives each worker; 0 on a machine without."""
    weight_sync_timeout: float = Field(60.0, gt=0)
    """Seconds that workers have to take up new weights."""
    rollout: RolloutConfig = RolloutConfig()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of vLLM's weights; the trainer's, and with them the in-process engine's, are float32."""
    trust_remote_code: bool = False
    """Let code from the model's repository run."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of problems, sampling and training."""
    preflight: Literal["refuse", "warn"] = "refuse"
    """What a problem does that is found before anything heavy starts: end the run, or be told."""
    output: Path | None = None
    """The run directory, also of a run to go on with; relative to DELETHINK_OUTPUT if set."""

    @property
    def accuracy_reward(self) -> str:
        """The name of the reward that says right or wrong; ``""`` where rewards are the task's."""
        return self.evaluation.reward or next(iter(self.rewards), "")

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Recipe:
        if self.trainer.strategy == "fsdp2" and self.training.lora is not None:
            raise ValueError(
                "trainer.strategy=fsdp2 with training.lora: the engine is served adapters merged "
                "into whole weights, which sharded ones are not; set trainer.strategy=ddp"
            )
        return self

    @model_validator(mode="after")
    def _has_traces_for_every_process(self) -> Recipe:
        traces, processes = self.training.traces_per_step, self.trainer.num_workers
        if traces % processes:
            fitting = [n for n in range(1, traces + 1) if traces % n == 0]
            near = sorted(fitting, key=lambda n: abs(n - processes))[:3]
            raise ValueError(
                f"an optimizer step of {traces} traces (training.per_device_train_batch_size x "
                f"gradient_accumulation_steps) does not divide by trainer.num_workers={processes}; "
                f"{', '.join(map(str, sorted(near)))} processes would fit"
            )
        return self

    @model_validator(mode="after")
    def _knows_accuracy(self) -> Recipe:
        if "rewards" in self.model_fields_set and not self.rewards:
            raise ValueError("'rewards' is {}: name one, or leave the key out for the task's own")
        if self.rewards and self.accuracy_reward not in self.rewards:
            raise ValueError(
                f"evaluation.reward={self.accuracy_reward!r} is none of the recipe's rewards."
                f"{did_you_mean(self.accuracy_reward, self.rewards)}"
            )
        return self


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe and applies ``dotted.key=value`` overrides.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the text names the nearest one), or an
            impossible value.
    """
    values = _read(Path(path))
    for override in overrides or []:
        _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that ``load_recipe`` reads back."""
    unnamed = set() if recipe.rewards else {"rewards"}
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude=unnamed), sort_keys=False)


def with_rewards(recipe: Recipe, weights: Mapping[str, float]) -> Recipe:
    """The recipe with these rewards in the place of its own.

    Raises:
        ConfigError: evaluation.reward is none of them.
    """
    values = recipe.model_dump() | {"rewards": dict(weights)}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def parse_values(overrides: Sequence[str]) -> dict[str, Any]:
    """What ``dotted.key=value`` arguments say, by themselves.

    Raises:
        ConfigError: an argument of another form.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        _override(values, override)
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"the recipe {path} is not YAML: {first}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"the recipe {path} must be a mapping of keys to values")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"an override is written dotted.key=value, got {override!r}")
    *sections, key = dotted.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
        values = inner
    try:
        values[key] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # 2024-13-45 is no date, but a fine string
        values[key] = text


def _explain(problem: ValidationError) -> str:
    return "; ".join(_explain_one(error) for error in problem.errors(include_url=False))


def _explain_one(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    dotted = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _keys_of(path[:-1])
        return f"unknown key {dotted!r}.{did_you_mean(path[-1], known)}"
    if error["type"] == "missing":
        return f"{dotted!r} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted!r} is {error['input']!r}: {message[:1].lower()}{message[1:]}"


def _keys_of(path: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in path:
        if part not in section.model_fields:
            continue  # a name that the user chose, as of a reward: what is in it is known already
        kinds = _alternatives(section.model_fields[part].annotation)
        section = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(section.model_fields)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that a value may have, for a mapping those of its values."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    if union or typing.get_origin(annotation) is dict:
        return typing.get_args(annotation)
    return (annotation,)
