"""Checkpoints of profiling runs: what is kept is found again, and the folder of all runs stays bounded."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from ditopt.profiler.checkpoint import Checkpoints, prune_runs
from tests.conftest import RunPython

DAY = 86400.0


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path))
    return tmp_path / "runs"


def make_run(runs: Path, digit: str, days: float, size: int = 1000) -> Path:
    """A run's folder with one bundle of ``size`` bytes, last used ``days`` ago."""
    folder = runs / (digit * 20)
    folder.mkdir(parents=True)
    bundle = folder / "prompt0.safetensors"
    bundle.write_bytes(bytes(size))
    then = time.time() - days * DAY
    for path in (bundle, folder):
        os.utime(path, (then, then))
    return folder


def names(runs: Path) -> set[str]:
    return {path.name[0] for path in runs.iterdir()}


def test_a_bundle_is_found_again(runs: Path) -> None:
    Checkpoints("a" * 20).save("prompt0", {"sample": torch.arange(3.0)})
    found = Checkpoints("a" * 20).load("prompt0", ["sample"])
    assert found is not None and torch.equal(found["sample"], torch.arange(3.0))
    assert Checkpoints("a" * 20).load("prompt0", ["sample", "other"]) is None
    assert Checkpoints("b" * 20).load("prompt0", ["sample"]) is None


def test_the_key_of_a_run_is_the_same_in_every_process(run_python: RunPython) -> None:
    program = """
import numpy, torch
from PIL import Image
from ditopt.adapters.module import ModuleAdapter
from ditopt.profiler.checkpoint import run_key

def rollout(model, prompt, seed):
    noise = lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return sum(model(noise(2)) for part in [word for word in prompt.split()])

model = torch.nn.Linear(2, 2)
with torch.no_grad():
    model.weight.fill_(1), model.bias.fill_(VALUE)
image = Image.fromarray(numpy.full((4, 4, 3), LEVEL, numpy.uint8))
facts = {"loop": ModuleAdapter(model, rollout).describe(), "image": image, "mask": torch.ones(2, dtype=torch.bfloat16)}
print(run_key({"transformer": model}, facts))
"""
    first = program.replace("VALUE", "0").replace("LEVEL", "7")
    root = (Path(__file__).parents[2],)
    keys = [run_python(text, path=root) for text in (first, first, first.replace("7", "8"))]
    assert keys[0] == keys[1] != keys[2]
    assert run_python(program.replace("VALUE", "1").replace("LEVEL", "7"), path=root) != keys[0]


def test_runs_of_long_ago_go_when_another_begins(runs: Path) -> None:
    make_run(runs, "a", days=31)
    make_run(runs, "b", days=29)
    Checkpoints("c" * 20).save("prompt0", {"sample": torch.zeros(1)})
    assert names(runs) == {"b", "c"}


def test_the_oldest_go_until_the_rest_fits(runs: Path) -> None:
    for digit, days in (("a", 3), ("b", 1), ("c", 2), ("d", 4)):
        make_run(runs, digit, days)
    prune_runs(runs / ("e" * 20), max_bytes=2500)
    assert names(runs) == {"b", "c"}


def test_the_current_run_counts_but_stays(runs: Path) -> None:
    current = make_run(runs, "a", days=90, size=5000)
    make_run(runs, "b", days=1)
    prune_runs(current, max_bytes=4000)
    assert names(runs) == {"a"}
    assert (current / "prompt0.safetensors").stat().st_size == 5000


def test_a_run_that_is_taken_up_is_young_again(runs: Path) -> None:
    make_run(runs, "a", days=20)
    Checkpoints("a" * 20)
    make_run(runs, "b", days=10)
    prune_runs(runs / ("c" * 20), max_bytes=1500)
    assert names(runs) == {"a"}


def test_what_is_no_run_is_left_alone(runs: Path, tmp_path: Path) -> None:
    old = make_run(runs, "a", days=90)
    (old / "notes.txt").write_text("mine")
    mine = runs / "training"
    mine.mkdir()
    (mine / "weights.safetensors").write_bytes(bytes(5000))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights.safetensors").write_bytes(bytes(5000))
    (runs / ("b" * 20)).symlink_to(elsewhere)
    prune_runs(runs / ("c" * 20), max_bytes=0)
    assert [path.name for path in old.iterdir()] == ["notes.txt"], "a bundle goes, what nobody here wrote stays"
    assert (mine / "weights.safetensors").exists() and (elsewhere / "weights.safetensors").exists()
