"""What a benchmark measured, as data: the JSON that ``ditopt bench`` writes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ditopt.plan_text import write_text_atomically


@dataclass(frozen=True)
class RivalResult:
    """A rival at the optimised loop's latency; ``reason`` says why there are no figures."""

    steps: int
    seconds: float | None = None
    psnr_db: float | None = None
    worst_psnr_db: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark measured; seconds are medians of whole generations, decibels are means over prompts.

    Rivals run the model as it is. Where the plan computes in a dtype of its own, ``dense_cast`` is the dense model in
    that one, and ``fewer_steps_cast`` and so on are rivals that run the model so; otherwise they are None.
    """

    dense_eager_s: float
    dense_inductor_s: float
    optimized_s: float
    speedup_vs_inductor: float
    psnr_db: float
    worst_psnr_db: float
    rel_l2: float
    ssim: float | None
    fewer_steps: RivalResult
    unipc: RivalResult
    dpmpp: RivalResult
    converged: dict[str, float]
    attribute_score: dict[str, float] | None
    graph_breaks: int
    recompiles: int
    variants: int
    compile_s: float
    first_generation_s: float
    compile_cache: str
    peak_rss_mb: float
    slot_bytes: int
    steps: int
    kept: int
    plan: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    prompts: int
    per_prompt: list[dict[str, Any]]
    seconds: dict[str, list[float]]
    notes: list[str]
    dense_cast: RivalResult | None = None
    fewer_steps_cast: RivalResult | None = None
    unipc_cast: RivalResult | None = None
    dpmpp_cast: RivalResult | None = None

    def to_data(self) -> dict[str, Any]:
        """The result as JSON-able data."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, whole or not at all.

        Raises:
            PlanError: the folder is missing or not writable.
        """
        write_text_atomically(Path(path), json.dumps(self.to_data(), indent=2, default=str) + "\n")
