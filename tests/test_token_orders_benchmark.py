"""The benchmark of token orders: what it times differs in the order alone, and its shares are those of the times."""

from __future__ import annotations

import pytest
import torch

from benchmarks.token_orders import SITE, captured, contenders, measure, told
from ditopt._torch import forget_compiled_code
from ditopt.geometry import Geometry
from ditopt.passes._infra import Ordered
from tests.trace.models import interpreted

pytest.importorskip("diffusers")


def test_all_forms_are_timed_on_graphs_that_differ_in_the_order_alone() -> None:
    forget_compiled_code()
    geometry = Geometry(2, 8, 8)
    with interpreted():
        program, inputs = captured(geometry.sizes)
        runs = contenders(program, inputs, geometry, 0.5)
        seconds = measure(runs, 2)
    assert list(runs) == [f"{dtype} {form}" for dtype in ("float32", "bfloat16") for form in ("not", "site", "heads")]
    assert all(len(each) == 2 and min(each) > 0 for each in seconds.values())
    plans = [plan for plan in program.variants.compiled if plan.sparse]
    assert {plan.sparse[0].order for plan in plans} == set(Ordered) and {plan.dtype for plan in plans} == {
        None,
        "bfloat16",
    }
    assert {plan.sparse[0].site for plan in plans} == {SITE}
    torch._dynamo.reset()


def test_shares_are_those_of_the_times() -> None:
    rows = told({"float32 not": [0.1] * 9, "float32 site": [0.101] * 9, "float32 heads": [0.102] * 9})
    assert rows["float32 not"] == {"ms": pytest.approx(100)}
    assert rows["float32 site"]["share"] == pytest.approx(0.01) and rows["float32 heads"]["ms"] == pytest.approx(102)
