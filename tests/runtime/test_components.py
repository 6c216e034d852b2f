"""Plans that predict outputs of attention, cross-attention and feed-forward modules, against eager code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.backend import Session
from ditopt.components import CROSS, MLP, SELF, modules
from ditopt.decisions import Forecast, Reuse, Sparse
from ditopt.errors import AuditError, PlanMismatchError
from ditopt.passes._infra import Prediction, StepPlan
from ditopt.passes.audit import audit, only_needed_by
from ditopt.plan import Rule
from ditopt.runtime.nesting import Nesting
from ditopt.runtime.program import Program
from ditopt.sites import STEP
from tests.runtime.test_program import INPUTS, Predict, embeds, generate, make_plan, noise, polynomial, schedule
from tests.tiny import tiny_wan
from tests.trace.models import compiled, interpreted

pytest.importorskip("diffusers")

BLOCKS = 3
RANGE = "blocks.1..2"
RULES: dict[str, tuple[Rule, ...]] = {
    "self-attention": (Rule(sites="blocks.1.attn1", steps=(1, 3, 4), do=Reuse()),),
    "all cross-attention": (Rule(sites="blocks.*.attn2", steps=(1, 2, 4, 5, 7), do=Reuse()),),
    "all feed-forward": (Rule(sites="blocks.*.ffn", steps=(2, 4, 5, 7), do=Forecast()),),
    "all three by themselves": (
        Rule(sites="blocks.*.attn1", steps=(3, 5), do=Forecast(order=2)),
        Rule(sites="blocks.*.attn2", steps=(1, 2, 3, 5), do=Reuse()),
        Rule(sites="blocks.0.ffn", steps=(3, 4, 6), do=Forecast()),
    ),
    "beside a range": (
        Rule(sites="blocks.*.attn1", steps=(1, 4, 5), do=Reuse()),
        Rule(sites=RANGE, steps=(3, 5), do=Reuse()),
    ),
    "beside whole steps": (
        Rule(sites="blocks.*.ffn", steps=(2, 3, 5, 6), do=Forecast()),
        Rule(sites=STEP, steps=(3, 7), do=Reuse()),
    ),
}


class Eager:
    """The model with its modules' outputs kept and extrapolated by Lagrange's formula, each by itself."""

    def __init__(self, model: nn.Module, rules: tuple[Rule, ...]) -> None:
        self.model = model
        self.rules: dict[str, tuple[tuple[int, ...], Predict]] = {}
        names = [f"blocks.{i}.{part}" for i in range(BLOCKS) for part in ("attn1", "attn2", "ffn")]
        for rule in rules:
            order = rule.do.order if isinstance(rule.do, Forecast) else 0
            for name in [STEP, RANGE, *names]:
                if rule.names(name):
                    self.rules[name] = rule.steps, polynomial(rule.steps, order)
        self.held: dict[tuple[int, str], list[tuple[int, Tensor]]] = {}
        self.touched = False

    def __call__(
        self, *, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        step = next(i for i, t in enumerate(schedule()[0]) if float(t) == float(timestep))
        self.branch, self.step, self.latents = id(encoder_hidden_states), step, hidden_states
        if step == 0:
            self.held = {key: held for key, held in self.held.items() if key[0] != self.branch}
        whole = self._predicted(STEP)
        if whole is not None:
            return (whole,)
        ranged = self._predicted(RANGE)
        undo = [self._around(name) for name in self.rules if name not in (STEP, RANGE)]
        try:
            output = self._run(ranged, hidden_states, timestep, encoder_hidden_states)
        finally:
            for each in undo:
                each()
        self._keep(STEP, output)
        return (output,)

    def _predicted(self, site: str) -> Tensor | None:
        if site not in self.rules:
            return None
        held = self.held.get((self.branch, site), [])
        return self.rules[site][1](self.step, held, self.latents, schedule()[1])

    def _keep(self, site: str, value: Tensor) -> None:
        self.held.setdefault((self.branch, site), []).insert(0, (self.step, value.clone()))

    def _around(self, name: str) -> Callable[[], None]:
        """A module answers with what is predicted, or keeps what it answers."""
        module = self.model.get_submodule(name)
        own = module.forward

        def forward(*given: Any, **settings: Any) -> Tensor:
            found = self._predicted(name)
            if found is not None:
                self.touched = self.touched or name.startswith(("blocks.1.", "blocks.2."))
                return found
            value: Tensor = own(*given, **settings)
            self._keep(name, value)
            return value

        module.forward = forward
        return lambda: vars(module).pop("forward", None) and None

    def _run(self, ranged: Tensor | None, *given: Tensor) -> Tensor:
        """The forward, its blocks 1 and 2 adding ``ranged`` where there is something; else what they add is kept."""
        blocks: list[nn.Module] = [self.model.get_submodule(f"blocks.{i}") for i in (1, 2)]
        self.touched = False
        seen: list[Tensor] = []
        if ranged is not None:
            blocks[0].forward = lambda stream, *rest: stream + ranged
            blocks[1].forward = lambda stream, *rest: stream
        hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
        hooks += [blocks[1].register_forward_hook(lambda _, inputs, output: seen.append(output))]
        try:
            output: Tensor = self.model(*given, return_dict=False)[0]
        finally:
            for hook in hooks:
                hook.remove()
            for block in blocks:
                vars(block).pop("forward", None)
        if ranged is None and not self.touched:
            self._keep(RANGE, seen[-1] - seen[0])
        return output


@pytest.fixture(scope="module")
def model() -> nn.Module:
    found: nn.Module = tiny_wan(text_dim=12, num_layers=BLOCKS, cross_attn_norm=True)
    return found


@pytest.fixture(scope="module")
def traced(model: nn.Module) -> Iterator[tuple[Session, Callable[..., Any], Program]]:
    torch._dynamo.reset()
    with interpreted():
        session = Session(inputs=INPUTS, check_passes=True)
        forward = compiled(model, session=session)
        generate(forward, embeds(1), noise(), stop=1)
        (program,) = session.programs
        yield session, forward, program
    torch._dynamo.reset()


Traced = tuple[Session, Callable[..., Any], Program]


def bound(traced: Traced, *rules: Rule) -> Program:
    session, _, program = traced
    session.bind(make_plan(program.variants.trace.structure, *rules))
    program.statistics = type(program.statistics)()
    return program


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_generation_equals_eager_code_with_the_rule_written_out(
    name: str, guided: bool, model: nn.Module, traced: Traced
) -> None:
    program = bound(traced, *RULES[name])
    prompt, other = embeds(1), embeds(2) if guided else None
    expected = generate(Eager(model, RULES[name]), prompt, noise(), other=other)
    found = generate(traced[1], prompt, noise(), other=other)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, generate(model, prompt, noise(), other=other), atol=1e-4), "it does something"
    assert program.statistics.cold_calls == 0 and program.statistics.predicted_calls > 0
    assert all(state.held_bytes == 0 for state in program._states), "nothing is held behind the last reader"


def test_the_modules_that_there_are_have_a_kind_and_a_block(traced: Traced) -> None:
    program = traced[2]
    kinds = {each.site: each.kind for each in modules(program.variants.trace)}
    named = {"attn1": SELF, "attn2": CROSS, "ffn": MLP}
    assert kinds == {f"blocks.{i}.{part}": kind for i in range(BLOCKS) for part, kind in named.items()}
    assert {site: each.block for site, each in program.variants.components.items()} == {
        site: int(site.split(".")[1]) for site in kinds
    }


def graph_of(program: Program, site: str) -> Mapping[str, Any]:
    plan = StepPlan(predicted=(Prediction(site, 1),))
    return {node.name: node for node in program.variants.graph(plan).graph.nodes}


@pytest.mark.parametrize("part", ["attn1", "attn2", "ffn"])
def test_what_only_a_predicted_module_needed_is_gone_and_nothing_else(part: str, traced: Traced) -> None:
    program = traced[2]
    site, trace = f"blocks.1.{part}", program.variants.trace
    left, whole = graph_of(program, site), {node.name for node in trace.gm.graph.nodes if node.op == "call_function"}
    gone = only_needed_by(trace.gm, program.variants.index, site, {node.name for node in trace.changing()})
    assert len(gone) > 3 and not {*gone} & left.keys()
    assert whole - left.keys() == {*gone}, "and nothing that others need"
    assert program.variants.index.components[site].node in gone


def test_the_audit_refuses_a_graph_that_still_computes_the_module(traced: Traced) -> None:
    program = traced[2]
    trace, index, site = program.variants.trace, program.variants.index, "blocks.0.ffn"
    plan = StepPlan(predicted=(Prediction(site, 1),))
    gone = only_needed_by(trace.gm, index, site, set())
    with pytest.raises(AuditError, match=r"blocks\.0\.ffn: predicted by the plan, but the graph does not read factors"):
        audit(trace.gm, plan, index, {site: gone})
    made = program.variants.graph(plan)
    audit(made, plan, index, {site: gone})
    kept = next(node.name for node in made.graph.nodes if node.op == "call_function")
    with pytest.raises(AuditError, match=r"blocks\.0\.ffn: .* 1 of its nodes are still computed"):
        audit(made, plan, index, {site: (*gone, kept)})


def test_names_that_are_not_there_are_refused(traced: Traced) -> None:
    with pytest.raises(PlanMismatchError, match=r"plan names sites that the model lacks: blocks\.1\.attn3"):
        bound(traced, Rule(sites="blocks.1.attn3", steps=(1,), do=Reuse()))
    traced[0].bind(None)


def test_heads_are_not_sparse_where_their_module_is_predicted(traced: Traced) -> None:
    sparse = Sparse(pattern='{"pattern": "skip"}')
    reuse = Rule(sites="blocks.1.attn1", steps=(2, 3), do=Reuse())
    program = bound(traced, reuse, Rule(sites="blocks.1.attn1", steps=(3, 5), do=sparse))
    assert program.bound is not None and program.bound.refused is not None
    assert (
        "plan predicts blocks.1.attn1 in steps 3, in which heads of blocks.1.attn1 are sparse" in program.bound.refused
    )
    traced[0].bind(None)


def test_a_range_holds_its_components_and_components_of_a_block_stand_side_by_side(traced: Traced) -> None:
    trace = traced[2].variants.trace
    nesting = Nesting(trace.ranges(), traced[2].variants.components)
    wanted = {"blocks.1.ffn": Reuse(), "blocks.1.attn1": Reuse(), "blocks.0.ffn": Reuse(), "blocks.1": Reuse()}
    assert [*nesting.active(wanted)] == ["blocks.1", "blocks.0.ffn"]
    del wanted["blocks.1"]
    assert nesting.active(wanted).keys() == wanted.keys()
    used = (STEP, RANGE, "blocks.1.attn2", "blocks.1.ffn", "blocks.0..1")
    assert nesting.recorded(used, {"blocks.1.ffn": Reuse()}) == (STEP, "blocks.1.attn2")
    assert nesting.recorded(used, {"blocks.2.ffn": Reuse()}) == (STEP, "blocks.1.attn2", "blocks.1.ffn", "blocks.0..1")
    assert nesting.recorded(used, {STEP: Reuse()}) == ()
    assert nesting.owner("blocks.1.attn1") == "blocks.1.attn1" and nesting.owner("text.attn") is None
