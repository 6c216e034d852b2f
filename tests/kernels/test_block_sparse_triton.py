"""The Triton kernel of attention to listed blocks: interpreted, compiled for GPUs, run on one; what is refused."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ditopt.kernels.block_sparse_attention import gpu
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, block_sparse_refusal
from ditopt.kernels.ops import _block_sparse_attention_in_triton as on_cuda
from tests.kernels.block_sparse import drawn, operands

HERE = Path(__file__).parent
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KIB = {(8, 0): 163, (8, 6): 99, (9, 0): 227, (12, 0): 99}
"""Shared memory that a program may have."""
USUAL = ("group", "repeats")
"""Sizes that are 1 in self-attention of one batch."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or gpu.gpu_refusal(torch.device("cuda")) is not None,
    reason=f"no GPU for the kernel: {gpu.gpu_refusal(torch.device('cuda'))}",
)


def run_cases(root: Path, cache: Path, **settings: str) -> None:
    """Run all of ``triton_cases.py`` in a process of its own."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
    done = subprocess.run(
        command,
        cwd=root,
        env={**variables, "TRITON_CACHE_DIR": str(cache), **settings},
        text=True,
        capture_output=True,
        timeout=1000,
    )
    if done.returncode or " passed" not in done.stdout or "skipped" in done.stdout:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}", pytrace=False)


@needs_triton
def test_in_the_interpreter(root: Path, tmp_path: Path) -> None:
    run_cases(root, tmp_path, TRITON_INTERPRET="1")


@needs_gpu
def test_on_this_gpu(root: Path, tmp_path: Path) -> None:
    run_cases(root, tmp_path)


@needs_gpu
def test_a_cuda_graph_replays_it_on_other_lists() -> None:
    query, key, value = (part.cuda() for part in operands((1, 2, 2, 512, 512, 64, 64), torch.bfloat16))
    lists, others = drawn(2, 512, 512, 0.5).to(query.device), drawn(2, 512, 512, 0.5).to(query.device)
    others.counts.clamp_(max=2)
    given = (query, key, value, lists.indices, lists.counts, 64, 64, 0.1)
    BLOCK_SPARSE_ATTENTION(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = BLOCK_SPARSE_ATTENTION(*given)
    lists.counts.copy_(others.counts)
    graph.replay()
    assert torch.equal(out, BLOCK_SPARSE_ATTENTION(*given)[0])


def compiled_for(
    capability: tuple[int, int],
    channels: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    ones: tuple[str, ...],
    pool: int = 0,
    int8: bool = False,
) -> Any:
    """The kernel, compiled for a GPU that need not be here; what is 1 is compiled in, as Triton does."""
    from ditopt.kernels.block_sparse_attention.triton import attend, constants

    like = torch.empty(1, 1, 1, channels, dtype=dtype)
    settings = constants(like, like, BlockLists(like, like, *blocks), capability, pool, int8)
    settings |= dict.fromkeys(ones, 1)
    pointers = dict.fromkeys(("query", "key", "value", "out", "pooled_key", "pooled_value"), f"*{NAMES[dtype]}")
    known = {**pointers, "logs": "*fp32", "indices": "*i32", "counts": "*i32", "order": "*i64"}
    known |= {"rest": "*i32", "factor": "fp32", "int8_heads": "*i32"}
    of_int8 = ("*i8", "*fp32", "*fp32") if int8 else (pointers["key"],) * 3
    known |= zip(("int8_key", "int8_scales", "int8_mean"), of_int8, strict=True)
    return compiled(attend, known, settings, capability)


def compiled(kernel: Any, known: dict[str, str], settings: dict[str, Any], capability: tuple[int, int]) -> Any:
    """A kernel for a GPU: ``known`` are types of arguments, others are int32; ``settings`` constants and options."""
    import triton.compiler
    from triton.backends.compiler import GPUTarget

    options = {name: settings.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in settings}
    signature = {name: "constexpr" if name in settings else known.get(name, "i32") for name in kernel.arg_names}
    aligned = [
        (number,)
        for number, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith(("_batch", "_head", "_stride"))
    ]
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = triton.compiler.ASTSource(kernel, signature, settings, attributes)
    return triton.compiler.compile(source, GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options)


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set, so nothing is compiled")
@pytest.mark.parametrize(
    ("capability", "channels", "dtype", "blocks", "ones", "pool", "int8"),
    [
        ((8, 0), 128, torch.bfloat16, (64, 64), USUAL, 0, False),
        ((8, 0), 128, torch.bfloat16, (64, 64), USUAL, 16, True),
        ((8, 6), 256, torch.float16, (128, 128), USUAL, 16, False),
        ((8, 6), 128, torch.float16, (64, 64), USUAL, 0, True),
        ((9, 0), 64, torch.bfloat16, (128, 128), (), 0, False),
        ((9, 0), 128, torch.bfloat16, (64, 64), USUAL, 0, False),
        ((9, 0), 96, torch.float32, (64, 48), (*USUAL, "heads", "tokens", "keys", "key_blocks", "padding"), 0, False),
        ((9, 0), 128, torch.bfloat16, (64, 64), USUAL, 16, True),
        ((12, 0), 64, torch.bfloat16, (128, 64), USUAL, 0, True),
    ],
)
def test_it_compiles_for_gpus_and_fits_their_shared_memory(
    capability: tuple[int, int],
    channels: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    ones: tuple[str, ...],
    pool: int,
    int8: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compiled_for(capability, channels, dtype, blocks, ones, pool, int8)
    assert 0 < kernel.metadata.shared <= KIB[capability] * 1024
    product = "wgmma" if capability == (9, 0) else "mma.sync"
    assert (product in kernel.asm["ptx"]) == (dtype != torch.float32), "tensor cores are for 16 bits only"
    assert "cp.async" in kernel.asm["ptx"], "keys are loaded ahead"
    assert ("s32.s8.s8" in kernel.asm["ptx"]) == int8, "and have products of int8 where they are asked for"


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set, so nothing is compiled")
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)])
def test_what_quantises_keys_compiles_for_gpus(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditopt.kernels.block_sparse_attention.triton import quantise_constants
    from ditopt.kernels.block_sparse_attention.triton_tiles import quantise

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    known = {"key": "*bf16", "mean": "*fp32", "numbers": "*i8", "scales": "*fp32"}
    kernel = compiled(quantise, known, quantise_constants(128, 64), capability)
    assert kernel.metadata.shared <= KIB[capability] * 1024
    assert "div.rn.f32" in kernel.asm["ptx"], "numbers are those of the reference to the bit"


def test_tiles_divide_blocks() -> None:
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 1)):
        for dtype in (torch.bfloat16, torch.float32):
            for channels in (1, 64, 65, 128, 256):
                for query_block, key_block in ((64, 64), (192, 96), (128, 256), (64, 16)):
                    tile = gpu.tile_for(capability, channels, dtype, query_block, key_block)
                    assert query_block % tile.rows == 0 and key_block % tile.columns == 0
    assert gpu.tile_for((8, 9), 64, torch.float16, 128, 64) == gpu.TILES[8, 6][64][0]
    assert gpu.tile_for((9, 0), 64, torch.float16, 64, 2).columns == 16, "a product takes no fewer"


def on_a_gpu(channels: int = 64, lists_on: str = "cuda") -> str | None:
    """Why no kernel takes these operands; they have no values, and no GPU is needed for them."""
    with FakeTensorMode():
        query = torch.empty(1, 2, 128, channels, device="cuda", dtype=torch.bfloat16)
        counts = torch.empty(1, 2, 2, device=lists_on, dtype=torch.int32)
        lists = BlockLists(counts.new_empty(1, 2, 2, 2), counts, 64, 64)
        return block_sparse_refusal(query, query, query, lists, 0.1)


def test_the_fake_needs_no_gpu() -> None:
    with FakeTensorMode():
        part = torch.empty(1, 2, 100, 64, device="cuda", dtype=torch.bfloat16)
        counts = torch.empty(1, 2, 2, device="cuda", dtype=torch.int32)
        out, logs = BLOCK_SPARSE_ATTENTION(part, part, part, counts.new_empty(1, 2, 2, 2), counts, 64, 64, 0.1)
        assert out.device == logs.device == part.device and out.transpose(1, 2).is_contiguous()
        assert out.shape == part.shape and logs.shape == part.shape[:3] and logs.dtype == torch.float32


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_operands_on_a_gpu_are_taken_or_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_a_gpu() == "torch sees no CUDA device"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        assert "Triton cannot be imported (ModuleNotFoundError" in str(gpu.triton_missing())
    monkeypatch.setattr(gpu, "triton_missing", lambda: None)
    with monkeypatch.context() as patch, FakeTensorMode():
        pretend(patch, (8, 9))
        assert gpu.gpu_refusal(torch.device("cuda")) is None
        patch.setattr(gpu, "triton_missing", lambda: "Triton cannot be imported")
        assert gpu.gpu_refusal(torch.device("cuda")) == "Triton cannot be imported"
        pretend(patch, (7, 5))
        assert "8.0 or newer, this GPU has 7.5" in str(gpu.gpu_refusal(torch.device("cuda")))
        patch.setattr(torch.version, "hip", "6.4")
        assert "AMD" in str(gpu.gpu_refusal(torch.device("cuda")))


def test_what_the_kernel_does_not_take_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditopt.kernels.ops.gpu_refusal", lambda device: None)
    assert on_a_gpu() is None
    assert on_a_gpu(channels=320) == "heads of 320 and 320 channels; at most 256 are taken on a GPU"
    assert on_a_gpu(lists_on="cpu") == "operands and lists are on several devices: cpu, cuda:0"


@pytest.mark.parametrize("by_name", [True, False])
def test_a_mask_is_refused_however_it_is_given(by_name: bool) -> None:
    part, lists = torch.ones(1, 1, 64, 16), drawn(1, 64, 64, 1.1)
    given = (part, part, part, lists.indices, lists.counts, 64, 64, 0.2)
    mask = torch.ones(64, 64, dtype=torch.bool)
    further, named = ((), {"mask": mask}) if by_name else ((None, None, None, 0, mask), {})
    with pytest.raises(ValueError, match="there is a mask, and no kernel for GPUs that takes one"):
        on_cuda(*given, *further, **named)


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set, so operands on cpu are taken")
def test_operands_on_the_processor_are_not_taken_without_the_interpreter() -> None:
    from ditopt.kernels.block_sparse_attention.triton import block_sparse_attention

    lists = drawn(1, 64, 64, 1.1)
    with pytest.raises(ValueError, match="operands are on cpu, where Triton runs in its interpreter only"):
        block_sparse_attention(*operands((1, 1, 1, 64, 64, 16, 16)), lists.indices, lists.counts, 64, 64, 0.2)


@needs_triton
def test_the_longest_lists_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditopt.kernels.block_sparse_attention import triton

    launched: list[Any] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *given, **settings: launched.append((grid, given))

    monkeypatch.setattr(triton, "attend", Recorder())
    query, key, value = operands((2, 3, 3, 300, 300, 32, 32))
    lists = drawn(3, 300, 300, 0.5)
    triton.launch(query, key, value, query.new_empty(query.shape), query.new_empty(2, 3, 300), lists, 0.2, (9, 0))
    ((grid, given),) = launched
    order = given[7]
    assert grid == (2 * lists.counts.numel(),) and torch.equal(order.sort().values, torch.arange(15))
    longest = lists.counts.flatten()[order]
    assert (longest.diff() <= 0).all() and (longest.diff() < 0).any()


@needs_triton
def test_it_is_launched_on_the_device_of_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditopt.kernels.block_sparse_attention import triton

    current: list[torch.device] = []
    launched: list[list[torch.device]] = []

    @contextmanager
    def device_of(part: torch.Tensor) -> Iterator[None]:
        current.append(part.device)
        yield
        current.pop()

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *given, **settings: launched.append(list(current))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(triton, "attend", Recorder())
    with FakeTensorMode():
        part = torch.empty(1, 2, 100, 64, device="cuda:1", dtype=torch.bfloat16)
        counts = torch.empty(1, 2, 2, device="cuda:1", dtype=torch.int32)
        lists = BlockLists(counts.new_empty(1, 2, 2, 2), counts, 64, 64)
        triton.launch(part, part, part, part, part.new_empty(1, 2, 100), lists, 0.1, (9, 0))
    assert launched == [[torch.device("cuda:1")]] and not current


@needs_triton
def test_only_operands_that_tiles_cannot_reach_are_copied() -> None:
    from ditopt.kernels.block_sparse_attention.triton import FURTHEST, readable

    widest = max(tile.columns for widths in gpu.TILES.values() for tiles in widths.values() for tile in tiles)
    assert (widest - 1) * (FURTHEST - 1) + gpu.WIDEST < 2**31
    for stride, channel, taken in ((FURTHEST - 1, 1, True), (FURTHEST, 1, False), (64, 2, False)):
        part = torch.empty_strided((1, 1, 65, 16), (0, 0, stride, channel), device="meta")
        assert (readable(part) is part) == taken
        assert readable(part).stride(3) == 1 and readable(part).stride(2) < FURTHEST


def test_the_processor_needs_no_triton(run_python: Callable[..., str]) -> None:
    program = (
        "import sys, torch, ditopt.kernels.block_sparse_attention.cpu\n"
        "from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION as attend\n"
        "part, count = torch.ones(1, 1, 64, 16), torch.ones(1, 1, 1, dtype=torch.int32)\n"
        "out, _ = attend(part, part, part, 0 * count[..., None], count, 64, 64, 0.25)\n"
        "assert torch.equal(out, part)\n"
        "print('ditopt.kernels.block_sparse_attention.triton' in sys.modules)"
    )
    assert run_python(program) == "False\n"
