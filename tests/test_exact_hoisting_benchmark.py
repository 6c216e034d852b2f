"""The benchmark of exact hoisting runs for every family, and writes what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.exact_hoisting import FAMILIES, main, measure
from tests.trace.models import interpreted

pytest.importorskip("diffusers")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured(family: str) -> None:
    with interpreted():
        gain = measure(family, layers=1 if family not in ("Flux", "HunyuanVideo") else 2, steps=3, turns=2)
    assert gain.max_rel < 1e-5 and not gain.reasons
    assert gain.values > 0 and gain.carried_mib > 0 and 0.02 < gain.weights_mib / gain.of_mib < 0.9
    assert min(gain.quartiles) > 0 and gain.dense_s > 0
    torch._dynamo.reset()


def test_figures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, threads = tmp_path / "gains.json", torch.get_num_threads()
    with interpreted():
        main(["--families", "PixArt", "--layers", "1", "--steps", "2", "--turns", "2", "--json", str(path)])
    torch.set_num_threads(threads)
    figures = json.loads(path.read_text())
    assert [gain["family"] for gain in figures["gains"]] == ["PixArt"] and figures["settings"]["steps"] == 2
    assert "PixArt" in capsys.readouterr().out
    torch._dynamo.reset()
