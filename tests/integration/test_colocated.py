"""``engine.placement=colocated``: an engine beside each rank, with weights in shared memory."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest
from installed import need
from small_runs import CLOSE, MEASURED, assert_nothing_is_left, metrics, run, start
from small_runs import texts as texts_of

need("ray", "vllm")

# Minutes for each run: two ranks and two engines start.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("own_ray"),
]

RANKS = ["trainer.num_ranks=2", "engine=vllm", "engine.kv_cache_gib=0.25"]
# Many processes start on few cores.
RANKS += ["engine.startup_timeout=1200", "engine.hang_timeout=600"]
COLOCATED = [*RANKS, "engine.placement=colocated", "engine.verify_weights=every"]


@pytest.fixture(scope="module")
def colocated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colocated")
    code, printed, errors = run(folder, *COLOCATED)
    assert code == 0, errors
    assert "starting 2 ranks: ddp" in printed
    assert_nothing_is_left(folder)
    return folder


def test_colocated_training_has_the_traces_and_the_loss_of_the_pool(
    colocated: Path, tmp_path: Path
) -> None:
    code, _, errors = run(tmp_path, *RANKS, "engine.num_engines=2")
    assert code == 0, errors
    assert texts_of(colocated) == texts_of(tmp_path)
    for pool, beside in zip(metrics(tmp_path), metrics(colocated), strict=True):
        assert {key: beside[key] for key in MEASURED} == {key: pool[key] for key in MEASURED}
        for key in CLOSE:
            assert beside[key] == pytest.approx(pool[key], rel=1e-4, abs=1e-6), key
        assert beside["logprob_difference"] < 1e-3  # the engines have the trainer's weights
        assert [beside[f"engine/worker {i}/chunks"] > 0 for i in range(2)] == [True, True]
        assert beside["overlap"] == 0  # all sample, then all train


def test_colocated_training_is_resumed_exactly(colocated: Path, tmp_path: Path) -> None:
    for steps in (1, 2):
        code, printed, errors = run(tmp_path, *COLOCATED, f"training.max_steps={steps}")
        assert code == 0, errors
    assert "resuming the run after step 1" in printed
    assert texts_of(tmp_path) == texts_of(colocated)
    for whole, resumed in zip(metrics(colocated), metrics(tmp_path), strict=True):
        for key in CLOSE:
            assert resumed[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL], ids=lambda sign: sign.name)
def test_an_end_at_any_time_leaves_no_process_and_no_shared_memory(
    tmp_path: Path, sign: signal.Signals
) -> None:
    before = set(Path("/dev/shm").iterdir())
    process = start(tmp_path, *COLOCATED, "training.max_steps=500", "evaluation.every=500")
    written = tmp_path / "run" / "metrics.jsonl"
    try:
        while not written.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(sign)
        process.wait(timeout=120)
    finally:
        process.kill()
    assert process.returncode == (130 if sign is signal.SIGINT else -signal.SIGKILL)
    assert_nothing_is_left(tmp_path)
    left = [file for file in set(Path("/dev/shm").iterdir()) - before if "delethink" in file.name]
    assert not left
    own = str(tmp_path)
    assert not [p for p in psutil.process_iter(["cmdline"]) if own in str(p.info["cmdline"])]
