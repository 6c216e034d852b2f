"""The file beside a plan: what it gives back, what of it is written and copied, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from ditopt import store
from ditopt.decisions import Sparse, pattern_text
from ditopt.errors import PlanError
from ditopt.geometry import Geometry
from ditopt.head_tensors import BlockMaps, Projections
from ditopt.plan import DevicePrint, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.plan_diff import diff_plans
from ditopt.plan_tensors import KEY, MAX_BYTES, PlanTensors, TensorFile

GEOMETRY = Geometry(3, 8, 8, text=5)
QUARTER, STRIPES = (pattern_text({"pattern": "listed", **each}) for each in ({"keep": 0.25}, {"columns": 0.125}))


def maps(site: str = "blocks.0.attn", pattern: str = QUARTER, heads: int = 4, seed: int = 0) -> BlockMaps:
    kept = np.random.default_rng(seed).random((2, heads, 13, 13)) < 0.4
    return BlockMaps.of(kept, "transformer", site, pattern, tuple(range(heads)), (0, 3), GEOMETRY, 16)


def rule(pattern: str, sites: str = "blocks.0.attn", heads: str | None = "1-2", **settings: object) -> Rule:
    data = json.loads(pattern) | settings
    return Rule.model_validate(
        {"sites": sites, "heads": heads, "steps": "1-4", "do": Sparse(pattern=pattern_text(data))}
    )


def plan(*rules: Rule) -> Plan:
    return Plan(
        model=ModelPrint(class_name="Model", structure="sha256:ab", blocks=2),
        sampler=SamplerPrint(
            class_name="Euler", steps=5, timesteps={"transformer": (5.0, 4.0, 3.0, 2.0, 1.0)},
            sigmas={"transformer": (5.0, 4.0, 3.0, 2.0, 1.0)},
        ),
        device=DevicePrint(device="cpu", torch="2", dtype="float32"),
        rules=rules,
    )  # fmt: skip


def test_maps_come_back_bit_by_bit_by_head_and_step() -> None:
    kept = np.random.default_rng(3).random((2, 2, 13, 13)) < 0.5
    one = BlockMaps.of(kept, "transformer", "a", QUARTER, (2, 5), (0, 3), GEOMETRY, 16)
    (read,) = PlanTensors.parse(PlanTensors((one,)).to_bytes(), "file").maps
    assert vars(read).keys() == vars(one).keys() and read.geometry == GEOMETRY and read.heads == (2, 5)
    for step in range(5):
        for place, head in enumerate((2, 5)):
            assert (read.kept(head, step) == kept[int(step >= 3), place]).all()
    with pytest.raises(KeyError, match="head 3 has no map; heads 2, 5 have"):
        read.kept(3, 0)


def test_a_plan_writes_what_its_rules_read_and_reads_it_again(tmp_path: Path) -> None:
    every = PlanTensors((maps(), maps("blocks.1.attn"), maps(pattern=STRIPES)))
    rules = rule(QUARTER), rule(QUARTER, heads="3", rest={"pooled": 16}), rule(STRIPES, "blocks.*.attn", None)
    made = plan(*rules).with_beside(every)
    made.save(tmp_path / "a.yaml")
    read = Plan.load(tmp_path / "a.yaml")
    assert read.rules == made.rules and read.tensors is not None
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.yaml", read.tensors.file]
    assert {(each.site, each.pattern): each.heads for each in read.beside.maps} == {
        ("blocks.0.attn", QUARTER): (1, 2, 3),
        ("blocks.0.attn", STRIPES): (0, 1, 2, 3),
    }
    assert (read.beside.maps[0].kept(3, 4) == every.maps[0].kept(3, 4)).all()
    before = (tmp_path / "a.yaml").read_text()
    read.save(tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_text() == before and read == Plan.load(tmp_path / "a.yaml")
    read.model_copy(update={"rules": (rules[0],)}).save(tmp_path / "b.yaml")
    other = Plan.load(tmp_path / "b.yaml")
    assert [each.heads for each in other.beside.maps] == [(1, 2)] and other.tensors != read.tensors
    told = [line for line in diff_plans(read, other) if line.startswith("~ tensors")]
    assert len(told) == 2, "other lists are a difference"
    plan().with_beside(every).save(tmp_path / "none.yaml")
    assert Plan.load(tmp_path / "none.yaml").tensors is None, "no rule reads any"
    (tmp_path / "elsewhere").mkdir()
    read.model_copy(update={"rules": ()}).save(tmp_path / "elsewhere" / "plan.yaml")
    assert Plan.load(tmp_path / "elsewhere" / "plan.yaml").tensors is None, "a file that nothing reads is not named"


def test_a_kept_plan_has_its_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    plan(rule(QUARTER)).with_beside(PlanTensors((maps(),))).save(tmp_path / "a.yaml")
    store.keep_plan(tmp_path / "a.yaml", "sha256:ab")
    store.keep_plan(store.plan_path("sha256:ab"), "sha256:cd")
    for structure in ("sha256:ab", "sha256:cd"):
        found = store.find_plan(structure)
        assert found is not None and found.beside == Plan.load(tmp_path / "a.yaml").beside
    assert not [path for path in store.plan_dir().iterdir() if path.suffix not in (".yaml", ".safetensors")]


def test_rules_without_their_lists_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is not written: its rules read lists or projections that it does not have"):
        plan(rule(QUARTER)).save(tmp_path / "a.yaml")
    assert not list(tmp_path.iterdir())


def projections(pattern: str, heads: tuple[int, ...] = (0, 1), width: int = 4) -> Projections:
    packed = np.random.default_rng(5).standard_normal((2, len(heads), width, width)).astype(np.float16)
    return Projections("transformer", "blocks.0.attn", pattern, heads, (0, 3), packed)


def test_projections_go_with_the_maps_and_are_found_by_what_is_skipped(tmp_path: Path) -> None:
    linear = pattern_text({"pattern": "listed", "keep": 0.25, "rest": "linear"})
    skip = pattern_text({"pattern": "skip", "rest": "linear"})
    every = PlanTensors((maps(),), (projections(linear), projections(skip)))
    rules = rule(linear, heads="0-1", qk="int8"), rule(skip, "blocks.1.attn")
    plan(*rules).with_beside(every).save(tmp_path / "a.yaml")
    read = Plan.load(tmp_path / "a.yaml").beside
    assert [each.heads for each in read.maps] == [(0, 1)] and [each.pattern for each in read.projections] == [linear]
    found = read.projections_for("transformer", "blocks.0.attn", rules[0].do.pattern)  # type: ignore[union-attr]
    assert found is not None and found.of_head(1, 4).dtype == np.float16
    assert (found.of_head(1, 4) == every.projections[0].packed[1, 1]).all()
    assert read.projections_for("transformer", "blocks.0.attn", QUARTER) is None
    with pytest.raises(KeyError, match="head 7 has no projection; heads 0, 1 have"):
        found.of_head(7, 0)


@pytest.mark.parametrize(
    ("packed", "told"),
    [
        (np.zeros((2, 2, 4, 4), np.float32), "projections are float32 of shape"),
        (np.zeros((2, 2, 4, 3), np.float16), r"shape \[2, 2, 4, 3\], not float16 \[periods, heads, E, E\]"),
        (np.zeros((1, 2, 4, 4), np.float16), r"projections are \[1, 2\]; there are 2 periods, 2 heads"),
        (np.full((2, 2, 4, 4), np.nan, np.float16), "NaN or infinite"),
    ],
)
def test_projections_that_do_not_fit_are_refused(packed: np.ndarray, told: str) -> None:
    skip = pattern_text({"pattern": "skip", "rest": "linear"})
    data = PlanTensors(projections=(replace(projections(skip), packed=packed),)).to_bytes()
    with pytest.raises(PlanError, match=told):
        PlanTensors.parse(data, "file")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (
            Path.unlink,
            r"tensors-\w{16}.safetensors: no such file; the plan beside it reads what its heads have",
        ),
        (_cut, "has the SHA-256 .*, the plan was written with .*: the file was cut short or changed"),
        (_flip, "was cut short or changed, or is of another plan"),
        (lambda path: path.write_bytes(b""), "was cut short or changed"),
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_refused(
    tmp_path: Path, harm: Callable[[Path], None], told: str
) -> None:
    plan(rule(QUARTER)).with_beside(PlanTensors((maps(),))).save(tmp_path / "a.yaml")
    (path,) = tmp_path.glob("*.safetensors")
    harm(path)
    with pytest.raises(PlanError, match=told):
        Plan.load(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", ".hidden", "a/b", ""])
def test_a_file_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    plan(rule(QUARTER)).with_beside(PlanTensors((maps(),))).save(tmp_path / "a.yaml")
    text = (tmp_path / "a.yaml").read_text()
    (path,) = tmp_path.glob("*.safetensors")
    (tmp_path / "b.yaml").write_text(text.replace(path.name, f'"{name}"'))
    with pytest.raises(PlanError, match=r"field tensors\.file: String should"):
        Plan.load(tmp_path / "b.yaml")


def test_large_files_are_neither_written_nor_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(PlanError, match="are over the limit of 268435456 for a plan's tensors"):
        PlanTensors.load(tmp_path, TensorFile(file="large", sha256="0" * 64))
    monkeypatch.setattr("ditopt.plan_tensors.MAX_BYTES", 100)
    with pytest.raises(PlanError, match="bytes are over the limit of 100 for a plan; search again"):
        PlanTensors((maps(),)).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"packed": np.zeros((2, 4, 13, 3), np.uint8)}, r"of shape \[2, 4, 13, 3\]; .* \[2, 4, 13, 2\]"),
        ({"packed": np.zeros((2, 4, 13, 2), np.int8)}, "maps are int8"),
        ({"geometry": Geometry(3, 8, 9)}, "in blocks of 16 has uint8 of shape"),
        ({"geometry": Geometry(10**6, 10**6, 1)}, "blocks a side are over the limit"),
        ({"heads": (1, 0, 2, 3)}, "heads .* are not ascending numbers"),
        ({"starts": (1, 3)}, r"periods start at steps \[1, 3\]; they ascend from 0"),
        ({"block": 0}, "field maps: block: Input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_maps_that_do_not_fit_are_refused(change: dict[str, object], told: str) -> None:
    data = PlanTensors((replace(maps(), **change),)).to_bytes()  # type: ignore[arg-type]  # what is tested
    with pytest.raises(PlanError, match=told):
        PlanTensors.parse(data, "file")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"plan", "is no file of a plan's tensors"),
        (save({"a": np.zeros(1)}), "is no file of a plan's tensors"),
        (save({"a": np.zeros(1)}, metadata={KEY: "[]"}), "is no file of a plan's tensors"),
        (save({"a": np.zeros(1)}, metadata={KEY: json.dumps({KEY: 2})}), "format version 2 is not supported"),
        (save({"a": np.zeros(1)}, metadata={KEY: json.dumps({KEY: 1})}), "field maps: expected a list, found NoneType"),
        (save({"a": np.zeros(1)}, metadata={KEY: json.dumps({KEY: 1, "maps": [{}]})}), "maps: network: Field"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PlanError, match=told):
        PlanTensors.load(tmp_path, TensorFile(file="x", sha256=hashlib.sha256(data).hexdigest()))
