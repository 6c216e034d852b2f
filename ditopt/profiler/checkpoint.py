"""Checkpoints of a profiling run: one file per prompt, so that an interrupted run resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditopt import store

log = logging.getLogger("ditopt")


def run_key(networks: Mapping[str, nn.Module], facts: Mapping[str, Any]) -> str:
    """A hash of the networks' weights (every tensor's shape and a sample of its values) and of ``facts``."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            flat = value.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
            digest.update(f"{name}.{key}{tuple(value.shape)}{value.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:20]


class Checkpoints:
    """Named bundles of tensors under one run's folder; each is written whole or not at all."""

    def __init__(self, key: str, resume: bool = True) -> None:
        self.folder = store.cache_dir() / "runs" / key
        self.resume = resume
        self.loaded = 0

    def load(self, name: str, expected: Sequence[str]) -> dict[str, Tensor] | None:
        """The bundle called ``name`` if it is there with all ``expected`` tensors."""
        path = self._path(name)
        if not self.resume or not path.exists():
            return None
        try:
            found = load_file(path)
        except SafetensorError:  # cut short by a full disk, say: as good as none
            return None
        if not set(expected) <= set(found):
            return None
        self.loaded += 1
        return found

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a bundle; where the folder cannot be written the run goes on without checkpoints."""
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            if self.resume:
                log.warning("%s: checkpoints cannot be kept (%s); an interrupted run will start over", path, error)
            self.resume = False

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
