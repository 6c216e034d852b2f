"""Who may import whom, as the design page draws the house; read off the syntax trees, nothing is imported.

    L0  errors, sites, decisions, plan(_text, _diff, _tensors), head_tensors, profile, measures, device, geometry,
        (block_)roles, findings, observations, recipes, step_rules, kept  data
    L1  kernels      cost_models                              never each other
    L2  passes -> kernels.ops      search -> cost_models      never each other
    L3  everything else: profiler, runtime, backend, adapters, api, report, cli, trace, ...

Beside it: `_torch.py` alone touches private torch interfaces, the data and the search do without torch,
imports are absolute, and nobody imports the packages at the repository's top by their bare names.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ditopt

DATA = (
    *(
        "errors",
        "sites",
        "decisions",
        "plan",
        "plan_text",
        "plan_tensors",
        "head_tensors",
        "plan_diff",
        "profile",
        "measures",
        "profile_file",
        "profile_check",
        "profile_data",
        "device",
        "geometry",
    ),
    *("roles", "block_roles", "findings", "observations", "recipes", "step_rules", "kept"),
)
TOP = ("passes", "kernels", "cost_models")

# What a part of the package may import of the rest, besides itself; a part that is not named here is of L3 and
# may import everything. A dotted name allows that module only.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(DATA, DATA),
    "_torch": DATA,
    "kernels": (*DATA, "_torch"),
    "cost_models": DATA,
    "passes": (*DATA, "_torch", "kernels.ops"),
    "search": (*DATA, "cost_models"),
    "runtime": (*DATA, "_torch", "kernels", "cost_models", "passes", "trace", "components", "search.predictors"),
}
NO_TORCH = {*DATA, "search"} - {"device"}
SEARCH_LIBRARIES = {"numpy", "ditopt", *sys.stdlib_module_names}


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported anywhere in a module, ``from a import b`` being ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def torch_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every use of a torch module: imports, and attributes read through what they bind."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            bound |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        chain: list[str] = []
        part: ast.AST = node
        while isinstance(part, ast.Attribute):
            chain.insert(0, part.attr)
            part = part.value
        if chain and isinstance(part, ast.Name) and part.id in bound:
            yield part.lineno, ".".join([bound[part.id], *chain])
    yield from imports(tree)


def is_private_torch(name: str) -> bool:
    first, *rest = name.split(".")
    return first == "torch" and any(part.startswith("_") and not part.endswith("__") for part in rest)


def allowed(part: str, target: str) -> bool:
    """Whether ``ditopt.<part>`` may import ``ditopt.<target>``."""
    inside = (part, *MAY_IMPORT[part]) if part in MAY_IMPORT else None
    return inside is None or any(target == name or target.startswith(f"{name}.") for name in inside)


def complaints(module: str, source: str) -> list[str]:
    """Everything that ``module`` (its dotted name; tests and examples have theirs too) must not do."""
    tree = ast.parse(source)
    package, _, inner = module.partition(".")
    part = inner.split(".")[0]
    found: set[tuple[int, str]] = set()
    for line, name in imports(tree):
        if name.split(".")[0] in TOP:
            found.add((line, f"imports {name} by its bare name; write ditopt.{name}"))
        if package != "ditopt" or not part:  # ditopt/__init__.py itself offers names of every layer
            continue
        if name.startswith("ditopt."):
            target = name.removeprefix("ditopt.")
            if target in ditopt.__all__:
                found.add((line, f"imports {name} from the facade; import it from the module that defines it"))
            elif not allowed(part, target):
                found.add((line, f"{part} must not import {name}"))
        if part in NO_TORCH and name.split(".")[0] == "torch":
            found.add((line, f"{part} is free of torch"))
        if part == "search" and name.split(".")[0] not in SEARCH_LIBRARIES:
            found.add((line, f"search is numbers only: numpy and the standard library, not {name}"))
    if package != "tests" and module != "ditopt._torch":
        found |= {
            (line, f"{name} is private to torch; only ditopt/_torch.py may use it")
            for line, name in torch_names(tree)
            if is_private_torch(name)
        }
    if package == "ditopt":
        found |= {
            (node.lineno, "imports must be absolute")
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level
        }
    return [f"{module}:{line}: {complaint}" for line, complaint in sorted(found)]


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every Python file of the repository, each once (symlinks are not followed)."""
    for folder in ("ditopt", *TOP, "tests", "examples", "benchmarks"):
        for file in sorted((root / folder).rglob("*.py")):
            if folder == "ditopt" and file.relative_to(root).parts[1] in TOP:
                continue  # some Pythons follow the symlinks
            parts = [*(["ditopt"] if folder in TOP else []), *file.relative_to(root).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def test_the_house_is_in_order(root: Path) -> None:
    found = [line for module, file in modules(root) for line in complaints(module, file.read_text())]
    assert not found, "\n" + "\n".join(found)


def test_the_walk_sees_every_layer(root: Path) -> None:
    names = [name for name, _ in modules(root)]
    assert len(names) == len(set(names))
    assert {"ditopt", "ditopt.errors", "ditopt.plan", "ditopt.passes", "ditopt.cost_models", "ditopt.search"} <= {
        *names
    }


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("ditopt.plan", "from ditopt.passes import verify", "plan must not import ditopt.passes.verify"),
        ("ditopt.errors", "def f():\n    import ditopt.api", ":2: errors must not import ditopt.api"),
        ("ditopt.sites", "import torch", "sites is free of torch"),
        ("ditopt.kernels.ops", "from ditopt.cost_models.base import Cost", "kernels must not import"),
        ("ditopt.kernels.ops", "from ditopt import cost_models", "kernels must not import ditopt.cost_models"),
        ("ditopt.cost_models.base", "from ditopt.kernels import ops", "cost_models must not import"),
        ("ditopt.passes.cut", "from ditopt.kernels import registry", "passes must not import ditopt.kernels.registry"),
        ("ditopt.passes.cut", "from ditopt.kernels.opsets import x", "passes must not import"),
        ("ditopt.passes.cut", "from ditopt.search.space import Candidate", "passes must not import"),
        ("ditopt.passes.cut", "from ditopt.runtime.slots import StateSlot", "passes must not import"),
        ("ditopt.search.joint", "from ditopt.passes.verify import verify", "search must not import"),
        ("ditopt.search.joint", "from torch import Tensor", "search is free of torch"),
        ("ditopt.search.joint", "from rich.table import Table", "search is numbers only"),
        ("ditopt.runtime.program", "from ditopt.search.space import Candidate", "runtime must not import"),
        ("ditopt.runtime.program", "import_module('ditopt.report')", "runtime must not import ditopt.report"),
        ("ditopt.api", "from ditopt import Plan", "from the facade"),
        ("ditopt.api", "from . import plan", "absolute"),
        ("ditopt.api", "from torch._dynamo import reset", "torch._dynamo.reset is private"),
        ("ditopt.api", "from torch import _guards", "torch._guards is private"),
        ("ditopt.api", "import torch\ntorch._inductor.config.x = 1", ":2: torch._inductor.config.x is private"),
        ("ditopt.api", "from torch import fx as g\ng.graph._Namespace()", "torch.fx.graph._Namespace is private"),
        ("ditopt.api", "import importlib\nimportlib.import_module('torch._guards')", "private"),
        ("examples.tiny_video.train", "import torch._dynamo", "private"),
        ("tests.test_ops", "from kernels.ops import attention", "write ditopt.kernels.ops.attention"),
        ("ditopt.api", "import passes", "write ditopt.passes"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_found(module: str, source: str, complaint: str) -> None:
    assert any(complaint in found for found in complaints(module, source)), complaints(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ditopt", "from ditopt.api import optimize"),
        ("ditopt.plan", "from ditopt import decisions\nfrom ditopt.sites import STEP\nimport yaml"),
        ("ditopt.passes.cut", "from ditopt.kernels import ops\nfrom ditopt.passes._infra import Pass"),
        ("ditopt.passes.cut", "from ditopt.kernels.ops import attention\nimport torch.fx"),
        ("ditopt.search.joint", "import numpy as np\nimport math\nfrom ditopt.cost_models.base import Cost"),
        ("ditopt.runtime.program", "from ditopt.search.predictors import forecast"),
        ("ditopt.report", "from ditopt.search.space import Candidate\nfrom ditopt.passes.verify import verify"),
        ("ditopt._torch", "import torch._inductor\nfrom torch._guards import tracing"),
        ("ditopt.api", "import torch\ntorch.__version__\ntorch.compiler.reset()"),
        ("ditopt.api", "from torch import Tensor\nx: Tensor\nx._version"),
        ("examples.tiny_video.train", "from .clips import render"),
        ("tests.test_trace", "import torch._dynamo\nfrom ditopt import Plan"),
    ],
)  # fmt: skip
def test_what_is_allowed_is_left_alone(module: str, source: str) -> None:
    assert complaints(module, source) == []
