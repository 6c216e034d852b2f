"""Plans with sparse attention, from rules to compiled graphs, against eager models whose heads are under masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt._torch import compile_counts
from ditopt.backend import Session
from ditopt.decisions import Decision, Dense, Reuse, Sparse, pattern_text
from ditopt.errors import PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks
from ditopt.kernels.patterns.candidates import block_for
from ditopt.kernels.patterns.registry import pattern_from_data
from ditopt.passes.sparse import list_names
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.profiler.head_edits import BlockMask, under_blocks, without_head
from ditopt.profiler.interpret import Edit, Watched
from ditopt.runtime.program import Program
from ditopt.runtime.sparse import AttentionSites, Place
from ditopt.sites import STEP, AttentionSite
from tests.test_graph_breaks import captured as captured
from tests.test_graph_breaks import hand_written
from tests.tiny import compiled_tiny, euler, make_model, prompt_features, tiny_wan
from tests.trace.models import CASES, capture, compiled, interpreted

pytest.importorskip("diffusers")

TIMES = tuple(1000.0 - 150 * step for step in range(6))
FRAMES = Geometry(4, 16, 16)
Forward = Callable[..., tuple[Tensor, ...]]
Emulated = Callable[[Program, Plan, int, list[Any], Geometry], Tensor]


def sparse(name: str, **settings: Any) -> Sparse:
    return Sparse(pattern=pattern_text({"pattern": name, **settings}))


def rule(sites: str, steps: str, do: Decision, heads: str | None = None) -> Rule:
    return Rule.model_validate({"sites": sites, "steps": steps, "do": do, "heads": heads})


RULES = (
    rule("blocks.*.attn1", "1-4", sparse("spatial")),
    rule("blocks.*.attn1", "1-4", sparse("temporal", rows=1, columns=2), "1"),
    rule("blocks.0.attn1", "2, 4", sparse("union", of=[{"pattern": "band", "width": 2}, {"pattern": "sink"}]), "0"),
    rule("blocks.1.attn1", "3", sparse("skip"), "0"),
    rule("blocks.1.attn1", "4", Dense(), "0"),
    rule("blocks.0.attn1", "4", Dense()),
)
"""Step 0 and 5 are dense, steps 1 to 3 sparse in both blocks, step 4 in one head of one."""


def plan_of(structure: str, *rules: Rule, tokens: Geometry | None = FRAMES, **settings: Any) -> Plan:
    return Plan(
        model=ModelPrint(class_name="Model", structure=structure, blocks=2),
        sampler=SamplerPrint(
            class_name="Euler",
            steps=len(TIMES),
            timesteps={"transformer": TIMES},
            sigmas={"transformer": tuple(time / 1000 for time in TIMES)},
        ),
        tokens={"transformer": tokens} if tokens is not None else {},
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        inputs=Inputs(identity="encoder_hidden_states"),
        rules=rules,
        **settings,
    )


def call(forward: Callable[..., Any], inputs: Mapping[str, Any], time: float) -> Tensor:
    step = {"timestep": torch.full_like(inputs["timestep"], time)}
    with torch.no_grad():
        found: Tensor = forward(**{**inputs, **step}, return_dict=False)[0]
    return found


def wan_inputs(rows: int = 32, batch: int = 1, text: int = 6) -> dict[str, Any]:
    drawing = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, 4, rows, 32, generator=drawing),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=drawing),
    }


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    model: nn.Module = tiny_wan()
    return model


@pytest.fixture(scope="module")
def structure(wan: nn.Module) -> str:
    with interpreted():
        found = capture(wan, wan_inputs())
    return found.program.variants.trace.structure


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps_of(
    session: Session, forward: Callable[..., Any], inputs: Mapping[str, Any]
) -> Iterator[tuple[int, Tensor, list[Any]]]:
    """Every step of a generation: its number, what the model gives, and its graph's inputs."""
    call(forward, inputs, TIMES[0])  # which compiles it
    (program,) = session.programs
    taken: list[list[Any]] = []

    def intercept(arguments: list[Any], compute: Callable[[list[Any]], Any]) -> Any:
        taken.append(list(arguments))
        return compute(arguments)

    program.interceptor = intercept
    for step, time in enumerate(TIMES):
        yield step, call(forward, inputs, time), taken[-1]
    program.interceptor = None


def masks(program: Program, plan: Plan, step: int, geometry: Geometry) -> dict[str, dict[int, BlockMask]]:
    """Of every head that the plan makes sparse the blocks that its pattern keeps, by site."""
    found: dict[str, dict[int, BlockMask]] = {}
    for site in program.variants.trace.sites:
        for head in range(site.heads if isinstance(site, AttentionSite) else 0):
            do = plan.head_decisions(site.name)[step].of(head + 1)[head]
            if isinstance(do, Sparse):
                kept = pattern_from_data(do.settings).block_map(geometry, 64, block_for(geometry.tokens))
                found.setdefault(site.name, {})[head] = BlockMask(kept, 64, block_for(geometry.tokens))
    return found


def emulated(program: Program, plan: Plan, step: int, arguments: list[Any], geometry: Geometry) -> Tensor:
    """The captured graph, node by node, with heads under masks as the plan has them."""
    trace = program.variants.trace
    of_sites = masks(program, plan, step, geometry)
    edits = {trace.site_nodes[site]: under_blocks(of_site) for site, of_site in of_sites.items()}
    with torch.no_grad():
        found: Tensor = Watched(trace, edits=edits).run(*arguments)[0]
    return found


def emulated_by(edit: Callable[[list[Any], Geometry], Edit]) -> Emulated:
    """The captured graph, node by node, with heads as the plan has them in a step: as ``edit`` does what is decided."""

    def emulated(program: Program, plan: Plan, step: int, arguments: list[Any], geometry: Geometry) -> Tensor:
        trace, edits = program.variants.trace, {}
        for site in trace.sites:
            if isinstance(site, AttentionSite):
                decided = plan.head_decisions(site.name)[step]
                if decided.any_sparse:
                    edits[trace.site_nodes[site.name]] = edit(list(decided.of(site.heads)), geometry)
        with torch.no_grad():
            found: Tensor = Watched(trace, edits=edits).run(*arguments)[0]
        return found

    return emulated


def check_plan_file(model: nn.Module, plan: Plan, path: Path, emulated: Emulated) -> Program:
    """A plan file, compiled, gives in every step what is emulated, without recompiling; steps 0 and 5 are dense."""
    inputs = wan_inputs()
    plan.save(path)
    assert Plan.load(path).rules == plan.rules
    session = Session.from_options({"plan": path, "check_passes": True})
    before, moved = None, []
    for step, found, arguments in steps_of(session, compiled(model, session=session), inputs):
        (program,) = session.programs
        before = before or compile_counts()
        torch.testing.assert_close(found, emulated(program, plan, step, arguments, FRAMES), rtol=1e-4, atol=1e-5)
        moved.append(distance(found, call(model, inputs, TIMES[step])))
    assert compile_counts() == before, "no graph break and no recompilation"
    assert max(moved[0], moved[5]) < 1e-5 and min(moved[1:5]) > 1e-4
    return program


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_a_compiled_plan_file_is_the_eager_model_with_its_heads_under_masks(
    wan: nn.Module, structure: str, tmp_path: Path
) -> None:
    program = check_plan_file(wan, plan_of(structure, *RULES), tmp_path / "plan.yaml", emulated)
    assert program.bound is not None and len(program.variants.compiled) == len(program.bound.variants) == 3
    assert program.bound.steps[1].variant == program.bound.steps[3].variant, "other patterns are other inputs"
    assert program.statistics.unplanned_calls == program.statistics.cold_calls == 0


def test_lists_at_run_time_are_the_plans_maps_and_equal_ones_are_one(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, *RULES)
    session = Session(plan=plan)
    with interpreted():
        call(compiled(wan, session=session), wan_inputs(), TIMES[0])
    (program,) = session.programs
    assert program.bound is not None
    for step, bound in enumerate(program.bound.steps):
        wanted = masks(program, plan, step, FRAMES)
        assert {each.site for each in bound.variant.sparse} == wanted.keys()
        assert set(bound.lists) == {name for site in wanted for name in list_names(site)}
        for each in bound.variant.sparse:
            indices, counts = (bound.lists[name] for name in list_names(each.site))
            assert indices.dtype == counts.dtype == torch.int32 and indices.shape == (1, 2, 16, each.width)
            kept = BlockLists(indices, counts, each.query_block, each.key_block).to_map(16)[0]
            for head in range(2):
                mask = wanted[each.site].get(head)
                expected = torch.ones(16, 16) > 0 if mask is None else torch.from_numpy(mask.kept)
                assert torch.equal(kept[head], expected)
    steps = program.bound.steps
    name, _ = list_names("blocks.1.attn1")
    assert steps[1].lists[name] is steps[2].lists[name] is not steps[3].lists[name]


def test_patterns_that_keep_everything_are_the_dense_graph(wan: nn.Module, structure: str) -> None:
    plan = plan_of(
        structure, rule("blocks.*.attn1", "0-5", sparse("dense")), rule("*.attn1", "3", sparse("spatial", frames=9))
    )
    session = Session(plan=plan)
    with interpreted():
        found = call(compiled(wan, session=session), wan_inputs(), TIMES[3])
    torch.testing.assert_close(found, call(wan, wan_inputs(), TIMES[3]), rtol=1e-4, atol=1e-5)
    (program,) = session.programs
    assert program.bound is not None and [each.sparse for each in program.bound.variants] == [()]
    assert (
        "blocks.0.attn1: patterns that keep every block of 64 queries and 64 keys run dense" in program.variants.reasons
    )


def test_a_skipped_head_of_cross_attention_adds_nothing(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, rule("blocks.1.attn2", "2", sparse("skip"), "1"), tokens=None)
    session = Session(plan=plan)
    with interpreted():
        for step, found, arguments in steps_of(session, compiled(wan, session=session), wan_inputs()):
            trace = session.programs[0].variants.trace
            edits = {trace.site_nodes["blocks.1.attn2"]: without_head(1)} if step == 2 else {}
            with torch.no_grad():
                torch.testing.assert_close(found, Watched(trace, edits=edits).run(*arguments)[0], rtol=1e-4, atol=1e-5)


def test_what_is_predicted_has_no_sparse_attention(wan: nn.Module, structure: str) -> None:
    rules = (*RULES, rule(STEP, "2", Reuse()), rule("blocks.1", "3", Reuse()))
    session = Session(plan=plan_of(structure, *rules), check_passes=True)
    inputs = wan_inputs()
    with interpreted():
        found = {step: given for step, given, _ in steps_of(session, compiled(wan, session=session), inputs)}
    (program,) = session.programs
    assert program.bound is not None
    sites = [tuple(each.site for each in step.variant.sparse) for step in program.bound.steps]
    both = ("blocks.0.attn1", "blocks.1.attn1")
    assert sites == [(), both, (), both[:1], both[1:], ()]
    assert program.bound.full in program.bound.variants and not program.bound.full.sparse
    assert torch.equal(found[2], found[1]) and program.statistics.predicted_calls == 2
    assert distance(found[3], call(wan, inputs, TIMES[3])) > 1e-4


def test_it_goes_with_a_dtype_and_simplified_steps(structure: str) -> None:
    model = tiny_wan(attention_head_dim=16)
    with interpreted():
        wide = capture(model, wan_inputs()).program.variants.trace.structure
        plan = plan_of(wide, rule(STEP, "0-5", Dense(dtype="bfloat16", simplify=True)), *RULES)
        session = Session(plan=plan, check_passes=True)
        torch._dynamo.reset()
        for step, found, arguments in steps_of(session, compiled(model, session=session), wan_inputs()):
            expected = emulated(session.programs[0], plan, step, arguments, FRAMES)
            assert 1e-5 < distance(found, expected) < 1e-2


def joint(name: str) -> tuple[nn.Module, dict[str, Any], Geometry]:
    """A model with text and video in one sequence, inputs of several blocks of tokens, and how these lie."""
    geometry = {"Flux": Geometry(1, 16, 16, 6, text_first=True), "CogVideoX": Geometry(2, 8, 8, 6, text_first=True)}[
        name
    ]
    model, inputs = CASES[name].make()
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(16), torch.arange(16)).float()
    larger = {
        "Flux": {"hidden_states": torch.randn(1, 256, 4), "img_ids": grid},
        "CogVideoX": {"hidden_states": torch.randn(1, 2, 4, 16, 16)},
    }
    inputs |= larger[name]
    return model, inputs, geometry


@pytest.mark.parametrize("name", ["Flux", "CogVideoX"])
def test_text_stays_dense_in_joint_attention(name: str) -> None:
    model, inputs, geometry = joint(name)
    with interpreted():
        found = capture(model, inputs).program.variants.trace
        plan = plan_of(found.structure, rule("*", "1-5", sparse("temporal", rows=1, columns=1), "0"), tokens=geometry)
        session = Session(plan=plan, check_passes=True)
        torch._dynamo.reset()
        for step, given, arguments in steps_of(session, compiled(model, session=session), inputs):
            (program,) = session.programs
            expected = emulated(program, plan, step, arguments, geometry)
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert program.bound is not None
    bound = program.bound.steps[1]
    assert bound.variant.sparse
    for each in bound.variant.sparse:
        indices, counts = (bound.lists[name] for name in list_names(each.site))
        keys = blocks(geometry.tokens, each.key_block)
        kept = BlockLists(indices, counts, each.query_block, each.key_block).to_map(keys)[0, 0]
        assert kept[0].all() and kept[:, 0].all() and not kept.all(), "text is in the first block"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            rule("blocks.*.attn1", "1", sparse("spacial")),
            r"rule 0 \(blocks\.\*\.attn1\): pattern .* is unknown; write one of band, dense",
        ),
        (
            rule("blocks.0.attn1", "1", sparse("temporal", rows=-1)),
            r"rule 0 \(blocks\.0\.attn1\): pattern .*rows: Input should be greater.*; temporal has rows, columns",
        ),
        (
            rule("blocks.*.attn1", "1", sparse("spatial"), "0, 2-3"),
            r"rule 0 \(blocks\.\*\.attn1 heads 0, 2-3\): blocks\.0\.attn1 has heads 0-1, there is no 3",
        ),
        (rule("blocks.0.attn1", "1", Dense(), "7"), r"blocks\.0\.attn1 has heads 0-1, there is no 7"),
        (
            rule("blocks.0.ffn", "1", sparse("spatial")),
            r"rule 0 \(blocks\.0\.ffn\): no attention site is called so; the model has blocks\.0\.attn1, ",
        ),
        (rule(STEP, "1", sparse("skip")), r"rule 0 \(step\): no attention site is called so"),
        (
            rule("blocks.0.attn2", "1", sparse("spatial")),
            r"blocks\.0\.attn2 is no self-attention .* 1024 queries and 6 keys; of patterns only dense and skip are",
        ),
        (rule("blocks.0.attn1", "6", sparse("spatial")), r"plan has rules for steps 6, its schedule has steps 0-5"),
        (rule("blocks.0.attn3", "1", Reuse()), r"plan names sites that the model lacks: blocks\.0\.attn3"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_named(wan: nn.Module, structure: str, bad: Rule, message: str) -> None:
    with interpreted(), pytest.raises(PlanMismatchError, match=message):
        call(compiled(wan, plan=plan_of(structure, bad)), wan_inputs(), TIMES[0])


def test_cross_attention_to_as_many_keys_is_no_self_attention(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, rule("blocks.0.attn2", "1", sparse("spatial")))
    with interpreted(), pytest.raises(PlanMismatchError, match=r"is no self-attention .* 1024 queries and 1024 keys"):
        call(compiled(wan, plan=plan), wan_inputs(text=1024), TIMES[0])


def test_a_geometry_that_is_not_given_is_found(wan: nn.Module, structure: str) -> None:
    """And all samples of a batch go by the same lists."""
    plan = plan_of(structure, *RULES, tokens=None)
    session = Session(plan=plan)
    with interpreted():
        for step, found, arguments in steps_of(session, compiled(wan, session=session), wan_inputs(batch=2)):
            expected = emulated(session.programs[0], plan, step, arguments, FRAMES)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            Geometry(4, 16, 15),
            r"blocks\.0\.attn1: sparse patterns need to know how its 1024 tokens lie; the plan says geometry of "
            r"4 x 16 x 15 tokens, which makes 960\. Give it in the plan: tokens: {transformer: {frames:",
        ),
        (Geometry(4, 15, 16, text=64), r"the plan's tokens of transformer: .* none of them text"),
    ],
)
def test_a_geometry_that_is_not_the_models_is_an_error(
    wan: nn.Module, structure: str, tokens: Geometry, message: str
) -> None:
    with interpreted(), pytest.raises(PlanMismatchError, match=message):
        call(compiled(wan, plan=plan_of(structure, *RULES, tokens=tokens)), wan_inputs(), TIMES[0])


def test_a_geometry_that_is_not_to_be_found_is_an_error() -> None:
    with interpreted(), compiled_tiny(make_model(), lambda model: euler(model, "a", 0)) as (model, program):
        plan = plan_of("", rule("blocks.2", "1", sparse("spatial")), tokens=None)
        program.bind(plan)
        message = r"blocks\.2: sparse patterns need .* its 64 tokens lie; the plan does not say it, and nothing tells"
        with pytest.raises(PlanMismatchError, match=message), torch.no_grad():
            model(torch.randn(1, 64, 4), torch.tensor([TIMES[0]]), prompt_features("a"))


def test_another_size_is_refused_run_dense_or_retargeted_with_lists_of_its_own(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, *RULES, geometry={"transformer": (1, 4, 4, 32, 32)})
    smaller, half = wan_inputs(16), Geometry(4, 8, 16)
    with interpreted():
        with pytest.raises(PlanMismatchError, match=r"latents have shape \[1, 4, 4, 16, 32\], the plan was made for"):
            call(compiled(wan, plan=plan), smaller, TIMES[2])
        torch._dynamo.reset()
        found = call(compiled(wan, plan=plan, on_mismatch="dense"), smaller, TIMES[2])
        torch.testing.assert_close(found, call(wan, smaller, TIMES[2]), rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
        session = Session(plan=plan, on_mismatch="retarget")
        for step, found, arguments in steps_of(session, compiled(wan, session=session), smaller):
            expected = emulated(session.programs[0], plan, step, arguments, half)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (program,) = session.programs
    assert program.bound is not None and {each.key_block for each in program.bound.steps[1].variant.sparse} == {16}


def test_networks_that_graph_breaks_cut_are_refused(captured: tuple[Session, Forward]) -> None:
    session, _ = captured
    with pytest.raises(PlanMismatchError, match="rules for heads of transformer, which graph breaks cut into several"):
        session.bind(hand_written(session, rule("blocks.0", "1", sparse("skip"))))
    session.bind(None)


def test_heads_that_attend_to_all_need_no_room_in_lists_and_sites_alike_share_them() -> None:
    """19,200 tokens in 300 blocks: a dense head among sparse ones would have made lists of 300 of them."""
    tokens = Geometry(frames=12, rows=40, columns=40)
    sites = [AttentionSite(f"blocks.{block}.attn1", 0, 3, tokens.tokens, tokens.tokens, 8, False) for block in (0, 1)]
    places = {site.name: Place(site, site.name[:8], True, torch.device("cpu")) for site in sites}
    rules = (rule("*.attn1", "1-3", sparse("spatial")), rule("blocks.1.attn1", "3", sparse("skip"), "2"))
    plan = plan_of("", *rules, rule("*.attn1", "2", sparse("dense"), "0-1"), tokens=tokens)
    found, _ = AttentionSites(places).steps(plan, "transformer", lambda step, block: False)
    assert {each.width for step in found for each in step.variant} == {128}
    (first, counts), (second, _) = ([step.inputs[name] for name in list_names(sites[0].name)] for step in found[1:3])
    assert first.shape == (1, 3, 300, 128) and counts.max() < 128
    named = BlockLists(second, found[2].inputs[list_names(sites[0].name)[1]], 64, 64)
    assert named.to_map(300)[0, :2].all() and not named.to_map(300)[0, 2].all()
    held = {found[step].inputs[list_names(site.name)[0]].data_ptr() for step in (1, 2, 3) for site in sites}
    assert len(held) == 3, "one of steps 1 and 3, one of step 2, one of step 3 at the site that does otherwise"
