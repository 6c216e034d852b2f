"""Plans with sparse heads for models that mask their attention: masks hold within the blocks that heads keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ditopt._torch import compile_counts
from ditopt.backend import Session
from ditopt.decisions import Dense
from ditopt.errors import AuditError, PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, DRAFT_LISTS
from ditopt.passes.audit import audit
from ditopt.passes.sparse import list_names, order_names
from ditopt.plan import Rule
from ditopt.profiler.head_edits import BlockMask, under_blocks
from ditopt.profiler.interpret import Watched
from ditopt.runtime.sparse import places_of
from ditopt.sites import STEP
from tests.runtime.test_sparse import (
    TIMES,
    _fresh,
    call,
    distance,
    emulated,
    plan_of,
    rule,
    sparse,
    steps_of,
)
from tests.trace.models import capture, compiled, hunyuan_video, interpreted

__all__ = ["_fresh"]  # a fixture

pytest.importorskip("diffusers")

TOKENS = Geometry(2, 8, 8, 38, text_first=False)
SITES = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn")
RULES = (
    rule("*transformer_blocks.*.attn", "1-4", sparse("spatial"), "0"),
    rule("single_transformer_blocks.*.attn", "2-3", sparse("temporal", rows=1, columns=2), "1"),
)


def hunyuan(prompt: int = 26) -> tuple[nn.Module, dict[str, Any]]:
    """A model of two frames of 8 x 8 tokens with 38 of text behind them, of which the prompt has so many."""
    torch.manual_seed(0)
    model, inputs = hunyuan_video(channels=16, axes=(4, 6, 6))
    inputs["hidden_states"] = torch.randn(1, 4, 2, 16, 16)
    inputs["encoder_hidden_states"] = torch.randn(1, 38, 12)
    return model, inputs | {"encoder_attention_mask": mask_of(prompt)}


def mask_of(prompt: int) -> Tensor:
    return (torch.arange(38) < prompt).float()[None]


def structure_of(model: nn.Module, inputs: dict[str, Any]) -> str:
    with interpreted():
        found: str = capture(model, inputs).program.variants.trace.structure
    torch._dynamo.reset()
    return found


def test_heads_are_sparse_under_the_models_mask_whatever_the_prompts_length() -> None:
    model, inputs = hunyuan()
    plan = plan_of(structure_of(model, inputs), *RULES, tokens=TOKENS)
    session = Session(plan=plan, check_passes=True)
    forward = compiled(model, session=session)
    before, results = None, []
    for prompt in (26, 38, 3):
        given = inputs | {"encoder_attention_mask": mask_of(prompt)}
        for step, found, arguments in steps_of(session, forward, given):
            (program,) = session.programs
            expected = emulated(program, plan, step, arguments, TOKENS)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            moved = distance(found, call(model, given, TIMES[step]))
            assert moved > 1e-4 if 1 <= step <= 4 else moved < 1e-5
            results.append(found)
            before = before or compile_counts()
    assert compile_counts() == before, "no graph break and no recompilation, whatever the mask"
    assert distance(results[1], results[7]) > 1e-4, "masks matter"
    assert {site for site, place in places_of(program.variants.trace).items() if place.masked} >= {*SITES}


@pytest.mark.parametrize("order", [{"tiles": [1, 2, 8]}, {"tiles": [1, 4, 4]}])
def test_masks_are_in_the_order_of_the_tokens(order: Any) -> None:
    model, inputs = hunyuan(20)
    structure = structure_of(model, inputs)
    with interpreted():
        plan = plan_of(
            structure, rule("*transformer_blocks.*.attn", "1", sparse("spatial", order=order)), tokens=TOKENS
        )
        session = Session(plan=plan, check_passes=True)
        forward = compiled(model, session=session)
        call(forward, inputs, TIMES[0])
        (program,) = session.programs
        assert program.bound is not None
        wanted = {each.site: each for each in program.bound.steps[1].variant.sparse}
        assert {*SITES} <= wanted.keys()
        for step, found, arguments in steps_of(session, forward, inputs):
            if step != 1:
                continue
            trace, lists = program.variants.trace, program.bound.steps[1].lists
            edits = {}
            for site in SITES:
                attended = _token_map(lists, site, wanted[site].query_block, wanted[site].key_block)
                masks = {head: BlockMask(attended[head].numpy(), 1, 1) for head in range(2)}
                edits[trace.site_nodes[site]] = under_blocks(masks)
            with torch.no_grad():
                expected = Watched(trace, edits=edits).run(*arguments)[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _token_map(lists: Any, site: str, query_block: int, key_block: int) -> Tensor:
    """``[H, S, S]`` in the model's own order: which keys a query attends to, by the lists of ordered tokens."""
    indices, counts = (lists[name] for name in list_names(site))
    order, back = (lists[name] for name in order_names(site))
    tokens = order.shape[-1]
    blocked = BlockLists(indices, counts, query_block, key_block).to_map(-(-tokens // key_block))[0]
    of_tokens = blocked.repeat_interleave(query_block, 1)[:, :tokens].repeat_interleave(key_block, 2)[..., :tokens]
    return of_tokens[:, back][:, :, back]


def test_it_goes_with_a_dtype() -> None:
    model, inputs = hunyuan()
    structure = structure_of(model, inputs)
    with interpreted():
        plan = plan_of(structure, rule(STEP, "0-5", Dense(dtype="bfloat16")), *RULES, tokens=TOKENS)
        session = Session(plan=plan, check_passes=True)
        for step, found, arguments in steps_of(session, compiled(model, session=session), inputs):
            expected = emulated(session.programs[0], plan, step, arguments, TOKENS)
            assert 1e-5 < distance(found, expected) < 3e-2


@pytest.mark.parametrize("rest", ["pooled", "linear"])
def test_a_rest_is_refused_where_the_model_hides_keys(rest: str) -> None:
    model, inputs = hunyuan()
    bad: Rule = rule("transformer_blocks.0.attn", "1", sparse("spatial", rest=rest))
    plan = plan_of(structure_of(model, inputs), bad, tokens=TOKENS)
    message = r"transformer_blocks\.0\.attn: there is a mask, under which what a pattern skips has no means \(a rest\)"
    with interpreted(), pytest.raises(PlanMismatchError, match=message):
        call(compiled(model, plan=plan), inputs, TIMES[0])


def test_drafts_choose_no_blocks_that_the_mask_hides() -> None:
    """166 tokens in 11 blocks of 16, of which the prompt leaves the last two without any that is shown."""
    model, inputs = hunyuan(3)
    rules = rule("single_transformer_blocks.0.attn", "1", sparse("draft", keep=0.9))
    session = Session(plan=plan_of(structure_of(model, inputs), rules, tokens=TOKENS), check_passes=True)
    with interpreted():
        forward = compiled(model, session=session)
        call(forward, inputs, TIMES[0])
        call(forward, inputs, TIMES[1])
    (program,) = session.programs
    assert program.bound is not None
    variant = program.bound.steps[1].variant
    gm = program.variants.graph(variant)
    (maker,) = gm.graph.find_nodes(op="call_function", target=DRAFT_LISTS)
    (attention,) = gm.graph.find_nodes(op="call_function", target=BLOCK_SPARSE_ATTENTION)
    assert maker.kwargs["mask"] is attention.kwargs["mask"]
    maker.kwargs = {}
    with pytest.raises(AuditError, match=r"blocks\.0\.attn: finds its blocks under another mask than its own"):
        audit(gm, variant, program.variants.index, {})


def test_the_audit_misses_a_mask_that_is_gone_or_another() -> None:
    model, inputs = hunyuan()
    plan = plan_of(structure_of(model, inputs), *RULES, tokens=TOKENS)
    session = Session(plan=plan)
    with interpreted():
        forward = compiled(model, session=session)
        call(forward, inputs, TIMES[0])
        call(forward, inputs, TIMES[1])
    (program,) = session.programs
    assert program.bound is not None
    variant = program.bound.steps[1].variant

    def check(tamper: Any) -> None:
        gm: fx.GraphModule = program.variants.graph(variant)
        for node in gm.graph.find_nodes(op="call_function", target=BLOCK_SPARSE_ATTENTION):
            tamper(node)
        audit(gm, variant, program.variants.index, {})

    check(lambda node: None)
    with pytest.raises(AuditError, match=r"the model masks its attention by .*, which the graph does not read there"):
        check(lambda node: setattr(node, "kwargs", {}))
    with pytest.raises(AuditError, match="the model masks its attention by"):
        check(lambda node: setattr(node, "kwargs", {"mask": node.args[4]}))
