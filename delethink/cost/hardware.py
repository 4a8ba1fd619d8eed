"""Accelerators: peak rates, bandwidth and memory as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass

from delethink.errors import ConfigError, did_you_mean

GIB = 2**30
GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Args:
        name: for tables.
        peak_flops: FLOPs a second in dense products of matrices, in numbers of ``dtype_bytes``.
        bandwidth: bytes a second between memory and the units that compute.
        memory: bytes.
        link: bytes a second to the other devices, for new weights.
        dtype_bytes: bytes of a weight, an activation and a cached number.
        source: where the figures are from.
    """

    name: str
    peak_flops: float
    bandwidth: float
    memory: float
    link: float
    dtype_bytes: int
    source: str


def _gpu(
    name: str, teraflops: float, bandwidth: float, memory: float, link: float, source: str
) -> Accelerator:
    """Bandwidth and link in GB/s, memory in GB."""
    return Accelerator(name, teraflops * TERA, bandwidth * GB, memory * GB, link * GB, 2, source)


# Dense bfloat16 summed in float32; sheets that state a rate with sparsity state twice it.
ACCELERATORS = {
    "a100": _gpu("A100 SXM 80 GB", 312, 2039, 80, 300, "NVIDIA A100 datasheet"),
    "h100": _gpu("H100 SXM", 989, 3350, 80, 450, "NVIDIA H100 datasheet"),
    "h200": _gpu("H200 SXM", 989, 4800, 141, 450, "NVIDIA H200 datasheet"),
    "b200": _gpu("B200 (DGX)", 2250, 8000, 180, 900, "NVIDIA DGX B200 datasheet, an eighth each"),
    "mi300x": _gpu("MI300X", 1307, 5300, 192, 448, "AMD Instinct MI300X data sheet"),
    "l40s": _gpu("L40S", 362, 864, 48, 32, "NVIDIA L40S datasheet"),
    "rtx4090": _gpu("RTX 4090", 165, 1008, 24, 32, "NVIDIA Ada GPU architecture whitepaper"),
    # float32; measured by benchmarks/bench_cost.py on two cores with AVX-512
    "cpu": Accelerator(
        "2 CPU cores", 0.19 * TERA, 23 * GB, 24 * GIB, 5 * GB, 4, "docs/benchmarks/cost.md"
    ),
}


def accelerator(name: str) -> Accelerator:
    """The accelerator of that name; spaces and dashes do not matter.

    Raises:
        ConfigError: no such accelerator; the text names the nearest one.
    """
    key = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    if key not in ACCELERATORS:
        raise ConfigError(f"unknown GPU {name!r}.{did_you_mean(key, ACCELERATORS)}")
    return ACCELERATORS[key]


@dataclass(frozen=True)
class Efficiency:
    """How much of a device's peak is reached. Every figure is a measurement, not a law.

    Args:
        bandwidth: share of the peak bandwidth that decoding reaches.
        decode: share of the peak rate that decoding reaches where it is bound by compute.
        prefill: share of the peak rate in prefills.
        training: share of the peak rate in training.
        step_seconds: seconds that a decoding step takes beside its work.
        token_seconds: seconds that a sampled token takes beside its work, in its engine.
        pass_seconds: seconds that training on a chunk takes beside its work.
        cache_share: share of a device's memory that weights and caches may fill.
        spread: standard deviation of the logarithm of a predicted time.
        source: what they were measured on.

    The defaults of ``bandwidth``, ``token_seconds`` and ``training`` are fitted to what the paper's
    authors report of 8 H100 with an engine of their time (``delethink cost --reproduce figure2c``).
    Those times do not tell ``decode`` and ``prefill``: their defaults are assumptions.
    """

    bandwidth: float = 0.808
    decode: float = 0.5
    prefill: float = 0.5
    training: float = 0.333
    step_seconds: float = 0.0
    token_seconds: float = 4.8e-5
    pass_seconds: float = 0.0
    cache_share: float = 0.8
    spread: float = 0.2
    source: str = "what the paper reports of 8 H100"
