"""Generate clips for held-out captions and count the attributes that the analytic detector finds.

    python -m examples.tiny_video.evaluate --model examples/tiny_video --sheet sheet.png

Clip i starts from the noise of seed i, whatever the batch, so runs differ only in what is being compared.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline

from ..common.evaluating import command_line, evaluate, what_is_wrong
from .detector import count_by_kind
from .prompts import CALIBRATION_SEEDS, captions
from .sheet import contact_sheet, save_gif

SHEET_ROWS = 16


def main() -> None:
    """Evaluate as the command line says."""
    parser = command_line(__doc__, CALIBRATION_SEEDS.start)
    parser.add_argument("--sheet", type=Path, help=f"write a contact sheet of the first {SHEET_ROWS} clips")
    parser.add_argument("--gif", type=Path, help=f"write the first {SHEET_ROWS} clips as one animation")
    args = parser.parse_args()
    prompts = captions(range(args.captions))
    pipeline = DiffusionPipeline.from_pretrained(args.model, trust_remote_code=True)
    clips, counts = evaluate(pipeline, prompts, count_by_kind, args)
    rows = slice(0, SHEET_ROWS)
    if args.sheet:
        contact_sheet(clips[rows], prompts[rows], [what_is_wrong(c) for c in counts[rows]]).save(args.sheet)
    if args.gif:
        save_gif(clips[rows], args.gif)


if __name__ == "__main__":
    main()
