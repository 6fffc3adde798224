"""The page of a comparison: a table of runs, and their curves laid over each other.

Knows what logs say, not where they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from axolotl_gmt import __version__
from axolotl_gmt.errors import UserError
from axolotl_gmt.files import whole
from axolotl_gmt.record import (
    EVER_KEPT,
    FORGETTING,
    GRAD_NORM_KEPT,
    KEPT_FRACTION,
    L1_KEPT,
    MASK_OVERLAP,
    STATISTICS,
)
from axolotl_gmt.report import figures
from axolotl_gmt.report.comparison import Run, columns
from axolotl_gmt.report.page import (
    NAMES,
    Drawn,
    Picture,
    Track,
    describe,
    has_mark,
    remarks,
    render,
)

PAGE = "gmt_compare.html"
_GENERATOR = "axolotl-gmt-compare"
_CHARTS = {
    "loss": ("Loss", "Training loss at each logged optimizer step."),
    "eval_loss": ("Evaluation loss", "Loss on the run's own evaluation data."),
    FORGETTING: (
        "Forgetting",
        "Loss on the run's own held-out text, less that before training; above 0 the model "
        "predicts the text worse than it did.",
    ),
    "learning_rate": ("Learning rate", "Learning rate of the base optimizer."),
    "grad_norm": ("Gradient norm", "As the trainer logs it: before it is clipped and masked."),
    KEPT_FRACTION: (
        "Kept fraction",
        "Non-zero gradient entries that survived the mask, over all entries subject to it.",
    ),
    GRAD_NORM_KEPT: (
        "Gradient norm kept",
        "Norm of the masked gradient over the norm of the gradient.",
    ),
    L1_KEPT: (
        "L1 norm kept",
        "Sum of the masked gradient's magnitudes over the sum of the gradient's.",
    ),
    MASK_OVERLAP: (
        "Mask overlap",
        "Entries kept both at this step and at the previous logged one, over those kept at either.",
    ),
    EVER_KEPT: (
        "Ever kept",
        "Entries kept at one step at least since training began or was last resumed.",
    ),
}


def write_comparison(runs: Sequence[Run], file: Path, track: Track = iter) -> Path:
    """Write the page of a comparison, whole or not at all.

    Args:
        runs: As many as there are ``figures.STYLES`` at most.
        file: Its folder is made if it is missing. A comparison that is there is replaced.
        track: Wraps the list of pictures to draw, to show how far it is.

    Returns:
        The file that was written.

    Raises:
        UserError: If the file is something else, or cannot be written.
    """
    file = file.resolve()
    try:
        if file.exists() and not has_mark(file, _GENERATOR):
            raise UserError(
                f"{file} is not the page of a comparison. Name another file, or move it."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as part:
            part.write_text(_page(runs, track), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}.") from error
    return file


def _page(runs: Sequence[Run], track: Track) -> str:
    return render(
        "compare.html",
        title=f"GMT comparison: {', '.join(run.log.name for run in runs)}",
        generator=f"{_GENERATOR} {__version__}",
        runs=list(zip(runs, figures.STYLES, strict=False)),
        columns=columns(runs),
        charts=[Drawn.of(picture) for picture in track(pictures(runs))],
    )


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """A chart for each quantity that a run has logged, with a line for each run that has."""
    return [picture for key in _CHARTS for picture in _chart(runs, key)]


def _chart(runs: Sequence[Run], key: str) -> Iterator[Picture]:
    styled = [
        (run.label, style, run.log.curves[key])
        for run, style in zip(runs, figures.STYLES, strict=False)
        if key in run.log.curves
    ]
    if not any(curve.finite.size for _, _, curve in styled):
        return
    title, caption = _CHARTS[key]
    count = "1 run" if len(styled) == 1 else f"{len(styled)} runs"
    named = [(label, curve) for label, _, curve in styled]
    lines = [(style, curve) for _, style, curve in styled]
    is_share, smooth = key in STATISTICS, key != "learning_rate"
    if smooth and (windows := {w for _, curve in named if (w := figures.mean_window(curve)) > 1}):
        ends = [f"{window:,}" for window in sorted({min(windows), max(windows)})]
        caption += f" Faint; on top, moving means of {' to '.join(ends)} logs."
    yield Picture(
        file=f"{key}.png",
        title=title,
        alt=f"{title} of {count} {describe(named, is_share)}",
        caption=" ".join([caption, *remarks(named)]),
        width=6.4,
        height=3.5,
        draw=partial(
            figures.overlay,
            curves=lines,
            label=NAMES.get(key, title.lower()),
            is_share=is_share,
            smooth=smooth,
        ),
    )
