"""Plans whose heads have a linear rest: compiled, against the formula on full maps; audited; refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt.backend import Session
from ditopt.decisions import HeadDecision, Sparse
from ditopt.errors import AuditError, PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.head_tensors import Projections
from ditopt.kernels.ops import LINEAR_REST
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.registry import pattern_from_data
from ditopt.passes.sparse import projection_name
from ditopt.plan import Plan, Rule
from ditopt.plan_tensors import PlanTensors
from ditopt.profiler.interpret import Edit
from tests.runtime.test_sparse import (
    TIMES,
    call,
    check_plan_file,
    emulated_by,
    plan_of,
    rule,
    sparse,
    wan_inputs,
)
from tests.runtime.test_sparse import _fresh as _fresh
from tests.runtime.test_sparse import structure as structure
from tests.runtime.test_sparse import wan as wan
from tests.trace.models import compiled, interpreted

pytest.importorskip("diffusers")

SPATIAL, SKIP = sparse("spatial", rest="linear"), sparse("skip", rest="linear", order="tiles")
STARTS = (0, 3)
RULES = (
    rule("blocks.*.attn1", "1-4", SPATIAL),
    rule("blocks.0.attn1", "2", SKIP, "1"),
    rule("blocks.1.attn1", "1-4", sparse("temporal", rest={"pooled": 16}), "0"),
)
CHANNELS = 12


def projections(block: int, do: Sparse, heads: tuple[int, ...] = (0, 1), width: int = CHANNELS) -> Projections:
    drawn = np.random.default_rng(block).standard_normal((len(STARTS), len(heads), width, width)) / width**0.5
    text = Projections.text_of(do.pattern)
    assert text is not None
    return Projections("transformer", f"blocks.{block}.attn1", text, heads, STARTS, drawn.astype(np.float16))


EVERY = PlanTensors(
    projections=(projections(0, SPATIAL), projections(1, SPATIAL), projections(0, SKIP)),
)


def linear_plan(structure: str, *rules: Rule) -> Plan:
    return plan_of(structure, *(rules or RULES)).with_beside(EVERY)


def heads_anew(decided: list[HeadDecision], geometry: Geometry, beside: dict[int, Tensor]) -> Edit:
    """Heads by the formula, on full maps: masked softmax attention, and what the projections make of the rest."""

    def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
        found = value.clone()
        for head, do in enumerate(decided):
            if not isinstance(do, Sparse):
                continue
            choice = SparseChoice.from_data(do.settings)
            query, key, values = (part[:, head] for part in given[:3])
            data = {name: each for name, each in do.settings.items() if name not in ("rest", "order")}
            kept = torch.from_numpy(pattern_from_data(data).block_map(geometry, 64))
            mask = kept.repeat_interleave(64, 0).repeat_interleave(64, 1)
            if head not in beside:  # means of 16 tokens, in raster order
                assert choice.rest is not None and choice.order is None
                means = [part.unflatten(1, (-1, 16)).mean(2) for part in (key, values)]
                groups = (~mask)[:, ::16].float().log() + np.log(16)
                scores = [query @ part.transpose(1, 2) / query.shape[-1] ** 0.5 for part in (key, means[0])]
                both = torch.cat([scores[0].masked_fill(~mask, -torch.inf), scores[1] + groups], -1).softmax(-1)
                found[:, head] = both @ torch.cat([values, means[1]], 1)
                continue
            found[:, head] = 0
            if mask.any():
                found[:, head] = F.scaled_dot_product_attention(query, key, values, attn_mask=mask)
            shares = query.softmax(-1) @ key.softmax(-1).transpose(1, 2) * ~mask
            found[:, head] += shares / shares.sum(-1, keepdim=True) @ values @ beside[head]
        return found

    return edit


def emulated(program: Any, plan: Plan, step: int, arguments: list[Any], geometry: Geometry) -> Tensor:
    numbers = iter(range(2))

    def edit(decided: list[HeadDecision], of: Geometry) -> Edit:
        site = f"blocks.{next(numbers)}.attn1"
        beside = {}
        for head, do in enumerate(decided):
            entry = plan.beside.projections_for("transformer", site, do.pattern) if isinstance(do, Sparse) else None
            if entry is not None:
                beside[head] = torch.from_numpy(entry.of_head(head, step).astype(np.float32))
        return heads_anew(decided, of, beside)

    return emulated_by(edit)(program, plan, step, arguments, geometry)


def test_a_plan_file_is_the_model_with_linear_attention_to_what_is_skipped(
    wan: nn.Module, structure: str, tmp_path: Path
) -> None:
    """In other periods by other projections; a head in tiles, one with pooled means beside them."""
    program = check_plan_file(wan, linear_plan(structure), tmp_path / "plan.yaml", emulated)
    assert program.bound is not None and program.bound.refused is None
    steps = program.bound.steps
    assert steps[1].variant == steps[3].variant == steps[4].variant
    name = projection_name("blocks.1.attn1")
    assert not torch.equal(steps[1].lists[name], steps[4].lists[name]) and not steps[1].lists[name][0].any()


ALPHAS = {"half": 0.5, "back": -1}
"""What linear attention is multiplied by before it is added, where that is spoilt."""


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("add", "but no linear attention is added to its result"),
        ("half", r"is not added to its result once, but read by .*alpha: 0\.5"),
        ("back", r"is not added to its result once, but read by .*alpha: -1"),
        ("twice", "is not added to its result once, but read by .*add.*; .*add"),
        ("lists", "its linear attention has other operands or lists than its own"),
        ("projection", "but its linear attention reads projection_blocks_1_attn1"),
    ],
)
def test_the_audit_finds_another_linear_attention(
    wan: nn.Module, structure: str, monkeypatch: pytest.MonkeyPatch, what: str, told: str
) -> None:
    from ditopt.passes import sparse as sparse_pass

    made = sparse_pass.call  # type: ignore[attr-defined]  # imported there

    def wrong(gm: Any, target: Any, *args: Any, **named: Any) -> Any:
        if target is LINEAR_REST and what == "lists":
            args = (args[0], args[0], *args[2:])
        if target is torch.ops.aten.add.Tensor and what in ALPHAS:
            named = {"alpha": ALPHAS[what]}
        node = made(gm, target, *args, **named)
        if target is torch.ops.aten.add.Tensor and what == "add":
            return args[0]
        if target is torch.ops.aten.add.Tensor and what == "twice":
            return made(gm, target, node, args[1])
        return node

    monkeypatch.setattr(sparse_pass, "call", wrong)
    if what == "projection":
        monkeypatch.setattr(sparse_pass, "projection_name", lambda site: "projection_blocks_1_attn1")
    with interpreted(), pytest.raises(AuditError, match=told):
        call(compiled(wan, plan=linear_plan(structure, rule("blocks.0.attn1", "1-4", SPATIAL))), wan_inputs(), TIMES[2])


@pytest.mark.parametrize(
    ("bad", "beside", "told"),
    [
        (
            rule("blocks.0.attn1", "1", sparse("band", width=2, rest="linear")),
            EVERY,
            r"rule 0 \(blocks\.0\.attn1\): blocks\.0\.attn1: the file beside the plan has no projections for .*band",
        ),
        (
            rule("blocks.1.attn1", "1", SPATIAL),
            PlanTensors(projections=(projections(1, SPATIAL, (1,)),)),
            "has no projections for .* of head 0, only of 1",
        ),
        (
            rule("blocks.0.attn1", "1", SPATIAL),
            PlanTensors(projections=(projections(0, SPATIAL, width=4),)),
            "its heads have 12 channels, the projections in the file beside the plan are for 4",
        ),
        (rule("blocks.0.attn2", "1", sparse("skip", rest="linear")), EVERY, "a rest is for that only"),
        (rule("blocks.0.attn1", "1", sparse("skip", rest={"linear": 16})), EVERY, "rest .* is unknown; write pooled"),
    ],
)
def test_rules_without_projections_are_named(
    wan: nn.Module, structure: str, bad: Rule, beside: PlanTensors, told: str
) -> None:
    with interpreted(), pytest.raises(PlanMismatchError, match=told):
        call(compiled(wan, plan=plan_of(structure, bad).with_beside(beside)), wan_inputs(), TIMES[0])


def test_a_plan_without_its_file_is_refused(wan: nn.Module, structure: str) -> None:
    session = Session(plan=plan_of(structure, rule("blocks.0.attn1", "1", SPATIAL)))
    with interpreted(), pytest.raises(PlanMismatchError, match="the file beside the plan has no projections"):
        call(compiled(wan, session=session), wan_inputs(), TIMES[0])
