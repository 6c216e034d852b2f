"""Captions of scenes that training never draws, and the text files that list them.

    python -m examples.tiny_image.prompts        # writes prompts.txt and calibration_prompts.txt again

Held out means held out by scene seed: training draws its seeds from `train.FIRST_SCENE` and
`train.FIRST_TAUGHT` upwards. Of captions that name one thing (11,664 exist) many recur in training with another
background noise, of those that name several hardly any do.
"""

from __future__ import annotations

from pathlib import Path

from .scenes import sample_scene

HERE = Path(__file__).parent
EVALUATION_SEEDS = range(64)
CALIBRATION_SEEDS = range(500, 508)


def captions(seeds: range) -> list[str]:
    """The caption of each scene seed."""
    return [sample_scene(seed).caption for seed in seeds]


def main() -> None:
    """Write both lists beside this file, one caption a line."""
    for name, seeds in (("prompts.txt", EVALUATION_SEEDS), ("calibration_prompts.txt", CALIBRATION_SEEDS)):
        (HERE / name).write_text("\n".join(captions(seeds)) + "\n")


if __name__ == "__main__":
    main()
