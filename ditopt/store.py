"""The user's folder of plans, by model structure: what ``backend="ditopt"`` looks in when no plan is named."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ditopt.errors import PlanError
from ditopt.plan import Plan


def cache_dir() -> Path:
    """``$DITOPT_CACHE``, else ``$XDG_CACHE_HOME/ditopt``, else ``~/.cache/ditopt``."""
    base = os.environ.get("DITOPT_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditopt"


def plan_dir() -> Path:
    """Where plans are kept."""
    return cache_dir() / "plans"


def check_writable(folder: Path) -> None:
    """Make a folder and try to write in it.

    Raises:
        OSError: it cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def plan_path(structure: str) -> Path:
    """The file of the plan for a model structure (``sha256:...``)."""
    return plan_dir() / f"{structure.replace(':', '-')}.yaml"


def find_plan(structure: str) -> Plan | None:
    """The stored plan for a model structure, or None.

    Raises:
        PlanError: there is one, and it is malformed.
    """
    path = plan_path(structure)
    return Plan.load(path) if path.exists() else None


def keep_plan(source: Path, structure: str) -> Path:
    """Copy a plan file into the folder, so that later compilations find it; returns the copy's path.

    What it has beside it (its file of tensors) goes with it, before it.

    Raises:
        PlanError: the plan is malformed, or the folder cannot be written.
    """
    target = plan_path(structure)
    tensors = Plan.load(source).tensors
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = {} if tensors is None else {tensors.file: tensors.file}
        for name, copy in {**beside, source.name: target.name}.items():
            partial = target.with_name(f".{copy}.{os.getpid()}.partial")
            shutil.copyfile(source.with_name(name), partial)
            os.replace(partial, target.with_name(copy))
    except OSError as error:
        raise PlanError(
            f"{target}: cannot be written: {error.strerror or error}; set DITOPT_CACHE to a writable folder"
        ) from error
    return target
