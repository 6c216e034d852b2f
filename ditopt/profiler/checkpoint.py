"""Checkpoints of a profiling run: one file per prompt, so that an interrupted run resumes where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditopt import store

log = logging.getLogger("ditopt")

MAX_BYTES = 2 * 2**30
MAX_DAYS = 30
KEY_DIGITS = 20
SUFFIXES = (".safetensors", ".partial")


def run_key(networks: Mapping[str, nn.Module], facts: Mapping[str, Any]) -> str:
    """A hash of the networks' weights (every tensor's shape and a sample of its values) and of ``facts``."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=_as_text).encode())
    for name, network in networks.items():
        digest.update(f"{name}.{weights_print(network)}".encode())
    return digest.hexdigest()[:KEY_DIGITS]


def weights_print(network: nn.Module) -> str:
    """``sha256:...`` of every tensor's name, shape and dtype and of a sample of its values."""
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode() + sample.numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:KEY_DIGITS]}"


def _as_text(value: Any) -> str:
    """What a fact is that JSON does not know, the same in every process: images, arrays and tensors by their bytes."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if hasattr(value, "tobytes"):
        return f"{type(value).__name__} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return str(value)


class Checkpoints:
    """Named bundles of tensors under one run's folder; each is written whole or not at all.

    Other runs' folders that are too old or too many go when a run begins (``prune_runs``).
    """

    def __init__(self, key: str, resume: bool = True) -> None:
        self.folder = store.cache_dir() / "runs" / key
        self.resume = resume
        self.loaded = 0
        if self.folder.is_dir():
            with contextlib.suppress(OSError):  # a read-only folder is still good to resume from
                os.utime(self.folder)
        prune_runs(self.folder)

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


def prune_runs(current: Path, max_bytes: int = MAX_BYTES, max_days: float = MAX_DAYS) -> None:
    """Delete the runs beside ``current`` last used over ``max_days`` ago, then the oldest until all fit ``max_bytes``.

    The current run counts, but stays. Nothing is touched that is not named and filled like a run's folder; what
    cannot be deleted is left.
    """
    try:
        beside = [path for path in current.parent.iterdir() if path != current and _is_run(path)]
        used = {path: _last_use(path) for path in beside}
        size = {path: _bytes(_files(path)) for path in [*beside, current]}
    except OSError:  # no folder yet, or another process prunes at the same time
        return
    total = sum(size.values())
    for path in sorted(beside, key=used.__getitem__):
        if total > max_bytes or time.time() - used[path] > 86400 * max_days:
            total -= size[path]
            _delete(path)


def _is_run(path: Path) -> bool:
    named = re.fullmatch(rf"[0-9a-f]{{{KEY_DIGITS}}}", path.name) is not None
    return named and path.is_dir() and not path.is_symlink()


def _files(run: Path) -> list[Path]:
    return [path for path in run.glob("*") if path.suffix in SUFFIXES]


def _bytes(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _last_use(run: Path) -> float:
    return max(path.stat().st_mtime for path in [run, *_files(run)])


def _delete(run: Path) -> None:
    try:
        for path in _files(run):
            path.unlink(missing_ok=True)
        run.rmdir()
    except OSError as error:
        log.info("%s: an old run's checkpoints cannot be deleted (%s)", run, error)
