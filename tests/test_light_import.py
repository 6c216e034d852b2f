"""`import ditopt` is light: it starts no compiler and loads no framework until a name is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import ditopt

HEAVY = ("torch", "triton", "diffusers", "transformers", "accelerate", "matplotlib", "jinja2", "numpy", "pydantic")


def loaded_after(run_python: Callable[..., str], statement: str) -> set[str]:
    return set(run_python(f"import sys\n{statement}\nprint(*sys.modules)").split())


def test_import_loads_nothing_heavy(run_python: Callable[..., str]) -> None:
    assert loaded_after(run_python, "import ditopt").isdisjoint(HEAVY)


def test_plan_needs_no_torch(run_python: Callable[..., str]) -> None:
    assert loaded_after(run_python, "from ditopt import Plan, Profile, PlanError").isdisjoint({"torch", "diffusers"})


def test_optimize_loads_neither_triton_nor_diffusers_nor_inductor(run_python: Callable[..., str]) -> None:
    loaded = loaded_after(run_python, "from ditopt import optimize")
    assert loaded.isdisjoint({"triton", "diffusers", "transformers", "torch._inductor", "torch._dynamo"})


def test_help_is_light(run_python: Callable[..., str]) -> None:
    program = (
        "import sys\nfrom ditopt.cli import main\nsys.argv = ['ditopt', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\nprint(*sys.modules)"
    )
    loaded = set(run_python(program).splitlines()[-1].split())
    assert loaded.isdisjoint({"triton", "diffusers", "torch._inductor"})


@pytest.mark.parametrize("name", ditopt.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(ditopt, name) is not None
    assert name in dir(ditopt)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'optimise'.*optimize"):
        getattr(ditopt, "optimise")  # noqa: B009  (a type checker would refuse the plain form, rightly)
