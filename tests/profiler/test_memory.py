"""Freed memory goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ditopt.profiler.memory import collect, trim

LENT, KEPT = 400, 1 << 16


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
def test_what_small_tensors_leave_between_others_is_given_back() -> None:
    trim()
    before = resident()
    held = [torch.ones(KEPT // 4) for _ in range(LENT)]
    last = torch.ones(16)  # stands behind them, so that the heap cannot just become shorter
    assert resident() - before > 0.8 * LENT * KEPT
    knot: list[object] = [held]
    knot.append(knot)
    del held, knot
    collect()
    assert resident() - before < 0.2 * LENT * KEPT and last.sum() == 16
