"""Accelerators: peak rate, bandwidth and memory from the manufacturers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from delethink.errors import ConfigError, did_you_mean

_GB = 10**9
_TERA = 10**12


@dataclass(frozen=True)
class Accelerator:
    """One device."""

    name: str
    peak_flops: float  # dense matrix FLOPs per second at ``dtype_bytes``
    bandwidth: float  # of the memory, bytes per second
    memory: float  # bytes
    link: float  # bandwidth to other devices for new weights, bytes per second
    dtype_bytes: int  # bytes per weight, activation and cached value
    source: str  # origin of the figures


def _gpu(
    name: str, teraflops: float, bandwidth: float, memory: float, link: float, source: str
) -> Accelerator:
    """Return a GPU. Bandwidth and link are in GB/s, memory is in GB."""
    return Accelerator(
        name, teraflops * _TERA, bandwidth * _GB, memory * _GB, link * _GB, 2, source
    )


# Dense bfloat16 with float32 accumulation. Some data sheets state rates with sparsity, twice these.
ACCELERATORS = {
    "a100": _gpu("A100 SXM 80 GB", 312, 2039, 80, 300, "NVIDIA A100 datasheet"),
    "h100": _gpu("H100 SXM", 989, 3350, 80, 450, "NVIDIA H100 datasheet"),
    "h200": _gpu("H200 SXM", 989, 4800, 141, 450, "NVIDIA H200 datasheet"),
    "b200": _gpu("B200 (DGX)", 2250, 8000, 180, 900, "NVIDIA DGX B200 datasheet, an eighth each"),
    "mi300x": _gpu("MI300X", 1307, 5300, 192, 448, "AMD Instinct MI300X data sheet"),
    "l40s": _gpu("L40S", 362, 864, 48, 32, "NVIDIA L40S datasheet"),
    "rtx4090": _gpu("RTX 4090", 165, 1008, 24, 32, "NVIDIA Ada GPU architecture whitepaper"),
    # float32, measured by benchmarks/bench_cost.py on two cores with AVX-512
    "cpu": Accelerator(
        "2 CPU cores", 0.19 * _TERA, 23 * _GB, 24 * 2**30, 5 * _GB, 4, "docs/benchmarks/cost.md"
    ),
}


def accelerator(name: str) -> Accelerator:
    """Return the accelerator with this name; case, spaces, dashes and underscores are ignored.

    Raises:
        ConfigError: there is no such accelerator; the text names the nearest one.
    """
    key = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    if key not in ACCELERATORS:
        raise ConfigError(f"unknown GPU {name!r}.{did_you_mean(key, ACCELERATORS)}")
    return ACCELERATORS[key]


@dataclass(frozen=True)
class Efficiency:
    """Reached fraction of a device's peak. Every figure is a measurement.

    The defaults of ``bandwidth``, ``token_seconds`` and ``training`` are fitted to times that the
    paper's authors report for 8 H100 (``delethink cost --reproduce figure2c``). Those times do not
    determine ``decode`` and ``prefill``, whose defaults are assumptions.
    """

    bandwidth: float = 0.808  # fraction of the peak bandwidth in decoding
    decode: float = 0.5  # fraction of the peak rate in decoding bound by compute
    prefill: float = 0.5  # fraction of the peak rate in prefills
    training: float = 0.333  # fraction of the peak rate in training
    step_seconds: float = 0.0  # overhead of a decoding step
    token_seconds: float = 4.8e-5  # overhead of a sampled token in its engine
    pass_seconds: float = 0.0  # overhead of training on a chunk
    cache_share: float = 0.8  # fraction of device memory for weights and caches
    spread: float = 0.2  # standard deviation of the logarithm of a predicted time
    source: str = "the paper's times on 8 H100"  # origin of the figures
