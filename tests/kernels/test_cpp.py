"""C++ kernels and the compiler: what it does not build has a reason, and working memory is as large as it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt._torch import has_bfloat16_dot_products
from ditopt.kernels import cpp, ops
from ditopt.kernels.block_sparse_attention import cpu
from ditopt.kernels.block_sparse_attention.pooled import PooledRest
from ditopt.kernels.flash_attention.cpu import SOURCE as FLASH
from tests.kernels.block_sparse import check_against, drawn, operands

needs_pairs = pytest.mark.skipif(not has_bfloat16_dot_products(), reason="no dot products of bfloat16 pairs")


def test_what_the_compiler_says_is_told(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text('#error "not on Sundays"\n')
    with pytest.raises(RuntimeError, match=r"^kernel\.cpp cannot be built: .*error: .*not on Sundays"):
        cpp.built(source, ())


def test_flags_that_the_compiler_does_not_know_are_a_reason() -> None:
    assert cpp.compiler_refusal(("-DNOTHING",)) is None
    told = cpp.compiler_refusal(("-mno-such-thing",))
    assert told is not None and told.startswith("the C++ compiler builds nothing with -mno-such-thing: ")


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        (cpu.SOURCE, ("-U__x86_64__",), "this kernel is for x86-64"),
        (FLASH, ("-mno-avx512bf16",), "AVX-512 with dot products of bfloat16 pairs is needed: GCC 10"),
    ],
)
def test_kernels_say_what_they_need_of_a_compiler(source: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{source.name} cannot be built: .*{message}"):
        cpp.built(source, flags)


@needs_pairs
def test_flash_attention_is_refused_where_the_compiler_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    part = torch.ones(1, 1, 64, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(ops, "has_amx", lambda: False)
    assert ops.refusal(part, part, part, 0.25, torch.bfloat16) is None
    monkeypatch.setattr(ops, "compiler_refusal", lambda flags: f"no {flags[-1]}")
    assert ops.refusal(part, part, part, 0.25, torch.bfloat16) == "no -mavx512bf16"


@needs_pairs
def test_without_the_compilers_help_bfloat16_runs_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-mno-avx512bf16"))
    assert cpu.library().ditopt_pairs() == 0
    parts, lists = operands((1, 2, 2, 70, 150, 16, 16), torch.bfloat16), drawn(2, 70, 150, 0.6)
    out, logs = cpu.block_sparse_attention(*parts, lists.indices, lists.counts, 64, 64, 0.2)
    assert out.dtype == torch.bfloat16
    check_against((out, logs), parts, lists, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_working_memory_is_all_that_is_written(
    dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins as NaN, and what lies before and behind it stays as it is."""
    held: list[tuple[Tensor, int]] = []

    def guarded(size: int) -> Tensor:
        whole = torch.full((size + 320,), 255, dtype=torch.uint8)
        held.append((whole, size))
        return whole[-whole.data_ptr() % 64 + 128 :][:size]

    monkeypatch.setattr(cpu, "working_memory", guarded)
    parts, lists = operands((1, 2, 2, 130, 200, 24, 40), dtype), drawn(2, 130, 200, 0.6)
    rest = None if masked else PooledRest.pooling(*parts[1:], torch.ones(2, dtype=torch.int32), 16)
    mask = torch.rand(130, 200, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    query, key, value = parts
    named: dict[str, Any] = {"mask": mask}
    if rest is not None:
        named |= {"pooled_key": rest.key, "pooled_value": rest.value, "rest": rest.heads, "pool": rest.pool}
    found = cpu.block_sparse_attention(query, key, value, lists.indices, lists.counts, 64, 64, 0.2, **named)
    wide = size = None
    if rest is not None:
        wide = PooledRest(rest.key.double(), rest.value.double(), rest.heads, rest.pool)
        size = PooledRest(rest.key.double(), rest.value.double().abs(), rest.heads, rest.pool)
    check_against(found, parts, lists, 0.2, wide, size, mask=mask)
    ((whole, length),) = held
    first = -whole.data_ptr() % 64 + 128
    assert (whole[:first] == 255).all() and (whole[first + length :] == 255).all()
    assert (whole[first : first + length] != 255).any()
