"""What all tests share: no network, reproducible properties, and a way to run Python from scratch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported

settings.register_profile("ditopt", deadline=None, derandomize=True)  # two busy cores are slow, not wrong
settings.load_profile("ditopt")

RunPython = Callable[..., str]


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans and checkpoints of tests do not mix with the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def run_python(root: Path) -> RunPython:
    """Run a program in a fresh interpreter and return what it printed; its failure fails the test."""

    def run(program: str, *, cwd: Path = root, path: tuple[Path, ...] = (), timeout: float = 300) -> str:
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=cwd, env=variables, text=True, capture_output=True, timeout=timeout
        )
        if done.returncode:
            pytest.fail(f"a fresh Python ended with status {done.returncode}:\n{program}\n{done.stderr}", pytrace=False)
        return done.stdout

    return run
