"""The benchmark of block-sparse attention on GPUs, run on a processor: rows, reasons, wrong results; no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import sparse_attention_gpu as benchmark
from benchmarks.sparse_attention import main
from ditopt.kernels.block_sparse_attention.gpu import gpu_refusal
from ditopt.kernels.block_sparse_attention.pooled import PooledRest

CPU = torch.device("cpu")


def test_rows_name_the_best_dense_kernel_and_the_share_of_the_ideal() -> None:
    told: list[str] = []
    rows = list(benchmark.measure(CPU, 300, 16, heads=2, densities=(0.5,), tell=told.append))
    assert [(row["equal"], row["pool"]) for row in rows] == [(True, 0), (False, 0), (True, 16)]
    for row in rows:
        cost = row["density"] + (1 / row["pool"] if row["pool"] else 0)
        assert row["best_dense"] == "flash", "the one that processors have"
        assert row["of_ideal"] == pytest.approx(row["seconds"]["dense"] * cost / row["seconds"]["ditopt"])
    assert rows[0]["density"] == pytest.approx(0.5, abs=0.05) and rows[1]["density"] == pytest.approx(0.75, abs=0.05)
    assert any("cudnn" in line and "No viable backend" in line for line in told)


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
