"""What the user asks of a plan: quality to reach, speed to reach, or both."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ditopt.errors import InputError
from ditopt.quality import DEFAULT_LEVEL, EXACT, LEVELS, Quality


@dataclass(frozen=True)
class Target:
    """Mean paired PSNR in dB, mean relative L2 error, or least speed-up over dense; a PSNR beside a speed-up, too.

    With both, quality is the bound and speed the aim: a plan that is faster and misses the PSNR is not taken.
    ``exact``: nothing may be approximated.
    """

    min_psnr: float | None = None
    max_rel_error: float | None = None
    speedup: float | None = None
    exact: bool = False

    @classmethod
    def from_arguments(
        cls, quality: str | None, max_rel_error: float | None, min_psnr: float | None, target_speedup: float | None
    ) -> Target:
        """The target that ``optimize``'s arguments name; nothing at all is ``balanced``.

        A level beside a speed-up is the PSNR that it stands for beside it.

        Raises:
            InputError: numbers are given that do not go together, one makes no sense, or the level is unknown.
        """
        given = {"max_rel_error": max_rel_error, "min_psnr": min_psnr, "target_speedup": target_speedup}
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) > 1 and max_rel_error is not None:
            raise InputError(
                f"{' and '.join(named)} are given together; give one target, or min_psnr= beside target_speedup="
            )
        for name, value in named.items():
            least = 1.0 if name == "target_speedup" else 0.0
            if not math.isfinite(value) or value <= least:
                raise InputError(f"{name}={value} makes no sense; give a number above {least:g}")
        if max_rel_error is not None and max_rel_error >= 1:
            raise InputError(f"max_rel_error={max_rel_error} makes no sense; give a number below 1, which is all of it")
        if quality is not None and named.keys() - {"target_speedup"}:
            raise InputError(f"quality={quality!r} and {' and '.join(named)} are given together; give one of them")
        if named and quality is None:
            return cls(min_psnr, max_rel_error, target_speedup)
        if quality == EXACT:
            if named:
                raise InputError(
                    "quality='exact' and target_speedup are given together; nothing is approximated then, so that a "
                    "speed-up cannot be asked for: give one of them"
                )
            return cls(exact=True)
        if quality is not None and quality not in LEVELS:
            levels = ", ".join([*(f"{name} ({psnr:g} dB)" for name, psnr in LEVELS.items()), EXACT])
            raise InputError(
                f"quality={quality!r} is unknown; use one of {levels}, or give min_psnr=, max_rel_error= or "
                "target_speedup="
            )
        return cls(min_psnr=LEVELS[quality or DEFAULT_LEVEL], speedup=target_speedup)

    def error(self, quality: Quality) -> float:
        """What the search lowers: the negative mean PSNR, or the mean relative error."""
        return quality.rel_l2 if self.max_rel_error is not None else -quality.psnr

    def limit(self, margin_db: float = 0.0) -> float:
        """The largest ``error`` that is good enough, tightened by a margin in dB."""
        if self.max_rel_error is not None:
            return self.max_rel_error * 10 ** (-margin_db / 20)
        return -(self.min_psnr + margin_db) if self.min_psnr is not None else math.inf

    def missing_db(self, quality: Quality) -> float:
        """By how many dB a measured quality misses the target; 0 or less where it is met."""
        if self.max_rel_error is not None:
            return 20 * math.log10(max(quality.rel_l2, 1e-12) / self.max_rel_error)
        return self.min_psnr - quality.psnr if self.min_psnr is not None else 0.0

    def to_data(self) -> dict[str, float | str]:
        """The target as a plan states it."""
        values = {"min_psnr": self.min_psnr, "max_rel_error": self.max_rel_error, "speedup": self.speedup}
        given: dict[str, float | str] = {name: value for name, value in values.items() if value is not None}
        return {"quality": EXACT} if self.exact else given
