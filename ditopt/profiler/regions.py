"""Regions of keys that attention may look at: text, frames, pixels, what is near in space and time."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ditopt.geometry import Geometry

DISTANCES = (1, 2, 4)
"""Space-time distances (the largest along an axis, in tokens) within which mass is measured."""
REGIONS = ("mass_text", "mass_first_frame", "mass_in_frame", "mass_same_pixel", "mass_self", "mass_near_pixel")
"""Regions of keys. The same pixel is that of all frames, with the query's own token, of which ``mass_self`` is; near
the pixel are, in the other frames, it and what is at most a row and a column away."""


class Regions:
    """The regions of keys that masses are of, for query rows at positions ``rows`` ``[R]`` of a sequence.

    A row of text counts as the nearest video token: give it no weight.
    """

    def __init__(self, geometry: Geometry, rows: Tensor) -> None:
        self.geometry = geometry
        self.first = geometry.text if geometry.text_first else 0
        place = (rows - self.first).clamp(0, geometry.video - 1)
        frame_size = geometry.rows * geometry.columns
        frames = torch.arange(geometry.frames, device=rows.device) * frame_size
        self.frame = (place // frame_size).tolist()
        self.pixel = self.first + frames + (place % frame_size)[:, None]
        self.own = self.first + place[:, None]
        self.near, self.inside, self.within = self._neighbours(place)
        self.beside, self.beside_inside = self._near_pixel(place)

    def _neighbours(self, place: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Keys ``[R, N]`` from near to far, which of them exist, and how many of them are within each distance."""
        sizes = self.geometry.sizes
        reach = [min(max(DISTANCES), size - 1) for size in sizes]
        offsets = sorted(
            itertools.product(*(range(-far, far + 1) for far in reach)), key=lambda offset: max(map(abs, offset))
        )
        rings = [max(map(abs, offset)) for offset in offsets]
        at = torch.stack(torch.unravel_index(place, sizes), -1)[:, None]
        there = at + torch.tensor(offsets, device=place.device)
        limits = torch.tensor(sizes, device=place.device)
        inside = ((there >= 0) & (there < limits)).all(-1)
        _, rows, columns = sizes
        flat = (there[..., 0] * rows + there[..., 1]) * columns + there[..., 2]
        near = self.first + torch.where(inside, flat, place[:, None])
        return near, inside, tuple(sum(ring <= distance for ring in rings) for distance in DISTANCES)

    def _near_pixel(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[R, 9 F]`` near the pixel in all frames, and which of them exist in another frame than the row's."""
        count, rows, columns = self.geometry.sizes
        frame, row, column = torch.stack(torch.unravel_index(place, self.geometry.sizes))
        near = torch.arange(-1, 2, device=place.device)
        there = torch.cartesian_prod(torch.arange(count, device=place.device), near, near)
        at_row, at_column = row[:, None] + there[:, 1], column[:, None] + there[:, 2]
        inside = (at_row >= 0) & (at_row < rows) & (at_column >= 0) & (at_column < columns)
        inside &= there[:, 0] != frame[:, None]
        flat = (there[:, 0] * rows + at_row) * columns + at_column
        return self.first + torch.where(inside, flat, place[:, None]), inside

    def masses(self, probabilities: Tensor, where: slice) -> Tensor:
        """``[6 + 3, r]``: the mass of ``REGIONS``, then that within ``DISTANCES``, of the rows ``where``."""
        geometry, first = self.geometry, self.first
        frame_size, video = geometry.rows * geometry.columns, geometry.video
        text = slice(0, first) if geometry.text_first else slice(video, video + geometry.text)
        in_frame = []
        for frame, rows in itertools.groupby(enumerate(self.frame[where]), key=lambda entry: entry[1]):
            at = [row for row, _ in rows]
            keys = slice(first + frame * frame_size, first + (frame + 1) * frame_size)
            in_frame.append(probabilities[at[0] : at[-1] + 1, keys].sum(1))
        near = probabilities.gather(1, self.near[where]).mul_(self.inside[where])
        found = [
            probabilities[:, text].sum(1),
            probabilities[:, first : first + frame_size].sum(1),
            torch.cat(in_frame),
            probabilities.gather(1, self.pixel[where]).sum(1),
            probabilities.gather(1, self.own[where])[:, 0],
            probabilities.gather(1, self.beside[where]).mul_(self.beside_inside[where]).sum(1),
            *(near[:, :count].sum(1) for count in self.within),
        ]
        return torch.stack(found)

    def uniform(self, weights: Tensor) -> dict[str, Any]:
        """The masses that uniform attention would have; ``weights`` ``[R]`` are the rows'."""
        tokens = self.geometry.tokens
        frame_size = self.geometry.rows * self.geometry.columns
        beside = float(weights @ self.beside_inside.sum(1).float())
        counts = (self.geometry.text, frame_size, frame_size, self.geometry.frames, 1, beside)
        near = [float(weights @ self.inside[:, :count].sum(1).float()) / tokens for count in self.within]
        return {**{name: count / tokens for name, count in zip(REGIONS, counts, strict=True)}, "mass_near": near}
