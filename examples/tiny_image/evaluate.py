"""Generate images for held-out captions and count the attributes that the analytic detector finds.

    python -m examples.tiny_image.evaluate --model examples/tiny_image --sheet sheet.png

Image i starts from the noise of seed i, whatever the batch, so runs differ only in what is being compared.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline

from ..common.evaluating import command_line, evaluate, what_is_wrong
from .image_detector import count_by_kind
from .prompts import CALIBRATION_SEEDS, captions
from .sheet import contact_sheet

SHEET_IMAGES = 24


def main() -> None:
    """Evaluate as the command line says."""
    parser = command_line(__doc__, CALIBRATION_SEEDS.start)
    parser.add_argument("--sheet", type=Path, help=f"write a contact sheet of the first {SHEET_IMAGES} images")
    args = parser.parse_args()
    prompts = captions(range(args.captions))
    pipeline = DiffusionPipeline.from_pretrained(args.model, trust_remote_code=True)
    images, counts = evaluate(pipeline, prompts, count_by_kind, args)
    if args.sheet:
        first = slice(0, SHEET_IMAGES)
        contact_sheet(images[first], prompts[first], [what_is_wrong(c) for c in counts[first]]).save(args.sheet)


if __name__ == "__main__":
    main()
