"""The benchmark of block-sparse attention on GPUs, run on a processor: rows, reasons, wrong results; no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import sparse_attention
from benchmarks import sparse_attention_gpu as benchmark
from benchmarks.sparse_attention import main
from ditopt.kernels.block_sparse_attention import reference
from ditopt.kernels.block_sparse_attention.gpu import gpu_refusal
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.pooled import PooledRest
from ditopt.kernels.ops import INT8_ON_CPU

CPU = torch.device("cpu")


def test_rows_name_the_best_dense_kernel_and_the_share_of_the_ideal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditopt.kernels.ops.has_byte_dot_products", lambda: False)
    told: list[str] = []
    rows = list(benchmark.measure(CPU, 300, 16, heads=2, densities=(0.5,), tell=told.append))
    assert [(row["equal"], row["pool"]) for row in rows] == [(True, 0), (False, 0), (True, 16)]
    for row in rows:
        cost = row["density"] + (1 / row["pool"] if row["pool"] else 0)
        assert row["best_dense"] == "flash", "the one that processors have"
        assert row["of_ideal"] == pytest.approx(row["seconds"]["dense"] * cost / row["seconds"]["ditopt"])
    assert rows[0]["density"] == pytest.approx(0.5, abs=0.05) and rows[1]["density"] == pytest.approx(0.75, abs=0.05)
    assert any("cudnn" in line and "No viable backend" in line for line in told)
    assert f"    without int8 scores: {INT8_ON_CPU}" in told and not any(row["int8"] for row in rows)
    assert sum("% of the ideal" in line for line in told) == 3


def test_where_there_is_a_kernel_int8_scores_have_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference stands for the GPU's kernel; all blocks are timed, too, with one budget."""
    ran: list[bool] = []

    def run(*given: Any, int8: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ran.append(int8 is not None)
        query, key, value, indices, counts, query_block, key_block, scale, *pooled = given
        lists = BlockLists(indices, counts, query_block, key_block)
        wide = [part.double() for part in (query, key, value)]
        means = [part.double() for part in pooled[:2]]
        rest = PooledRest(means[0], means[1], *pooled[2:]) if pooled else None
        out, logs = reference.block_sparse_attention(wide[0], wide[1], wide[2], lists, scale, rest, int8=int8)
        return out.bfloat16(), logs

    monkeypatch.setattr(benchmark, "BLOCK_SPARSE_ATTENTION", run)
    monkeypatch.setattr(benchmark, "block_sparse_refusal", lambda *given, **named: None)
    monkeypatch.setattr(benchmark, "time_in_turn", lambda runs: {name: each() for name, each in runs.items()})
    told: list[str] = []
    rows = list(benchmark.measure(CPU, 200, 16, heads=2, densities=(1.0, 0.5), tell=told.append))
    assert [row["int8"] for row in rows] == [False, True, False, False, False, True] and any(ran)
    assert sum("int8 scores: " in line and "% of the ideal" in line for line in told) == 2
    assert [row["density"] for row in rows[:2]] == [1.0, 1.0]


def test_int8_scores_are_held_against_those_of_the_same_numbers() -> None:
    parts = benchmark.operands(300, 2, 16, CPU)
    lists, eight = benchmark.lists_of(300, 2, 0.5, True, CPU), torch.ones(2, dtype=torch.int32)
    query, key, value = (4 * part.double() for part in parts)
    parts = (query.bfloat16(), key.bfloat16(), value.bfloat16())
    out, _ = reference.block_sparse_attention(query, key, value, lists, 0.25, int8=eight)
    benchmark.check(out.bfloat16(), parts, lists, int8=True)
    with pytest.raises(RuntimeError, match="is off by"):
        benchmark.check(out.bfloat16(), parts, lists)


@pytest.mark.parametrize("given", [[], ["--flex", "--densities", "0.5", "0.25"]])
def test_arguments_are_taken_and_figures_written(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def figures(*each: Any) -> dict[str, Any]:
        asked.append(each)
        return {"rows": [1]}

    monkeypatch.setattr(sparse_attention, "processor_figures", figures)
    assert main([*given, "--json", str(tmp_path / "figures.json")]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["rows"] == [1]
    assert asked == [(bool(given), [0.5, 0.25] if given else sparse_attention.DENSITIES)]


def test_on_a_gpu_its_rows_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_attention, "gpu_refusal", lambda device: None)
    monkeypatch.setattr(sparse_attention, "describe_device", lambda device: "a GPU")
    sizes: list[tuple[int, int]] = []

    def measure(device: torch.device, tokens: int, channels: int) -> Iterator[dict[str, Any]]:
        sizes.append((tokens, channels))
        yield {"tokens": tokens}

    monkeypatch.setattr(benchmark, "measure", measure)
    assert main(["--device", "cuda", "--json", str(tmp_path / "figures.json")]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["rows"] == [{"tokens": tokens} for tokens, _ in sizes]
    assert sizes == [(tokens, channels) for tokens in benchmark.TOKENS for channels in benchmark.CHANNELS]


def test_no_time_is_told_of_a_wrong_result() -> None:
    parts = benchmark.operands(300, 2, 16, CPU)
    lists = benchmark.lists_of(300, 2, 0.5, True, CPU)
    out = benchmark.sparse(parts, lists)
    benchmark.check(out, parts, lists)
    out[0, 1, 299, 3] += 0.1
    with pytest.raises(RuntimeError, match="head 1, block of queries 4 is off by"):
        benchmark.check(out, parts, lists)
    means = PooledRest.pooling(*parts[1:], torch.ones(2, dtype=torch.int32), benchmark.POOL)
    benchmark.check(benchmark.sparse(parts, lists, means), parts, lists, means)
    with pytest.raises(RuntimeError, match="is off by"):
        benchmark.check(benchmark.sparse(parts, lists), parts, lists, means)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if gpu_refusal(torch.device("cuda")) is None:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cuda"])
    assert ended.value.code == 2
    assert "error: --device cuda: torch sees no CUDA device" in capsys.readouterr().err
