"""Sample outputs beside a plan: dense, optimised, fewer steps; as clips of a page, with their differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditopt.errors import InputError
from ditopt.report.png import Bytes, data_uri, resized, strip

DENSE, OPTIMISED, FEWER = "dense", "optimised", "fewer_steps"
MAX_BYTES = 2**30
MAX_FRAMES, MAX_EDGE = 16, 160
MAX_VALUES = 1_200_000
"""Colour values of all clips of a page together, differences included: about as many bytes in the page."""
LOUDEST = 64
"""The strongest amplification of a difference."""


@dataclass(frozen=True)
class Samples:
    """One prompt's samples by contender, ``[F, H, W, 3]`` uint8; ``facts`` are the file's own (prompt, seed, ...)."""

    clips: Mapping[str, Bytes]
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Clip:
    """A clip as a strip of frames under each other; ``difference`` that to dense, made ``louder`` times stronger.

    ``psnr`` is that of these very samples, as 8-bit pictures; None for dense itself, infinite where nothing differs.
    """

    uri: str
    frames: int
    height: int
    width: int
    difference: str | None = None
    louder: int = 1
    psnr: float | None = None


def samples_path(plan: str | Path) -> Path:
    """Where the samples of a plan stand.

    >>> samples_path("out/plan.yaml").as_posix()
    'out/plan.samples.safetensors'
    """
    return Path(plan).with_suffix(".samples.safetensors")


def load_samples(path: str | Path) -> Samples:
    """Read the samples of a plan.

    Raises:
        InputError: the file is missing, too large or no safetensors, or what it holds are no clips of one size.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: over the limit of {MAX_BYTES} bytes for samples of one prompt")
        with safe_open(path, framework="numpy") as file:
            clips = {name: file.get_tensor(name) for name in (DENSE, OPTIMISED, FEWER) if name in file.keys()}  # noqa: SIM118
            facts = dict(file.metadata() or {})
    except FileNotFoundError:
        raise InputError(f"{path}: not found; `ditopt optimize` writes the samples beside the plan") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as the samples of a plan: {error}") from None
    if DENSE not in clips:
        raise InputError(f"{path}: holds no tensor {DENSE!r}; make the plan again to renew it")
    for name, clip in clips.items():
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or clip.shape != clips[DENSE].shape:
            raise InputError(
                f"{path}, tensor {name}: {clip.dtype} {list(clip.shape)} should be uint8 [F, H, W, 3], as dense is"
            )
    return Samples(clips, facts)


def drawn(samples: Samples) -> dict[str, Clip]:
    """The samples as clips of a page, small enough for it."""
    dense = samples.clips[DENSE]
    others = {name: clip for name, clip in samples.clips.items() if name != DENSE}
    differences = {name: np.abs(clip.astype(np.int16) - dense) for name, clip in others.items()}
    louder = amplification(differences)
    count = len(samples.clips) + len(differences)
    found = {DENSE: _clip(_small(dense, count))}
    for name, clip in others.items():
        loud = np.minimum(differences[name] * louder, 255).astype(np.uint8)
        found[name] = _clip(_small(clip, count), _small(loud, count), louder, psnr(clip, dense))
    return found


def psnr(clip: Bytes, reference: Bytes) -> float:
    """Peak signal-to-noise ratio of two 8-bit clips in dB; infinite where they are equal."""
    error = float(np.mean(np.square(clip.astype(np.float64) - reference)))
    return 10 * math.log10(255**2 / error) if error else math.inf


def amplification(differences: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.int16]]]) -> int:
    """The power of two that makes the largest difference just about white: one for all, so that they compare."""
    largest = max((float(np.quantile(each, 0.995)) for each in differences.values()), default=0.0)
    return min(LOUDEST, 1 << max(0, math.floor(math.log2(255 / max(largest, 1.0)))))


def facts_of(samples: Samples) -> str:
    """Prompt and seed in words."""
    told = [f"“{samples.facts['prompt']}”"] if "prompt" in samples.facts else []
    return ", ".join([*told, *(f"{key} {samples.facts[key]}" for key in ("seed",) if key in samples.facts)])


def _small(clip: Bytes, count: int) -> Bytes:
    """A clip with fewer frames and pixels where ``count`` of it would be too much for a page."""
    frames, height, width = clip.shape[:3]
    kept = np.linspace(0, frames - 1, min(frames, MAX_FRAMES)).round().astype(int)
    room = math.sqrt(MAX_VALUES / (count * 3 * len(kept) * height * width))
    scale = min(1.0, MAX_EDGE / max(height, width), room)
    if scale < 1:
        size = max(1, int(height * scale)), max(1, int(width * scale))
        clip = resized(clip[kept].transpose(0, 3, 1, 2), *size).transpose(0, 2, 3, 1).round().astype(np.uint8)
        return np.ascontiguousarray(clip)
    return np.asarray(clip[kept])


def _clip(clip: Bytes, difference: Bytes | None = None, louder: int = 1, decibels: float | None = None) -> Clip:
    loud = None if difference is None else data_uri(strip(list(difference)))
    frames, height, width = clip.shape[:3]
    return Clip(data_uri(strip(list(clip))), frames, height, width, loud, louder, decibels)
