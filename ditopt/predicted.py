"""What is predicted of whole generations under a plan that was never run, and how that is written and shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from ditopt.outcome import write_side
from ditopt.plan import Plan, Rule
from ditopt.profile import Profile
from ditopt.quality import CAP_DB
from ditopt.search import Solution
from ditopt.target import Target


def relative_error_to_psnr(error: float, sample_norm: float, peak: float, numel: float) -> float:
    """PSNR in dB of samples that are off by the relative L2 ``error``, at most ``CAP_DB``.

    Errors of the norm ``error * sample_norm`` in ``numel`` values are ``error * sample_norm / sqrt(numel)`` each, root
    mean square; ``peak`` is the range of the values.

    >>> round(relative_error_to_psnr(0.01, sample_norm=50.0, peak=1.0, numel=10_000), 6)
    46.0206
    """
    off = error * sample_norm / math.sqrt(numel)
    return min(CAP_DB, 20 * math.log10(peak / off)) if off > 0 else CAP_DB


def psnr_to_relative_error(psnr: float, sample_norm: float, peak: float, numel: float) -> float:
    """The relative L2 error at which samples have ``psnr`` dB: what ``relative_error_to_psnr`` turns back."""
    return peak * 10 ** (-psnr / 20) * math.sqrt(numel) / sample_norm


def can_tell_psnr(profile: Profile) -> bool:
    """Whether the profile says how large its samples are, so that a relative error can be told as a PSNR."""
    return {"peak", "numel"} <= profile.sample.keys()


def psnr_of(profile: Profile, error: float) -> float | None:
    """The PSNR in dB at a relative error of the profile's samples; None where it does not say how large they are."""
    if not can_tell_psnr(profile):
        return None
    return relative_error_to_psnr(error, profile.sample_norm, profile.sample["peak"], profile.sample["numel"])


@dataclass(frozen=True)
class Predicted:
    """Decisions for every network, and what is predicted of whole generations under them.

    ``dense_seconds`` are those of all network evaluations of the dense run.
    """

    solutions: Mapping[str, Solution]
    dense_seconds: float

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Those of all networks."""
        return tuple(rule for solution in self.solutions.values() for rule in solution.rules)

    @property
    def seconds(self) -> float:
        """Of all network evaluations of a generation."""
        return sum(solution.predicted_seconds for solution in self.solutions.values())

    @property
    def error(self) -> float:
        """Of the sample, relative; the networks' are taken to be independent."""
        return math.sqrt(sum(solution.predicted_error**2 for solution in self.solutions.values()))

    @property
    def speedup(self) -> float:
        """Of the network evaluations."""
        return self.dense_seconds / max(self.seconds, 1e-12)

    @property
    def evaluations(self) -> int:
        """Steps in which a network runs."""
        return sum(len(solution.kept) for solution in self.solutions.values())


def predicted_plan(template: Plan, profile: Profile, target: Target, found: Predicted) -> Plan:
    """The plan with rules and predicted figures, and nothing measured."""
    psnr = psnr_of(profile, found.error)
    predicted = {
        "seconds": round(found.seconds, 3),
        "relative_error": round(found.error, 5),
        **({} if psnr is None else {"psnr": round(psnr, 2)}),
        "speedup": round(found.speedup, 2),
    }
    settings = {"rules": found.rules, "target": target.to_data(), "predicted": predicted, "measured": {}}
    return template.model_copy(update=settings)


def write_predicted(path: Path, plan: Plan, profile: Profile, found: Predicted, reasons: Sequence[str]) -> None:
    """Write a plan and the side file that ``ditopt explain`` and ``ditopt report`` read.

    It is not kept in the user's folder of plans: what compiled models find there was verified.

    Raises:
        PlanError: a file cannot be written.
    """
    plan.save(path)
    side = {
        "explanations": {name: [asdict(one) for one in made.explanations] for name, made in found.solutions.items()},
        "reasons": [*reasons, *profile.reasons],
        "prompts": {"profiled": list(profile.prompts)},
        "profile": {name: part.figures() for name, part in profile.networks.items()},
    }
    write_side(path, side)


def predicted_table(profile: Profile, found: Predicted) -> Table:
    """What is predicted, beside the dense run."""
    table = Table(title="whole generations without what is beside the networks: predicted, not measured")
    table.add_column("")
    for column in ("seconds", "speed-up", "relative error", "PSNR dB", "evaluations", "graphs"):
        table.add_column(column, justify="right")
    steps = sum(len(part.timesteps) for part in profile.networks.values())
    table.add_row("dense", f"{found.dense_seconds:.2f}", "1.00x", "0", "-", str(steps), str(len(profile.networks)))
    psnr = psnr_of(profile, found.error)
    table.add_row(
        "plan",
        f"{found.seconds:.2f}",
        f"{found.speedup:.2f}x",
        f"{found.error:.4f}",
        "-" if psnr is None else f"{psnr:.1f}",
        str(found.evaluations),
        str(sum(solution.variants for solution in found.solutions.values())),
    )
    return table
