"""Families of the replication: oracles, splits, lengths and graders."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

# The recipe's own modules, as ``delethink train`` finds them.
sys.path.append(str(Path(__file__).parents[2] / "recipes" / "replication"))

import families
import make_base

from delethink.envs.automaton import automaton_step, is_held_out
from delethink.errors import ConfigError
from delethink.evaluation.run import load_problems
from delethink.rewards.match import exact_match
from delethink.tasks import demonstrations_of

pytest.importorskip("reasoning_gym")

FOLDER = Path(__file__).parents[2] / "recipes" / "replication"

TASKS = {"hitting": families.HittingTask(2, 10), "life": families.LifeTask(2, 11)}
LONG = {"hitting": families.HittingTask(11, 115), "life": families.LifeTask(13, 115)}
TRAINING_TOKENS = {"hitting": 216, "life": 252}


def graded(name: str, text: str, problem) -> float:
    if name == "hitting":
        return exact_match(text, problem.answer)
    return families.board_score(text, problem.metadata)


def test_hitting_times_are_those_of_single_steps() -> None:
    rng, times = random.Random(0), families.hitting_times()
    for _ in range(100):
        ring = families.ring_text(rng.getrandbits(families.RING_CELLS))
        steps, state = int(times[int(ring, 2)]), ring
        for step in range(1, steps + 1):
            state = automaton_step(state, families.RULE)
            assert state.startswith(families.STOP) == (step == steps)


def test_every_last_ring_is_about_equally_likely() -> None:
    held_out = TASKS["hitting"]
    answers = [held_out.problem("heldout", i).answer for i in range(1024)]
    assert max(map(answers.count, set(answers))) < 0.02 * len(answers)


def test_an_empty_board_and_a_block_rest() -> None:
    assert families.life_table()[0] == 0
    block = int("0000011001100000", 2)
    assert families.life_table()[block] == block
    assert not families.restless_boards()[block]


def test_boards_have_entered_their_cycles_when_they_are_judged() -> None:
    table, boards = families.life_table(), np.arange(1 << families.BOARD_CELLS)
    for _ in range(families._TRANSIENT_STEPS):
        boards = table[boards]
    reached = np.unique(boards)
    assert len(np.unique(table[reached])) == len(reached)


@pytest.mark.parametrize("steps", [1, 3, 17, 60])
def test_the_oracle_of_life_agrees_with_reasoning_gym(steps: int) -> None:
    for seed in range(8):
        board = families.compact_board(families.life_entry(seed, 0)["answer"])
        entry = families.life_entry(seed, steps)
        *_, last = families.LifeTask.lines(board, steps)
        assert families.full_board(last.partition(":")[2]) == entry["answer"]
        question = "".join(c for c in entry["question"].partition("\n\n")[2] if c in "01")
        assert question == board


@pytest.mark.parametrize("name", TASKS)
def test_no_starting_state_is_in_both_splits(name: str) -> None:
    task = TASKS[name]
    for split in ("train", "heldout"):
        problems = [task.problem(split, i) for i in range(60)]
        assert {is_held_out(p.metadata["state"]) for p in problems} == {split == "heldout"}
        assert all(task.min_steps <= p.metadata["steps"] <= task.max_steps for p in problems)
        assert problems[7] == type(task)(task.min_steps, task.max_steps).problem(split, 7)


@pytest.mark.parametrize("name", TASKS)
def test_the_base_corpus_starts_from_training_states_only(name: str) -> None:
    rng = random.Random(0)
    for i in range(200):
        query, text, ended = families.FAMILIES[name].write_trace(rng, 1 + i % 19, 0.1)
        assert not is_held_out(query.rpartition(":")[2])
        assert ended == ("</think>" in text)


@pytest.mark.parametrize("name", TASKS)
def test_a_trace_without_slips_is_the_right_solution(name: str) -> None:
    rng, task, ends = random.Random(1), TASKS[name], 0
    for i in range(60):
        query, text, ended = task.write_trace(rng, 1 + i % 12, 0.0)
        state = query.rpartition(":")[2]
        lines = task.lines(state) if name == "hitting" else task.lines(state, int(query[:3]))
        assert "\n".join(lines).startswith(text.partition("</think>")[0].rstrip("\n"))
        ends += ended
    assert 10 < ends < 50


@pytest.mark.parametrize("name", TASKS)
def test_the_grader_takes_the_right_demonstration_only(name: str) -> None:
    task = TASKS[name]
    for i in range(20):
        problem = task.problem("heldout", i)
        right, wrong = demonstrations_of(task, problem)
        assert graded(name, right, problem) == 1.0
        assert graded(name, wrong, problem) == 0.0
        assert graded(name, right.replace("</think>", ""), problem) == 0.0
        assert graded(name, right + "0", problem) == 0.0


@pytest.mark.parametrize("name", TASKS)
def test_problems_fit_the_training_budget_and_the_long_ones_ten_times_it(name: str) -> None:
    def tokens(task, problem) -> int:
        right = demonstrations_of(task, problem)[0]
        return len(right.replace("</think>", "!")) + 1  # one token a character, and the end

    assert all(
        tokens(TASKS[name], TASKS[name].problem(s, i)) <= TRAINING_TOKENS[name]
        for s in ("train", "heldout")
        for i in range(100)
    )
    lengths = [tokens(LONG[name], LONG[name].problem("heldout", i)) for i in range(40)]
    assert max(lengths) <= 10 * TRAINING_TOKENS[name]
    assert max(lengths) > 5 * TRAINING_TOKENS[name]


def test_there_are_enough_held_out_problems() -> None:
    assert TASKS["hitting"].size("heldout") >= 1024
    assert LONG["hitting"].size("heldout") >= 256
    prompts = {TASKS["life"].problem("heldout", i).prompt for i in range(100)}
    assert len(prompts) >= 95


def test_tasks_and_grader_are_found_by_module_and_object(monkeypatch) -> None:
    monkeypatch.chdir(FOLDER)
    loaded = load_problems("families:LifeTask", {"min_steps": 2, "max_steps": 5}, 4)
    assert (len(loaded.problems), loaded.reward) == (4, "families:board_score")
    loaded.close()


@pytest.mark.parametrize("task", families.FAMILIES.values(), ids=list(families.FAMILIES))
@pytest.mark.parametrize("steps", [(0, 3), (4, 3), (1, 10_000), (1.5, 3)], ids=str)
def test_impossible_steps_are_refused(task, steps) -> None:
    with pytest.raises(ConfigError, match="steps must"):
        task(*steps)


# ---- the base model


def tiny_settings(name: str) -> dict:
    sizes = make_base.read_sizes()
    tiny = {"updates": 6, "layers": 1, "width": 32, "tokens": 128, "max_lines": 3}
    return make_base.base_settings(name, sizes) | tiny


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_has_labels_for_the_written_text_only(name: str) -> None:
    settings, tokenizer = tiny_settings(name), make_base.make_tokenizer()
    for number in range(8):
        ids, labels = make_base.make_batch(tokenizer, settings, number)
        again, _ = make_base.make_batch(tokenizer, settings, number)
        assert ids.equal(again)
        for row, wanted in zip(ids, labels, strict=True):
            text = tokenizer.decode(row)
            query, _, _ = text.partition("<think>")
            labelled = tokenizer.decode(row[wanted != make_base.IGNORED])
            assert text == f"{query}<think>{labelled}" + "<pad>" * text.count("<pad>")
            assert "<pad>" not in labelled


def test_a_base_made_in_pieces_is_the_base_made_at_once(tmp_path: Path) -> None:
    settings, clock = tiny_settings("hitting"), iter(range(10**6))
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert make_base.make_piece(settings, whole, 10**6, print)
    with pytest.MonkeyPatch.context() as patch:
        # A clock that moves a second with each reading, so each piece is a few updates.
        patch.setattr(make_base.time, "monotonic", lambda: next(clock))
        number = 1
        while not make_base.make_piece(settings, pieces, 5, print):
            number += 1
    assert number > 1
    weights = [load_file(folder / "model.safetensors") for folder in (whole, pieces)]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    assert make_base.make_piece(settings, whole, 0, print)  # it is there
    with pytest.raises(ConfigError, match="other sizes"):
        make_base.make_piece(settings | {"lr": 1.0}, whole, 0, print)


def test_a_model_begun_with_other_sizes_is_refused(tmp_path: Path) -> None:
    settings = tiny_settings("life")
    assert not make_base.make_piece(settings, tmp_path, 0, print)
    with pytest.raises(ConfigError, match=r"begun with slip=0.03, and now it is 0.5"):
        make_base.make_piece(settings | {"slip": 0.5}, tmp_path, 0, print)
