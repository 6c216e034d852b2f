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

    A branch is what run-time streams tell apart: a conditioning object, and the name of diffusers' ``cache_context``
    where there is one; the branch named ``uncond`` comes last, as in the order of ``weights``.

    Raises:
        RolloutError: no network was called, no argument tells the step, or guidance branches cannot be told apart.
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
    _check_told_apart(log)
    return {
        name: _of_network([r for r in log.records if r.network == name], guidance)
        for name in dict.fromkeys(r.network for r in log.records)
    }


def _check_told_apart(log: CallLog) -> None:
    """Refuse two calls of one branch at one point, the same latents at the same timestep.

    A solver that evaluates a timestep twice (Heun's predictor and corrector) has moved the latents between; only
    guidance asks the network twice at one point, for another condition.
    """
    seen = set()
    for record in log.records:
        point = (record.network, record.branch, record.timestep, record.latents)
        if record.latents is not None and point in seen:
            looked_at = ", ".join(log.looked_at) or "there is no tensor besides timestep and latents"
            raise RolloutError(
                f"the rollout calls {record.network} twice at timestep {record.timestep:g} with the same latents, and "
                f"nothing tells these calls apart, so that two guidance branches would share their state: no argument "
                f"has an object for each that stays the same from step to step (looked at: {looked_at}), nor are they "
                "in contexts of different names. Pass one conditioning tensor per branch, made once and given at every "
                'step; or call each branch inside model.cache_context("cond") and model.cache_context("uncond") of '
                "diffusers; or call the model once with both branches in a batch"
            )
        seen.add(point)


def _of_network(records: Sequence[CallRecord], guidance: float) -> NetworkCalls:
    branches = sorted(dict.fromkeys(r.branch for r in records), key=lambda branch: branch[1] == "uncond")
    per_branch = [[r.timestep for r in records if r.branch == branch] for branch in branches]
    longest = max(per_branch, key=len)
    cursor = dict.fromkeys(branches, 0)
    calls = []
    for record in records:
        at = cursor[record.branch]
        while at < len(longest) - 1 and longest[at] != record.timestep:
            at += 1
        calls.append((at, branches.index(record.branch)))
        cursor[record.branch] = at + 1
    batched = len(branches) == 1 and guidance > 1 and all(r.batch == 2 for r in records)
    return NetworkCalls(tuple(longest), tuple(calls), 2 if batched else len(branches), batched)
