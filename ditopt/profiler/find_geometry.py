"""How a model's tokens lie: frames x rows x columns, and where text stands.

Found in this order, the first that fits the number of tokens: given by the user; the patch size of the model's config
and the latents' shape; tables of positions (rotary factors, embeddings, position ids) that the graph joins to the
tokens; the latents' shape alone; the periods of attention. Models are never told apart by their class.

Text is found by asking the graph. The part of it that makes the queries of the longest self-attention (the first, among
equals) is run with NaN for the latents: a row of the queries that stays finite depends on no latents, so it is text. In
later blocks attention has mixed the two, and no row is finite; a model that mixes them before its first block hides its
text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ditopt.errors import InputError
from ditopt.geometry import Geometry
from ditopt.measures import Numbers, Table
from ditopt.profiler.periods import periods
from ditopt.profiler.places import Attention, attentions
from ditopt.trace import Trace

Sizes = tuple[int, int, int]
SAME = 1e-4
"""Entries of a table that differ by less than this, of the range of their column, are the same."""
MAX_COLUMNS = 512
"""Of a table of positions, so many columns are looked at."""


def find_geometry(
    trace: Trace,
    latents_position: int | None,
    config: Mapping[str, Any] | object | None = None,
    given: Geometry | Sequence[int] | None = None,
    by_distance: Table | None = None,
    arguments: Sequence[Any] | None = None,
) -> tuple[Geometry | None, str]:
    """(the geometry of a graph's self-attention, or None; how it was found, or why not).

    ``latents_position`` is the place of the latents among the graph's inputs; ``config`` the model's, a mapping or an
    object; ``given`` what the user says: a geometry, or (frames, rows, columns), or (rows, columns) of an image;
    ``by_distance`` a table of attention by raster distance; ``arguments`` the graph's inputs in a real call, without
    which tables of positions that are not made in the graph are not known.

    Raises:
        InputError: ``given`` does not fit the tokens of the model's self-attention.
    """
    site = _longest(trace)
    if site is None:
        if given is not None:
            raise InputError(f"a geometry is given, {given}, but the model has no self-attention in its blocks")
        return None, "the blocks have no self-attention"
    tokens = site.site.keys
    probed = _probe(trace, site, latents_position, arguments)
    if given is not None:
        return _fitting(given, site, probed), "given"
    if probed.video is None:
        return None, probed.why
    count = len(probed.video)
    shape = _latents_shape(trace, latents_position)
    for sizes, how in _ideas(config, shape, probed, count, by_distance):
        if math.prod(sizes) == count and min(sizes) >= 1:
            return Geometry(*sizes, tokens - count, probed.video.start > 0), how
    text = f" and {tokens - count} of text" if count < tokens else ""
    return None, f"nothing tells how the {count} tokens of {site.site.name}{text} lie; give (frames, rows, columns)"


def _ideas(
    config: object, shape: tuple[int, ...], probed: _Probed, count: int, by_distance: Table | None
) -> Iterator[tuple[Sizes, str]]:
    """Frames, rows and columns as they may be, the best evidence first; not all fit the number of tokens."""
    patch = _patch(config)
    if patch is not None:
        for video in _readings(shape, _entry(config, "in_channels")):
            frames, rows, columns = (size // side for size, side in zip(video, patch, strict=True))
            yield (frames, rows, columns), f"the config's patch size {patch} and latents of {list(shape)}"
    sizes, names = _grid(probed, count)
    if sizes is not None:
        yield sizes, f"the positions in {', '.join(names)}"
    for video in _readings(shape, _entry(config, "in_channels")):
        side = math.isqrt(max(1, math.prod(video) // count))
        yield (video[0], video[1] // side, video[2] // side), f"latents of {list(shape)}, in patches of {side} x {side}"
    found = periods(by_distance, count) if by_distance is not None else None
    if found is not None:
        yield (count // found[1], found[1] // found[0], found[0]), f"periods of attention, {found[0]} and {found[1]}"


def _fitting(given: Geometry | Sequence[int], site: Attention, probed: _Probed) -> Geometry:
    geometry = given if isinstance(given, Geometry) else None
    if geometry is None:
        sizes = [int(size) for size in given]  # type: ignore[union-attr]  # a geometry was told apart above
        if len(sizes) not in (2, 3):
            raise InputError(f"the geometry {given} has to be (frames, rows, columns), or (rows, columns) of an image")
        frames, rows, columns = sizes if len(sizes) == 3 else (1, *sizes)
        geometry = Geometry(frames, rows, columns)
    has = f"self-attention {site.site.name} has {probed.tokens} tokens"
    if probed.video is None:
        if geometry.tokens != probed.tokens:
            raise InputError(
                f"the {geometry} given makes {geometry.tokens} tokens, {has}; where text stands is not known "
                f"({probed.why}): give Geometry(frames, rows, columns, text=..., text_first=...)"
            )
        return geometry
    text, first = probed.tokens - len(probed.video), probed.video.start > 0
    full = Geometry(*geometry.sizes, text, first)
    place = f", of which the {'first' if first else 'last'} {text} are text" if text else ", none of them text"
    if geometry.video != len(probed.video) or geometry.text not in (0, text):
        raise InputError(f"the {geometry} given makes {geometry.tokens} tokens, {has}{place}")
    if geometry.text and geometry.text_first != first:
        said = "first" if geometry.text_first else "last"
        raise InputError(f"the {geometry} given has its text {said}, {has}{place}")
    return full


def _longest(trace: Trace) -> Attention | None:
    own = [entry for entry in attentions(trace) if not entry.cross and entry.site.queries == entry.site.keys]
    return max(own, key=lambda entry: entry.site.keys, default=None)


def _latents_shape(trace: Trace, position: int | None) -> tuple[int, ...]:
    value = trace.placeholders[position].meta["val"] if position is not None else None
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _entry(config: object, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _patch(config: object) -> Sizes | None:
    """Latent frames, rows and columns of a token; None where the config does not say."""
    size, frames = _entry(config, "patch_size"), _entry(config, "patch_size_t")
    sides = [size] if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) not in (1, 2, 3):
        return None
    if not all(isinstance(side, int) and side > 0 for side in sides):
        return None
    if len(sides) == 3:
        return int(sides[0]), int(sides[1]), int(sides[2])
    return frames if isinstance(frames, int) and frames > 0 else 1, int(sides[0]), int(sides[-1])


def _readings(shape: tuple[int, ...], channels: object) -> list[Sizes]:
    """Frames, rows and columns of latents ``[B, C, H, W]``, ``[B, C, F, H, W]`` or ``[B, F, C, H, W]``."""
    if len(shape) == 4:
        return [(1, shape[2], shape[3])]
    if len(shape) != 5:
        return []
    found = [(shape[2], shape[3], shape[4]), (shape[1], shape[3], shape[4])]
    return found[::-1] if shape[2] == channels != shape[1] else found


@dataclass(frozen=True)
class _Probed:
    """What a run of the graph up to a self-attention tells: where the video's tokens stand, tables by name.

    ``why``: what is not known, and the reason.
    """

    tokens: int
    video: range | None
    tables: tuple[tuple[str, Tensor], ...] = ()
    why: str = ""


class _Prober(fx.Interpreter):
    """Runs what a node needs and nothing else; keeps what joins the values that change."""

    def __init__(self, trace: Trace, last: fx.Node) -> None:
        super().__init__(trace.gm, garbage_collect_values=True)
        self.extra_traceback = False
        self.last, self.needed, self.changing = last, _ancestors(last), trace.changing()
        self.tables: list[tuple[str, Tensor]] = []
        self.found: Any = None

    def run_node(self, n: fx.Node) -> Any:
        """As the base class, where the node is needed."""
        if n.op != "placeholder" and n not in self.needed:
            return None
        value = super().run_node(n)
        joins = any(user in self.changing and user in self.needed for user in n.users)
        if isinstance(value, Tensor) and n not in self.changing and joins:
            self.tables.append((n.name, value))
        if n is self.last:
            self.found = value
        return value


def _probe(trace: Trace, site: Attention, latents: int | None, arguments: Sequence[Any] | None) -> _Probed:
    tokens = site.site.keys
    value = trace.placeholders[latents].meta["val"] if latents is not None else None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return _Probed(tokens, None, why="which input holds the latents is not known")
    inputs = list(arguments) if arguments is not None else [_stand_in(node) for node in trace.placeholders]
    inputs[latents or 0] = torch.full(tuple(value.shape), math.nan, dtype=value.dtype, device=value.device)
    prober = _Prober(trace, site.node.args[0])  # type: ignore[arg-type]  # the queries are a node
    try:
        with torch.no_grad():
            prober.run(*inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        return _Probed(tokens, None, why=f"the graph up to {site.site.name} does not run on NaN: {error}")
    changing = prober.found.isnan().any(-1).flatten(0, 1).any(0)  # [S] of [B, H, S, D]
    at = changing.nonzero().flatten().tolist()
    if not at or len(at) != at[-1] + 1 - at[0] or (at[0] > 0 and at[-1] < tokens - 1):
        why = f"the tokens of {site.site.name} that depend on the latents do not lie together"
        return _Probed(tokens, None, why=why)
    return _Probed(tokens, range(at[0], at[-1] + 1), tuple(prober.tables))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, open_ = {node}, [node]
    while open_:
        new = [parent for parent in open_.pop().all_input_nodes if parent not in found]
        found.update(new)
        open_ += new
    return found


def _stand_in(node: fx.Node) -> Any:
    """For an input whose value is not known: small numbers, so that nothing overflows, in the memory of one."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return value if isinstance(value, bool | float) else int(value)
    small = 1 / max(1, *value.shape) if value.is_floating_point() or value.is_complex() else value.dtype is torch.bool
    return torch.full((), small, dtype=value.dtype, device=value.device).expand(value.shape)


def _grid(probed: _Probed, count: int) -> tuple[Sizes | None, list[str]]:
    """(frames, rows and columns of tables of positions, each of whose columns goes by one of the three; the tables).

    Where a column changes from token to token tells the length of its runs: 1 where it goes by the token's column, the
    number of columns where it goes by the row, and so on. What is so read has to explain as many tables as can be.
    """
    tables = [(name, columns) for name, table in probed.tables for columns in _columns(table, probed, count)]
    changes = [column for _, values in tables for column in np.abs(np.diff(values, axis=0)).T > SAME]
    runs = sorted({math.gcd(*(np.flatnonzero(column) + 1).tolist(), count) for column in changes if column.any()})
    best: tuple[Sizes | None, list[str]] = None, []
    for columns, plane in product([run for run in runs if run > 1], [*runs, count]):
        if plane <= columns or plane % columns or count % plane:
            continue
        sizes = count // plane, plane // columns, columns
        explained, covered = [], np.array(sizes) == 1
        for name, values in tables:
            grid = values.reshape(*sizes, -1)
            along = np.stack([np.ptp(grid, axis).max((0, 1)) > SAME for axis in range(3)])
            if (along.sum(0) <= 1).all():
                explained.append(name)
                covered |= along.any(1)
        if covered.all() and len(explained) > len(best[1]):
            best = sizes, explained
    return best


def _columns(table: Tensor, probed: _Probed, count: int) -> Iterator[Numbers]:
    """A table as ``[video's tokens, n]``, along each axis that may be the tokens; every column runs from 0 to 1."""
    real = torch.view_as_real(table) if table.is_complex() else table
    for axis, size in enumerate(table.shape):
        if probed.video is None or size not in (count, probed.tokens):
            continue
        rows = real.movedim(axis, 0)
        if size != count:
            rows = rows[probed.video.start : probed.video.stop]
        values = rows.detach().reshape(count, -1)[:, :MAX_COLUMNS].double().cpu().numpy()
        extent = np.ptp(values, 0)
        kept = np.isfinite(extent) & (extent > 1e-6 * np.abs(values).max(initial=0))
        if kept.any():
            yield (values[:, kept] - values[:, kept].min(0)) / extent[kept]
