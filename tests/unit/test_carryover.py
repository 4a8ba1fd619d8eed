"""Carryover policies and boundaries: golden vectors by hand, what is promised, and what is asked.

The t-th sampled token of a trace is t, so that a carryover reads as the positions it came from.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import pytest

from delethink import registry
from delethink.carryover import (
    Boundary,
    Carryover,
    Full,
    HeadTail,
    LineBreak,
    Nothing,
    SinkWindow,
    StateBlock,
    Summary,
    Tail,
)
from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.envs.spaces import CharacterTokenizer
from delethink.errors import CarryoverError, ConfigError, PolicyError
from delethink.policy import Completion, Sampling, ScriptedPolicy
from delethink.rollout import run_rollout
from delethink.testing import check_boundary, check_carryover
from delethink.types import ChunkRole, StopReason, TokenIds, TraceStop

QUERY = (90, 91)
TEXT = CharacterTokenizer("abcdefghij \n[].")
EOS = TEXT.eos_token_id


def span(first: int, last: int) -> TokenIds:
    return tuple(range(first, last + 1))


def ids(text: str) -> TokenIds:
    return tuple(TEXT(text)["input_ids"])


def text(token_ids: TokenIds) -> str:
    return TEXT.decode(token_ids)


def boundaries(spec: ChunkSpec, lengths: tuple[int, ...] = ()) -> list[tuple[int, TokenIds]]:
    """(new tokens allowed, tokens carried) of each chunk; chunks are full, or as long as said."""
    state, seen = start(spec, QUERY), []
    while state.stop is None:
        seen.append((state.max_new_tokens, tuple(state.carried)))
        length = (*lengths, *[99] * 99)[len(seen) - 1]
        first = state.num_sampled + 1
        output = span(first, first + min(length, state.max_new_tokens) - 1)
        state = state.advance(output, StopReason.LENGTH)
    return seen


# -- golden vectors --------------------------------------------------------------------------------


def test_tail() -> None:
    spec = ChunkSpec(8, 3, 3, carryover=Tail())
    assert boundaries(spec) == [(8, ()), (5, (6, 7, 8)), (5, (11, 12, 13))]


def test_head_tail_equals_the_sizes_of_the_spec() -> None:
    named = ChunkSpec(8, 4, 4, carryover=HeadTail(head_size=2))
    assert named == ChunkSpec(8, 4, 4, head_size=2)
    assert boundaries(named) == [
        (8, ()),
        (4, (1, 2, 7, 8)),
        (4, (1, 2, 11, 12)),
        (4, (1, 2, 15, 16)),
    ]
    outside = ChunkSpec(8, 4, 4, carryover=HeadTail(2, head_outside=True))
    assert outside == ChunkSpec(8, 4, 4, head_size=2, head_outside=True)
    assert ChunkSpec(8192, 4096, 5, carryover=HeadTail()) == ChunkSpec(8192, 4096, 5)


def test_none() -> None:
    spec = ChunkSpec(3, 0, 3, carryover=Nothing())
    assert boundaries(spec) == [(3, ()), (3, ()), (3, ())]
    assert spec.max_carried == 0


def test_full_carries_everything_and_keeps_chunks_and_budget() -> None:
    spec = ChunkSpec(6, 2, 4, carryover=Full())
    assert boundaries(spec) == [(6, ()), (4, span(1, 6)), (4, span(1, 10)), (4, span(1, 14))]
    assert spec.max_carried is None
    assert spec.budget == ChunkSpec(6, 2, 4, head_size=0).budget == 18
    assert spec.max_thinking_context == 18


def test_sink_window() -> None:
    spec = ChunkSpec(8, 4, 4, carryover=SinkWindow(num_sinks=1))
    assert boundaries(spec) == [
        (8, ()),
        (4, (1, 6, 7, 8)),
        (4, (1, 10, 11, 12)),
        (4, (1, 14, 15, 16)),
    ]


def test_sinks_are_the_first_tokens_however_early_a_boundary_fell() -> None:
    sinks = ChunkSpec(8, 4, 9, carryover=SinkWindow(num_sinks=3))
    head = ChunkSpec(8, 4, 9, carryover=HeadTail(head_size=3))
    assert [carried for _, carried in boundaries(sinks, (1, 1, 5))][1:4] == [
        (1,),
        (1, 2),
        (1, 2, 3, 7),
    ]
    assert [carried for _, carried in boundaries(head, (1, 1, 5))][1:4] == [
        (1,),
        (1, 2),
        (1, 5, 6, 7),
    ]


@pytest.mark.parametrize(
    ("wrote", "size", "carried"),
    [
        pytest.param("abc[de]fg", 6, "[de]", id="a state"),
        pytest.param("[ab]cd[ef]g", 6, "[ef]", id="the last of two"),
        pytest.param("abcdefgh", 6, "cdefgh", id="none: the tail"),
        pytest.param("ab[cdefgh", 6, "cdefgh", id="not closed: the tail"),
        pytest.param("[ab]cd[ef", 6, "[ab]", id="the last whole one"),
        pytest.param("ab]cdefg", 6, "]cdefg", id="not opened: the tail"),
        pytest.param("[abcdefg]h", 6, "cdefg]", id="too long: its end"),
        pytest.param("[]abcdef", 6, "[]", id="an empty state"),
        pytest.param("abc[de]fg", 0, "", id="nothing may be carried"),
    ],
)
def test_state_block(wrote: str, size: int, carried: str) -> None:
    policy = StateBlock("[", "]").bind(TEXT)
    spec = ChunkSpec(12, size, 3, carryover=policy)
    state = start(spec, QUERY).advance(ids(wrote), StopReason.LENGTH)
    assert text(state.carried) == carried


def test_a_state_stays_until_another_is_written() -> None:
    spec = ChunkSpec(12, 6, 9, carryover=StateBlock("[", "]").bind(TEXT))
    state = start(spec, QUERY)
    for wrote, carried in [("a[bc]d", "[bc]"), ("efgh", "[bc]"), ("[ij", "[bc]"), ("]a", "[bc]")]:
        state = state.advance(ids(wrote), StopReason.LENGTH)
        assert text(state.carried) == carried
    assert text(state.advance(ids("a[ef]"), StopReason.LENGTH).carried) == "[ef]"


class Glued:
    """A tokenizer in which a tag shares tokens with what is beside it, as in real ones."""

    pieces = ("<st", "ate>x", "y</", "state>\n", "z", "é", "\u4e2d")

    def decode(self, token_ids: Any, **options: Any) -> str:
        return "".join(self.pieces[i] for i in token_ids)


def test_tags_that_share_tokens_with_their_neighbours_are_found_in_the_text() -> None:
    policy = StateBlock().bind(Glued())  # type: ignore[arg-type]
    window = (5, 6, 4, 0, 1, 4, 2, 3, 4, 6)
    assert policy.carry(None, window, 9) == ((), (0, 1, 4, 2, 3))
    assert policy.carry(None, window, 3) == ((), (4, 2, 3))


# -- a carryover that the model writes -------------------------------------------------------------

SUMMARY = Summary(instruction="[", before="a", after=".").bind(TEXT)
ASKING = ChunkSpec(context_size=8, carryover_size=5, max_chunks=3, carryover=SUMMARY)


def test_a_summary_is_asked_for_at_the_boundary_and_carried_with_what_is_put_around_it() -> None:
    state = start(ASKING, QUERY)
    assert (state.max_new_tokens, state.budget_left) == (8, 14 + 2 * 3)
    state = state.advance(ids("bcdefghi"), StopReason.LENGTH)
    assert state.role is ChunkRole.CARRYOVER
    assert state.prompt_ids == QUERY + ids("bcdefghi") + ids("[")
    assert (state.max_new_tokens, state.budget_left, state.num_chunks) == (3, 6 + 2 * 3, 1)
    state = state.advance((*ids("jj"), EOS), StopReason.EOS)
    assert (state.role, state.stop) == (ChunkRole.THINKING, None)
    assert text(state.carried) == "ajj."
    assert (state.max_new_tokens, state.num_sampled, state.num_written) == (8 - 4, 11, 3)
    state = state.advance(ids("ghij"), StopReason.LENGTH)
    assert state.prompt_ids == QUERY + ids("ajj.ghij[")
    state = state.advance(ids("bbb"), StopReason.LENGTH)
    assert text(state.carried) == "abbb."
    state = state.advance(ids("ab"), StopReason.LENGTH)  # 14 tokens of thinking are the budget
    assert (state.stop, state.budget_left) == (TraceStop.BUDGET, 0)


def test_the_budget_and_the_context_of_a_summary_count_what_is_written() -> None:
    assert ASKING.thinking_budget == 8 + 2 * 3 == ChunkSpec(8, 5, 3, head_size=0).budget
    assert ASKING.budget == ASKING.thinking_budget + 2 * 3
    assert ASKING.max_thinking_context == 8 + 1 + 3  # thinking, the instruction, the answer


def test_the_end_of_a_summary_alone_is_an_empty_one() -> None:
    state = start(ASKING, QUERY).advance(ids("bcdefghi"), StopReason.LENGTH)
    assert text(state.advance((EOS,), StopReason.EOS).carried) == "a."


@pytest.mark.parametrize(
    ("stop", "ends"),
    [(StopReason.ABORT, TraceStop.ABORTED), (StopReason.ERROR, TraceStop.ERROR)],
)
def test_a_failure_while_a_summary_is_written_ends_the_trace(
    stop: StopReason, ends: TraceStop
) -> None:
    state = start(ASKING, QUERY).advance(ids("bcdefghi"), StopReason.LENGTH)
    after = state.advance((), stop)
    assert (after.stop, after.stop.is_failure if after.stop else None) == (ends, True)


def test_a_summary_that_is_too_long_is_the_policys_fault() -> None:
    state = start(ASKING, QUERY).advance(ids("bcdefghi"), StopReason.LENGTH)
    with pytest.raises(PolicyError, match=r"4 tokens.* at most 3"):
        state.advance(ids("jjjj"), StopReason.LENGTH)


def test_nothing_is_asked_after_the_last_chunk_nor_in_one_chunk() -> None:
    state: ThinkingState = start(replace(ASKING, max_chunks=1), QUERY)
    assert state.advance(ids("bcdefghi"), StopReason.LENGTH).stop is TraceStop.BUDGET
    assert replace(ASKING, max_chunks=1).budget == 8


def test_a_rollout_samples_summaries_as_chunks_of_the_trace() -> None:
    said = [
        Completion(ids("bcdefghi"), (-0.5,) * 8, StopReason.LENGTH, 3),
        Completion((*ids("jj"), EOS), (-1.0, -2.0, -3.0), StopReason.EOS, 4),
        Completion((*ids("gh"), EOS), (-0.1,) * 3, StopReason.EOS, 5),
    ]
    policy = ScriptedPolicy(said)
    trace = asyncio.run(run_rollout(policy, ASKING, QUERY, Sampling(seed=1)))
    assert trace.stop is TraceStop.COMPLETED
    roles = [ChunkRole.THINKING, ChunkRole.CARRYOVER, ChunkRole.THINKING]
    assert [chunk.role for chunk in trace.chunks] == roles
    assert [chunk.prompt_ids for chunk in trace.chunks] == [
        QUERY,
        QUERY + ids("bcdefghi["),
        QUERY + ids("ajj."),
    ]
    assert [chunk.carried for chunk in trace.chunks] == [0, 9, 4]
    assert [limit for _, limit in policy.calls] == [8, 3, 4]
    assert trace.chunks[1].logprobs == (-1.0, -2.0, -3.0)
    assert trace.length == 8 + 3 + 3, "what is written is sampled, and counts in the denominator"
    assert trace.output_ids == (*ids("bcdefghigh"), EOS), "the reward reads the thinking alone"


def test_a_summary_draws_with_a_seed_of_its_own() -> None:
    seeds = []

    class Recorder(ScriptedPolicy):
        async def generate(self, prompt_ids: Any, limit: Any, sampling: Sampling) -> Completion:
            seeds.append(sampling.seed)
            return await super().generate(prompt_ids, limit, sampling)

    full = Recorder(lambda prompt, limit: (2,) * limit)
    asyncio.run(run_rollout(full, ASKING, QUERY, Sampling(seed=1)))
    assert len(seeds) == len(set(seeds)) == 5


def test_a_summary_needs_room_and_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="carryover_size=2 leaves no room for a summary"):
        ChunkSpec(8, 2, 3, carryover=SUMMARY)
    for unbound in (Summary(), StateBlock()):
        with pytest.raises(ConfigError, match=r"works on text.*spec.bind"):
            start(ChunkSpec(8, 5, 3, carryover=unbound), QUERY)
    with pytest.raises(ConfigError, match="max_tokens"):
        ChunkSpec(8, 5, 3, carryover=Summary(max_tokens=0))


# -- promises --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Greedy(Carryover):
    """Promises m and returns one more."""

    name = "greedy"

    def carry(
        self, head: TokenIds | None, window: TokenIds, size: int
    ) -> tuple[TokenIds, TokenIds]:
        return (), window[-size - 1 :]


class Strange(Carryover):
    def carry(self, head: Any, window: Any, size: int) -> Any:
        return window


def test_a_policy_exceeding_its_bound_is_an_error_with_its_name() -> None:
    state = start(ChunkSpec(6, 2, 3, carryover=Greedy()), QUERY)
    with pytest.raises(CarryoverError, match="'greedy' returned 3 tokens; its bound is 2"):
        state.advance(span(1, 6), StopReason.LENGTH)


def test_a_policy_without_head_and_tail_is_an_error_with_its_name() -> None:
    state = start(ChunkSpec(6, 2, 3, carryover=Strange()), QUERY)
    with pytest.raises(CarryoverError, match="'Strange' must return a head and a tail"):
        state.advance(span(1, 6), StopReason.LENGTH)


def test_a_broken_carryover_is_not_a_failed_trace_among_others() -> None:
    policy = ScriptedPolicy(lambda prompt, limit: (7,) * limit)
    with pytest.raises(CarryoverError, match="greedy"):
        asyncio.run(run_rollout(policy, ChunkSpec(6, 2, 3, carryover=Greedy()), QUERY, Sampling()))


def test_a_bug_in_a_carryover_keeps_its_traceback() -> None:
    class Buggy(Carryover):
        def carry(self, head: Any, window: Any, size: int) -> Any:
            return window[10**6], ()

    policy = ScriptedPolicy(lambda prompt, limit: (7,) * limit)
    with pytest.raises(IndexError):
        asyncio.run(run_rollout(policy, ChunkSpec(6, 2, 3, carryover=Buggy()), QUERY, Sampling()))


class DuckTyped:
    """All methods of a carryover policy without the base class."""

    head_outside = False
    carry, bound, ask, check, bind = Tail.carry, Tail.bound, Tail.ask, Tail.check, Tail.bind
    unbound = False


@pytest.mark.parametrize(
    "wrong", ["tail", Tail, {"name": "tail"}, lambda head, window, m: None, DuckTyped()]
)
def test_anything_but_a_subclass_of_carryover_is_refused(wrong: Any) -> None:
    with pytest.raises(
        ConfigError, match="carryover must be an instance of a subclass of delethink.Carryover"
    ):
        ChunkSpec(6, 2, 3, carryover=wrong)


def test_replacing_the_carryover_of_a_spec_keeps_no_default_head() -> None:
    spec = ChunkSpec(8192, 4096, 5)
    assert replace(spec, carryover=Tail()) == ChunkSpec(8192, 4096, 5, carryover=Tail())


def test_the_example_of_head_and_window_in_the_docstring() -> None:
    policy = HeadTail(head_size=1)
    head, tail = policy.carry(None, ids("abcdef"), 3)
    assert (text(head), text(tail)) == ("a", "ef")
    head, tail = policy.carry(head, tail + ids("ghi"), 3)
    assert (text(head), text(tail)) == ("a", "hi")


def test_sizes_of_head_tail_beside_another_policy_are_refused() -> None:
    for sizes in ({"head_size": 1}, {"head_outside": True}):
        with pytest.raises(ConfigError, match="belong to the carryover 'head_tail'.*'tail'"):
            ChunkSpec(6, 2, 3, carryover=Tail(), **sizes)  # type: ignore[arg-type]


def test_sizes_that_a_policy_cannot_work_with_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_sinks.*at most carryover_size=2, got 4"):
        ChunkSpec(6, 2, 3, carryover=SinkWindow())
    with pytest.raises(ConfigError, match="head_size must be at least 0, got -1"):
        HeadTail(-1)
    with pytest.raises(ConfigError, match="tags"):
        StateBlock("")


# -- names -----------------------------------------------------------------------------------------

SHIPPED = ["tail", "head_tail", "none", "full", "state_block", "summary", "sink_window"]
ARGS: dict[str, dict[str, Any]] = {
    "state_block": {"opening": "[", "closing": "]"},
    "summary": {"instruction": "[", "before": "a", "after": "."},
}


def test_every_policy_has_a_name() -> None:
    assert sorted(registry.names("delethink.carryovers")) == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_policy_keeps_its_promises(name: str) -> None:
    made = registry.make("delethink.carryovers", {"name": name, "args": ARGS.get(name)})
    assert made.name == name
    check_carryover(made, tokenizer=TEXT)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("tale", "unknown carryover 'tale'. Did you mean 'tail'?"),
        ({"name": "tail", "arg": {}}, "unknown key 'arg' of a carryover. Did you mean 'args'?"),
        (
            {"name": "sink_window", "args": {"num_sink": 1}},
            "'sink_window' has no parameter 'num_sink'. Did you mean 'num_sinks'?",
        ),
        ({"name": "tail", "args": {"size": 1}}, "'tail' has no parameter 'size'. It has none."),
        ({"args": {}}, "a carryover must be a name, or a mapping with name and args"),
    ],
)
def test_wrong_names_and_parameters_are_told_the_nearest(value: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.make("delethink.carryovers", value)
    assert text in str(caught.value)


def test_a_program_registers_its_own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._IN_PROCESS, "delethink.carryovers", {})

    @registry.register("delethink.carryovers", "every_other")
    class EveryOther(Carryover):
        def carry(self, head: Any, window: TokenIds, size: int) -> tuple[TokenIds, TokenIds]:
            return window[:0], window[::2][:size]

    made = registry.make("delethink.carryovers", "every_other")
    assert boundaries(ChunkSpec(6, 2, 2, carryover=made))[1] == (4, (1, 3))
    assert "every_other" in registry.names("delethink.carryovers")
    registry.register("delethink.carryovers", "every_other")(EveryOther)  # the same one again
    with pytest.raises(ConfigError, match="'tail' is taken by delethink.carryover:Tail"):
        registry.register("delethink.carryovers", "tail")(EveryOther)
    with pytest.raises(ConfigError, match="Did you mean 'delethink.carryovers'"):
        registry.register("delethink.carryover", "x")


def test_a_package_names_a_policy_by_an_entry_point(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_carryovers.py").write_text(
        "from delethink import Carryover\n"
        "class Last(Carryover):\n"
        "    def carry(self, head, window, size):\n"
        "        return (), window[-1:]\n"
    )
    metadata = tmp_path / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[delethink.carryovers]\nlast = their_carryovers:Last\n"
        "lost = their_carryovers:Lost\ngone = their_gone:Gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = registry.make("delethink.carryovers", "last")
    assert boundaries(ChunkSpec(6, 2, 3, carryover=made))[1] == (5, (6,))
    for name in ("lost", "gone"):
        with pytest.raises(ConfigError, match=f"'{name}' stands for .*which cannot be loaded"):
            registry.make("delethink.carryovers", name)


# -- boundaries that fall early --------------------------------------------------------------------

LINES = ChunkSpec(8, 4, 3, head_size=0, boundary=LineBreak(within=4).bind(TEXT))


@pytest.mark.parametrize(
    ("wrote", "kept"),
    [
        ("abcde\nab", "abcde\n"),
        ("abc\nabcd", "abc\n"),
        ("ab\nabcde", "ab\nabcde"),
        ("abc\na\nab", "abc\n"),
        ("abcdefg\n", "abcdefg\n"),
        ("ab\n", "ab\n"),
    ],
    ids=[
        "in the last four",
        "at their start",
        "before them",
        "the first",
        "on the boundary",
        "short",
    ],
)
def test_a_line_break_among_the_last_tokens_ends_a_chunk(wrote: str, kept: str) -> None:
    output, stop = start(LINES, QUERY).truncate(ids(wrote), StopReason.LENGTH)
    assert (text(output), stop) == (kept, StopReason.LENGTH)


def test_an_end_of_the_answer_beyond_a_boundary_was_never_sampled() -> None:
    output, stop = start(LINES, QUERY).truncate((*ids("abcd\nf"), EOS), StopReason.EOS)
    assert (text(output), stop) == ("abcd\n", StopReason.LENGTH)
    output, stop = start(LINES, QUERY).truncate((*ids("ab\nf"), EOS), StopReason.EOS)
    assert (text(output), stop) == ("ab\nf<eos>", StopReason.EOS)


def test_a_chunk_beyond_a_boundary_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"beyond a boundary; shorten it with truncate\(\)"):
        start(LINES, QUERY).advance(ids("abcde\nab"), StopReason.LENGTH)


def test_a_rollout_ends_chunks_at_boundaries_with_their_own_log_probs() -> None:
    said = [
        Completion(ids("abcde\nab"), tuple(-float(i) for i in range(8)), StopReason.LENGTH),
        Completion((*ids("g"), EOS), (-1.0, -2.0), StopReason.EOS),
    ]
    trace = asyncio.run(run_rollout(ScriptedPolicy(said), LINES, QUERY, Sampling()))
    assert [text(chunk.output_ids) for chunk in trace.chunks] == ["abcde\n", "g<eos>"]
    assert trace.chunks[0].logprobs == tuple(-float(i) for i in range(6))
    assert text(trace.chunks[1].prompt_ids[2:]) == "cde\n"


def test_the_last_chunk_has_no_boundary_so_that_no_budget_is_lost() -> None:
    state = start(LINES, QUERY).advance(ids("abcd\n"), StopReason.LENGTH)
    state = state.advance(ids("ab\n"), StopReason.LENGTH)
    assert state.num_chunks == LINES.max_chunks - 1
    output, stop = state.truncate(ids("a\nbc"), StopReason.LENGTH)
    assert (text(output), stop) == ("a\nbc", StopReason.LENGTH)
    single = start(replace(LINES, max_chunks=1), QUERY)
    assert single.truncate(ids("abcde\nab"), StopReason.LENGTH)[0] == ids("abcde\nab")


def test_a_boundary_never_gives_a_chunk_more_than_its_room() -> None:
    class Never(Boundary):
        within = 8

        def ends(self, output_ids: TokenIds, room: int) -> bool:
            return False

    assert boundaries(ChunkSpec(8, 4, 3, head_size=0, boundary=Never())) == [
        (8, ()),
        (4, span(5, 8)),
        (4, span(9, 12)),
    ]


def test_a_shipped_boundary_keeps_its_promises() -> None:
    check_boundary(registry.make("delethink.boundaries", "line_break"), TEXT, ["ab\n", "\n", "ab"])
    with pytest.raises(ConfigError, match="within of at least 1"):
        LineBreak(within=0)
    with pytest.raises(ConfigError, match="line_break.*works on text"):
        start(ChunkSpec(8, 4, 3, head_size=0, boundary=LineBreak()), QUERY)
