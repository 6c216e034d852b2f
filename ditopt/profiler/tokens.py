"""Collects which tokens change from step to step, as a map over the token geometry."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.geometry import Geometry, cells_of
from ditopt.measures import PROMPT, Measure, Numbers, Table
from ditopt.passes._infra import tensor_value
from ditopt.passes.features import feature
from ditopt.profiler.interpret import Collector, Seen
from ditopt.sites import STEP, range_name
from ditopt.trace import Trace

CELLS = 2048
"""A map has at most so many cells."""
KEPT = 1 << 19
"""Of a feature at most so many numbers are kept until the next step, at least 256 for each cell."""
LARGEST = float(np.finfo(np.float16).max)

Cells = npt.NDArray[np.int64]


class TokenChange(Collector):
    """How far tokens move, relative to their usual size, per cell of the map: ``||x_t - x_(t-1)|| / rms norm of x_t``.

    x is what all blocks add to the stream (site ``step``), and what the blocks at a quarter, half and three quarters of
    the depth add; of several streams the one with the video's tokens, else the largest. A cell has the root mean square
    of its tokens. ``geometry`` None: a map along the sequence only.

    The step before is kept in full where that is at most ``KEPT`` numbers; else each token is kept as a few sums of its
    channels with random signs, drawn once, which keep distances (Achlioptas 2003, Johnson-Lindenstrauss with coins).
    """

    name = "tokens"

    def __init__(self, trace: Trace, calls: NetworkCalls, geometry: Geometry | None) -> None:
        super().__init__()
        self._maps: dict[str, Numbers] = {}
        self._ends: dict[str, list[str]] = {}
        self._streams: dict[str, tuple[str, str | None]] = {}
        self._geometry: dict[str, Geometry | None] = {}
        self._grids: dict[str, tuple[int, ...]] = {}
        self._starts: dict[tuple[str, int], Tensor] = {}  # of the present call
        self._before: dict[tuple[str, int], tuple[int, Tensor]] = {}
        self._shape = len(calls.timesteps), calls.branches
        for site, block_range in sites_of(trace).items():
            made = feature(trace.gm, trace.graph_index(None), block_range)
            counts = [_tokens(tensor_value(end)) for end in made.ends]
            sizes = [tensor_value(end).numel() for end in made.ends]
            if not counts:
                self.skip(f"{site} hands on no stream")
                continue
            chosen = stream_of(counts, sizes, geometry)
            start = made.starts[chosen]
            self._streams[site] = made.ends[chosen].name, start.name if start is not None else None
            fits = geometry is not None and counts[chosen] in (geometry.video, geometry.tokens)
            if geometry is not None and not fits:
                self.skip(f"{site}: its stream has {counts[chosen]} tokens, which are not those of a {geometry}")
            self._geometry[site] = geometry if fits else None
            self._ends.setdefault(self._streams[site][0], []).append(site)
        self._begins = {start for _, start in self._streams.values() if start is not None}
        self.wanted = frozenset(self._ends) | self._begins
        order = {node.name: place for place, node in enumerate(trace.gm.graph.nodes)}
        self._last = max(self.wanted, key=order.__getitem__, default="")

    def see(self, seen: Seen) -> None:
        """Keep the sums of a stream at the beginning of a site, compare at its end."""
        name, moment, parts = seen.node.name, seen.moment, self.parts(seen)
        if not parts:
            return
        for branch, part in parts:
            sums = signed_sums(part)
            for site in self._ends.get(name, ()):
                start = self._streams[site][1]
                if start is None or (start, branch) in self._starts:
                    self._compare(
                        site, branch, moment.step, sums if start is None else sums - self._starts[start, branch]
                    )
            if name in self._begins:
                self._starts[name, branch] = sums
        if name == self._last:
            self._starts.clear()

    def tables(self) -> dict[str, Table]:
        """By site, ``change`` per step, branch and cell; NaN where a branch did not run in the step or before it."""
        found = {}
        for site in self._streams:
            if site not in self._maps:
                continue
            values, grid = self._maps[site], self._grids[site]
            names = ("frames", "rows", "columns") if len(grid) == 3 else ("cells",)
            change = Measure((PROMPT, "step", "branch", "cell"), values[None], partial=True)
            found[site] = Table({"change": change}, facts=dict(zip(names, grid, strict=True)))
        return found

    def _compare(self, site: str, branch: int, step: int, now: Tensor) -> None:
        geometry = self._geometry[site]
        if geometry is not None and now.shape[1] != geometry.video:
            now = now[:, geometry.text :] if geometry.text_first else now[:, : geometry.video]
        tokens = now.shape[1]
        if site not in self._maps:
            grid: tuple[int, ...] = pooled(geometry) if geometry is not None else (min(tokens, CELLS),)
            self._grids[site] = grid
            self._maps[site] = np.full((*self._shape, math.prod(grid)), np.nan, np.float16)
        last, before = self._before.get((site, branch), (-1, now))
        if last == step - 1 and last >= 0:
            grid = self._grids[site]
            cells = cells_of(geometry.sizes if geometry is not None else (tokens,), grid)
            self._maps[site][step, branch] = np.minimum(relative_change(now, before, cells), LARGEST)
        self._before[site, branch] = step, now


def sites_of(trace: Trace) -> dict[str, str]:
    """The sites that are looked at, and the block ranges whose features they are."""
    blocks = trace.blocks
    if not trace.boundaries:
        return {}
    depths = dict.fromkeys(len(blocks) * quarter // 4 for quarter in (1, 2, 3))
    return {STEP: range_name(blocks[0], blocks[-1])} | {blocks[depth]: blocks[depth] for depth in depths}


def stream_of(tokens: list[int], sizes: list[int], geometry: Geometry | None) -> int:
    """Which of several streams is the video's: the one with its tokens, or with its and the text's, or the largest."""
    wanted = (geometry.video, geometry.tokens) if geometry is not None else ()
    return next((tokens.index(count) for count in wanted if count in tokens), int(np.argmax(sizes)))


def pooled(geometry: Geometry) -> tuple[int, int, int]:
    """Frames, rows and columns of a map: the longest is halved until there are at most ``CELLS`` cells.

    >>> pooled(Geometry(21, 30, 52))
    (11, 8, 13)
    """
    sizes = list(geometry.sizes)
    while math.prod(sizes) > CELLS:
        longest = sizes.index(max(sizes))
        sizes[longest] = -(-sizes[longest] // 2)
    frames, rows, columns = sizes
    return frames, rows, columns


def signed_sums(value: Tensor) -> Tensor:
    """A stream ``[B, S, C]`` as ``[B, S, D]`` float32 with about the same distances; unchanged where it is small."""
    tokens = value.detach().reshape(value.shape[0], -1, value.shape[-1]) if value.ndim != 2 else value.detach()[None]
    batch, count, channels = tokens.shape
    most = max(KEPT // (batch * count), 1)
    if channels <= most:
        return tokens.to(torch.float32, copy=True)  # a view would hold on to all that it is a view of
    return tokens.float() @ _signs(channels, most, value.device)


def relative_change(now: Tensor, before: Tensor, cells: Cells) -> Numbers:
    """The change of tokens ``[B, S, D]`` from ``before`` to ``now`` per cell, relative to the rms norm of a token."""
    moved = (now - before).square().sum(-1).mean(0).double().cpu().numpy()
    size = float(now.square().sum(-1).mean())
    per_cell = np.bincount(cells, moved) / np.bincount(cells)
    return np.asarray(np.sqrt(per_cell / size) if size else np.where(per_cell > 0, np.inf, 0.0))


def _tokens(stream: Tensor) -> int:
    return int(stream.shape[:-1].numel() // (stream.shape[0] if stream.ndim > 2 else 1))


@functools.lru_cache(maxsize=16)
def _signs(channels: int, count: int, device: torch.device) -> Tensor:
    """Random signs ``[channels, count]``, always the same, scaled to keep norms."""
    coins = torch.randint(0, 2, (channels, count), generator=torch.Generator().manual_seed(channels))
    return ((2 * coins - 1) / math.sqrt(count)).float().to(device)
