"""Plans whose heads have their tokens in the order of clusters: against masks in the space of the tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.backend import Session
from ditopt.decisions import Dense, Sparse
from ditopt.errors import PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.clusters import k_means
from ditopt.kernels.block_sparse_attention.lists import blocks, kernel_blocks
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.draft import Draft
from ditopt.kernels.patterns.whole import Nothing
from ditopt.passes._infra import Ordered
from ditopt.passes.sparse import ROUNDS, clusters_name
from ditopt.profiler.interpret import Edit
from tests.kernels.test_draft_lists import literal
from tests.runtime.test_masked import TOKENS, hunyuan, mask_of, structure_of
from tests.runtime.test_orders import in_token_space
from tests.runtime.test_sparse import (
    TIMES,
    call,
    check_plan_file,
    distance,
    emulated_by,
    joint,
    plan_of,
    rule,
    sparse,
    steps_of,
    wan_inputs,
)
from tests.runtime.test_sparse import _fresh as _fresh
from tests.runtime.test_sparse import structure as structure
from tests.runtime.test_sparse import wan as wan
from tests.trace.models import capture, compiled, interpreted


def by_clusters(decided: list[Any], geometry: Geometry) -> Edit:
    """Heads in the order of clusters: a mask of tokens, and of the means of groups of them, in float64."""
    others = [do if isinstance(do, Sparse) and not _is_clustered(do) else Dense() for do in decided]
    rest_of = in_token_space(others, geometry)

    def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
        out: Tensor = rest_of(given, value)
        query, key, values = given[:3]
        scale, tokens = query.shape[-1] ** -0.5, geometry.tokens
        seen = given[3] if len(given) > 3 and given[3] is not None else torch.ones(1, 1, 1, 1, dtype=torch.bool)
        seen = seen if seen.dtype == torch.bool else seen > -1e4
        seen = seen[(None,) * (4 - seen.ndim)].expand(*query.shape[:2], tokens, tokens)
        sizes = kernel_blocks(tokens, tokens)
        text = torch.from_numpy(Nothing().block_map(geometry, *sizes))[None, None]
        before = geometry.text if geometry.text_first else 0
        video = slice(before, before + geometry.video)
        clusters = -(-geometry.video // sizes[1])
        for head, do in enumerate(decided):
            if not _is_clustered(do):
                continue
            choice = SparseChoice.from_data(do.settings)
            assert isinstance(choice.pattern, Draft)
            for sample in range(len(query)):
                q, k, v = (part[sample, head * part.shape[1] // query.shape[1]] for part in (query, key, values))
                places = []
                for part in (q, k):
                    order = torch.arange(tokens)
                    order[video] = before + k_means(part[video], clusters, ROUNDS)[0].argsort(stable=True)
                    places.append(order)
                limit, mass = [choice.pattern.room(blocks(tokens, sizes[1]))], [choice.pattern.mass or math.inf]
                one, other = q[places[0]][None, None].float(), k[places[1]][None, None].float()
                shown = seen[sample, head][places[0]][:, places[1]][None, None]
                found = literal(one, other, text, sizes, limit, mass, scale, seen=shown)
                kept = torch.tensor(found).view(text.shape[2:])
                of_query, of_key = (place.argsort() // size for place, size in zip(places, sizes, strict=True))
                of_row, keys, means, counts = kept[of_query], [k.double()], [v.double()], [torch.ones(tokens)]
                hidden = [~(of_row[:, of_key] & seen[sample, head])]
                if choice.pooled is not None:
                    groups = places[1].split(choice.pooled.of(sizes[1]))
                    keys.append(torch.stack([keys[0][each].mean(0) for each in groups]))
                    means.append(torch.stack([means[0][each].mean(0) for each in groups]))
                    counts.append(torch.tensor([float(len(each)) for each in groups]))
                    hidden.append(of_row[:, torch.arange(len(groups)) * len(groups[0]) // sizes[1]])
                scores = scale * q.double() @ torch.cat(keys).T + torch.cat(counts).log()
                scores = scores.masked_fill(torch.cat(hidden, 1), -math.inf)
                out[sample, head] = (scores.softmax(-1).nan_to_num(0.0) @ torch.cat(means)).to(value.dtype)
        return out

    return edit


def _is_clustered(do: Any) -> bool:
    return isinstance(do, Sparse) and do.settings.get("order") == "clusters"


emulated = emulated_by(by_clusters)


CLUSTERS = sparse("draft", mass=0.6, order="clusters")


def test_a_compiled_plan_file_sorts_tokens_by_clusters(wan: nn.Module, structure: str, tmp_path: Path) -> None:
    rules = (
        rule("blocks.*.attn1", "1-3", CLUSTERS),
        rule("blocks.0.attn1", "2", sparse("draft", keep=0.25, order="clusters", rest={"pooled": 16}), "1"),
        rule("blocks.1.attn1", "2", sparse("window", tile=[2, 4, 8], reach=[0, 1, 1], order="tiles"), "0"),
        rule("blocks.1.attn1", "3", Dense(), "1"),
        rule("blocks.1.attn1", "4", sparse("spatial")),
    )
    program = check_plan_file(wan, plan_of(structure, *rules), tmp_path / "plan.yaml", emulated)
    bound = program.bound
    assert bound is not None and len({step.variant for step in bound.steps[1:4]}) == 1, "who is clustered is an input"
    assert {(each.order, each.clusters) for each in bound.steps[1].variant.sparse} == {(Ordered.HEADS, (0, 1024))}
    heads = [bound.steps[step].lists[clusters_name("blocks.1.attn1")].tolist() for step in (1, 2, 3)]
    assert heads == [[1, 1], [0, 1], [1, 0]]
    last = {each.site: each.clusters for each in bound.steps[4].variant.sparse}
    assert last == {"blocks.1.attn1": None}, "steps in which nobody is clustered do not look for clusters"


@pytest.mark.parametrize("name", ["Flux", "CogVideoX"])
def test_text_stays_where_it_is_and_dense(name: str) -> None:
    model, inputs, geometry = joint(name)
    with interpreted():
        found = capture(model, inputs).program.variants.trace
        plan = plan_of(found.structure, rule("*", "1-5", sparse("draft", keep=0.3, order="clusters")), tokens=geometry)
        session = Session(plan=plan, check_passes=True)
        torch._dynamo.reset()
        for step, given, arguments in steps_of(session, compiled(model, session=session), inputs):
            if step in (1, 4):
                expected = emulated(session.programs[0], plan, step, arguments, geometry)
                torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_the_models_mask_is_in_the_order_of_the_clusters() -> None:
    model, inputs = hunyuan(20)
    clustered = rule("*transformer_blocks.*.attn", "1-2", sparse("draft", keep=0.3, order="clusters"))
    plan = plan_of(structure_of(model, inputs), clustered, tokens=TOKENS)
    session = Session(plan=plan, check_passes=True)
    forward = compiled(model, session=session)
    found = []
    for prompt in (20, 5):
        given = inputs | {"encoder_attention_mask": mask_of(prompt)}
        for step, result, arguments in steps_of(session, forward, given):
            if step in (1, 2):
                expected = emulated(session.programs[0], plan, step, arguments, TOKENS)
                torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
                found.append(result)
    assert distance(found[0], found[2]) > 1e-4, "masks matter"


def test_numbers_that_are_none_are_neither_lost_nor_spread(wan: nn.Module, structure: str) -> None:
    plan, inputs = plan_of(structure, rule("blocks.1.attn1", "1", CLUSTERS)), wan_inputs()
    inputs["hidden_states"][0, 0, 0, 0, 0] = math.nan
    with interpreted():
        found = call(compiled(wan, session=Session(plan=plan)), inputs, TIMES[1])
        assert torch.equal(found.isnan(), call(wan, inputs, TIMES[1]).isnan()) and found.isnan().any()


def test_patterns_of_places_do_not_go_with_clusters(wan: nn.Module, structure: str) -> None:
    bad = rule("blocks.0.attn1", "1", sparse("spatial", order="clusters"))
    message = r"rule 0 \(blocks\.0\.attn1\): order clusters: tokens of a block are alike there .* spatial, which is a"
    with interpreted(), pytest.raises(PlanMismatchError, match=message):
        call(compiled(wan, plan=plan_of(structure, bad)), wan_inputs(), TIMES[0])
