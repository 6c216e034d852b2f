"""A head under a pattern whose rest is kept, by our operators: what the recipes' tests compare with papers."""

from __future__ import annotations

import torch
from torch import Tensor

from ditopt.decisions import Sparse, pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.kept import add_rest, keep_rest, other_lists
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.reference import block_sparse_attention
from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.candidates import candidates
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.kept import Form, Kept
from ditopt.kernels.patterns.registry import pattern_to_data
from ditopt.profiler.kept_errors import kept_of
from ditopt.recipes import RECIPES

GEOMETRY, BLOCK, SCALE = Geometry(4, 6, 8), 16, 8**-0.5
Step = tuple[Tensor, Tensor, Tensor]


def generation(steps: int) -> list[Step]:
    """Queries, keys and values ``[S, 8]`` float64 that move from step to step."""
    generator = torch.Generator().manual_seed(0)
    first, moves = torch.randn(2, 3, GEOMETRY.tokens, 8, generator=generator, dtype=torch.float64)
    found = [1.5 * first + 0.2 * step * moves for step in range(steps)]
    return [(each[0], each[1], each[2]) for each in found]


def tokens_of(pattern: Pattern) -> Tensor:
    """``[S, S]``: the pairs of whole blocks that a pattern keeps."""
    blocks = torch.from_numpy(pattern.block_map(GEOMETRY, BLOCK))
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def run(pattern: Pattern, form: Form, every: int, steps: list[Step]) -> list[Tensor]:
    """``[S, 8]`` of every step of a run, as our graphs have it: lists, all other lists, what is kept."""
    attended = torch.from_numpy(pattern.block_map(GEOMETRY, BLOCK))[None, None]
    own = BlockLists.from_map(attended, BLOCK, BLOCK)
    others = other_lists(attended, torch.tensor([True]), BLOCK, BLOCK)
    forms = torch.tensor([Kept(form, every).code], dtype=torch.int32)
    found, kept = [], (torch.empty(0), torch.empty(0))
    for number, step in enumerate(steps):
        query, key, value = (part[None, None] for part in step)
        here = block_sparse_attention(query, key, value, own, SCALE)
        if number % every == 0:
            there = block_sparse_attention(query, key, value, others, SCALE)
            whole, *kept = keep_rest(*here, *there, forms)  # type: ignore[assignment]  # two of three
        else:
            whole = add_rest(*here, forms, *kept)
        found.append(whole[0, 0])
    return found


def profiled(recipe: str) -> list[SparseChoice]:
    """What profiles of a video measure of a recipe."""
    names = tuple(pattern_text(pattern_to_data(each)) for each in candidates(Geometry(6, 28, 28)))
    kept = kept_of(names, in_order=False).names
    assert not any(RECIPES[recipe].allows(name) for name in names), "only with what it keeps"
    return [SparseChoice.from_data(Sparse(pattern=name).settings) for name in kept if RECIPES[recipe].allows(name)]
