"""``plan.explain.json``, the side file of a plan: why it is as it is, what was tried, what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ditopt.errors import InputError
from ditopt.plan_text import write_text_atomically

MAX_BYTES = 64 * 2**20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Rival(_Part):
    """An alternative not taken; ``error`` and ``objective`` are None or not finite where there is none."""

    name: str
    error: float | None = None
    objective: float | None = None
    reason: str = ""


class Explanation(_Part):
    """Why ``chosen`` was taken at ``site`` in ``step`` (None: in all steps)."""

    step: int | None = None
    site: str
    chosen: str
    objective: float | None = None
    rivals: tuple[Rival, ...] = ()


class Trial(_Part):
    """One plan tried by real rollouts.

    ``seconds`` are those that the cost model gives it, ``measured_seconds`` what a generation took; ``predicted_error``
    the relative L2 error that the search expected, ``rel_l2`` the one measured.
    """

    kept: tuple[int, ...] = ()
    evaluations: int
    psnr: float
    worst_psnr: float | None = None
    rel_l2: float | None = None
    predicted_error: float | None = None
    seconds: float | None = None
    measured_seconds: float | None = None
    variants: int | None = None
    stage: str = ""
    met: bool = False


class TableRow(_Part):
    """One line of the closing table: dense, optimised, or a rival."""

    name: str
    seconds: float | None = None
    speedup: float | None = None
    psnr: float | None = None
    worst_psnr: float | None = None
    evaluations: int | None = None


class NetworkFigures(_Part):
    """What the profile says of one network, in a form to draw."""

    timesteps: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    similarity: tuple[tuple[float, ...], ...] = ()
    sensitivity: tuple[float, ...] = ()
    range_weights: dict[str, tuple[float, ...]] = {}
    seconds: dict[str, float] = {}


class Work(_Part):
    """What operators of one kind take in one step: seconds, floating-point operations, bytes read and written.

    ``dtype`` is what they compute in, one of those that the roofline has a rate for.
    """

    seconds: float
    flops: float | None = None
    bytes: float | None = None
    calls: int | None = None
    dtype: str | None = None


class VariantWork(_Part):
    """Where the time of one compiled graph goes, by kind of operator; ``seconds`` are those of a whole step."""

    seconds: float
    kinds: dict[str, Work] = {}
    steps: str = ""


class Ahead(_Part):
    """What is computed ahead of the steps from the same ``arguments`` of a call.

    ``steps``: for so many at once, 0 where the timestep is not among the arguments; ``bytes`` of the ``values``,
    ``operations`` of the graph that computes them.
    """

    arguments: tuple[str, ...] = ()
    values: int
    steps: int = 0
    operations: int = 0
    bytes: int = 0

    @property
    def told(self) -> str:
        """All of it in words."""
        source = f"from {' and '.join(self.arguments)}" if self.arguments else "from weights alone"
        once = f", for {self.steps} of them at once" if self.steps else ""
        size = f"{self.operations} operations, {self.bytes / 2**20:.2f} MiB"
        return f"{self.values} values {source} ({size}) are computed ahead of the steps{once}"


class Roofline(_Part):
    """What the machine can do at most; rates of arithmetic by dtype."""

    flops_per_second: dict[str, float]
    bytes_per_second: float
    device: str = ""


class Explained(_Part):
    """The whole side file; every part may be empty. ``kernels`` are by network and variant (``dense`` is one).

    ``hoisted`` is by network.
    """

    explanations: dict[str, tuple[Explanation, ...]] = {}
    trials: tuple[Trial, ...] = ()
    reasons: tuple[str, ...] = ()
    prompts: dict[str, tuple[str, ...]] = {}
    timings: dict[str, float] = {}
    table: tuple[TableRow, ...] = ()
    profile: dict[str, NetworkFigures] = {}
    kernels: dict[str, dict[str, VariantWork]] = {}
    roofline: Roofline | None = None
    hoisted: dict[str, tuple[Ahead, ...]] = {}

    def save(self, path: str | Path) -> None:
        """Write the side file, whole or not at all.

        Raises:
            PlanError: the folder is missing or not writable.
        """
        write_text_atomically(Path(path), json.dumps(self.model_dump(mode="python")) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Explained:
        """Read and validate a side file.

        Raises:
            InputError: it is missing, too large, not JSON or malformed; the message names the field.
        """
        data = read_json(
            Path(path),
            "the side file of a plan; `ditopt optimize` and `search` write it beside the plan; copy both",
        )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}, field {field}: {first['msg']}; make the plan again to renew it") from None


def side_path(plan: str | Path) -> Path:
    """Where the side file of a plan stands.

    >>> side_path("out/plan.yaml").as_posix()
    'out/plan.explain.json'
    """
    return Path(plan).with_suffix(".explain.json")


def read_json(path: Path, what: str) -> Any:
    """The JSON in a file; ``what`` is how errors call it.

    Raises:
        InputError: it is missing, too large or not JSON.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: over the limit of {MAX_BYTES} bytes; is this {what}?")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; it is {what}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read as {what}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}), so it is not {what}") from None
