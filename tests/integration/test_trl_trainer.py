"""What training loads of TRL: its trainer, and not vLLM with it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not (find_spec("trl") and find_spec("vllm")), reason="needs TRL and vLLM installed"
    ),
]


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_vllm_is_not_loaded_and_whoever_wants_it_of_trl_then_is_told_how() -> None:
    program = """
import sys, warnings
warnings.simplefilter("error", UserWarning)  # of TRL, about versions of vLLM
import delethink.training.grpo
print("vllm" in sys.modules)
from trl import import_utils
import trl.generation.vllm_generation as generation
import trl.trainer.grpo_trainer as trainer
warnings.simplefilter("ignore")
print(import_utils.is_vllm_available(), trainer.is_jmespath_available is not None)
class Asked(generation.VLLMGeneration):
    def __init__(self):
        self.model = self.accelerator = None
        self._init_vllm()
try:
    Asked()
except ImportError as error:
    print(error)
"""
    loaded, available, told = run(program).splitlines()
    assert loaded == "False"
    assert available.startswith("True")
    assert "import trl.generation.vllm_generation before it" in told


@pytest.mark.slow
def test_a_process_that_has_loaded_it_is_left_as_it_is() -> None:
    program = """
import sys
import trl.generation.vllm_generation as generation
import delethink.training.grpo
print(generation.is_vllm_available(), generation.LLM is sys.modules["vllm"].LLM)
"""
    assert run(program).splitlines()[-1] == "True True"
