"""A drawn trace: origins and fates of tokens, shades, the answer, and texts that stay texts."""

from __future__ import annotations

import asyncio
import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from delethink import Chunk, ChunkSpec, Sampling, ScriptedPolicy, Trace, run_rollout
from delethink.carryover import Carryover, Full, Nothing, SinkWindow, Tail
from delethink.envs.spaces import CharacterTokenizer
from delethink.trace_html import (
    JudgedAnswer,
    TraceView,
    answer_place,
    card_html,
    html_text,
    page_html,
    token_texts,
    trace_html,
    trace_parts,
)
from delethink.trace_map import UNKNOWN, map_trace, match_tokens
from delethink.trace_svg import map_bars, map_svg
from delethink.types import ChunkRole, StopReason, TraceStop
from delethink.view.terminal import print_trace, trace_lines


class Letters:
    """A tokenizer with one token for each character, for any text."""

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, ids))


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def sampled(spec: ChunkSpec, said: list[str], query: str = "q") -> Trace:
    policy = ScriptedPolicy([ids(text) for text in said], eos_id=ord("."))
    return asyncio.run(run_rollout(policy, spec, ids(query), Sampling()))


def drawn(trace: Trace, **options: Any) -> TraceView:
    return TraceView(trace, token_texts(Letters()), **options)


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def segments(trace: Trace) -> list[list[tuple[str, str, str]]]:
    return [
        [(s.kind, s.fate, "".join(map(chr, one.ids[s.begin : s.end]))) for s in one.segments]
        for one in map_trace(trace)
    ]


def test_each_token_of_a_context_has_a_kind_and_a_fate() -> None:
    trace = sampled(ChunkSpec(6, 3, 3, head_size=1), ["abcdef", "ghi", "jk."])
    assert segments(trace) == [
        [("new", "kept", "a"), ("new", "dropped", "bcd"), ("new", "kept", "ef")],
        [("carried", "kept", "a"), ("carried", "dropped", "ef"), ("new", "dropped", "g"),
         ("new", "kept", "hi")],
        [("carried", "last", "ahi"), ("new", "last", "jk.")],
    ]  # fmt: skip


def test_origins_are_places_among_the_sampled_tokens() -> None:
    trace = sampled(ChunkSpec(6, 3, 3, head_size=1), ["abcdef", "ghi", "jk."])
    assert [one.origins for one in map_trace(trace)] == [
        [0, 1, 2, 3, 4, 5],
        [0, 4, 5, 6, 7, 8],
        [0, 7, 8, 9, 10, 11],
    ]


@pytest.mark.parametrize(
    "policy",
    [Tail(), Nothing(), Full(), SinkWindow(num_sinks=1)],
    ids=lambda policy: policy.name,
)
def test_carried_tokens_equal_those_at_their_origin(policy: Carryover) -> None:
    size = 0 if isinstance(policy, Nothing) else 4
    trace = sampled(ChunkSpec(8, size, 3, carryover=policy), ["abcdefgh", "ijkl", "mn."])
    for one in map_trace(trace):
        for token, origin in zip(one.ids, one.origins, strict=True):
            assert origin != UNKNOWN
            assert trace.output_ids[origin] == token


def test_a_block_in_the_middle_is_found_and_an_unknown_token_is_said() -> None:
    assert match_tokens(ids("cd"), ids("abcdef")) == [2, 3]
    assert match_tokens(ids("aXf"), ids("abcdef")) == [0, UNKNOWN, 5]
    assert match_tokens((), ids("ab")) == []


def test_a_head_that_is_clear_at_one_boundary_is_the_head_at_all() -> None:
    # The second letter of the head, b, also stands before the tail of the first boundary.
    trace = sampled(ChunkSpec(8, 4, 3, head_size=2), ["abcdebfg", "hijk", "lm."])
    first, second, _ = segments(trace)
    assert first == [("new", "kept", "ab"), ("new", "dropped", "cdeb"), ("new", "kept", "fg")]
    assert second[0] == ("carried", "kept", "ab")


@given(st.lists(st.integers(0, 2), max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_matches_are_equal_tokens_in_order(context: list[int], head: int, tail: int) -> None:
    carried = context[:head] + context[max(head, len(context) - tail) :]
    places = match_tokens(carried, context)
    assert [context[place] for place in places] == carried
    assert places == sorted(set(places))


def test_a_carryover_that_the_model_wrote_is_set_apart() -> None:
    query, first, ask, summary = ids("q"), ids("abc"), ids("?"), ids("S.")
    trace = Trace(
        query,
        (
            Chunk(query, first, (), StopReason.LENGTH),
            Chunk(query + first + ask, summary, (), StopReason.EOS, 4, role=ChunkRole.CARRYOVER),
            Chunk(query + ids("S"), ids("x."), (), StopReason.EOS, 1),
        ),
        TraceStop.COMPLETED,
    )
    assert segments(trace) == [
        [("new", "dropped", "abc")],
        [("asked", "dropped", "abc?"), ("written", "kept", "S"), ("written", "dropped", ".")],
        [("carried", "last", "S"), ("new", "last", "x.")],
    ]
    page = trace_html(drawn(trace))
    assert "Carryover written after chunk 1" in page
    assert page.count("context reset</b>") == 1


def test_a_page_names_boundary_origin_policy_version_worker_and_answer() -> None:
    trace = sampled(ChunkSpec(8, 4, 5, head_size=0), ["abcdefgh", "</th", "ink>", "42."])
    place = answer_place(trace, token_texts(Letters()))
    assert place == (16, 18)
    page = trace_html(drawn(trace, answer=place, workers=["worker 0", "worker 1", None, None]))
    for text in (
        "Chunk 2 of 4",
        "4 carried + 4 new tokens",
        "policy version 0",
        "worker 1",
        "4 of 8 tokens dropped, 4 carried over",
        "carried over</b> from chunk 1",
        "the answer is here, at token 1",
        "dropped at the next reset",
        "survives the next reset",
    ):
        assert text in page, text
    assert page.count('answer" title') == 2  # the tokens 4 and 2


@pytest.mark.parametrize(
    ("verdict", "texts"),
    [
        (JudgedAnswer("42", "42", 1.0, "exact"), ["✓ right", "exact 1", "<code>42</code>"]),
        (JudgedAnswer("42", "41", 0.0, "exact"), ["✕ wrong", "exact 0", "<code>41</code>"]),
        (JudgedAnswer("42", "41", 0.5, "exact"), ["◐ partly right", "exact 0.5"]),
        (JudgedAnswer(None, None), ["? not scored", "<dd>none</dd>", "<dd>not known</dd>"]),
        (JudgedAnswer("x" * 300, "1", 0.0), [f"<code>{'x' * 200}…</code>"]),
    ],
    ids=["right", "wrong", "partly", "unknown", "long"],
)
def test_the_own_answer_stands_beside_the_gold_answer(
    verdict: JudgedAnswer, texts: list[str]
) -> None:
    trace = sampled(ChunkSpec(8, 4, 3, head_size=0), ["abcdefgh", "ijkl", "m."])
    for page in (
        trace_html(drawn(trace, verdict=verdict)),
        card_html(drawn(trace, verdict=verdict)),
    ):
        for text in texts:
            assert text in page, text


def test_a_trace_out_of_budget_says_why_it_has_no_answer() -> None:
    trace = sampled(ChunkSpec(8, 4, 2, head_size=0), ["abcdefgh", "ijkl"])
    page = trace_html(drawn(trace, verdict=JudgedAnswer("1", None, 0.0)))
    assert "none: the budget was used up" in page


def test_a_heading_says_why_a_chunk_stopped() -> None:
    query = ids("q")
    trace = Trace(
        query,
        (
            Chunk(query, ids("abcdefgh"), (), StopReason.LENGTH),
            Chunk(query + ids("efgh"), ids("ij"), (), StopReason.LENGTH, 4),
            Chunk(query + ids("ghij"), ids("k."), (), StopReason.EOS, 4),
        ),
        TraceStop.COMPLETED,
    )
    page = trace_html(drawn(trace, context_size=8))
    assert "stopped: the context of 8 tokens is full (length)" in page
    assert "stopped early, at 6 of 8 tokens (length)" in page
    assert "ended by the model (eos)" in page
    assert trace_html(drawn(trace)).count("stopped for a context reset (length)") == 2


def bars(trace: Trace) -> list[list[tuple[int, int, str]]]:
    return [list(map_bars(one)) for one in map_trace(trace)]


def test_the_map_tells_carried_from_new_and_dropped_from_kept() -> None:
    trace = sampled(ChunkSpec(6, 3, 3, head_size=1), ["abcdef", "ghi", "jk."])
    assert bars(trace) == [
        [(0, 1, "new"), (1, 4, "new lost"), (4, 6, "new")],
        [(0, 1, "carried"), (4, 6, "carried lost"), (6, 7, "new lost"), (7, 9, "new")],
        [(0, 1, "carried"), (7, 9, "carried"), (9, 12, "new")],
    ]
    page = trace_html(drawn(trace))
    assert page.count('<path class="cut"') == 2
    assert "<title>chunk 2: 3 carried + 3 new tokens, 3 dropped at the next reset</title>" in page
    for text in ("carried over", "new", "pale: dropped at the next reset", "✂ context reset"):
        assert re.search(f'<span class="key key-[a-z]+">{text}</span>', page)
    assert "key-place" not in page  # no answer


def test_a_map_of_many_contexts_has_few_rows_and_says_so() -> None:
    chunks, carried = [], ()
    for number in range(100):
        chunks.append(Chunk((1, *carried), (number, 7), (), StopReason.LENGTH, len(carried)))
        carried = (7,)
    trace = Trace((1,), tuple(chunks), TraceStop.BUDGET)
    drawing = map_svg(map_trace(trace), trace.length, most=40, height=130)
    assert drawing.count("<g data-chunk") <= 41
    assert 'data-chunk="100"' in drawing
    assert "map of 100 contexts, of which 34 are drawn" in drawing
    assert drawing.count("<li>") == 2


def test_shades_follow_the_logprobs_and_stored_values() -> None:
    chunk = Chunk(ids("q"), ids("abc"), (-0.01, -1.0, -9.0), StopReason.EOS)
    trace = Trace(ids("q"), (chunk,), TraceStop.COMPLETED)
    values = {"difference": [[0.0, 0.02, 1.0]]}
    page = trace_html(drawn(trace, values=values))
    assert '<i class="t" title="token 1 of the trace · id 97 · log-prob -0.010' in page
    assert '<i class="t l2 d2"' in page
    assert '<i class="t l4 d4"' in page
    assert 'class="by-difference"' in page
    assert "by-entropy" not in page


def test_a_long_trace_is_cut_into_bounded_parts_that_hold_every_token() -> None:
    text = "abcdefghij" * 300
    trace = sampled(ChunkSpec(len(text), 0, 1, head_size=0), [text[:-1] + "."])
    parts = trace_parts(drawn(trace), 500)
    assert max(part.end - part.begin for part in parts) == 500
    assert sum(part.end - part.begin for part in parts) == len(text)


ATTACKS = [
    "<script>alert(1)</script>",
    "</pre></div><img src=x onerror=alert(1)>",
    '"><a href="javascript:alert(1)">x</a>',
    "\x1b]8;;http://evil\x07link\x1b]8;;\x07",
    "\x1b[2J\x1b]0;title\x07",
    "abc\u202edcba\u2066x",
    "a\u200bb\u00adc\ufeff",
]
TAGS = {
    *("article", "h1", "h2", "h3", "small", "dl", "div", "dt", "dd", "p", "span", "svg", "rect"),
    *("code", "g", "title", "ol", "li"),
    *("pre", "i", "b", "fieldset", "legend", "label", "input", "details", "summary", "path"),
}


def hostile(attack: str) -> TraceView:
    chunk = Chunk(ids("q" + attack), ids(attack + "</think>" + attack), (), StopReason.ERROR,
                  error=attack)  # fmt: skip
    trace = Trace(ids("q" + attack), (chunk,), TraceStop.ERROR)
    return drawn(
        trace,
        title=attack,
        facts={attack: attack},
        notes={attack: attack},
        workers=[attack],
        verdict=JudgedAnswer(attack, attack, 0.5, attack),
        answer=answer_place(trace, token_texts(Letters())),
    )


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_of_a_model_is_live(attack: str) -> None:
    page = trace_html(hostile(attack))
    reader = read(page)
    assert reader.tags <= TAGS
    assert not {name for name in reader.attributes if name.startswith("on") or name == "href"}
    for character in "\x1b\x07\u202e\u2066\u200b\u00ad\ufeff":
        assert character not in page
    assert "\x1b" not in page_html(attack, page)
    assert html_text(attack) in page  # as text


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_terminal_gets_no_escapes_of_a_model(attack: str) -> None:
    written = io.StringIO()
    print_trace(hostile(attack), Console(file=written, force_terminal=False, width=80))
    for character in "\x1b\x07\u202e\u2066\u200b\ufeff":
        assert character not in written.getvalue()


@given(st.text())
def test_whatever_the_text_the_page_has_its_own_tags_only(text: str) -> None:
    assert read(trace_html(hostile(text))).tags <= TAGS


def test_an_exported_page_allows_no_script_and_no_connection() -> None:
    page = page_html("t", trace_html(hostile("<script>")))
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    assert "<script" not in page
    assert "http" not in page.partition("<body>")[0].replace("http-equiv", "")


def test_tokens_of_half_a_character_join_to_it() -> None:
    class Bytes:
        def decode(self, numbers: Any) -> str:
            return bytes(numbers).decode("utf-8", "replace")

    number = list("aé中🙂b".encode())
    found = token_texts(Bytes())(number)
    assert len(found) == len(number)
    assert "".join(found) == "aé中🙂b"
    cut = token_texts(Bytes())(number[:-2])
    assert "".join(cut) == Bytes().decode(number[:-2])


def test_without_a_tokenizer_the_ids_are_shown() -> None:
    assert token_texts(None)([7, 12]) == ["⟨7⟩", "⟨12⟩"]


def test_the_toy_tokens_join_to_the_decoded_text() -> None:
    tokenizer = CharacterTokenizer()
    number = tokenizer("01:001</think>11")["input_ids"]
    assert "".join(token_texts(tokenizer)(number)) == tokenizer.decode(number)


def test_terminal_lines_name_each_part() -> None:
    trace = sampled(ChunkSpec(8, 4, 3, head_size=0), ["abcdefgh", "ijkl", "m."])
    text = "\n".join(
        line.text
        for line in trace_lines(
            drawn(trace, facts={"reward": 1.0}, verdict=JudgedAnswer("42", "41", 0.0))
        )
    )
    for part in (
        "reward 1.0",
        "wrong: the model's answer 41, gold answer 42",
        "query, 1 tokens",
        "chunk 2 of 3: 4 carried + 4 new tokens, policy version 0, stop length",
        "+ new, 4 tokens, dropped at the next reset\nabcd",
        "> carried over from chunk 1, 4 tokens, dropped at the next reset\nefgh",
        "---- context reset: 4 of 8 tokens dropped, 4 carried over ----",
        "end: completed",
    ):
        assert part in text, part


def test_colours_are_for_terminals_only() -> None:
    trace = sampled(ChunkSpec(8, 4, 3, head_size=0), ["abcdefgh", "ijkl", "m."])
    plain, coloured = io.StringIO(), io.StringIO()
    print_trace(drawn(trace), Console(file=plain, width=80))
    print_trace(drawn(trace), Console(file=coloured, width=80, force_terminal=True))
    assert "\x1b" not in plain.getvalue()
    assert "\x1b[" in coloured.getvalue()
