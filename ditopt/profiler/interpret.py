"""Runs a captured graph node by node, and shows the values at chosen nodes to collectors.

One collector is one file beside this one. It lives for one generation of one network: it names the nodes it wants,
reduces their values to statistics as they pass, and gives a table per site at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.calls import NetworkCalls
from ditopt.errors import InputError, RolloutError
from ditopt.measures import Table
from ditopt.profiler.memory import trim
from ditopt.runtime.program import Compute
from ditopt.trace import Trace

Edit = Callable[[tuple[Any, ...], Any], Any]
"""Makes another value of a node's arguments and its value."""


@dataclass(frozen=True)
class Moment:
    """Which call of a generation it is: its step, and the guidance branches that its batch holds, in order."""

    step: int
    branches: tuple[int, ...]

    def refusal(self, value: Tensor) -> str | None:
        """Why the branches cannot share a batched value ``[B, ...]``; None if they can."""
        count = len(self.branches)
        return f"a batch of {len(value)} does not divide into {count} guidance branches" if len(value) % count else None


@dataclass(frozen=True)
class Seen:
    """The values of one node in one call: its arguments (tensors in place of nodes) and its result."""

    moment: Moment
    node: fx.Node
    arguments: tuple[Any, ...]
    settings: Mapping[str, Any]
    result: Any


class Collector(ABC):
    """Statistics of what one network computes in one generation.

    ``wanted`` are the names of the graph's nodes that it wants to see; ``reasons`` what it leaves out, and why, and how
    often: a site that cannot be measured is skipped by name, never in silence.
    """

    name: str
    wanted: frozenset[str]

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}

    @abstractmethod
    def see(self, seen: Seen) -> None:
        """Take in one node's values; nothing of them may be kept that is as large as they are."""

    @abstractmethod
    def tables(self) -> dict[str, Table]:
        """What was measured, by site; every measure per prompt has the axis ``prompt`` first, of length 1."""

    def parts(self, seen: Seen) -> list[tuple[int, Tensor]]:
        """A result's part of each guidance branch; none, and that is counted, where it does not divide."""
        value, name = seen.result, seen.node.name
        if value.ndim < 2 or seen.moment.refusal(value):
            self.skip(f"{name}: shape {list(value.shape)} does not divide into branches, tokens and channels")
            return []
        return of_branches(seen.moment, value)

    def skip(self, reason: str) -> None:
        """Count one more time that something was left out."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


@dataclass(frozen=True)
class State:
    """Where a run stands: the node that comes next, and the values that are still needed there."""

    at: fx.Node
    values: Mapping[fx.Node, Any]


class Watched(fx.Interpreter):
    """Runs a trace's graph eagerly; values die after their last use, so it needs no more memory than the model does.

    A run can stop before a node, and go on from there as often as wanted, with other values: states share what they
    hold, and running on leaves them as they were.
    """

    def __init__(
        self, trace: Trace, collectors: Sequence[Collector] = (), edits: Mapping[str, Edit] | None = None
    ) -> None:
        super().__init__(trace.gm, garbage_collect_values=True)
        self.edits = dict(edits or {})
        self.moment = Moment(0, ())
        self.collectors = tuple(collectors)
        self._watching: dict[str, list[Collector]] = {}
        for collector in collectors:
            for name in collector.wanted:
                self._watching.setdefault(name, []).append(collector)

    def run_node(self, n: fx.Node) -> Any:
        """As the base class, with edits, before the collectors that watch the node."""
        watching, edit = self._watching.get(n.name), self.edits.get(n.name)
        if watching is None and edit is None:
            return super().run_node(n)
        arguments, settings = self.fetch_args_kwargs_from_env(n)
        result = super().run_node(n)
        if edit is not None:
            result = edit(arguments, result)
        for collector in watching or ():
            collector.see(Seen(self.moment, n, arguments, settings, result))
        return result

    def start(self, *arguments: Any) -> State:
        """The state before the first node, with the graph's ``arguments``."""
        nodes = iter(self.graph.nodes)
        values: dict[fx.Node, Any] = {}
        for node, value in zip(nodes, self.graph.process_inputs(*arguments), strict=False):
            values[node] = value
        return State(next(node for node in self.graph.nodes if node.op != "placeholder"), values)

    def until(self, state: State, node: fx.Node) -> State:
        """Run on up to the ``node``, which is the next one then."""
        self.env = dict(state.values)
        at = state.at
        while at is not node:
            self.env[at] = self.run_node(at)
            self._forget(at)
            at = at.next
        return State(node, self.env)

    def value(self, state: State) -> tuple[tuple[Any, ...], Any]:
        """Arguments and value of the node that is next."""
        self.env = dict(state.values)
        arguments, _ = self.fetch_args_kwargs_from_env(state.at)
        return arguments, self.run_node(state.at)

    def put(self, state: State, value: Any) -> State:
        """The state behind the node that is next, with a value for it."""
        self.env = {**state.values, state.at: value}
        self._forget(state.at)
        return State(state.at.next, self.env)

    def finish(self, state: State) -> Any:
        """Run on to the end; what the graph gives."""
        last = self.graph.output_node()
        _, outputs = self.value(self.until(state, last))
        return self.graph.process_outputs(outputs)

    def _forget(self, node: fx.Node) -> None:
        for unused in self.user_to_last_uses.get(node, ()):
            self.env.pop(unused, None)


@dataclass
class CountedCalls(ABC):
    """What an interceptor of one generation knows: the network's graph, its call pattern, and the calls so far."""

    trace: Trace
    calls: NetworkCalls
    count: int = field(default=0, kw_only=True)

    @abstractmethod
    def __call__(self, arguments: list[Any], compute: Compute) -> Sequence[Any]:
        """Answer one call of the network."""

    @property
    def complete(self) -> bool:
        """Whether every call of the recorded pattern was seen."""
        return self.count == len(self.calls.calls)

    def next_call(self) -> tuple[int, Moment]:
        """The number of the call that comes in, and what it is. Raises as ``moment_of``."""
        number = self.count
        self.count += 1
        return number, moment_of(self.calls, number)


@dataclass
class WatchedCalls(CountedCalls):
    """An interceptor: answers the calls of one generation of a network by interpreting its graph."""

    collectors: Sequence[Collector] = ()

    def __post_init__(self) -> None:
        self._interpreter = Watched(self.trace, self.collectors)

    def __call__(self, arguments: list[Any], compute: Compute) -> Sequence[Any]:
        """Answer one call of the network.

        Raises:
            RolloutError: there are more calls than in the recorded generation.
        """
        _, self._interpreter.moment = self.next_call()
        with torch.no_grad():
            outputs: Sequence[Any] = self._interpreter.run(*arguments)
        trim()
        return outputs


def moment_of(calls: NetworkCalls, number: int) -> Moment:
    """What the ``number``-th call of a generation is.

    Raises:
        RolloutError: there are more calls than in the recorded generation.
    """
    if number >= len(calls.calls):
        raise RolloutError(
            "the rollout calls the model more often than in the recorded generation; it must call it alike for every "
            "prompt"
        )
    step, branch = calls.calls[number]
    return Moment(step, (0, 1) if calls.batched else (branch,))


def of_branches(moment: Moment, value: Tensor) -> list[tuple[int, Tensor]]:
    """The part of a batched value ``[B, ...]`` that each guidance branch of a call has.

    Raises:
        InputError: the batch does not divide into the branches.
    """
    refused = moment.refusal(value)
    if refused is not None:
        raise InputError(refused)
    parts = value.chunk(len(moment.branches)) if len(moment.branches) > 1 else (value,)
    return list(zip(moment.branches, parts, strict=True))


def reasons_of(collectors: Iterable[Collector]) -> list[str]:
    """What collectors left out, with how often."""
    return [
        f"{collector.name}: {reason} ({count} times)"
        for collector in collectors
        for reason, count in collector.reasons.items()
    ]
