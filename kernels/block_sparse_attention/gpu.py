"""Which GPUs the Triton kernel of ``ditopt::block_sparse_attention`` runs on, and in tiles of which sizes.

Imports no Triton unless it is asked whether that can be done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WIDEST = 256
"""Channels of a head that the tiles have room for."""

Capability = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time: ``rows`` queries by ``columns`` keys, by so many warps and load stages."""

    rows: int
    columns: int
    warps: int
    stages: int


# By the compute capability that they begin at, then by the widest head that they are for: 16-bit operands' tile, then
# float32's, whose products take no tensor cores. Compiled for these GPUs they fit shared memory and keep all but a few
# words in registers. NOT YET MEASURED: nobody has timed one against another, on any GPU.
_LARGE = {  # A100
    64: (Tile(128, 64, 4, 3), Tile(64, 32, 8, 2)),
    128: (Tile(128, 64, 8, 3), Tile(32, 16, 8, 2)),
    256: (Tile(64, 64, 8, 2), Tile(16, 16, 4, 2)),
}
_SMALL = {  # 100 KiB of shared memory: A10, L4, L40, GeForce RTX 30, 40 and 50
    64: (Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    128: (Tile(64, 32, 4, 2), Tile(32, 16, 8, 2)),
    256: (Tile(64, 32, 8, 2), Tile(16, 16, 4, 2)),
}
_HOPPER = {  # and the larger ones of Blackwell
    64: (Tile(128, 128, 8, 2), Tile(64, 32, 8, 2)),
    128: (Tile(128, 64, 8, 3), Tile(32, 16, 8, 2)),
    256: (Tile(64, 32, 8, 2), Tile(16, 16, 4, 2)),
}
TILES: dict[Capability, dict[int, tuple[Tile, Tile]]] = {
    (8, 0): _LARGE,
    (8, 6): _SMALL,
    (9, 0): _HOPPER,
    (12, 0): _SMALL,
}
OLDEST = min(TILES)


def tile_for(capability: Capability, channels: int, dtype: torch.dtype, query_block: int, key_block: int) -> Tile:
    """The tile for heads of ``channels``, cut so that blocks are whole numbers of tiles where they can be.

    Rows are a power of two that divides ``query_block``; columns are one that divides ``key_block``, unless that would
    be fewer than the 16 that a product takes. Fewer rows than the table's are for four warps.
    """
    by_width = TILES[max(known for known in TILES if known <= max(capability, OLDEST))]
    tile = by_width[min(width for width in by_width if width >= channels)][dtype == torch.float32]
    rows = min(tile.rows, query_block & -query_block)
    columns = max(16, min(tile.columns, key_block & -key_block))
    return Tile(rows, columns, tile.warps if rows == tile.rows else 4, tile.stages)


def triton_missing() -> str | None:
    """Why Triton cannot be imported, which this tries; None if it can."""
    try:
        import triton  # noqa: F401
    except Exception as problem:  # a build for another Python or another system fails in its own ways
        return f"Triton cannot be imported ({type(problem).__name__}: {problem}); pip install triton"
    return None


def gpu_refusal(device: torch.device) -> str | None:
    """Why the kernel does not run on a CUDA device; None if it does."""
    if torch.version.hip is not None:
        return "the Triton kernel is for NVIDIA's GPUs, this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        have, need = (".".join(map(str, each)) for each in (capability, OLDEST))
        return f"the Triton kernel is for compute capability {need} or newer, this GPU has {have}"
    return triton_missing()
