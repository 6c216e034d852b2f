"""The call pattern of a generation: which step and guidance branch each call of a network is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditopt.adapters.base import CallLog, CallRecord
from ditopt.errors import RolloutError


@dataclass(frozen=True)
class NetworkCalls:
    """One network's part of a generation.

    ``timesteps`` are its evaluations for one branch in call order; ``calls[i]`` is the (step, branch) of its
    i-th call; ``batched`` says that each call's batch holds both guidance branches, unconditional first.
    """

    timesteps: tuple[float, ...]
    calls: tuple[tuple[int, int], ...]
    branches: int
    batched: bool

    @property
    def branch_names(self) -> tuple[str, ...]:
        """Names of the branches in the order of the profile's rows."""
        if self.batched:
            return ("uncond", "cond")
        return (
            ("all",)
            if self.branches == 1
            else tuple(["cond", "uncond", *(f"branch{i}" for i in range(2, self.branches))][: self.branches])
        )

    def weights(self, guidance: float) -> tuple[float, ...]:
        """How the branches' outputs are combined under guidance of scale ``guidance``, in the order of the rows."""
        if self.batched:
            return (1 - guidance, guidance)
        if self.branches == 2:
            return (guidance, 1 - guidance)
        return (1.0,) + (0.0,) * (self.branches - 1)


def call_pattern(log: CallLog, guidance: float) -> dict[str, NetworkCalls]:
    """The pattern of a recorded rollout, per network.

    Raises:
        RolloutError: no network was called, or no argument tells the step.
    """
    if not log.kept:
        raise RolloutError(
            "the rollout finished without calling the model; call model(...) inside rollout(model, prompt, seed)"
        )
    if not log.timestep:
        raise RolloutError(
            "no argument of the model tells the step: none of its small tensor arguments changes from call to "
            "call; pass the timestep as a tensor"
        )
    return {
        name: _of_network([r for r in log.records if r.network == name], guidance)
        for name in dict.fromkeys(r.network for r in log.records)
    }


def _of_network(records: Sequence[CallRecord], guidance: float) -> NetworkCalls:
    identities = list(dict.fromkeys(r.identity for r in records))
    per_branch = [[r.timestep for r in records if r.identity == identity] for identity in identities]
    longest = max(per_branch, key=len)
    cursor = dict.fromkeys(identities, 0)
    calls = []
    for record in records:
        at = cursor[record.identity]
        while at < len(longest) - 1 and longest[at] != record.timestep:
            at += 1
        calls.append((at, identities.index(record.identity)))
        cursor[record.identity] = at + 1
    batched = len(identities) == 1 and guidance > 1 and all(r.batch == 2 for r in records)
    return NetworkCalls(tuple(longest), tuple(calls), 2 if batched else len(identities), batched)
