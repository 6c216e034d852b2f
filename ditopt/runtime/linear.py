"""Heads whose rest is linear attention: the projections of each step, from the file beside the plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ditopt.decisions import HeadDecision, Sparse
from ditopt.errors import PlanMismatchError
from ditopt.head_tensors import Projections
from ditopt.plan import Plan, Rule
from ditopt.runtime.choices import Heads


class LinearRests:
    """What the file beside a plan says of the linear rests of one network's heads."""

    def __init__(self, plan: Plan, network: str) -> None:
        self.beside, self.network = plan.beside, network

    def check(self, rule: Rule, told: str, site: str, heads: int, channels: int) -> None:
        """Check that the file has what a rule reads of a site with so many heads of so many channels.

        Raises:
            PlanMismatchError: it has not.
        """
        if not is_linear(rule.do):
            return
        assert isinstance(rule.do, Sparse)
        found = self._find(rule.do, site)
        wanted = range(heads) if rule.heads is None else rule.heads
        missing = [head for head in wanted if found is None or head not in found.heads]
        if missing:
            of_head = "" if found is None else f" of head {missing[0]}, only of {', '.join(map(str, found.heads))}"
            raise PlanMismatchError(
                f"{told}: {site}: the file beside the plan has no projections for {rule.do.pattern}{of_head}. They are "
                "fitted to a profile, by `ditopt optimize` or `ditopt search`; rest: pooled needs none"
            )
        assert found is not None
        if found.packed.shape[-1] != channels:
            raise PlanMismatchError(
                f"{told}: {site}: its heads have {channels} channels, the projections in the file beside the plan are "
                f"for {found.packed.shape[-1]}"
            )

    def inputs(self, site: str, channels: int, decided: Mapping[int, Heads], device: torch.device) -> dict[int, Tensor]:
        """By step every head's projection ``[H, E, E]`` float32, 0 for those without; nothing where no step has any."""
        if not any(is_linear(do) for heads in decided.values() for do in heads):
            return {}
        made: dict[tuple[tuple[HeadDecision, int], ...], Tensor] = {}
        found = {}
        for step, heads in decided.items():
            key = tuple((do, self._period(do, site, step)) for do in heads)
            if key not in made:
                each = torch.zeros(len(heads), channels, channels)
                for head, do in enumerate(heads):
                    if isinstance(do, Sparse) and is_linear(do):
                        each[head] = torch.from_numpy(self._of(do, site).of_head(head, step).astype("float32"))
                made[key] = each.to(device)
            found[step] = made[key]
        return found

    def _period(self, do: HeadDecision, site: str, step: int) -> int:
        return self._of(do, site).period(step) if isinstance(do, Sparse) and is_linear(do) else 0

    def _find(self, do: Sparse, site: str) -> Projections | None:
        return self.beside.projections_for(self.network, site, do.pattern)

    def _of(self, do: Sparse, site: str) -> Projections:
        found = self._find(do, site)
        assert found is not None, "checked before"
        return found


def is_linear(do: object) -> bool:
    """Whether a decision has a linear rest."""
    return isinstance(do, Sparse) and Projections.text_of(do.pattern) is not None
