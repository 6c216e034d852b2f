"""Write a trained pipeline as the directory that is shipped."""

from __future__ import annotations

import inspect
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MAX_BYTES = 40_000_000
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def export(pipeline: Any, out: Path, dtype: torch.dtype = torch.float32) -> int:
    """Write the pipeline to ``out``, each file whole or not at all, and return its size in bytes.

    The transformer's weights are written in ``dtype``; diffusers loads them in float32 whatever they are kept in. Where
    ``out`` is the directory of the pipeline's own source, that is left as it is.

    Raises:
        ValueError: if it is larger than `MAX_BYTES`; ``out`` is then as before.
    """
    own = Path(inspect.getfile(type(pipeline))).parent
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as name:
        fresh = Path(name)
        pipeline.save_pretrained(fresh)
        if dtype != torch.float32:
            weights = {key: value.to(dtype) for key, value in load_file(fresh / WEIGHTS).items()}
            save_file(weights, fresh / WEIGHTS, metadata={"format": "pt"})
        files = sorted(path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file())
        size = sum((fresh / path).stat().st_size for path in files)
        if size > MAX_BYTES:
            raise ValueError(f"the pipeline takes {size:,} bytes; it must be at most {MAX_BYTES:,}")
        for path in files:
            if out.resolve() == own.resolve() and path.suffix == ".py":
                continue
            (out / path).parent.mkdir(exist_ok=True)
            os.replace(fresh / path, out / path)
    return size
