"""What a run reads before it loads a model: tokenizer, settings of the model, problems."""

from __future__ import annotations

from typing import Any, NamedTuple

from delethink.config import TaskConfig
from delethink.query import check_thinking_is_open, query_ids
from delethink.rule import ChunkSpec, start
from delethink.serving.checkpoint import eos_ids, load_shell, load_tokenizer, longest_sequence
from delethink.tasks import Taken, Task, take
from delethink.training.preflight import Prepared
from delethink.types import Problem


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
