"""Plan files: a round trip, a readable form, and what malformed ones get."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditopt.decisions import (
    MAX_PATTERN,
    Decision,
    Dense,
    Fit,
    Forecast,
    Reuse,
    Sparse,
    decision_to_data,
    pattern_text,
)
from ditopt.errors import PlanError
from ditopt.geometry import Geometry
from ditopt.plan import (
    MAX_BYTES,
    MAX_STEPS,
    DevicePrint,
    ModelPrint,
    Plan,
    Rule,
    SamplerPrint,
    cast_rules,
    format_steps,
    parse_steps,
)
from ditopt.plan_diff import diff_plans
from ditopt.plan_text import MAX_FINDINGS

HEAD = """ditopt: 1
model: {class: Net, structure: 'sha256:0', blocks: 2}
sampler: {class: Euler, steps: 3, timesteps: {transformer: [3, 2, 1]}, sigmas: {transformer: [1, 0.5, 0.2]}}
device: {device: cpu, torch: '2', dtype: float32}
"""


def make(*rules: Rule) -> Plan:
    return Plan(
        model=ModelPrint(class_name="Net", structure="sha256:0", blocks=2),
        sampler=SamplerPrint(
            class_name="Euler",
            steps=3,
            timesteps={"transformer": (3.0, 2.0, 1.0)},
            sigmas={"transformer": (1.0, 0.5, 0.2)},
        ),
        device=DevicePrint(device="cpu", torch="2", dtype="float32"),
        rules=rules,
    )


steps = st.sets(st.integers(0, 200), min_size=1, max_size=12).map(lambda found: tuple(sorted(found)))


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=6)
sparse = st.builds(
    lambda settings, name: Sparse(pattern=pattern_text({**settings, "pattern": name})),
    st.dictionaries(
        words,
        st.recursive(
            st.integers(-99, 99) | st.floats(-9, 9) | st.booleans() | words,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    ),
    words,
)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    chosen = draw(steps)
    number = st.floats(-4, 4, allow_nan=False)
    fit = Fit(
        history=2,
        latents=True,
        coefficients={t: (draw(number), draw(number), draw(number)) for t in chosen},
        sources={t: (t + 2, t + 1) for t in chosen},
    )
    decisions: list[Decision] = [Dense(), Dense(dtype="bfloat16"), Reuse(), Forecast(order=1), Forecast(order=2), fit]
    do = draw(st.sampled_from(decisions) | sparse)
    heads = draw(st.none() | st.frozensets(st.integers(0, 40), min_size=1, max_size=8).map(tuple))
    return Rule(
        sites=draw(st.sampled_from(["step", "blocks.1", "blocks.0..3", "blocks.*"])),
        heads=heads if isinstance(do, Sparse) or do == Dense() else None,
        steps=chosen,
        do=do,
    )


@given(st.lists(rules(), max_size=4))
def test_round_trip(found: list[Rule]) -> None:
    plan = make(*found)
    import yaml

    assert Plan.parse(yaml.safe_dump(plan.to_data())) == plan


@given(steps)
def test_steps_round_trip(found: tuple[int, ...]) -> None:
    assert parse_steps(format_steps(found)) == found


def test_saved_plans_load_and_later_rules_win(tmp_path: Path) -> None:
    plan = make(Rule(sites="step", steps=(1, 2), do=Reuse()), Rule(sites="step", steps=(2,), do=Dense()))
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    assert plan.kept_steps() == (0, 2)
    assert not list(tmp_path.glob(".*"))


def test_diff_names_what_changed() -> None:
    assert diff_plans(make(), make()) == []
    changed = diff_plans(make(), make(Rule(sites="step", steps=(1,), do=Reuse())))
    assert changed == ["+ rule step @ 1: reuse"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"p.yaml: a plan is a mapping.*found NoneType"),
        ("- a", r"p.yaml: a plan is a mapping.*found list"),
        ("ditopt: 2", r"p.yaml, field ditopt: format version 2 is not supported; upgrade ditopt"),
        ("ditopt: 1\nmodel: {class: A", r"p.yaml, line 2: not a plan in YAML"),
        (HEAD[: len(HEAD) // 2], r"p.yaml, line \d: not a plan in YAML"),
        (HEAD + "colour: red", r"p.yaml, line 5, field colour: unknown field"),
        (HEAD + "rules:\n- {sites: step, steps: 5-3, do: reuse}", r"line 6, field rules.0.steps: .*backwards"),
        (
            HEAD + "rules:\n- {sites: step, steps: 1, do: magic}",
            r"line 6, field rules.0.do: .*'magic' is unknown",
        ),
        (HEAD + "rules:\n- {sites: step, steps: 1, do: {forecast: {order: 7}}}", r"line 6.*less than or equal to 2"),
        (HEAD + "rules:\n- {sites: step, steps: 1, do: {reuse: {1: 2}}}", r"line 6, field rules.0.do: a decision is a"),
        (HEAD + "rules:\n- {sites: step, steps: 1, do: {a: 1, b: 2}}", r"line 6, field rules.0.do: a decision is a"),
        (HEAD.replace("[1, 0.5, 0.2]", "[1]"), r"line 3, field sampler: timesteps are .*as many of both"),
        ("ditopt: 1\nditopt: 1", r"line 2.*key 'ditopt' stands twice"),
        ("a: &a [1]\nb: *a", r"line 2.*aliases are not allowed"),
        ("x: !!python/object/apply:os.system [ls]", r"p.yaml, line 1: .*the tag 'tag:.*os.system' is not allowed"),
        ("a: 1\nx: !!timestamp abc", r"p.yaml, line 2: .*the tag 'tag:yaml.org,2002:timestamp' is not allowed"),
        ("a: 1\nx: !!int ''", r"p.yaml, line 2: .*the tag 'tag:yaml.org,2002:int' is not allowed"),
        ("a: 1\nx: !!float ''", r"p.yaml, line 2: .*the tag 'tag:yaml.org,2002:float' is not allowed"),
        ("a: 1\nx: !!bool maybe", r"p.yaml, line 2: .*the tag 'tag:yaml.org,2002:bool' is not allowed"),
        ("ditopt: 0x" + "f" * 5000, r"p.yaml, line 1: .*has 5002 characters; write at most 40"),
        ("x: 1" + ":00" * 300 + ".5", r"p.yaml, line 1: .*has 903 characters; write at most 40"),
        ("a: 2024-99-99", r"p.yaml: not a plan in YAML"),
        ("? [1]\n: 2", r"p.yaml.*not a plan in YAML"),
        ("[" * 5000, r"p.yaml.*not a plan in YAML"),
    ],
)
def test_malformed_plans_are_named(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.parse(text, "p.yaml")


@pytest.mark.parametrize(
    "text", ["ditopt: 1\nmodel: {class: A", "ditopt: 1\nmodel: 'A", "ditopt: 1\nmodel: {class: A}\n"]
)
def test_a_plan_cut_short_says_how_to_make_it_again(text: str) -> None:
    with pytest.raises(PlanError, match="if the file was cut short, make the plan again with `ditopt optimize"):
        Plan.parse(text, "p.yaml")


def rule_lines(steps: str, count: int) -> str:
    return HEAD + "rules:\n" + f"- {{sites: step, steps: {steps}, do: reuse}}\n" * count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (rule_lines("0-99999", 60), r"line 5, field rules: rules 0-2 name 300000 steps, over the limit of 200000"),
        (rule_lines("'0-99999, 7'", 1), r"line 6, field rules.0.steps: .*'0-99999, 7' are over the limit of 100000"),
        (rule_lines(f"'{'0-99999, ' * 60}0'", 1), r"line 6, field rules.0.steps: .* are over the limit of 100000"),
    ],
)
def test_steps_are_counted_before_they_are_expanded(text: str, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PlanError, match=message):
            Plan.parse(text, "p.yaml")
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_whole_schedules_are_within_the_limit() -> None:
    assert len(Plan.parse(rule_lines("0-99999", 2)).rules[1].steps) == MAX_STEPS


def test_the_first_findings_are_told_and_the_rest_counted() -> None:
    text = HEAD + "".join(f"key{number}: 1\n" for number in range(500))
    with pytest.raises(PlanError) as caught:
        Plan.parse(text, "p.yaml")
    *lines, last = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"p.yaml, line {number + 5}, field key{number}" for number in range(MAX_FINDINGS)
    ]
    assert last == "p.yaml: 480 more findings are not shown; mend these first"


def test_long_values_do_not_make_long_messages() -> None:
    text = rule_lines("x" * 10_000, 1) + "y" * 100 + ": 1"
    with pytest.raises(PlanError, match=r"steps 'x{77}\.\.\.' should be numbers and ranges") as caught:
        Plan.parse(text, "p.yaml")
    assert len(str(caught.value)) < 600


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such plan file; make one with `ditopt optimize"):
        Plan.load(tmp_path / "none.yaml")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"a" * (MAX_BYTES + 1))
    with pytest.raises(PlanError, match="over the limit"):
        Plan.load(large)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(128, 256)))
    with pytest.raises(PlanError, match="is no text, so no plan"):
        Plan.load(binary)
    with pytest.raises(PlanError, match="cannot be written"):
        make().save(tmp_path / "no" / "plan.yaml")


def test_a_fit_covers_its_steps() -> None:
    broken: dict[str, Any] = {"history": 2, "coefficients": {1: (1.0, 0.0)}, "sources": {1: (0, 0)}}
    with pytest.raises(ValueError, match="fit has coefficients for steps 1, the rule is for 1-2"):
        Rule(sites="step", steps=(1, 2), do=Fit(**broken))
    with pytest.raises(ValueError, match="step 1 has 1 coefficients and 2 sources"):
        Fit(history=2, coefficients={1: (1.0,)}, sources={1: (0, 0)})


def test_the_model_cast_keeps_the_dtype_of_computed_steps_alone() -> None:
    narrow = Rule(sites="step", steps=(0, 1, 2, 3), do=Dense(dtype="bfloat16"))
    both = Rule(sites="step", steps=(1, 2), do=Dense(dtype="bfloat16", second_order=0.25))
    plain, reuse = Rule(sites="step", steps=(3,), do=Dense()), Rule(sites="step", steps=(2,), do=Reuse())
    assert cast_rules([narrow, both, plain, reuse]) == [(narrow, "bfloat16"), (plain, None)]
    bare = both.model_copy(update={"do": Dense(dtype="bfloat16")})
    assert cast_rules([plain, both, narrow]) == [(plain, None), (bare, "bfloat16"), (narrow, "bfloat16")]
    assert cast_rules([both.model_copy(update={"do": Dense(second_order=0.25)}), reuse]) == []
    simple = both.model_copy(update={"do": Dense(dtype="bfloat16", simplify=True)})
    assert cast_rules([simple]) == [(bare, "bfloat16")], "whoever casts the model does not rewrite it"


SPARSE = "- {sites: blocks.*.attn1, heads: '0, 2, 5-6', steps: 1-2, do: {sparse: {pattern: temporal, rows: 1}}}\n"


def test_rules_for_heads_are_read_and_written_and_later_ones_win_head_by_head(tmp_path: Path) -> None:
    text = HEAD + "tokens: {transformer: {frames: 6, rows: 16, columns: 8, text: 4}}\nrules:\n" + SPARSE
    text += "- {sites: blocks.1.attn1, heads: 2, steps: 2, do: dense}\n"
    text += (
        "- {sites: blocks.2.attn1, steps: 2, do: {sparse: {pattern: union, of: [{pattern: spatial}, {pattern: sink}]}}}"
    )
    plan = Plan.parse(text)
    assert plan.tokens == {"transformer": Geometry(6, 16, 8, text=4)}
    temporal, union = (plan.rules[at].do for at in (0, 2))
    assert temporal == Sparse(pattern='{"rows": 1, "pattern": "temporal"}') != union
    assert plan.head_decisions("blocks.1.attn1")[1].of(4) == (temporal, Dense(), temporal, Dense())
    assert plan.head_decisions("blocks.1.attn1")[2].of(4) == (temporal, Dense(), Dense(), Dense())
    assert plan.head_decisions("blocks.2.attn1")[2].of(3) == (union,) * 3
    assert plan.head_decisions("blocks.2.attn1")[0].of(2) == (Dense(),) * 2
    assert plan.head_decisions("blocks.1.attn2")[2].of(2) == (Dense(),) * 2
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    written = (tmp_path / "plan.yaml").read_text()
    assert "heads: 0, 2, 5-6" in written and "sparse: {pattern: temporal, rows: 1}" in written


def test_rules_for_heads_say_nothing_of_blocks_and_those_of_blocks_nothing_of_heads() -> None:
    sparse = Rule(sites="blocks.*", steps=(1,), do=Sparse(pattern='{"pattern": "skip"}'))
    plan = make(Rule(sites="blocks.1", steps=(1,), do=Reuse()), sparse)
    assert plan.decisions(1, ["blocks.1"]) == {"blocks.1": Reuse()}
    plan = make(sparse, Rule(sites="blocks.*", steps=(1,), do=Reuse()))
    assert plan.head_decisions("blocks.1.attn1")[1].of(1) == (sparse.do,)
    plan = make(sparse, Rule(sites="blocks.1.*", steps=(1,), do=Dense()))
    assert plan.head_decisions("blocks.1.attn1")[1].of(1) == (Dense(),)
    assert cast_rules([Rule(sites="step", steps=(1,), do=Dense(dtype="bfloat16")), sparse])[1:] == []


def test_equal_patterns_are_one_decision_and_heads_are_told_apart() -> None:
    skip = Sparse(pattern='{"pattern":"skip"}')
    assert {skip, Sparse(pattern=pattern_text({"pattern": "skip"}))} == {skip}
    one, other = (Rule(sites="blocks.1.attn1", heads=heads, steps=(1,), do=skip) for heads in ((0,), (2, 1)))
    assert diff_plans(make(one), make(other)) == [
        "- rule blocks.1.attn1 heads 0 @ 1: {'sparse': {'pattern': 'skip'}}",
        "+ rule blocks.1.attn1 heads 1-2 @ 1: {'sparse': {'pattern': 'skip'}}",
    ]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("heads: 3-1, steps: 1, do: {sparse: {pattern: skip}}", r"rules.0.heads: heads '3-1' has a range .*backwards"),
        ("heads: 0-256, steps: 1, do: {sparse: {pattern: skip}}", r"rules.0.heads: .* over the limit of 256"),
        ("heads: [-1], steps: 1, do: {sparse: {pattern: skip}}", r"rules.0.heads.0: .*greater than or equal to 0"),
        ("heads: all, steps: 1, do: {sparse: {pattern: skip}}", r"rules.0.heads: heads 'all' should be numbers and"),
        ("heads: 1, steps: 1, do: reuse", r"rules.0: heads 1 are given to reuse; only sparse and dense without"),
        ("heads: 1, steps: 1, do: {dense: {simplify: true}}", r"rules.0: heads 1 are given to {'dense'"),
        ("steps: 1, do: sparse", r"rules.0.do: sparse needs the name of a pattern, e.g. {sparse: {pattern: temporal"),
        ("steps: 1, do: {sparse: {rows: 1}}", r"rules.0.do: sparse needs the name of a pattern"),
        ("steps: 1, do: {sparse: {pattern: 3}}", r"rules.0.do: sparse needs the name of a pattern"),
        ("steps: 1, do: {sparse: {pattern: band, width: .nan}}", r"rules.0.do: a pattern is a mapping of names to"),
        (f"steps: 1, do: {{sparse: {{pattern: {'x' * MAX_PATTERN}}}}}", r"rules.0.do: a pattern of 40\d\d characters"),
    ],
)
def test_malformed_rules_for_heads_are_named(rule: str, message: str) -> None:
    text = HEAD + f"rules:\n- {{sites: blocks.1.attn1, {rule}}}"
    with pytest.raises(PlanError, match=f"line 6, field {message}"):
        Plan.parse(text)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("{frames: 0, rows: 1, columns: 2}", r"tokens.transformer: geometry of 0 x 1 x 2 tokens: .* at least 1"),
        ("{frames: 1, rows: 1}", r"tokens.transformer.columns: Field required"),
        ("{frames: 1, rows: 1, columns: 1, txt: 3}", r"tokens.transformer.txt: Unexpected keyword"),
    ],
)
def test_malformed_tokens_are_named(tokens: str, message: str) -> None:
    with pytest.raises(PlanError, match=f"line 5, field {message}"):
        Plan.parse(HEAD + f"tokens: {{transformer: {tokens}}}")


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_of_second_order_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match="second_order"):
        Dense(second_order=share)
    assert decision_to_data(Dense(second_order=0.5)) == {"dense": {"second_order": 0.5}}
