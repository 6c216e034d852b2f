"""What commands take: the types of their arguments and options, prompts, settings and pipelines."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ditopt.errors import InputError


class Quality(StrEnum):
    """Quality levels of ``optimize``."""

    high = "high"
    balanced = "balanced"
    fast = "fast"
    exact = "exact"


class Mismatch(StrEnum):
    """What a call outside of the planned schedule does."""

    error = "error"
    dense = "dense"
    retarget = "retarget"


class Dtype(StrEnum):
    """Number formats that a pipeline can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Directory = Annotated[str, typer.Argument(metavar="DIR", help="a diffusers pipeline directory (or a Hub id)")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file")]
PlanOrProfile = Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file, or a profile (*.profile)")]
Prompts = Annotated[Path, typer.Option(metavar="FILE", help="prompts, one a line")]
Steps = Annotated[int | None, typer.Option(min=1, help="sampling steps, as the pipeline counts them")]
Guidance = Annotated[float | None, typer.Option(help="guidance scale; 1 is without guidance")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any argument of the pipeline's call, repeatable")
]
Trust = Annotated[
    bool | None,
    typer.Option(help="run pipeline code that lies with the model; default: yes for a local directory, no for the Hub"),
]
Precision = Annotated[Dtype, typer.Option(help="of the weights")]
Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="restrict the search to what a published system does; `ditopt recipes` lists them"
    ),
]
Device = Annotated[str | None, typer.Option(help="where to run; default: cuda if there is one, else cpu")]


def read_prompts(path: Path, option: str = "--prompts") -> list[str]:
    """The lines of a prompt file, empty ones left out.

    Raises:
        InputError: it cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{option} {path}: no such file; give a text file with one prompt a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path}: cannot be read as UTF-8 text: {error}") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{option} {path}: the file holds no prompts; write one a line")
    return texts


def pipe_settings(steps: int | None, guidance: float | None, given: list[str] | None) -> dict[str, Any]:
    """The arguments of the pipeline's call that the options name; values of ``--set`` are YAML.

    Raises:
        InputError: a setting is not ``key=value``, or its value is no YAML.
    """
    import yaml

    found: dict[str, Any] = {}
    if steps is not None:
        found["num_inference_steps"] = steps
    if guidance is not None:
        found["guidance_scale"] = guidance
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip().isidentifier():
            raise InputError(f"--set {text}: should be key=value, such as --set height=64")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(
                f"--set {text}: the value is not YAML; quote it, such as --set 'negative_prompt=\"a: b\"'"
            ) from None
    return found


def load_pipeline(model: str, trust: bool | None, dtype: Dtype, device: str | None) -> Any:
    """The pipeline of a directory, or of a Hub id.

    Code beside the model in a local directory is run (and named) unless ``trust`` is False; that of the Hub only
    where ``trust`` is True.

    Raises:
        InputError: there is no such directory, it is no pipeline, or its code may not be run.
    """
    path = Path(model)
    local = path.is_dir()
    if not local and (path.exists() or path.is_absolute() or len(path.parts) != 2 or path.parent.is_dir()):
        raise InputError(
            f"{model}: no such directory; give the directory of a diffusers pipeline (one with model_index.json)"
        )
    code = _own_code(path) if local else None
    if code is not None and trust is False:
        raise InputError(
            f"{model}: the pipeline is code of its own ({code}); read it and allow it with --trust-remote-code"
        )
    if code is not None and trust is None:
        typer.echo(f"running the pipeline's own code, {code} (--no-trust-remote-code forbids it)")
    try:
        import torch
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise InputError(
            f"diffusers cannot be imported ({error}); install it with `pip install ditopt[diffusers]`"
        ) from None
    try:
        pipe = DiffusionPipeline.from_pretrained(
            model, trust_remote_code=bool(trust) or code is not None, dtype=getattr(torch, dtype.value)
        )
        return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:  # what can be wrong with a directory is no closed list
        first = (str(error).strip().splitlines() or ["no details"])[0]
        raise InputError(
            f"{model}: cannot be loaded as a diffusers pipeline: {type(error).__name__}: {first}"
        ) from error


def _own_code(directory: Path) -> Path | None:
    """The pipeline code in a local directory, if its index names any.

    Raises:
        InputError: there is no readable index.
    """
    from ditopt.report.explained import read_json

    index = read_json(
        directory / "model_index.json", "the index of a diffusers pipeline, which its directory must have"
    )
    name = index.get("_class_name") if isinstance(index, dict) else None
    return directory / f"{name[0]}.py" if isinstance(name, list) and name else None
