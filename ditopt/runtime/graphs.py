"""The graphs of one forward: a network without graph breaks is one program, a broken one several in a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ditopt.errors import TraceError
from ditopt.kernels.ops import ATTENTION
from ditopt.runtime.program import Program
from ditopt.trace import Trace, block_of


@dataclass(frozen=True)
class Graphs:
    """The programs of one network in which decisions can be made, in the order in which a forward runs them.

    Attributes:
        clock: the program that is called with the timestep; the others follow it.
        parts: the programs with blocks; of a whole network the one program.
        whole: whether one program is the whole network, so that whole steps can be predicted.
        cut: blocks that graph breaks cut apart, or that several graphs hold; no decision is made for them.
        breaks: file, line and reason of each graph break.
        notes: what was left out, and why.
        known: structures of all programs with blocks, those without decisions too.
    """

    clock: Program
    parts: tuple[Program, ...]
    whole: bool
    cut: frozenset[str] = frozenset()
    breaks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    def sites(self, part: Program) -> dict[str, tuple[int, int]]:
        """The block ranges of one program that can be decided on, as ``Trace.ranges`` gives them."""
        trace = part.variants.trace
        return {
            site: (first, last)
            for site, (first, last) in trace.ranges().items()
            if not self.cut.intersection(trace.blocks[first : last + 1])
        }

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """The runs of blocks, whole in one program each, that can be decided on."""
        runs = (groupby(part.variants.trace.blocks, self.cut.__contains__) for part in self.parts)
        return tuple(tuple(run) for of_part in runs for is_cut, run in of_part if not is_cut)

    def ranges(self) -> dict[str, tuple[int, int]]:
        """The block ranges of all programs, their blocks numbered through."""
        found: dict[str, tuple[int, int]] = {}
        before = 0
        for part in self.parts:
            found |= {site: (first + before, last + before) for site, (first, last) in self.sites(part).items()}
            before += len(part.variants.trace.blocks)
        return found

    @property
    def structures(self) -> tuple[str, ...]:
        """The structures of the clock and of all programs with blocks, each once."""
        return tuple(dict.fromkeys((self.clock.variants.trace.structure, *self.known)))


def find_graphs(
    network: str, programs: Sequence[Program], calls: int, breaks: Sequence[str] = (), *, identified: bool = False
) -> Graphs:
    """What can be decided in, after one generation in which the network was called ``calls`` times.

    ``identified``: generations are told apart by an argument, which the clock has to see too.

    Raises:
        TraceError: the graphs are not those of one forward, or none of them can be decided in.
    """
    if len(programs) == 1 and programs[0].variants.trace.blocks:
        return Graphs(programs[0], tuple(programs), True, breaks=tuple(breaks))
    traces = [program.variants.trace for program in programs]
    holders = Counter(name for trace in traces for name in _blocks_touched(trace))
    cut = frozenset(name for name, count in holders.items() if count > 1)
    structures = Counter(trace.structure for trace in traces)
    once = [program.statistics.calls == calls for program in programs]
    clocks = [
        number
        for number, program in enumerate(programs)
        if once[number]
        and program.positions.timestep is not None
        and (program.positions.identity is not None or not identified)
        and structures[program.variants.trace.structure] == 1
    ]
    at = clocks[0] if clocks else len(programs)
    notes = [f"{name} is in several graphs: left dense" for name in sorted(cut)]
    parts = []
    for number, program in enumerate(programs):
        trace = program.variants.trace
        if not once[number]:
            notes.append(f"graph {number} ran {program.statistics.calls} times in {calls} calls: left dense")
        elif number < at and trace.blocks:
            notes.append(f"graph {number} comes before the one that sees the timestep: left dense")
        elif not trace.blocks and any(node.target is ATTENTION for node in trace.gm.graph.nodes):
            notes.append(f"graph {number} has attention outside of numbered blocks of the network: left dense")
        elif set(trace.blocks) - cut and trace.boundaries:
            parts.append(program)
    if not clocks or not parts:
        raise TraceError(
            f"{network} was captured as {len(programs)} graphs, none of which has whole blocks under a known step "
            f"({'; '.join(notes) or 'no numbered blocks with attention'}); remove the graph breaks "
            "(TORCH_LOGS=graph_breaks shows them) or call it with the same shapes throughout"
        )
    known = tuple(trace.structure for trace in traces if trace.blocks)
    return Graphs(programs[at], tuple(parts), False, cut, tuple(breaks), tuple(notes), known)


def _blocks_touched(trace: Trace) -> set[str]:
    """The numbered modules that a graph runs anything of."""
    found = {block_of(node) for node in trace.gm.graph.nodes if node.op == "call_function"}
    return {name for name in found if name is not None}
