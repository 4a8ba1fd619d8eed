"""Checks before a run: names and settings, then inputs, then memory, disk and rewards.

``prepare`` resolves the names of a recipe, ``read_inputs`` reads tokenizer, configuration and
problems, and ``run_checks`` compares them with this machine. None of them loads weights.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from delethink.chunking import ChunkSpec, start
from delethink.config import EngineConfig, Recipe, RewardConfig, with_rewards
from delethink.cost.memory import cache_bytes, training_bytes, weight_bytes
from delethink.cost.models import shape_of_config
from delethink.cost.recipe_terms import terms_of
from delethink.cost.shape import ModelShape
from delethink.engines.engine_settings import check_engine_settings
from delethink.engines.factory import choose_engine
from delethink.engines.loading import (
    engine_window,
    eos_ids,
    find_adapter,
    load_shell,
    load_tokenizer,
    locate,
    longest_sequence,
    scaled_window,
)
from delethink.errors import ConfigError, MissingExtraError, ModelError, UserError
from delethink.registry import make_task, resolve
from delethink.scoring.isolation import ADVICE, find_isolation
from delethink.scoring.rollouts import attempt_from_text, mark_setting
from delethink.scoring.scorer import make_scorer
from delethink.tasks import SelectedProblems, Task, demonstrations_of, rewards_of, select_problems
from delethink.thinking_marks import (
    AUTO,
    OPTION,
    SETTING,
    find_thinking_marks,
    marks_of,
    shown_ends,
)
from delethink.tokenization import (
    bind_marks,
    check_thinking_is_open,
    end_tokens,
    loses_spaces,
    query_ids,
    tokenizer_faults,
)
from delethink.training.checkpointing import run_path
from delethink.training.export import stored_dtype
from delethink.training.lora import adapter_parameters
from delethink.training.preflight_check import (
    BYTES_PER_GIB,
    WARNING_SHARE,
    Check,
    compare_size,
    gib,
)
from delethink.training.preflight_hardware import check_here
from delethink.training.preflight_machine import check_machine, check_shared_memory
from delethink.training.system import device_memory, free_disk, process_memory
from delethink.types import Problem, Score

# -- names and settings ------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A recipe whose names are resolved."""

    recipe: Recipe  # with the rewards of the task, if it names none itself
    task: Task
    evaluation_task: Task  # source of held-out problems
    scorer: Any  # for training
    evaluation_scorer: Any  # for held-out problems: the accuracy only, on the same verifiers

    def close(self) -> None:
        """Stop the verifiers."""
        self.evaluation_scorer.close()
        self.scorer.close()


def prepare(recipe: Recipe) -> Prepared:
    """Resolve every name of a recipe, and check engine and packages.

    Raises:
        UserError: a name, an argument, a package, a data set, a model folder or an engine is wrong,
            or the GPUs are not here.
    """
    check_machine(recipe)
    for name, reward in recipe.rewards.items():
        resolve("delethink.rewards", reward.reward or name)
    task = evaluation_task = make_task(recipe.task.name, recipe.task.args, recipe.seed)
    recipe = recipe if recipe.rewards else _with_rewards_of(task, recipe)
    scorer = make_scorer(recipe.rewards, recipe.accuracy_reward, recipe.scoring)
    evaluated = recipe
    if (other := recipe.evaluation.task) is not None:
        evaluation_task = make_task(other.name, other.args, recipe.seed)
        # evaluation.reward names a reward of training.
        evaluation = recipe.evaluation.model_copy(update={"reward": None})
        evaluated = recipe.model_copy(update={"evaluation": evaluation})
        evaluated = _with_rewards_of(evaluation_task, evaluated)
    accuracy = evaluated.accuracy_reward
    evaluation_scorer = make_scorer(
        {accuracy: evaluated.rewards[accuracy]}, accuracy, recipe.scoring, scorer.pool
    )
    locate(recipe.model)
    _check_engine(recipe)
    _check_packages(recipe)
    return Prepared(recipe, task, evaluation_task, scorer, evaluation_scorer)


def _with_rewards_of(task: Task, recipe: Recipe) -> Recipe:
    weights = rewards_of(task)
    if not weights:
        raise ConfigError("the task has no rewards of its own: set rewards: {NAME: WEIGHT}")
    return with_rewards(recipe, weights)


def _check_engine(recipe: Recipe) -> None:
    """Refuse settings without effect on the engine."""
    check_engine_settings(recipe.engine, trains=True)
    if choose_engine(recipe.engine.name) != "transformers":
        return
    if recipe.training.max_staleness:
        raise ConfigError(
            f"training.max_staleness={recipe.training.max_staleness} samples during training, and "
            "engine=transformers shares its weights with the trainer: leave it out, or set "
            "engine=vllm"
        )


def _check_packages(recipe: Recipe) -> None:
    if recipe.trainer.num_ranks > 1 and importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray")
    is_folder = Path(recipe.model).expanduser().is_dir()  # an id is not looked up yet
    is_adapter = is_folder and find_adapter(recipe.model) is not None
    if (recipe.training.lora or is_adapter) and importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "lora")
    for name in recipe.training.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training.report_to names {name}, which is not installed: pip install {name}"
            )


# -- inputs ------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Inputs of a run, without weights."""

    tokenizer: Any
    shell: Any  # configuration and generation settings of the model
    spec: ChunkSpec  # bound to the tokenizer
    selected: dict[str, SelectedProblems]  # by split: "train" and "heldout"
    longest_query: dict[str, int]  # by split, in tokens
    num_adapter_parameters: int = 0  # of training.lora

    @property
    def longest_context(self) -> int:
        """Longest sequence of any chunk, prompt and output, in tokens."""
        return max(self.longest_query.values()) + self.spec.max_thinking_context

    @property
    def longcot_context(self) -> int:
        """Longest sequence of LongCoT with the same budget, in tokens."""
        return max(self.longest_query.values()) + self.spec.budget

    def engine_config(self, engine: EngineConfig) -> EngineConfig:
        """Return the settings with the longest sequence of the run, unless they have one."""
        if engine.max_model_tokens is not None:
            return engine
        return engine.model_copy(update={"max_model_tokens": self.engine_context})

    @property
    def engine_context(self) -> int:
        """Longest sequence of the run, LongCoT's in the table included if the model takes it."""
        longcot = self.longest_query["heldout"] + self.spec.budget
        fits = longcot <= longest_sequence(self.shell)
        return max(self.longest_context, longcot if fits else 0)

    @property
    def max_chunks(self) -> int:
        """Most chunks of a trace, including chunks that write a carryover."""
        return self.spec.max_chunks + (self.spec.max_chunks - 1 if self.spec.ask else 0)

    @property
    def max_prompt_tokens(self) -> int:
        """Most prompt tokens of all chunks of a training trace together."""
        spec, query = self.spec, self.longest_query["train"]
        carried = spec.thinking_budget if spec.max_carried is None else spec.max_carried
        thinking = spec.max_chunks * (query + carried)
        written = query + spec.max_thinking_context - spec.max_written
        return thinking + (self.max_chunks - spec.max_chunks) * written


def read_inputs(prepared: Prepared) -> Inputs:
    """Read tokenizer, configuration and problems, and check their sizes.

    Raises:
        UserError: the tokenizer has no end token, the chat template fails or closes the thinking,
            there are too few problems, a query leaves no room for thinking, the model has no
            settings, or it has no layers for the adapters.
    """
    recipe, training = prepared.recipe, prepared.recipe.training
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code, recipe.chat_template_kwargs)
    bind_marks(tokenizer, mark_setting(prepared.scorer, recipe.task.end_of_thinking))
    shell = load_shell(recipe.model, recipe.trust_remote_code)
    eos_ids(shell, tokenizer)
    adapters = 0
    if training.lora is not None:
        adapters = adapter_parameters(shell.config, training.lora, recipe.trust_remote_code)
    spec = recipe.thinking.spec().bind(tokenizer)
    max_model_tokens = engine_window(shell, recipe.engine.max_model_tokens)
    num_heldout = recipe.evaluation.num_problems
    num_train = training.num_batches * training.traces_per_batch // training.num_generations
    evaluated = recipe.evaluation.task or recipe.task
    selected, longest = {}, {}
    for split, task, number, limit in (
        ("train", prepared.task, num_train, recipe.task.max_query_tokens),
        ("heldout", prepared.evaluation_task, num_heldout, evaluated.max_query_tokens),
    ):
        selected[split] = select_problems(
            task, split, number, lambda problem: len(query_ids(tokenizer, problem)), limit
        )
        queries = [query_ids(tokenizer, problem) for problem in selected[split].problems]
        for query in queries:
            start(spec, query, max_model_tokens)
        longest[split] = max(map(len, queries), default=0)
    for chosen in selected.values():  # tasks may have system messages of their own
        for problem in chosen.problems[:1]:
            check_thinking_is_open(tokenizer, problem)
    return Inputs(tokenizer, shell, spec, selected, longest, adapters)


# -- checks ------------------------------------------------------------------------------------

_LIBRARY_BYTES = 0.8 * BYTES_PER_GIB  # memory of a process after importing the trainer
# On the CPU, freed memory stays with the process (cli/process.py), and caches grow by copying. The
# processes of the toy reasoner took up to twice the size of their activations and caches.
_CPU_OVERHEAD_FACTOR = 2.0
_MAX_BATCH_SIZE = 256  # chunks in a batch of the engine in this process
_LOGIT_COPIES = 4  # float32 copies of a batch's logits while a token is drawn
_BYTES_PER_SAMPLED_TOKEN, _BYTES_PER_PROMPT_TOKEN = 36, 7  # in traces/


def run_checks(prepared: Prepared, inputs: Inputs, path: Path) -> list[Check]:
    """Run all checks; the run directory need not exist yet."""
    import torch

    recipe, checks = prepared.recipe, list[Check]()
    if (number := torch.cuda.device_count()) > 1 and "WORLD_SIZE" not in os.environ:
        found = f"{number} GPUs are visible and the trainer uses one"  # TRL wants a process each
        checks.append(Check("devices", "problem", found, "choose it with CUDA_VISIBLE_DEVICES"))
    tokenizer, problem = inputs.tokenizer, inputs.selected["train"].problems[0]
    checks.append(_check_tokenizer(tokenizer, inputs.shell, problem))
    checks += [*_check_marks(prepared, inputs), _check_context(inputs)]
    try:
        shape = shape_of_config(inputs.shell.config.to_dict(), recipe.model)
    except ModelError as error:
        checks.append(Check("memory", "not checked", str(error)))
    else:
        checks += _check_memory(recipe, inputs, shape)
        update = weight_bytes(shape, 4)  # the object store takes float32
        if (shared := check_shared_memory(recipe, update)) is not None:
            checks.append(shared)
        checks.append(_check_disk(recipe, inputs, shape, path))
    return checks + _check_rewards(prepared, inputs)


def check_recipe(recipe: Recipe) -> list[Check]:
    """Run all checks of a recipe, up to a wrong name or an input that cannot be read."""
    try:
        prepared = prepare(recipe)
    except UserError as error:
        return [Check("recipe", "problem", str(error))]
    with closing(prepared):
        names = Check("recipe", "ok", f"{recipe.name}: all names and settings are known")
        try:
            inputs = read_inputs(prepared)
        except UserError as error:
            return [names, Check("inputs", "problem", str(error))]
        return [names, *run_checks(prepared, inputs, run_path(prepared.recipe))]


def check_model(
    model: str, chat_template_kwargs: Mapping[str, Any], end_of_thinking: str | None
) -> list[Check]:
    """Check tokenizer, chat template and marks of thinking of a model, without a recipe.

    ``end_of_thinking`` is the setting of ``find_thinking_marks``.
    """
    try:
        tokenizer = load_tokenizer(model, chat_template_kwargs=chat_template_kwargs)
        shell = load_shell(model)
        bind_marks(tokenizer, end_of_thinking)
        checks = [_check_tokenizer(tokenizer, shell, _QUESTION), check_marks(tokenizer)]
    except UserError as error:
        return [Check("model", "problem", str(error))]
    try:
        check_thinking_is_open(tokenizer, _QUESTION)
    except ModelError as error:
        checks.append(Check("template", "problem", str(error)))
    return checks


_QUESTION = Problem("What is 1 + 1?", "2")


def _check_tokenizer(tokenizer: Any, shell: Any, problem: Problem) -> Check:
    """Show end tokens and chat template, and check special tokens and spaces."""
    ids = query_ids(tokenizer, problem)
    template = "a chat template" if tokenizer.chat_template else "no chat template"
    sources, ends = end_tokens(tokenizer, shell), eos_ids(shell, tokenizer)
    listed = ", ".join(
        f"{tokenizer.convert_ids_to_tokens(end)} ({end}, from {sources[end]})" for end in ends
    )
    text = str(tokenizer.decode(list(ids)))
    found = f"ends with {listed}; {template}, a query ends with {text[-30:]!r}"
    faults = tokenizer_faults(tokenizer, ids, ends)
    if not faults:
        return Check("tokenizer", "ok", found)
    found = "; ".join([found, *(fault for fault, _ in faults)])
    advice = "; ".join(dict.fromkeys(advice for _, advice in faults))
    # Prompts and answers without spaces are not what the model was trained on.
    status: Literal["problem", "warning"] = "problem" if loses_spaces(tokenizer) else "warning"
    return Check("tokenizer", status, found, advice)


def check_marks(tokenizer: Any) -> Check:
    """Show the marks of thinking of a model, and warn if nothing shows that it writes them."""
    marks, shown = marks_of(tokenizer), shown_ends(tokenizer)
    known = f"the tokenizer shows {', '.join(shown)}" if shown else "the tokenizer shows no mark"
    if marks.end is None:
        found = f"no mark of the end of thinking ({marks.source}): the whole output is the answer"
        return Check("thinking", "ok", f"{found}; {known}")
    source = marks.source if marks.is_assumed else f"from {marks.source}"
    found = f"the answer begins after {marks.end} ({source})"
    if marks.end in shown or (marks.source == SETTING and not shown):  # plain text, says the user
        return Check("thinking", "ok", found)
    advice = (
        f"set {OPTION}, to {shown[0]!r} or auto"
        if shown
        else f"every reward is 0 until the model writes {marks.end}: ask for it in the prompt, "
        f"train the model to write it, or set {OPTION}, to the model's own mark, or to null to "
        "grade the whole output"
    )
    where = "" if marks.is_assumed else f"; {known}"
    return Check("thinking", "warning", f"{found}{where}", advice)


def _check_marks(prepared: Prepared, inputs: Inputs) -> list[Check]:
    """Show the marks of the model, and compare them with those that rewards look for."""
    marks = marks_of(inputs.tokenizer)
    checks = [check_marks(inputs.tokenizer)]
    for reward in prepared.scorer.rewards:
        end = reward.end_of_thinking(marks.end)
        if end is not None and end != marks.end:
            found = f"{reward.name} looks for {end}, and the model's mark is {marks.end}"
            advice = f"leave out rewards.{reward.name}.args.end, or set {OPTION}"
            checks.append(Check("thinking", "warning", found, advice))
    return checks


def _check_context(inputs: Inputs) -> Check:
    """Compare contexts with the longest sequence of the model."""
    spec, available = inputs.spec, longest_sequence(inputs.shell)
    found = (
        f"queries of up to {max(inputs.longest_query.values())} tokens and a context of "
        f"{spec.context_size} need {inputs.longest_context} of the model's {available}; a budget "
        f"of {spec.budget} in up to {spec.max_chunks} chunks"
    )
    if (scaled := scaled_window(inputs.shell)) > available:
        found = (
            f"{found}; RoPE is scaled for {scaled}, which max_position_embeddings={scaled} in "
            "config.json would allow"
        )
    if inputs.longcot_context <= available:
        return Check("context", "ok", found)
    found = f"{found}; LongCoT would need {inputs.longcot_context}"
    return Check("context", "warning", found, "the table will have no row for LongCoT")


def _check_memory(recipe: Recipe, inputs: Inputs, shape: ModelShape) -> list[Check]:
    """Compare the peak memory of trainer and engines, caches full, with that of this machine."""
    device, ram = device_memory(), process_memory()
    memory, factor, extra = (
        (device, 1.0, 0.0) if device else (ram, _CPU_OVERHEAD_FACTOR, _LIBRARY_BYTES)
    )
    trainer = _trainer_bytes(recipe, inputs, shape, factor)  # within a tenth (docs/guide/cost.md)
    if choose_engine(recipe.engine.name) == "transformers":
        # Weights and the state of Adam; there are no gradients while the engine samples.
        sampling = weight_bytes(shape, 12) + factor * _sampling_bytes(recipe, inputs, shape)
        needed = extra + max(trainer, sampling)
        found = f"training takes {gib(trainer)}, sampling in the same process {gib(sampling)}"
        advice = "lower training.forward_tokens or evaluation.num_problems, or use a smaller model"
        return [compare_size("memory", needed, memory, found, advice)]
    if device is not None and recipe.engine.gpus_per_engine:
        query = max(inputs.longest_query.values())
        longest = recipe.engine.max_model_tokens or inputs.engine_context
        adapters = inputs.num_adapter_parameters
        return check_here(terms_of(recipe, shape, query, adapters, longest), device)
    # Every rank has a GPU of its own; on the CPU, ranks and engines share the memory.
    ranks = 1 if device else recipe.trainer.num_ranks
    engines, engine_check = _check_workers(recipe, inputs, shape)
    found = f"training takes {gib(trainer)}" + (f" on each of {ranks} ranks" if ranks > 1 else "")
    needed = ranks * (trainer + extra)
    if device is None:
        needed += engines
        found = f"{found}, engines take {gib(engines)} beside it"
    advice = "lower training.forward_tokens, or use a smaller model or fewer engines"
    return [compare_size("memory", needed, memory, found, advice), engine_check]


def _check_workers(recipe: Recipe, inputs: Inputs, shape: ModelShape) -> tuple[float, Check]:
    """Compare the cache of a worker on the CPU with one context; return the bytes of all workers.

    The bytes include the copy of new weights that each worker reads.
    """
    engine, size = recipe.engine, 4 if recipe.engine.engine_dtype == "float32" else 2
    weights = weight_bytes(shape, size)
    longest = engine.max_model_tokens or inputs.engine_context
    cache = float(cache_bytes(shape, longest, size, block=16))
    reserved = engine.kv_cache_gib * BYTES_PER_GIB
    needed = engine.num_engines * (2 * weights + reserved + _LIBRARY_BYTES)
    found = (
        f"{engine.num_engines} workers with {gib(weights)} of weights and {gib(reserved)} of cache "
        f"each; a sequence of {longest} takes {gib(cache)} of it"
    )
    if cache <= reserved:
        return needed, Check("engine", "ok", found)
    advice = "raise engine.kv_cache_gib, or use a smaller model or a smaller context"
    found = f"{found}, of {gib(reserved)}"
    return needed, Check("engine", "problem", found, advice)


def _trainer_bytes(recipe: Recipe, inputs: Inputs, shape: ModelShape, factor: float) -> float:
    """Return the memory of a rank; ``factor`` multiplies the activations."""
    training, longest = recipe.training, inputs.longest_context
    micro_batch = training.per_device_train_batch_size * inputs.max_chunks * longest
    tokens = max(longest, min(training.forward_tokens, micro_batch))
    size, by_layer = 2 if training.bf16 else 4, training.gradient_checkpointing
    peak = training_bytes(shape, tokens, dtype_bytes=size, by_layer=by_layer)
    states = weight_bytes(shape, 16)  # weights, gradients, and the state of Adam
    activations = float(peak) - states
    if training.lora:
        # Frozen weights have neither gradients nor a state; adapters are on top of them.
        states -= weight_bytes(shape, 12)
        states += 16 * inputs.num_adapter_parameters
    elif training.beta:
        states += weight_bytes(shape, 4)  # the reference weights
    if recipe.trainer.strategy == "fsdp2":
        states /= recipe.trainer.num_ranks
    return states + factor * activations


def _sampling_bytes(recipe: Recipe, inputs: Inputs, shape: ModelShape) -> float:
    """Return the memory of caches and logits in the largest batch, of training or evaluation."""
    longest = inputs.longcot_context
    if longest > longest_sequence(inputs.shell):  # then LongCoT is not evaluated
        longest = inputs.longest_context
    evaluated = min(_MAX_BATCH_SIZE, recipe.evaluation.num_problems)
    trained = min(_MAX_BATCH_SIZE, recipe.training.traces_per_batch)
    evaluating = evaluated * float(cache_bytes(shape, longest, 4))
    training = trained * float(cache_bytes(shape, inputs.longest_context, 4))
    return max(evaluating, training) + _MAX_BATCH_SIZE * shape.vocabulary_size * 4 * _LOGIT_COPIES


def _check_disk(recipe: Recipe, inputs: Inputs, shape: ModelShape, path: Path) -> Check:
    """Compare the size of checkpoints and traces with the free disk space."""
    training, free = recipe.training, free_disk(path)
    adapters = inputs.num_adapter_parameters
    one = 12 * adapters if training.lora else weight_bytes(shape, 12)  # and the state of Adam
    # While a checkpoint is written, the oldest is still there.
    kept = training.save_total_limit + 1 if training.save_steps else 0
    final = weight_bytes(shape, stored_dtype(inputs.shell.config).itemsize) + 4 * adapters
    checkpoints = kept * one + final
    present = sum(f.stat().st_size for f in (path / "checkpoints").rglob("*") if f.is_file())
    needed = max(one, final, checkpoints - present)
    trace = inputs.spec.budget * _BYTES_PER_SAMPLED_TOKEN
    trace += inputs.max_prompt_tokens * _BYTES_PER_PROMPT_TOKEN
    traces = training.num_batches * training.traces_per_batch * trace
    found = (
        f"checkpoints take {gib(checkpoints)} ({gib(one)} each, the trained model "
        f"{gib(final)}), traces at most {gib(traces)}; "
        f"{gib(free)} are free at {path}"
    )
    if needed + traces <= WARNING_SHARE * free:
        return Check("disk", "ok", found)
    advice = (
        "free some space, choose another output=PATH, or keep fewer checkpoints: "
        "training.save_total_limit=1"
    )
    return Check("disk", "problem" if needed > free else "warning", found, advice)


def _check_rewards(prepared: Prepared, inputs: Inputs) -> list[Check]:
    """Score a right and a wrong answer to the first problem of each task."""
    problem, recipe = inputs.selected["train"].problems[0], prepared.recipe
    checks = _check_isolation(prepared)
    checks.append(_check_scorer("rewards", prepared.scorer, prepared.task, problem, inputs, recipe))
    if recipe.evaluation.task is not None and (heldouts := inputs.selected["heldout"].problems):
        task, scorer, heldout = prepared.evaluation_task, prepared.evaluation_scorer, heldouts[0]
        checks.append(_check_scorer("rewards of evaluation", scorer, task, heldout, inputs, recipe))
    return checks


def _check_isolation(prepared: Prepared) -> list[Check]:
    """Name the isolation for the rewards that run code of the model."""
    scored = [*prepared.scorer.rewards, *prepared.evaluation_scorer.rewards]
    names = ", ".join(dict.fromkeys(r.name for r in scored if r.evaluates_output))
    if not names:
        return []
    if (isolation := find_isolation()) != "none":
        return [Check("isolation", "ok", f"{names} runs code of the model inside {isolation}")]
    found = f"{names} runs code of the model with the rights of your user (allow_unsafe_code)"
    return [Check("isolation", "warning", found, ADVICE)]


def _check_scorer(
    name: str, scorer: Any, task: Task, problem: Problem, inputs: Inputs, recipe: Recipe
) -> Check:
    answers = demonstrations_of(task, problem)
    if None in answers:
        found = "the task has no example of a right and a wrong answer"
        return Check(name, "not checked", found, "give the task a method demonstrations(problem)")
    spec, attempts, marks = inputs.spec, [], marks_of(inputs.tokenizer)
    if (own := mark_setting(scorer, AUTO)) != AUTO:  # of the accuracy reward alone
        marks = find_thinking_marks(inputs.tokenizer, own)
    for answer in map(str, answers):
        text = marks.rewrite(answer)
        length = len(inputs.tokenizer(text, add_special_tokens=False)["input_ids"])
        sizes = (length, spec.budget, spec.max_chunks)
        attempts.append(attempt_from_text(problem, text, *sizes, marks=marks))
    right, wrong = scorer.score_now(attempts)
    advice = "see the scores of the task's answers: delethink tasks NAME --check 8"
    for score, answer in ((right, "the right answer"), (wrong, "the wrong answer")):
        if score.errors:
            reward, reason = next(iter(score.errors.items()))
            config = recipe.rewards.get(reward, RewardConfig())
            if ":" in (config.reward or reward):
                advice = f"correct {config.reward or reward}, and run delethink doctor again"
            return Check(name, "problem", f"{reward} cannot score {answer}: {reason}", advice)
    accuracy = scorer.accuracy
    found = f"right answer {_describe(right)}, wrong answer {_describe(wrong)}"
    if len(right.parts) > 1:
        chosen = "by evaluation.reward" if recipe.evaluation.reward else "as the first reward"
        found = f"{found}; {accuracy} is the accuracy, chosen {chosen}"
    if right.parts[accuracy] != 1 or wrong.parts[accuracy] != 0:
        if len(right.parts) > 1:
            advice = f"name another accuracy with evaluation.reward, or {advice}"
        return Check(name, "problem", f"{found}; {accuracy} must give 1 and 0", advice)
    if not right.total > wrong.total:
        found = f"{found}: the right answer has no higher reward"
        return Check(name, "problem", found, "change the weights of the rewards")
    return Check(name, "ok", found)


def _describe(score: Score) -> str:
    known = [f"{name} {value + 0.0:g}" for name, value in score.parts.items() if value is not None]
    total = "none" if score.total is None else f"{score.total:g}"
    return f"{total} ({', '.join(known)})"
