"""Sessions for TRL's ``AsyncGRPOTrainer``: thinking in chunks, sampled from a vLLM server.

    dataset = Dataset.from_list(prompt_rows("recipe.yaml", 1000))
    worker = rollout_worker("recipe.yaml", args, dataset)
    AsyncGRPOTrainer(model, args=args, train_dataset=dataset, rollout_worker=worker).train()

TRL's worker asks the factory for a session per trace. The session runs the library's own rollout
and hands back one turn a chunk: the prompt with the carried tokens, the sampled ids, their
log-probs and a mask. TRL makes each turn a row, as its prompt does not continue the last turn.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from delethink.config import Recipe, load_recipe
from delethink.engines.openai_logprobs import LogprobServer
from delethink.errors import ConfigError, UserError, WorkersLostError
from delethink.integrations.episodes import EpisodeSource
from delethink.integrations.releases import check_release
from delethink.output import safe_text
from delethink.policy import Sampling
from delethink.rollout import derive_seed
from delethink.scoring.rollouts import RolloutResult, run_scored_rollouts
from delethink.tokenization import query_ids, reward_text
from delethink.tokens import as_list
from delethink.types import Problem, Score, TokenIds, Trace, TraceStop

check_release("openenv", "0.10", "0.11")
check_release("trl", "1.16", "1.17")

from openenv.core.harness import (  # noqa: E402 - after the check, which names a wrong release
    ResourceSession,
    ResourceSessionFactory,
    ToolResult,
    TrainingTrace,
    VerifyResult,
)
from openenv.core.harness.capture.upstream import training_sampling  # noqa: E402
from openenv.core.harness.training import TrainingTurn  # noqa: E402

PROBLEM_KEY = "problem"  # of the last message of a prompt: its value is like "train/7"
_FAILED = 1  # exit code of a session without a reward
_MAX_TRIES = 50  # problems examined for each row
_CLOSE_TIMEOUT_S = 10.0
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

_Value = TypeVar("_Value")


# -- the data and the worker -----------------------------------------------------------------------


def prompt_rows(
    recipe: Recipe | str | Path,
    num_problems: int,
    split: str = "train",
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return rows for ``datasets.Dataset.from_list``, from the first problems of a split.

    A prompt is a conversation. Its last message also names the problem, whose gold answer only the
    session sees; chat templates do not read that key. Problems with too long a query are skipped.

    Raises:
        UserError: the recipe is wrong, there is no chat template, a query leaves no room for
            thinking, or there are too few problems.
    """
    source = EpisodeSource.from_recipe(recipe, overrides)
    try:
        rows = list(_rows(source, split, num_problems))
    finally:
        source.close()
    if len(rows) < num_problems:
        raise ConfigError(
            f"{num_problems} problems were asked for, and {len(rows)} of the split {split!r} have "
            "a query that is short enough; ask for fewer, or raise task.max_query_tokens"
        )
    return rows


def _rows(source: EpisodeSource, split: str, number: int) -> Iterator[dict[str, Any]]:
    found = 0
    for index in range(min(source.size(split), number * _MAX_TRIES)):
        if found == number:
            return
        problem, limit = source.problem(split, index), source.max_query_tokens
        if limit is not None and len(query_ids(source.tokenizer, problem)) > limit:
            continue
        source.begin(problem)  # checks template and length
        messages = problem.messages
        messages[-1][PROBLEM_KEY] = f"{split}/{index}"
        yield {"prompt": messages}
        found += 1


def rollout_worker(
    recipe: Recipe | str | Path,
    args: Any,
    dataset: Any,
    overrides: Sequence[str] = (),
    child_ready_timeout: int = 300,
    **options: Any,
) -> Any:
    """Return TRL's ``HarnessRolloutWorker`` for the sessions of a recipe.

    Args:
        recipe: task, rewards, chunk sizes and model; its section ``training`` is not read.
        args: the ``AsyncGRPOConfig`` that the trainer gets too: number of traces for each prompt,
            sampling, address of the server.
        dataset: made from ``prompt_rows``; the trainer gets it too.
        overrides: ``dotted.key=value`` for a recipe's file.
        child_ready_timeout: seconds that TRL gives the worker's process to start.
        options: further arguments of ``DelethinkSessionFactory``.

    Raises:
        UserError: the recipe is wrong.
        ValueError: the sampling leaves tokens out, in OpenEnv's words.
    """
    from trl.experimental.async_grpo.openenv_harness import HarnessRolloutWorker

    given = {key: getattr(args, key) for key in _SAMPLING_KEYS}
    training_sampling({key: value for key, value in given.items() if value is not None})
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    source = EpisodeSource.from_recipe(recipe)
    source.close()
    tokenizer = source.tokenizer
    if getattr(tokenizer, "response_template", None) is None:
        # TRL parses answers of tools with it, and refuses chat templates that it does not know.
        tokenizer.response_template = {}
    samples_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    ahead = max(args.max_staleness, 1) * samples_per_step * args.world_size
    return HarnessRolloutWorker(
        harness_session_factory=partial(
            DelethinkSessionFactory, recipe, args.vllm_server_base_url, **options
        ),
        model_name=recipe.model,
        dataset=dataset,
        reward_funcs=[],
        processing_class=tokenizer,
        eos_token_ids=sorted(source.eos_ids),
        num_generations=args.num_generations,
        max_inflight_tasks=ahead if args.max_inflight_tasks < 0 else args.max_inflight_tasks,
        queue_maxsize=args.queue_maxsize,
        vllm_server_url=args.vllm_server_base_url,
        log_completions=args.log_completions,
        num_completions_to_print=args.num_completions_to_print,
        child_ready_timeout=child_ready_timeout,
        **given,
    )


# -- sessions --------------------------------------------------------------------------------------


class DelethinkSessionFactory(ResourceSessionFactory["DelethinkSession"]):  # type: ignore[misc]
    """Make a session for each trace of a recipe's task.

    All sessions share a thread with an event loop, which samples and scores.

    Args:
        recipe: a recipe, or its file.
        server_url: address of a vLLM server of the recipe's model.
        overrides: ``dotted.key=value`` for a file.
        sampling: sampling parameters, by TRL's worker. Tokens may not be left out.
        served_model: name of the model on the server; ``None`` takes the only one.
        api_key: key sent with each request.
        timeout_s: seconds after which a trace is given up; by default ``engine.rollout_timeout``.
        retries: number of retries of a failed request.

    Raises:
        UserError: the recipe is wrong, or the server cannot be used.
        ValueError: the sampling leaves tokens out, in OpenEnv's words.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        server_url: str,
        overrides: Sequence[str] = (),
        *,
        sampling: Mapping[str, Any] | None = None,
        served_model: str | None = None,
        api_key: str | None = None,
        timeout_s: float | None = None,
        retries: int = 8,
    ) -> None:
        recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
        self._temperature = float(
            training_sampling({"temperature": 1.0, **(sampling or {})})["temperature"]
        )
        self._timeout_s = timeout_s or recipe.engine.rollout_timeout
        self._seed = recipe.seed
        self._server_url = server_url
        self._source = EpisodeSource.from_recipe(recipe)
        self._server = LogprobServer(
            server_url,
            served_model,
            self._source.tokenizer,
            api_key=api_key,
            eos_ids=tuple(sorted(self._source.eos_ids)),
            retries=retries,
        )
        self._created: Counter[int | None] = Counter()  # sessions by seed
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="delethink-sessions", daemon=True
        )
        self._thread.start()

    def create(
        self, task: Any, seed: int | None = None, episode_id: str | None = None
    ) -> DelethinkSession:
        """Return a session before its first chunk.

        The n-th session with the same ``seed`` samples the n-th trace of a group, whatever else
        runs. A mistake of the user is told when the session is asked for its turns, as TRL's worker
        stops there; an error here would only leave out the trace.

        Args:
            task: a prompt made by ``prompt_rows``, or a ``Problem``.
            seed: the same for all traces of a group.
            episode_id: name of the trace.
        """
        with self._lock:
            number = self._created[seed]
            self._created[seed] += 1
        name = episode_id or f"{seed}-{number}"
        try:
            problem = task if isinstance(task, Problem) else self._named(task)
            query = self._source.begin(problem).state.query_ids
        except UserError as error:
            return DelethinkSession(self, name, fault=str(error))
        own_seed = derive_seed("session", self._seed, -1 if seed is None else seed, number)
        sampling = Sampling(self._temperature, own_seed)
        return DelethinkSession(self, name, problem, partial(self._start, problem, query, sampling))

    def problem(self, split: str, index: int) -> Problem:
        """Return a problem of the recipe's task, as ``create`` takes it too.

        Raises:
            ConfigError: the split is unknown, or has no such problem.
        """
        return self._source.problem(split, index)

    def close(self) -> None:
        """Stop the thread and the verifiers; sessions that still run end."""
        if self._thread.is_alive():
            self.run(self._end()).result(_CLOSE_TIMEOUT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_TIMEOUT_S)
        self._source.close()

    def run(self, work: Coroutine[Any, Any, _Value]) -> Future[_Value]:
        """Run a coroutine in the thread of the sessions."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def unreachable(self) -> str | None:
        """Return a sentence if the server does not answer, else ``None``."""
        if self.run(self._server.is_healthy()).result():
            return None
        return safe_text(f"the vLLM server at {self._server_url} does not answer any more")

    def text(self, token_ids: TokenIds) -> str:
        """Return the text of sampled tokens, without special ones."""
        return reward_text(self._source.tokenizer, token_ids)

    def _start(
        self, problem: Problem, query: TokenIds, sampling: Sampling, timeout_s: float | None
    ) -> Future[RolloutResult]:
        source, server = self._source, self._server
        windows = [source.max_model_tokens, server.max_model_tokens]
        return self.run(
            run_scored_rollouts(
                server,
                source.spec,
                [problem],
                [query],
                [sampling],
                source.tokenizer,
                source.scorer,
                min((window for window in windows if window), default=None),
                timeout_s or self._timeout_s,
            )
        )

    def _named(self, prompt: Any) -> Problem:
        """Return the problem that a prompt names.

        Raises:
            ConfigError: it names none, or another one than its text.
        """
        last = prompt[-1] if isinstance(prompt, Sequence) and prompt else None
        name = last.get(PROBLEM_KEY) if isinstance(last, Mapping) else None
        split, slash, index = str(name).partition("/")
        if not slash or not index.isdecimal():
            raise ConfigError(
                f"a prompt must name its problem, as those of prompt_rows do; got {prompt!r:.200}"
            )
        problem = self.problem(split, int(index))
        if [m.get("content") for m in prompt] != [m["content"] for m in problem.messages]:
            raise ConfigError(
                f"the text of the prompt is not that of the problem {name} of this recipe; make "
                "the data set again with prompt_rows and this recipe"
            )
        return problem

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.disconnect()


class DelethinkSession(ResourceSession):  # type: ignore[misc]
    """One trace, as OpenEnv's ``TrainableSession``.

    A failed trace has no reward and no trained tokens: its turns are masked.

    Attributes:
        trace: the trace; ``None`` before its end.
    """

    def __init__(
        self,
        factory: DelethinkSessionFactory,
        episode_id: str,
        problem: Problem | None = None,
        start: Callable[[float | None], Future[RolloutResult]] | None = None,
        fault: str | None = None,
    ) -> None:
        self._factory, self._episode_id = factory, episode_id
        self._problem, self._start, self._fault = problem, start, fault
        self._lock, self._is_closed = threading.Lock(), False
        self._running: Future[RolloutResult] | None = None
        self._score: Score | None = None
        self.trace: Trace | None = None

    def wait_for_completion(self, timeout_s: float | None = None) -> int:
        """Sample and score the trace, and return 0, or 1 where there is no reward.

        Raises:
            TimeoutError: the trace was given up after ``timeout_s`` seconds.
        """
        with self._lock:
            if self._start is None or self._is_closed:
                return _FAILED
            self._running = self._start(timeout_s)
        try:
            result = self._running.result()
        except CancelledError:  # by close
            return _FAILED
        except (UserError, WorkersLostError) as error:  # it concerns every trace
            self._fault = str(error)
            return _FAILED
        self.trace, self._score = result.traces[0], result.scores[0]
        if self.trace.stop is TraceStop.ABORTED:
            raise TimeoutError(self.trace.error)
        if self.trace.stop is TraceStop.ERROR and (dead := self._factory.unreachable()):
            self._fault = f"{dead}; the last error: {self.trace.error}"
        return _FAILED if self._reward is None else 0

    def fetch_training_trace(self) -> TrainingTrace:
        """Return a turn for each chunk that has tokens.

        Raises:
            ValueError: a mistake of the user, or a dead server. TRL's worker stops at it.
        """
        if self._fault is not None:
            raise ValueError(self._fault)
        chunks = self.trace.chunks if self.trace else ()
        turns = [self._turn(i) for i, chunk in enumerate(chunks) if chunk.output_ids]
        return TrainingTrace(turns=turns)

    def _turn(self, index: int) -> TrainingTurn:
        trace = self.trace
        assert trace is not None
        chunk, is_last = trace.chunks[index], index + 1 == len(trace.chunks)
        # TRL shows and scores the reply of the last turn, so that one is the whole answer.
        text = self._factory.text(trace.output_ids if is_last else chunk.output_ids)
        message = {"role": "assistant", "content": text}
        weight = int(not trace.stop.is_failure)
        return TrainingTurn(
            node_id=f"{self._episode_id}/{index}",
            prompt_token_ids=as_list(chunk.prompt_ids),
            completion_token_ids=as_list(chunk.output_ids),
            per_token_logps=[float(value) for value in chunk.logprobs],
            loss_mask=[0] * len(chunk.prompt_ids) + [weight] * len(chunk.output_ids),
            request={"messages": self.initial_messages()},
            response={"choices": [{"message": message, "finish_reason": chunk.stop.value}]},
            metadata={"chunk": index, "carried": chunk.carried, "role": chunk.role.value},
        )

    @property
    def _reward(self) -> float | None:
        if self.trace is None or self.trace.stop.is_failure or self._score is None:
            return None
        return self._score.total

    def verify(
        self, transcript: list[dict[str, Any]], final_state: Any | None = None
    ) -> VerifyResult:
        """Return the recipe's reward of the trace; ``None`` for a failed trace or reward."""
        metrics: dict[str, Any] = {}
        if self.trace is not None and self._score is not None:
            metrics = {
                "stop": self.trace.stop.value,
                "length": self.trace.length,
                "num_chunks": len(self.trace.thinking),
                "rewards": dict(self._score.parts),
                "errors": dict(self._score.errors),
            }
        return VerifyResult(env_reward=self._reward, done=self.trace is not None, metrics=metrics)

    def initial_messages(self) -> list[dict[str, Any]]:
        """Return the conversation of the problem."""
        return [] if self._problem is None else list(self._problem.messages)

    def list_tools(self) -> list[Any]:
        """Return no tools: thinking has none."""
        return []

    def call_tool(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Return an error: thinking has no tools."""
        return ToolResult(error=f"a session of thinking has no tools, got a call of {name!r:.80}")

    def close(self) -> None:
        """Cancel what is still sampled."""
        with self._lock:
            self._is_closed = True
            running = self._running
        if running is not None:
            running.cancel()
