"""Plans with ``qk: int8``: what they say of heads in every step, and where they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ditopt.decisions import Sparse, decision_from_data, decision_to_data, pattern_text
from ditopt.errors import PlanMismatchError
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.passes.sparse import int8_name
from ditopt.runtime.products import int8_flags
from ditopt.runtime.sparse import AttentionSites, Place
from ditopt.sites import AttentionSite
from tests.runtime.test_sparse import FRAMES, TIMES, call, plan_of, rule, sparse, wan_inputs
from tests.runtime.test_sparse import _fresh as _fresh
from tests.runtime.test_sparse import structure as structure
from tests.runtime.test_sparse import wan as wan
from tests.trace.models import compiled, interpreted

SITE = AttentionSite("blocks.0.attn1", 0, 2, FRAMES.tokens, FRAMES.tokens, 8, False)
ON_A_GPU = AttentionSites({SITE.name: Place(SITE, "blocks.0", True, torch.device("meta"))})
"""A device without any kernel stands for a GPU: nothing is computed."""


def test_which_heads_multiply_as_int8_is_an_input_that_steps_share_a_graph_by() -> None:
    plan = plan_of(
        "",
        rule(SITE.name, "1-4", sparse("spatial")),
        rule(SITE.name, "1", sparse("spatial", qk="int8"), "0"),
        rule(SITE.name, "3", sparse("skip", qk="int8"), "1"),
        rule(SITE.name, "4", sparse("dense", qk="int8")),
    )
    found, notes = ON_A_GPU.steps(plan, "transformer", lambda step, block: False)
    assert [[each.int8 for each in step.variant] for step in found] == [[], [True], [True], [True], [True], []]
    assert len({step.variant for step in found[1:5]}) == 1
    flags = int8_flags({step: each.of(2) for step, each in enumerate(plan.head_decisions(SITE.name, "transformer"))})
    assert [flags[step] for step in range(6)] == [(0, 0), (1, 0), (0, 0), (0, 1), (1, 1), (0, 0)]
    devices = {step.inputs[int8_name(SITE.name)].device.type for step in found[1:5]}
    assert devices == {"meta"} and not notes, "dense heads are not run as torch has them"


def test_without_it_graphs_are_as_they_were() -> None:
    plan = plan_of("", rule(SITE.name, "1-4", sparse("spatial")), rule(SITE.name, "3", sparse("dense")))
    found, notes = ON_A_GPU.steps(plan, "transformer", lambda step, block: False)
    assert not any(each.int8 for step in found for each in step.variant)
    assert int8_name(SITE.name) not in found[1].inputs and len(notes) == 1 and not found[3].variant


def test_without_a_kernel_a_plan_with_it_is_refused(
    wan: nn.Module, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditopt.kernels.ops.has_byte_dot_products", lambda: False)
    plan = plan_of(structure, rule("blocks.0.attn1", "1", sparse("spatial", qk="int8"), "1"))
    message = r"blocks\.0\.attn1: there is no kernel with int8 scores .* without dot products of bytes .*; leave qk out"
    with interpreted(), pytest.raises(PlanMismatchError, match=message):
        call(compiled(wan, plan=plan), wan_inputs(), TIMES[0])


def test_a_decision_is_written_as_it_is_read() -> None:
    data = {"sparse": {"pattern": "dense", "qk": "int8"}}
    decision = decision_from_data(data)
    assert isinstance(decision, Sparse) and decision_to_data(decision) == data
    choice = SparseChoice.from_data(decision.settings)
    assert choice.qk == "int8" and pattern_text(choice.to_data()) == decision.pattern
    assert SparseChoice.from_data({"pattern": "dense"}).qk is None


@pytest.mark.parametrize("qk", ["fp8", 8, True, {"int8": 64}])
def test_other_products_are_told(qk: Any) -> None:
    with pytest.raises(ValueError, match=r"qk .* is unknown; write qk: int8, or nothing"):
        SparseChoice.from_data({"pattern": "skip", "qk": qk})
