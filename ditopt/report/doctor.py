"""``ditopt doctor``: what this machine has of what ditopt needs, each finding with the way out."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ditopt import store
from ditopt.errors import DitoptError
from ditopt.plan import Plan


@dataclass(frozen=True)
class Finding:
    """One fact; ``broken`` if ditopt cannot work as it is."""

    name: str
    text: str
    broken: bool = False

    def __str__(self) -> str:
        return f"{'BROKEN' if self.broken else 'ok':<7}{self.name:<20}{self.text}"


def findings() -> Iterator[Finding]:
    """All findings, the slow one (a trial compilation) last."""
    import torch

    from ditopt._torch import has_bfloat16_dot_products
    from ditopt.device import describe_device
    from ditopt.kernels.block_sparse_attention.gpu import gpu_refusal, triton_missing

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield Finding("device", f"{device.type}: {describe_device(device)}")
    yield _compiler()
    dots = has_bfloat16_dot_products()
    absent = "absent: attention in bfloat16 is torch's own (no avx512_bf16)"
    yield Finding("attention kernel", "present, for bfloat16 on this processor" if dots else absent)
    yield _sparse_kernel()
    missing = triton_missing()
    text = "present" if missing is None else f"absent; needed for GPUs only: {missing}"
    yield Finding("triton", text, device.type == "cuda" and missing is not None)
    refused = gpu_refusal(torch.device("cuda"))
    present = "present, in Triton; its speed is not yet measured"
    yield Finding("GPU sparse kernel", present if refused is None else f"absent: {refused}")
    absent = "absent; needed for pipelines only: pip install ditopt[diffusers]"
    yield Finding("diffusers", "present" if importlib.util.find_spec("diffusers") else absent)
    absent = "absent; needed by `ditopt bench` only: pip install ditopt[bench]"
    yield Finding("scikit-image", "present" if importlib.util.find_spec("skimage") else absent)
    yield _cache()
    yield from _plans()
    yield _trial()


def _compiler() -> Finding:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    found = next((path for path in map(shutil.which, wanted) if path), None)
    if found is None:
        return Finding("C++ compiler", f"none of {', '.join(wanted)} found; install g++ or set CXX", broken=True)
    return Finding("C++ compiler", found)


def _sparse_kernel() -> Finding:
    """The C++ kernel of sparse heads, which this builds."""
    from ditopt.kernels.block_sparse_attention.cpu import library

    try:
        found = library()
    except RuntimeError as error:
        return Finding("sparse kernel", f"absent: {error}")
    bfloat16 = "by dot products of pairs" if found.ditopt_pairs() else "as float32"
    int8 = "with int8 scores" if found.ditopt_bytes() else "without int8 scores (no avx512_vnni)"
    return Finding("sparse kernel", f"present, bfloat16 {bfloat16}, {int8}")


def _cache() -> Finding:
    folder = store.cache_dir()
    try:
        store.check_writable(folder)
    except OSError as error:
        text = f"{folder} cannot be written ({error.strerror}); set DITOPT_CACHE to a folder that can"
        return Finding("cache", text, broken=True)
    return Finding("cache", f"{folder} is writable")


def _plans() -> Iterator[Finding]:
    files = sorted(store.plan_dir().glob("*.yaml"))
    yield Finding("plans", f"{len(files)} in {store.plan_dir()}")
    for file in files:
        try:
            plan = Plan.load(file)
            yield Finding("", f"{plan.model.class_name}, {plan.sampler.steps} steps: {file.name}")
        except DitoptError as error:
            yield Finding("", f"{str(error).splitlines()[0]}; delete or replace it", broken=True)


def _trial() -> Finding:
    """Compile a small network through the backend: it meets every private interface of torch that ditopt uses."""
    import torch
    from torch import nn

    from ditopt.backend import Session, ditopt_backend

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    given = torch.randn(2, 8)
    began = time.perf_counter()
    try:
        with torch.no_grad():
            options: dict[str, Any] = {"session": Session()}
            compiled = torch.compile(network, backend=ditopt_backend, options=options)
            error = float((compiled(given) - network(given)).abs().max())
    except Exception as problem:  # whatever a torch release moved is what this is to find
        first = str(problem).strip().splitlines()[:1]
        text = f"a trial compilation failed: {type(problem).__name__}: {' '.join(first)}"
        text += "; ditopt is made for torch 2.11 to 2.13"
        return Finding("private interfaces", text, broken=True)
    seconds = time.perf_counter() - began
    return Finding(
        "private interfaces", f"a trial compilation took {seconds:.1f} s, error {error:.1g}", broken=error > 1e-4
    )
