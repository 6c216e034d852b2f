"""What machine this is, in the words that plans and benchmarks record."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

_NOTABLE = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def describe_device(device: Any) -> str:
    """A readable name: ``AMD EPYC, 2 cores, avx512_bf16`` or the accelerator's own; ``device`` is a torch device."""
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return str(device)
    name, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        entries = {key.strip(): value.strip() for key, value in fields.items()}
        name, flags = entries.get("model name", name), entries.get("flags", "")
    best = next((flag for flag in _NOTABLE if flag in flags.split()), "")
    return ", ".join(part for part in (name, f"{os.cpu_count()} cores", best) if part)
