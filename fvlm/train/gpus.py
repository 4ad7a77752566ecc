"""What the planner knows of GPUs: sizes and rates from data sheets, prices as assumptions to be replaced."""

from __future__ import annotations

from dataclasses import dataclass

from fvlm.model.flops import PEAK_FLOPS
from fvlm.schema import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One model of GPU in a usual machine."""

    name: str
    memory: float
    """GiB that a process can see of it (CUDA's total memory, a little under the name's)."""
    peak: float
    """Dense bf16 operations a second."""
    bandwidth: float
    """Bytes a second of its own memory."""
    link: float
    """Bytes a second, one direction, to the other GPUs of the machine: NVLink, else PCIe."""
    host: float
    """Bytes a second, one direction, to the host's memory."""
    price: float
    """Assumed price of an hour, US dollars."""


def _gpu(name: str, peak: str, **values: float) -> Gpu:
    return Gpu(name=name, peak=PEAK_FLOPS[peak], **values)


# Memory, its bandwidth, NVLink and PCIe: NVIDIA's data sheets. PCIe 4 x16 is 32 GB/s and PCIe 5 x16 64 GB/s in one
# direction; NVLink is half of the advertised sum of both directions. Prices are round figures of the order of public
# on-demand offers of 2025; they are assumptions: give the real one with --price.
GPUS = {
    "rtx5090": _gpu("RTX 5090 32 GB", "RTX 5090", memory=31.3, bandwidth=1.79e12, link=64e9, host=64e9, price=0.90),
    "a100-40": _gpu("A100 40 GB", "A100", memory=39.4, bandwidth=1.56e12, link=300e9, host=32e9, price=1.30),
    "a100-80": _gpu("A100 80 GB", "A100", memory=79.1, bandwidth=2.04e12, link=300e9, host=32e9, price=1.80),
    "h100": _gpu("H100 80 GB", "H100", memory=79.1, bandwidth=3.35e12, link=450e9, host=64e9, price=3.00),
    "h200": _gpu("H200 141 GB", "H200", memory=139.8, bandwidth=4.8e12, link=450e9, host=64e9, price=3.80),
}


def find_gpu(name: str) -> Gpu:
    """A GPU by its key; raises ConfigError that lists the known ones."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name!r}: expected one of {', '.join(GPUS)}")
    return GPUS[name]
