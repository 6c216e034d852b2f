"""What is built is what stands in the tree, and an installed wheel works on its own.

`passes`, `kernels` and `cost_models` stand at the top of the repository but are `ditopt.passes` and so on. Two
of them refuse their bare names. `kernels` cannot: Hugging Face has a distribution of that name, transformers
looks for it by *importing* it, and lets no ImportError pass, so that with a refusal in `kernels/__init__.py`
every program that is started in the repository's root would fail at `import transformers`. It has no
`__init__.py` instead: by Python's rules such a folder gives way to a real package of its name anywhere on the
path, and transformers knows that one without any is nobody's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

TOP = ("passes", "kernels", "cost_models")
RunPython = Callable[..., str]


def files_of(root: Path) -> set[str]:
    """Every file that belongs into the package, by its path inside an installed one."""
    found = set()
    for folder, prefix in (("ditopt", ""), *((name, "ditopt/") for name in TOP)):
        for path, folders, names in os.walk(root / folder):
            folders[:] = [f for f in folders if f != "__pycache__" and not Path(path, f).is_symlink()]
            found |= {prefix + Path(path, name).relative_to(root).as_posix() for name in names}
    return found


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tree as it stands, built in a copy so that nothing of an earlier build gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in ("ditopt", *TOP):
        shutil.copytree(root / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        text=True,
        capture_output=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("ditopt-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ditopt installed in it and nothing else; torch comes from the running environment."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel], check=True)
    return target


def test_package_list_is_the_tree(root: Path) -> None:
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {Path(file).parent.as_posix().replace("/", ".") for file in files_of(root) if file.endswith(".py")}
    assert sorted(listed) == sorted(there | {f"ditopt.{name}" for name in TOP})


@pytest.mark.parametrize("name", TOP)
def test_symlinks_say_the_same_as_the_package_dir_mapping(root: Path, name: str) -> None:
    mapping = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    assert mapping[f"ditopt.{name}"] == name
    assert (root / "ditopt" / name).readlink() == Path("..", name)


def test_wheel_holds_every_file_once_and_nothing_else(root: Path, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packed = [name for name in names if ".dist-info/" not in name]
    assert len(packed) == len(set(packed))
    assert set(packed) == files_of(root)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_installed_package_imports_from_where_it_was_installed(installed: Path, run_python: RunPython) -> None:
    program = (
        "import ditopt, ditopt.passes, ditopt.kernels, ditopt.cost_models\n"
        "print(ditopt.__file__)\n"
        "for p in (ditopt.passes, ditopt.kernels, ditopt.cost_models): print(*p.__path__)"
    )
    places = run_python(program, cwd=installed.parent, path=(installed,)).splitlines()
    assert [Path(place) for place in places] == [
        installed / "ditopt" / name for name in ("__init__.py", "passes", "kernels", "cost_models")
    ]


def test_installed_version_and_command(installed: Path, run_python: RunPython) -> None:
    program = (
        "from importlib.metadata import distribution\nimport ditopt\nd = distribution('ditopt')\n"
        "assert d.version == ditopt.__version__\n"
        "print(*(e.name for e in d.entry_points if e.group == 'console_scripts' and callable(e.load())))"
    )
    assert run_python(program, cwd=installed.parent, path=(installed,)).split() == ["ditopt"]


def test_torch_finds_the_backend_by_name(installed: Path, run_python: RunPython) -> None:
    program = (
        "import torch\nassert 'ditopt' in torch.compiler.list_backends()\n"
        "torch.compile(torch.nn.Identity(), backend='ditopt')  # an unknown name is refused here\n"
        "import ditopt.backend\nprint(ditopt.backend.__file__)"
    )
    place = run_python(program, cwd=installed.parent, path=(installed,)).splitlines()[-1]
    assert Path(place) == installed / "ditopt" / "backend.py"


@pytest.mark.parametrize("name", ["passes", "cost_models"])
def test_bare_name_is_refused(root: Path, name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=root, text=True, capture_output=True)
    assert f"ImportError: this package is named 'ditopt.{name}', not '{name}'" in done.stderr


def test_kernels_gives_way_to_the_distribution_of_that_name(root: Path, tmp_path: Path, run_python: RunPython) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'Hugging Face'\n")
    assert run_python("import kernels; print(kernels.OWNER)", path=(tmp_path,)) == "Hugging Face\n"


def test_transformers_and_diffusers_do_not_take_our_kernels_for_theirs(run_python: RunPython) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    program = (
        "import transformers.modeling_utils, diffusers\n"
        "from transformers.utils.import_utils import is_kernels_available as seen_by_transformers\n"
        "from diffusers.utils.import_utils import is_kernels_available as seen_by_diffusers\n"
        "from importlib.util import find_spec\n"
        "theirs = find_spec('kernels').loader.__class__.__name__ != 'NamespaceLoader'\n"
        "print(theirs or not (seen_by_transformers() or seen_by_diffusers()))"
    )
    assert run_python(program) == "True\n"
