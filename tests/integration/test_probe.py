"""``delethink probe`` on the shipped toy reasoner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from delethink import ChunkSpec, Problem, StopReason
from delethink.carryover import Full
from delethink.cli.main import main
from delethink.engines.loading import load_model
from delethink.evaluation.probe import Probe
from delethink.trace_io import TraceRecord, write_traces
from delethink.types import Chunk, Trace, TraceStop

pytestmark = pytest.mark.integration

QUERY, OUTPUT = (5, 6, 7), tuple(3 + (i * i) % 12 for i in range(30))


def trace_of(output: tuple[int, ...]) -> Trace:
    chunk = Chunk(QUERY, output, (0.0,) * len(output), StopReason.LENGTH)
    return Trace(QUERY, (chunk,), TraceStop.BUDGET)


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe(load_model("toy", "float32").eval(), 512)


@torch.no_grad()
def plain(probe: Probe, context: tuple[int, ...], output: tuple[int, ...]) -> torch.Tensor:
    logits = probe.model(input_ids=torch.tensor([context + output])).logits
    return logits[0, len(context) - 1 : -1].log_softmax(-1)


def test_gap_and_divergence_are_those_of_plain_forward_passes(probe: Probe) -> None:
    spec, other = ChunkSpec(12, 6, 10**6, 2), trace_of(OUTPUT[::-1])
    boundaries = list(probe.boundaries([trace_of(OUTPUT), other], [spec], spec))
    mine = [b for b in boundaries if b.trace == 0]
    assert [(b.chunk, b.condition) for b in mine] == [
        (chunk, condition) for chunk in (1, 2, 3) for condition in ("carried", "none", "other")
    ]
    begin = 18  # of the third chunk: 12, then 6 each
    output = OUTPUT[begin : begin + 6]
    carried = OUTPUT[:2] + OUTPUT[begin - 4 : begin]
    borrowed = OUTPUT[::-1][:2] + OUTPUT[::-1][8:12]
    history = plain(probe, QUERY + OUTPUT[:begin], output)
    chosen = torch.tensor(output)[:, None]
    for boundary, context in zip(mine[3:6], (carried, (), borrowed), strict=True):
        seen = plain(probe, QUERY + context, output)
        gap = (history - seen).gather(1, chosen)[:, 0]
        assert torch.tensor(boundary.gap) == pytest.approx(gap.double(), abs=1e-4)
        divergence = (history.exp() * (history - seen)).sum(-1)
        assert torch.tensor(boundary.divergence) == pytest.approx(divergence.double(), abs=1e-4)


def test_nothing_is_lost_where_everything_is_carried(probe: Probe) -> None:
    spec = ChunkSpec(12, 6, 10**6, carryover=Full())
    boundaries = list(probe.boundaries([trace_of(OUTPUT)], [spec], ChunkSpec(12, 6, 10**6, 0)))
    assert len(boundaries) == 3
    for boundary in boundaries:
        assert boundary.gap == pytest.approx(0, abs=1e-4)
        assert boundary.divergence == pytest.approx(0, abs=1e-6)


def test_traces_that_fit_in_one_context_or_in_none_are_left_out(probe: Probe) -> None:
    spec = ChunkSpec(12, 6, 10**6, 0)
    assert not list(probe.boundaries([trace_of(OUTPUT[:9])], [spec], spec))
    assert not probe.fits(trace_of(OUTPUT * 40))
    assert not list(probe.boundaries([trace_of(OUTPUT * 40)], [spec], spec))


def test_the_page_of_a_trained_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = "--task automaton --task-arg min_steps=10 --task-arg max_steps=12 --num-problems 6"
    sizes = "-C 90 --carryover-size 30,45 --head-size 0 --budget 300"
    words = f"probe -m toy {task} {sizes} --json -o".split()
    assert main([*words, str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    whole = {
        (line["carryover_size"], line["condition"]): line["gap"]["mean"]
        for line in found["lines"]
        if line["begin"] == 0 and line["end"] > 1
    }
    # A line looks back one line, which 45 tokens always hold whole.
    assert abs(whole[45, "carried"]) < 0.1 < whole[45, "none"]
    assert whole[45, "other"] > 0.1
    assert found["traces"] == 6
    assert found["answers"] == 6
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["probe.json", "probe.md", "probe.png", "report.html"]
    assert (tmp_path / "out" / "probe.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("-m toy", "either --traces PATH or --task NAME"),
        ("-m toy --task automaton --traces x.jsonl", "either --traces PATH or --task NAME"),
        ("-m toy --traces nowhere.jsonl -C 90", "there are no traces at nowhere.jsonl"),
        ("-m toy --traces empty -C 90", "holds no traces"),
        ("-m toy --traces other.jsonl -C 90", "the traces are of another model"),
        (
            "-m toy --traces other.jsonl -C 90 --carryover-size 90",
            "carryover_size must be at least 0",
        ),
        ("-m toy --traces other.jsonl -C 90 --carryover 45", "write --carryover-size 45"),
        (
            "-m toy --traces other.jsonl -C 90 --carryover summary",
            "carryover written by the model",
        ),
        ("-m toy --traces other.jsonl -C 90 engine=vllm", "engine settings have no effect"),
        ("-m toy --traces other.jsonl -C none", "-C: a whole number of tokens"),
        ("-m ./nowhere --traces other.jsonl -C 90", "the model folder nowhere does not exist"),
        ("-m toy --traces other.jsonl -C 90 -o full", "full is not empty"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    write_traces("other.jsonl", [TraceRecord(Problem("a", "b"), trace_of((3, 40_000)))])
    before = sorted(tmp_path.rglob("*"))
    assert main(["probe", *words.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert says in error[-1]
    assert sorted(tmp_path.rglob("*")) == before
