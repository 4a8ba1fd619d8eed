"""Preflight: what can be foreseen of a run before anything heavy starts, each with its number."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from delethink.chunking import ChunkSpec, start
from delethink.config import Recipe, TaskConfig, dump_recipe, with_rewards
from delethink.cost.flops import Cut
from delethink.cost.memory import cache_bytes, longest_context, training_bytes, weight_bytes
from delethink.cost.models import shape_of_config
from delethink.cost.shape import ModelShape
from delethink.engines.factory import choose_engine
from delethink.engines.loading import (
    digest,
    eos_ids,
    load_shell,
    load_tokenizer,
    locate,
    longest_sequence,
)
from delethink.errors import ConfigError, MissingExtraError, ModelError, UserError
from delethink.output import output_path
from delethink.registry import make_task, resolve
from delethink.scoring.rollouts import answer_of
from delethink.scoring.scorer import make_scorer
from delethink.tasks import Taken, Task, demonstrations_of, rewards_of, take
from delethink.tokenization import check_thinking_is_open, query_ids
from delethink.training.resume import changes
from delethink.training.run_directory import RunDirectory
from delethink.training.system import Memory, device_memory, free_disk, process_memory, size_of
from delethink.types import Problem


class Prepared(NamedTuple):
    """A recipe whose names are known."""

    recipe: Recipe  # resolved: its rewards are there, if only the task named them
    task: Task
    evaluation_task: Task  # where held-out problems come from
    scorer: Any  # of training traces; not started
    evaluation_scorer: Any  # of held-out ones: right or wrong; it shares the workers

    def close(self) -> None:
        """Ends what the scorers have started."""
        self.evaluation_scorer.close()
        self.scorer.close()


class Place(NamedTuple):
    """Where a run writes, and whether it was begun there before."""

    run: RunDirectory
    begun: bool
    changed: dict[str, list[Any]]  # [old, new] by dotted key, if so

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether nothing is left to do."""
        return self.begun and self.run.finished_step == recipe.training.max_steps


def prepare(recipe: Recipe) -> Prepared:
    """Resolves every name of a recipe.

    Raises:
        UserError: a name, an argument, a package, a data set, a model folder or an engine is wrong.
    """
    for name, reward in recipe.rewards.items():
        resolve("delethink.rewards", reward.reward or name)
    task = evaluation_task = make_task(recipe.task.name, recipe.task.args, recipe.seed)
    recipe = recipe if recipe.rewards else _with_rewards_of(task, recipe)
    scorer = make_scorer(recipe.rewards, recipe.accuracy_reward, recipe.scoring)
    evaluated = recipe
    if (other := recipe.evaluation.task) is not None:
        evaluation_task = make_task(other.name, other.args, recipe.seed)
        own = recipe.evaluation.model_copy(update={"reward": None})  # it names a training reward
        evaluated = _with_rewards_of(evaluation_task, recipe.model_copy(update={"evaluation": own}))
    accuracy = evaluated.accuracy_reward
    only = {accuracy: evaluated.rewards[accuracy]}  # nothing else is asked of a held-out trace
    evaluation_scorer = make_scorer(only, accuracy, recipe.scoring, scorer.pool)
    locate(recipe.model)
    _check_engine(recipe)
    _check_packages(recipe)
    return Prepared(recipe, task, evaluation_task, scorer, evaluation_scorer)


def place(recipe: Recipe) -> Place:
    """Makes the directory of a resolved recipe's run, or takes the one that the run was begun in.

    Raises:
        RunDirectoryError: it cannot be written, or holds something else or another recipe's run.
    """
    path = run_path(recipe)
    if not RunDirectory.holds_run(path):
        run = RunDirectory.create(path, dump_recipe(recipe), digest(recipe.model))
        return Place(run, False, {})
    changed = changes(path, recipe)
    return Place(RunDirectory.reopen(path), True, changed)


def _with_rewards_of(task: Task, recipe: Recipe) -> Recipe:
    named = rewards_of(task)
    if not named:
        raise ConfigError("the task names no rewards of its own: write rewards: {NAME: WEIGHT}")
    return with_rewards(recipe, named)


def _check_engine(recipe: Recipe) -> None:
    """Settings of workers that an engine in this process would ignore are refused."""
    if choose_engine(recipe.engine.name) == "vllm":
        return
    if recipe.training.max_staleness:
        raise ConfigError(
            f"training.max_staleness={recipe.training.max_staleness} samples while the trainer "
            "trains, which takes engines of their own; the engine here is transformers, with the "
            "trainer's own weights: leave it out or set engine=vllm"
        )
    for key, default in (("num_engines", 1), ("gpus_per_engine", 0.0), ("dtype", None)):
        if (value := getattr(recipe.engine, key)) != default:
            raise ConfigError(
                f"{key}={value} is for vLLM's workers; the engine here is transformers, in this "
                f"process, with the trainer's own float32 weights: leave it out or set engine=vllm"
            )


def _check_packages(recipe: Recipe) -> None:
    """What only some settings need is looked for before anything is loaded."""
    if recipe.trainer.num_ranks > 1 and importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray")
    if recipe.training.lora is not None and importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "lora")
    for name in recipe.training.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training.report_to names {name}, which is not installed: pip install {name}"
            )


def run_path(recipe: Recipe) -> Path:
    """Where the run of a recipe goes."""
    name = f"{recipe.name}-seed{recipe.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    return output_path(recipe.output or Path("runs") / name)


class Inputs(NamedTuple):
    """All that is known of a run without a single weight."""

    tokenizer: Any
    shell: Any  # the model's configuration and generation settings
    spec: ChunkSpec  # bound to the tokenizer
    taken: dict[str, Taken]  # problems of "train" and "heldout"
    longest_query: dict[str, int]  # of each, in tokens

    @property
    def window(self) -> int:
        """The most tokens that the model takes."""
        return longest_sequence(self.shell)


def read_inputs(prepared: Prepared) -> Inputs:
    """Reads tokenizer, settings and problems, and checks that they go together.

    Raises:
        UserError: a tokenizer without an end, a template that closes the thinking, too few
            problems, a query that leaves no room, a model without settings.
    """
    recipe, training = prepared.recipe, prepared.recipe.training
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    shell = load_shell(recipe.model, recipe.trust_remote_code)
    eos_ids(shell, tokenizer)
    needed = training.num_batches * training.traces_per_batch // training.num_generations
    number, other = recipe.evaluation.num_problems, recipe.evaluation.task or recipe.task
    taken = {
        "train": _take(prepared.task, "train", needed, recipe.task, tokenizer),
        "heldout": _take(prepared.evaluation_task, "heldout", number, other, tokenizer),
    }
    spec, window = recipe.thinking.spec().bind(tokenizer), longest_sequence(shell)
    longest = {}
    for split, some in taken.items():
        queries = [query_ids(tokenizer, problem) for problem in some.problems]
        for query in queries:
            start(spec, query, window)
        longest[split] = max(map(len, queries))
    check_thinking_is_open(tokenizer, taken["train"].problems[0])
    return Inputs(tokenizer, shell, spec, taken, longest)


def _take(task: Task, split: str, number: int, config: TaskConfig, tokenizer: Any) -> Taken:
    """The problems of a split that the run uses."""

    def length(problem: Problem) -> int:
        return len(query_ids(tokenizer, problem))

    return take(task, split, number, length, config.max_query_tokens)


Status = Literal["ok", "warning", "problem", "not checked"]

GIB = 2**30
_LIBRARIES = 0.8 * GIB  # of a process that has imported what a trainer needs
# Of activations and caches on the CPU: freed memory stays with the process (cli/process.py), and
# caches grow by being copied. The toy's processes took up to twice what these tensors did.
_SPREAD = 2.0
_BATCH = 256  # chunks that the engine in this process decodes side by side
_LOGITS = 4  # copies of a batch's logits in float32 while a token is drawn
_SAMPLED, _READ = 36, 7  # bytes of a line of traces/ for a token that was sampled, or read
_CLOSE = 0.9  # of what is there: beyond it is close


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    status: Status
    found: str
    advice: str = ""


def check_recipe(recipe: Recipe) -> list[Check]:
    """All checks of a recipe, from its names on; what cannot be looked at any more is left out."""
    try:
        prepared = prepare(recipe)
    except UserError as error:
        return [Check("recipe", "problem", str(error))]
    try:
        checks = [Check("recipe", "ok", f"{recipe.name}: every name and setting is known")]
        try:
            inputs = read_inputs(prepared)
        except UserError as error:
            rewards = list(_rewards(prepared, prepared.task.problem("train", 0), None))
            return [*checks, Check("inputs", "problem", str(error)), *rewards]
        return [*checks, *check_run(prepared, inputs, run_path(prepared.recipe))]
    finally:
        prepared.close()


def check_run(prepared: Prepared, inputs: Inputs, path: Path) -> list[Check]:
    """What is known of a run whose inputs are read, and whose directory is or will be ``path``."""
    checks = [*_tokenizer(inputs), *_context(inputs)]
    try:
        shape = shape_of_config(inputs.shell.config.to_dict(), prepared.recipe.model)
    except ModelError as error:
        checks.append(Check("memory", "not checked", str(error)))
    else:
        checks += _memory(prepared.recipe, inputs, shape)
        checks += _disk(prepared.recipe, inputs, shape, path)
    checks += _rewards(prepared, inputs.taken["train"].problems[0], inputs)
    return checks


def refuse_problems(checks: list[Check], how: Literal["refuse", "warn"]) -> None:
    """Raises a ``ConfigError`` with every problem, unless the recipe only wants to be warned."""
    found = [f"{c.name}: {c.found}; {c.advice}" for c in checks if c.status == "problem"]
    if found and how == "refuse":
        raise ConfigError(f"preflight: {'; '.join(found)}; preflight=warn goes on all the same")


def _tokenizer(inputs: Inputs) -> Iterator[Check]:
    tokenizer, problem = inputs.tokenizer, inputs.taken["train"].problems[0]
    ids = query_ids(tokenizer, problem)
    ends = eos_ids(inputs.shell, tokenizer)
    template = "a chat template" if tokenizer.chat_template else "no chat template"
    listed = ", ".join(f"{tokenizer.convert_ids_to_tokens(end)} ({end})" for end in ends)
    says = str(tokenizer.decode(list(ids)))
    found = f"ends with {listed}; {template}, a query ends with {says[-30:]!r}"
    first = tokenizer.bos_token_id
    if first is not None and ids[:2] == (first, first):
        yield Check(
            "tokenizer",
            "warning",
            f"{found}, and begins with two {tokenizer.bos_token}",
            "take the token out of the chat template: the tokenizer adds it already",
        )
    else:
        yield Check("tokenizer", "ok", found)


def _context(inputs: Inputs) -> Iterator[Check]:
    spec, window, query = inputs.spec, inputs.window, max(inputs.longest_query.values())
    needed = _longest(inputs)
    found = (
        f"queries of up to {query} tokens and a context of {spec.context_size} need {needed} of "
        f"the model's {window}; a budget of {spec.budget} in up to {spec.max_chunks} chunks"
    )
    if query + spec.budget > window:
        yield Check(
            "context",
            "warning",
            f"{found}; as LongCoT it would need {query + spec.budget}",
            "the table will have no row for LongCoT",
        )
    else:
        yield Check("context", "ok", found)


def _memory(recipe: Recipe, inputs: Inputs, shape: ModelShape) -> Iterator[Check]:
    """The most that trainer and engine hold, against what there is.

    The trainer's tensors fit measured steps within a tenth (docs/guide/cost.md); the engine's are
    its caches and logits at their fullest.
    """
    device, ram = device_memory(), process_memory()
    place, spread, more = (device, 1.0, 0.0) if device else (ram, _SPREAD, _LIBRARIES)
    trainer = _trainer_bytes(recipe, inputs, shape, spread)
    # Each process of the trainer has a GPU of its own; on the CPU they share what there is.
    processes = 1 if device else recipe.trainer.num_ranks
    each = f" in each of {recipe.trainer.num_ranks} processes" if processes > 1 else ""
    if choose_engine(recipe.engine.name) == "transformers":
        held = weight_bytes(shape, 12)  # weights and Adam's state; there are no gradients meanwhile
        sampling = held + spread * _sampling_bytes(recipe, inputs, shape)
        needed = more + max(trainer, sampling)
        yield _fits(
            "memory",
            needed,
            place,
            f"training takes {_gib(trainer)}, sampling in the same process {_gib(sampling)}",
            "lower training.forward_tokens or evaluation.num_problems, or take a smaller model",
        )
        return
    yield _fits(
        "memory",
        processes * (trainer + more),
        place,
        f"training takes {_gib(trainer)}{each}",
        "lower training.forward_tokens, or take a smaller model",
    )
    yield from _workers(recipe, inputs, shape, device, ram)


def _workers(
    recipe: Recipe, inputs: Inputs, shape: ModelShape, device: Memory | None, ram: Memory
) -> Iterator[Check]:
    """VLLM reserves its cache; a trace that does not fit in it is never sampled."""
    size = 4 if recipe.engine.engine_dtype == "float32" else 2
    weights = weight_bytes(shape, size)
    cache = float(cache_bytes(shape, _longest(inputs), size, block=16))
    found = (
        f"{recipe.engine.num_engines} workers with {_gib(weights)} of weights each; a context's "
        f"cache takes {_gib(cache)}"
    )
    advice = "take fewer workers, a smaller model or a smaller context"
    reserved = recipe.engine.kv_cache_gib * GIB
    if recipe.engine.gpus_per_engine and device is not None:
        parallel = recipe.engine.tensor_parallel_size
        share = (weights + cache) / parallel / recipe.engine.gpu_memory_utilization
        yield _fits("engine", share, device, found, advice)
    elif cache > reserved:
        advice = f"raise rollout.kv_cache_gib, or {advice}"
        yield Check("engine", "problem", f"{found}, of {_gib(reserved)}", advice)
    else:
        needed = recipe.engine.num_engines * (weights + reserved + _LIBRARIES)
        yield _fits("engine", needed, ram, found, advice)


def _trainer_bytes(recipe: Recipe, inputs: Inputs, shape: ModelShape, spread: float) -> float:
    training = recipe.training
    longest = _longest(inputs)
    whole = training.per_device_train_batch_size * inputs.spec.max_chunks * longest
    tokens = max(longest, min(training.forward_tokens, whole))
    whole_model = weight_bytes(shape, 16)  # weights, gradients, state of Adam
    at_most = training_bytes(
        shape,
        tokens,
        dtype_bytes=2 if training.bf16 else 4,
        by_layer=training.gradient_checkpointing,
    )
    frozen = weight_bytes(shape, 12) if training.lora else 0.0  # no gradients, no state of Adam
    reference = weight_bytes(shape, 4) if training.beta and not training.lora else 0.0
    activations = float(at_most) - whole_model
    held = whole_model - frozen + reference
    if recipe.trainer.strategy == "fsdp2":
        held /= recipe.trainer.num_ranks
    return held + spread * activations


def _sampling_bytes(recipe: Recipe, inputs: Inputs, shape: ModelShape) -> float:
    """Caches and logits of the largest batch, of training or of the table."""
    spec, query = inputs.spec, max(inputs.longest_query.values())
    longest = query + spec.budget if query + spec.budget <= inputs.window else _longest(inputs)
    table = min(_BATCH, recipe.evaluation.num_problems) * float(cache_bytes(shape, longest, 4))
    rows = min(_BATCH, recipe.training.traces_per_batch)
    training = rows * float(cache_bytes(shape, _longest(inputs), 4))
    logits = _BATCH * shape.vocabulary_size * 4 * _LOGITS
    return max(table, training) + logits


def _longest(inputs: Inputs) -> int:
    """The longest context that any trace has."""
    spec = inputs.spec
    outside = spec.head_size if spec.head_outside else 0
    cut = Cut(spec.context_size, spec.carryover_size, outside)
    return int(longest_context(spec.budget, max(inputs.longest_query.values()), cut))


def _disk(recipe: Recipe, inputs: Inputs, shape: ModelShape, path: Path) -> Iterator[Check]:
    training, free = recipe.training, free_disk(path)
    one = weight_bytes(shape, 12 if not training.lora else 4)  # weights and Adam's state
    kept = training.save_total_limit + 1 if training.save_steps else 0  # and the one being written
    checkpoints = kept * one + weight_bytes(shape, 4)
    needed = max(one, checkpoints - size_of(path / "checkpoints"))
    spec = inputs.spec
    read = spec.max_chunks * (inputs.longest_query["train"] + spec.carryover_size)
    trace = spec.budget * _SAMPLED + read * _READ
    traces = training.num_batches * training.traces_per_batch * trace
    found = (
        f"checkpoints take {_gib(checkpoints)} ({_gib(one)} each), traces at most {_gib(traces)}; "
        f"{_gib(free)} are free at {path}"
    )
    advice = "make room, choose another output=PATH, or keep fewer: training.save_total_limit=1"
    if needed > free:
        yield Check("disk", "problem", found, advice)
    elif needed + traces > _CLOSE * free:
        yield Check("disk", "warning", found, advice)
    else:
        yield Check("disk", "ok", found)


def _rewards(prepared: Prepared, problem: Problem, inputs: Inputs | None) -> Iterator[Check]:
    """A right and a wrong answer to a problem, through the scorer that training uses."""
    yield _graded("rewards", prepared.scorer, prepared.task, problem, inputs)
    if prepared.recipe.evaluation.task is not None:
        heldout = prepared.evaluation_task.problem("heldout", 0)
        task, scorer = prepared.evaluation_task, prepared.evaluation_scorer
        yield _graded("rewards of evaluation", scorer, task, heldout, inputs)


def _graded(name: str, scorer: Any, task: Task, problem: Problem, inputs: Inputs | None) -> Check:
    answers = demonstrations_of(task, problem)
    if None in answers:
        return Check(
            name,
            "not checked",
            "the task has no right and wrong answer to show",
            "give it demonstrations(problem)",
        )
    texts = [str(answer) for answer in answers]
    right, wrong = scorer.score_now([_attempt(problem, text, inputs) for text in texts])
    advice = "see what graders make of the task's answers: delethink tasks NAME --check 8"
    for score, what in ((right, "the gold answer"), (wrong, "a wrong answer")):
        if score.errors:
            reward, reason = next(iter(score.errors.items()))
            return Check(name, "problem", f"{reward} cannot score {what}: {reason}", advice)
    found = f"gold answer {_parts(right)}, wrong answer {_parts(wrong)}"
    exact = scorer.accuracy
    if right.parts[exact] != 1 or wrong.parts[exact] != 0:
        return Check(name, "problem", f"{found}; {exact} must say 1 and 0", advice)
    if not _total(right) > _total(wrong):
        return Check(name, "problem", f"{found}: being right does not pay", "mend the weights")
    return Check(name, "ok", found)


def _attempt(problem: Problem, text: str, inputs: Inputs | None) -> Any:
    if inputs is None:
        return answer_of(problem, text)
    ids = inputs.tokenizer(text, add_special_tokens=False)["input_ids"]
    spec = inputs.spec
    return answer_of(problem, text, len(ids), spec.budget, spec.max_chunks)


def _parts(score: Any) -> str:
    known = [f"{name} {value:g}" for name, value in score.parts.items() if value is not None]
    return f"{_total(score):g} ({', '.join(known)})"


def _total(score: Any) -> float:
    return -math.inf if score.total is None else float(score.total)


def _fits(name: str, needed: float, memory: Memory, found: str, advice: str) -> Check:
    text = (
        f"{_gib(needed)} of {_gib(memory.total)} {memory.name}, {_gib(memory.free)} of it free: "
        f"{found}"
    )
    if needed > memory.total:
        return Check(name, "problem", text, advice)
    if needed > _CLOSE * memory.free:
        return Check(name, "warning", text, f"{advice}; or end other programs")
    return Check(name, "ok", text)


def _gib(size: float) -> str:
    return f"{size / GIB:.{1 if size >= 0.1 * GIB else 3}f} GiB"
