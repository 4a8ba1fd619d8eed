"""Preflight checks and ``delethink doctor``: each kind of problem is found, with its number."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from delethink.cli.main import main
from delethink.config import load_recipe
from delethink.training import preflight
from delethink.training.preflight import Check, check_recipe
from delethink.training.system import Memory, process_memory

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart" / "recipe.yaml"
TOY = ROOT / "delethink" / "assets" / "toy_reasoner"
REWARDS = """
def none_right(text, answer):
    return 0.0


def all_right(text, answer):
    return 1.0


def broken(text, answer):
    return text.nonsense


def punishes(text, answer):
    return -2.0 * text.endswith(answer)
"""


def found(*overrides: str, name: str, expected: int = 1) -> Check:
    """Return the check of a name; no other check is a problem."""
    all_of_them = check_recipe(load_recipe(RECIPE, list(overrides)))
    problems = [check for check in all_of_them if check.status == "problem"]
    assert all(check.name == name for check in problems), problems
    named = [check for check in all_of_them if check.name == name]
    assert len(named) == expected
    return named[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the toy reasoner to damage."""
    return Path(shutil.copytree(TOY, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; ``None`` removes a key."""
    known = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in known.items() if value is not None}))


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)


def test_the_quickstart_passes_all_checks() -> None:
    all_of_them = check_recipe(load_recipe(RECIPE))
    assert [check.name for check in all_of_them] == [
        "recipe",
        "tokenizer",
        "thinking",
        "context",
        "memory",
        "disk",
        "rewards",
    ]
    assert {check.status for check in all_of_them} <= {"ok", "warning"}  # on a busy machine
    assert "105 of the model's 1024" in all_of_them[3].found
    assert "right answer 1 (exact 1), wrong answer 0 (exact 0)" in all_of_them[6].found


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.name=automato"], "unknown task 'automato'"),
        (["task.args.widht=3"], "'widht'"),
        (["model=./nowhere"], "the model folder nowhere does not exist"),
        (["rewards={exakt: 1}"], "'exakt'"),
        (
            ["engine=transformers", "engine.num_engines=3"],
            "engine.num_engines=3 applies to engines in Ray workers",
        ),
    ],
)
def test_a_name_or_setting_that_is_wrong(overrides: list[str], words: str) -> None:
    check = found(*overrides, name="recipe")
    assert check.status == "problem"
    assert words in check.found


def test_a_tokenizer_without_an_end(model: Path) -> None:
    change(model / "tokenizer_config.json", eos_token=None)
    check = found(f"model={model}", name="inputs")
    assert check.status == "problem"
    assert "set eos_token in its tokenizer_config.json" in check.found
    assert "end-of-sequence token" in check.found


def test_a_template_that_closes_the_thinking(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[-1].content }}<think></think>")
    assert "closes the thinking" in found(f"model={model}", name="inputs").found


def test_a_window_too_small(model: Path) -> None:
    change(model / "config.json", max_position_embeddings=100)
    check = found(f"model={model}", name="inputs")
    assert "the query has 15 tokens" in check.found


def test_a_window_too_small_for_longcot_is_a_warning(model: Path) -> None:
    change(model / "config.json", max_position_embeddings=300)
    check = found(f"model={model}", name="context")
    assert check.status == "warning"
    assert "LongCoT would need 465" in check.found
    assert "no row for LongCoT" in check.advice


def test_a_model_too_large_for_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Memory("RAM", 2**30, 2**30)
    monkeypatch.setattr(preflight, "process_memory", lambda: small)
    check = found(name="memory")
    assert check.status == "problem"
    needed = re.match(r"(\d+\.\d) GiB of 1.0 GiB RAM", check.found)
    assert needed is not None
    assert float(needed[1]) > 1.5
    assert "training.forward_tokens" in check.advice
    assert found("training.forward_tokens=256", "evaluation.num_problems=8", name="memory")


def test_a_context_larger_than_the_cache_of_a_worker(model: Path) -> None:
    change(model / "config.json", max_position_embeddings=10_000_000)
    sizes = ["thinking.context_size=4000000", "thinking.carryover_size=2000000"]
    options = ["engine=vllm", "training.forward_tokens=256", "preflight=warn"]
    all_of_them = check_recipe(load_recipe(RECIPE, [f"model={model}", *sizes, *options]))
    engine = next(check for check in all_of_them if check.name == "engine")
    assert engine.status == "problem"
    assert "of 1.0 GiB" in engine.found


def test_the_memory_of_an_unknown_architecture_is_not_checked(model: Path) -> None:
    change(model / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    check = found(f"model={model}", name="memory")
    assert check.status == "not checked"
    assert "model_type 'gpt2' is not supported" in check.found


def test_a_disk_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_disk", lambda path: 10**7)
    check = found(name="disk")
    assert check.status == "problem"
    assert "0.009 GiB are free" in check.found
    assert "training.save_total_limit=1" in check.advice
    monkeypatch.setattr(preflight, "free_disk", lambda path: 5 * 10**7)
    assert found(name="disk").status == "warning"  # enough for checkpoints alone


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("none_right", "wrong answer 0 (it 0); it must give 1 and 0"),
        ("all_right", "wrong answer 1 (it 1); it must give 1 and 0"),
        ("broken", "it cannot score the right answer: error: AttributeError"),
    ],
)
def test_a_reward_that_does_not_tell_right_from_wrong(rewards: None, spec: str, words: str) -> None:
    reward = f"rewards={{it: {{reward: 'broken_rewards:{spec}', isolated: false}}}}"
    check = found(reward, name="rewards")
    assert check.status == "problem"
    assert words in check.found


def test_weights_that_punish_being_right(rewards: None) -> None:
    other = "{reward: 'broken_rewards:punishes', isolated: false}"
    check = found(f"rewards={{exact: 1.0, other: {other}}}", name="rewards")
    assert check.status == "problem"
    assert "right answer -1 (exact 1, other -2), wrong answer 0" in check.found
    assert "the right answer has no higher reward" in check.found


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(RECIPE), "task.args.min_steps=99"]) == 1
    text = capsys.readouterr().out
    assert text.startswith("problem      recipe ")
    assert "1 checks: 1 problems, 0 warnings" in text
    assert main(["doctor", str(RECIPE), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [check["status"] for check in report["checks"]].count("problem") == 0
    assert main(["doctor", str(RECIPE), "seeed=1"]) == 2
    assert "Did you mean 'seed'?" in capsys.readouterr().err


def test_training_refuses_before_the_model_is_loaded(tmp_path: Path, rewards: None) -> None:
    options = ["rewards={it: {reward: 'broken_rewards:none_right'}}", f"output={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "delethink.cli.main", "train", str(RECIPE), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("delethink: preflight: rewards: right answer 0 (it 0)")
    assert last.endswith("preflight=warn starts the run anyway")
    assert "starting the engine" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_memory_and_disk_of_this_machine(tmp_path: Path) -> None:
    memory = process_memory()
    assert 0 < memory.free <= memory.total
    assert preflight.free_disk(tmp_path / "not" / "there" / "yet") > 0
