"""Episodes of thinking for loops of other libraries: prompts out, chunks in, rewards at the end.

The caller samples. It needs no engine of this library, and no Gymnasium:

    source = EpisodeSource.from_recipe("recipe.yaml")
    episode = source.begin(source.problem("train", 0))
    while episode.stop is None:
        episode.add(sample(episode.prompt_ids, episode.max_new_tokens))
    score = await episode.score()
"""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.errors import (
    ActionError,
    ConfigError,
    ModelError,
    QueryTooLongError,
    did_you_mean,
)
from delethink.registry import make_task
from delethink.scoring.rollouts import make_attempt, mark_setting
from delethink.scoring.scorer import Scorer, make_scorer
from delethink.tasks import SPLITS, Task, rewards_of, task_size
from delethink.tokenization import (
    bind_marks,
    check_thinking_is_open,
    encode,
    query_ids,
    retokenized_at,
)
from delethink.tokens import as_list, token_array
from delethink.types import Chunk, Problem, Score, TokenIds, Trace, TraceStop

if TYPE_CHECKING:
    from delethink.config import Recipe

UNLIMITED = 2**31  # problems that a task without an end is said to have
_MAX_DRAWS = 50  # problems examined for one whose query is short enough


@dataclass
class EpisodeSource:
    """Problems, chunk sizes and rewards of a recipe, for episodes that others sample.

    Args:
        task: source of problems.
        tokenizer: encodes prompts and decodes traces.
        spec: sizes and policies of the chunks, bound to the tokenizer.
        scorer: rewards of a finished trace.
        eos_ids: tokens that end an answer.
        vocabulary: number of token ids.
        max_query_tokens: longest query of a drawn problem; ``None`` for any.
        max_model_tokens: the longest sequence of the model, if known.
        plain_prompts: accept a tokenizer without a chat template; a prompt is then the text of the
            messages.
    """

    task: Task
    tokenizer: Any
    spec: ChunkSpec
    scorer: Scorer
    eos_ids: frozenset[int]
    vocabulary: int
    max_query_tokens: int | None = None
    max_model_tokens: int | None = None
    plain_prompts: bool = False
    _has_open_thinking: bool = field(default=False, init=False, repr=False)

    @classmethod
    def from_recipe(
        cls, recipe: Recipe | str | Path, overrides: Sequence[str] = (), plain_prompts: bool = False
    ) -> EpisodeSource:
        """Return the source of a recipe: its task, rewards, chunk sizes and tokenizer.

        Args:
            recipe: a recipe, or its file.
            overrides: ``dotted.key=value`` for a file.
            plain_prompts: see the class.

        Raises:
            UserError: the recipe is wrong, or names what cannot be loaded.
        """
        from delethink.config import load_recipe, with_rewards  # they need the extra with pydantic
        from delethink.engines.loading import (
            engine_window,
            eos_ids,
            load_shell,
            load_tokenizer,
            vocabulary_size,
        )

        if isinstance(recipe, str | Path):
            recipe = load_recipe(recipe, overrides)
        task = make_task(recipe.task.name, recipe.task.args, recipe.seed)
        if not recipe.rewards:
            if not (weights := rewards_of(task)):
                raise ConfigError("the task has no rewards of its own: set rewards: {NAME: WEIGHT}")
            recipe = with_rewards(recipe, weights)
        tokenizer = load_tokenizer(
            recipe.model, recipe.trust_remote_code, recipe.chat_template_kwargs
        )
        shell = load_shell(recipe.model, recipe.trust_remote_code)
        scorer = make_scorer(recipe.rewards, recipe.accuracy_reward, recipe.scoring)
        bind_marks(tokenizer, mark_setting(scorer, recipe.task.end_of_thinking))
        return cls(
            task,
            tokenizer,
            recipe.thinking.spec().bind(tokenizer),
            scorer,
            frozenset(eos_ids(shell, tokenizer)),
            vocabulary_size(shell),
            recipe.task.max_query_tokens,
            engine_window(shell, recipe.engine.max_model_tokens),
            plain_prompts,
        )

    def size(self, split: str) -> int:
        """Return the number of problems in a split; ``UNLIMITED`` for a task without an end.

        Raises:
            ConfigError: the split is unknown.
        """
        if split not in SPLITS:
            raise ConfigError(f"unknown split {split!r:.80}.{did_you_mean(str(split), SPLITS)}")
        size = task_size(self.task, split)
        return UNLIMITED if size is None else size

    def problem(self, split: str, index: int) -> Problem:
        """Return problem ``index`` of a split.

        Raises:
            ConfigError: the split is unknown, or has no such problem.
        """
        size, number = self.size(split), _whole(index)
        if number is None or not 0 <= number < size:
            raise ConfigError(
                f"index must be a whole number from 0 to {size - 1}, the last problem of "
                f"{split!r}, got {index!r:.80}"
            )
        return self.task.problem(split, number)

    def draw(self, split: str, seed: int | None = None) -> tuple[int, Problem]:
        """Return a random problem with a query of at most ``max_query_tokens``, and its index.

        Raises:
            ConfigError: the split is unknown, or no short query was found.
        """
        size, stream = self.size(split), random.Random(seed)
        for _ in range(_MAX_DRAWS):
            index = stream.randrange(size)
            problem = self.task.problem(split, index)
            limit = self.max_query_tokens
            if limit is None or len(query_ids(self.tokenizer, problem)) <= limit:
                return index, problem
        raise ConfigError(
            f"none of {_MAX_DRAWS} drawn problems of {split!r} has a query of at most "
            f"{self.max_query_tokens} tokens; raise task.max_query_tokens"
        )

    def begin(self, problem: Problem) -> Episode:
        """Return an episode before its first chunk.

        Raises:
            QueryTooLongError: the query leaves no room for a full context, or is longer than
                ``max_query_tokens``.
            ModelError: there is no chat template, it fails, or it closes the thinking.
        """
        if self.tokenizer.chat_template is None and not self.plain_prompts:
            raise ModelError(
                "the tokenizer has no chat template, so the model was hardly trained to answer "
                "questions; add a chat_template.jinja, name another model, or allow prompts of "
                "plain text with plain_prompts"
            )
        if not self._has_open_thinking:
            check_thinking_is_open(self.tokenizer, problem)
            self._has_open_thinking = True
        query, limit = query_ids(self.tokenizer, problem), self.max_query_tokens
        if limit is not None and len(query) > limit:
            raise QueryTooLongError(
                f"the query has {len(query)} tokens and may have at most {limit}, by "
                "task.max_query_tokens"
            )
        return Episode(self, problem, token_array(query))

    def close(self) -> None:
        """Stop the verifiers of the rewards."""
        self.scorer.close()


class Episode:
    """One attempt at a problem, chunk by chunk.

    Attributes:
        source: where it comes from.
        problem: the problem.
        state: position in the trace.
        chunks: the chunks so far, without log-probs.
        open_ids: tokens of a chunk that ``extend`` has not completed yet.
    """

    def __init__(self, source: EpisodeSource, problem: Problem, query: TokenIds) -> None:
        self.source, self.problem = source, problem
        self.state = start(source.spec, query, source.max_model_tokens)
        self.chunks: list[Chunk] = []
        self.open_ids: list[int] = []

    @property
    def prompt_ids(self) -> list[int]:
        """Return the prompt of the next chunk; after the end, the last prompt."""
        return as_list(self.state.prompt_ids)

    @property
    def prompt(self) -> str:
        """Return the text of ``prompt_ids``, special tokens included."""
        return str(self.source.tokenizer.decode(self.prompt_ids))

    @property
    def max_new_tokens(self) -> int:
        """Return the room of the next chunk; 0 after the end."""
        return self.state.max_new_tokens

    @property
    def stop(self) -> TraceStop | None:
        """Return the stop reason of the trace; ``None`` before its end."""
        return self.state.stop

    @property
    def trace(self) -> Trace:
        """Return the chunks so far as a trace; before its end its stop reason is ``CUT``."""
        stop = self.stop or TraceStop.CUT
        return Trace(self.state.query_ids, tuple(self.chunks), stop)

    def retokenized_at(self) -> int | None:
        """Return the first position of ``prompt_ids`` that its text does not give back."""
        return retokenized_at(self.source.tokenizer, self.prompt_ids)

    def add(self, token_ids: Sequence[int], ended: bool = False) -> Chunk:
        """Add a chunk of token ids, and return it.

        A token that ends an answer ends the trace. Any other chunk leads to a boundary, also where
        it is not full. Tokens after the end or after an early boundary are dropped.

        Args:
            token_ids: the sampled tokens.
            ended: the model ended its answer, and its server left out the token that did.

        Raises:
            ActionError: the chunk is empty, too long or no list of known ids, or the trace has
                ended.
        """
        state = self._running_state()
        ids, eos_ids = self._known(token_ids), self.source.eos_ids
        if ended and eos_ids.isdisjoint(ids):
            own = self.source.tokenizer.eos_token_id
            ids = (*ids, own if own in eos_ids else min(eos_ids))
        output_ids, stop = state.read_chunk(ids, eos_ids)
        if not 0 < len(output_ids) <= state.max_new_tokens:
            raise ActionError(
                f"this chunk must have 1 to {state.max_new_tokens} tokens, got {len(output_ids)}"
            )
        chunk = Chunk(
            prompt_ids=state.prompt_ids,
            output_ids=output_ids,
            logprobs=(),
            stop=stop,
            carried=len(state.prompt_ids) - len(state.query_ids),
            policy_version=None,
            role=state.role,
        )
        self.state = state.advance(output_ids, stop)
        self.chunks.append(chunk)
        return chunk

    def add_text(self, text: str, ended: bool = False) -> Chunk:
        """Add a chunk of text, and return it with the ids that the tokenizer gives.

        Args:
            text: the chunk. The text of the EOS token ends the trace.
            ended: see ``add``.

        Raises:
            ActionError: see ``add``. Text may be encoded as more tokens than were sampled.
        """
        return self.add(encode(self.source.tokenizer, text), ended)

    def extend(self, token_ids: Sequence[int], ended: bool = False) -> Chunk | None:
        """Add the tokens of a call to the open chunk, for loops that need several calls a chunk.

        The next call continues ``prompt_ids + open_ids``. There must be no early boundary.

        Returns:
            The chunk, if it is full or the answer has ended; otherwise ``None``.

        Raises:
            ActionError: see ``add``.
        """
        full = self._running_state().max_new_tokens
        ids = self._known(token_ids)
        if not 0 < len(ids) <= full - len(self.open_ids):
            raise ActionError(
                f"this call must give 1 to {full - len(self.open_ids)} tokens, the room left in "
                f"its chunk, got {len(ids)}"
            )
        sampled = [*self.open_ids, *ids]
        if len(sampled) < full and not ended and self.source.eos_ids.isdisjoint(ids):
            self.open_ids = sampled
            return None
        self.open_ids = []
        return self.add(sampled, ended and len(sampled) < full)

    def _running_state(self) -> ThinkingState:
        if self.state.stop is not None:
            raise ActionError(
                f"the trace has ended ({self.state.stop.value}) and takes no chunk; begin another "
                "one"
            )
        return self.state

    def _known(self, token_ids: Any) -> TokenIds:
        if isinstance(token_ids, str) or not isinstance(token_ids, Sequence):
            raise ActionError(f"a chunk must be a list of token ids, got {token_ids!r:.80}")
        for token in token_ids:
            number = _whole(token)
            if number is None or not 0 <= number < self.source.vocabulary:
                raise ActionError(
                    "a token id must be a whole number from 0 to "
                    f"{self.source.vocabulary - 1}, got {token!r:.80}"
                )
        return token_array(token_ids)

    async def score(self) -> Score:
        """Return the rewards of the finished trace, as a training run would compute them.

        Raises:
            ActionError: the trace has not ended.
        """
        if self.stop is None:
            raise ActionError(
                f"the trace has not ended and has no reward yet: {self.state.budget_left} of "
                f"{self.source.spec.budget} tokens are left"
            )
        source = self.source
        attempt = make_attempt(self.problem, self.trace, source.tokenizer, source.spec)
        (score,) = await source.scorer.score([attempt])
        return score


def _whole(value: Any) -> int | None:
    """Return a whole number, or ``None`` for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
