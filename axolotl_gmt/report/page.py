"""The report of a run: pictures, and one page that holds them all and needs nothing else.

Knows what a training log says, not where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from axolotl_gmt import __version__
from axolotl_gmt.errors import UserError
from axolotl_gmt.files import whole
from axolotl_gmt.record import (
    EVER_KEPT,
    FORGETTING,
    FORGETTING_LOSS,
    GRAD_NORM_KEPT,
    KEPT_FRACTION,
    L1_KEPT,
    MASK_OVERLAP,
    MASK_OVERLAP_BY_CHANCE,
    STATISTICS,
)
from axolotl_gmt.report import figures
from axolotl_gmt.report.log import Curve, Grid, TrainingLog

PAGE = "index.html"
_GENERATOR = "axolotl-gmt"
NAMES = {
    KEPT_FRACTION: "kept fraction",
    GRAD_NORM_KEPT: "gradient norm kept",
    L1_KEPT: "L1 norm kept",
    MASK_OVERLAP: "mask overlap",
    MASK_OVERLAP_BY_CHANCE: "mask overlap by chance",
    EVER_KEPT: "ever kept",
    FORGETTING: "nats a token",
}
_MOST_ROWS = 40
_LONGEST_LABEL = 44
_FLAT = 0.002  # Shares that differ by less than this have one colour.


@dataclass(frozen=True)
class Picture:
    """A picture of a report, not yet drawn; sizes in inches."""

    file: str
    title: str
    alt: str
    caption: str
    width: float
    height: float
    draw: Callable[[Axes], None]
    is_map: bool = False

    @property
    def name(self) -> str:
        """What to call it in a link."""
        return self.file.removesuffix(".png")

    def on_figure(self, figure: Figure) -> None:
        """Draw it as the only thing on ``figure``."""
        self.draw(figure.subplots())


class Drawn(NamedTuple):
    """A picture of a page."""

    picture: Picture
    svg: str
    """What stands inside its ``<svg>``."""

    @classmethod
    def of(cls, picture: Picture) -> Self:
        """Draw ``picture``."""
        draw, size = picture.on_figure, (picture.width, picture.height)
        return cls(picture, figures.render_svg(draw, *size, picture.name))


Track = Callable[[list[Picture]], Iterable[Picture]]


def write_report(log: TrainingLog, folder: Path, track: Track = iter) -> list[Path]:
    """Write a page and its pictures into ``folder``, whole or not at all.

    Args:
        log: The run.
        folder: Made if it is missing. A report that is there is replaced.
        track: Wraps the list of pictures to draw, to show how far it is.

    Returns:
        The files that were written, the page first.

    Raises:
        UserError: If the folder holds something else, or cannot be written.
    """
    folder = folder.resolve()
    try:
        _check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole(folder) as part:
            part.mkdir()
            for file, content in _render(log, track).items():
                (part / file).write_bytes(content)
            files = sorted(path.name for path in part.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return [folder / PAGE, *(folder / file for file in files if file != PAGE)]


def facts(log: TrainingLog) -> list[tuple[str, str]]:
    """What the run was and what came out, as labels and values to print."""
    ratio, step = log.mask_ratio, _amount(log.step)
    texts = {
        "Model": log.model,
        "Data": ", ".join(log.data) or None,
        "Began": log.began and f"{log.began:%Y-%m-%d %H:%M} UTC",
        "Gradient-Mask Tuning": None if log.has_gmt else "not in the log",
        "Mask ratio": None if ratio is None else f"{ratio:.4g} (kept {1 - ratio:.4g})",
        "Granularity": log.settings.get("granularity"),
        "Criterion": log.settings.get("criterion"),
        "Base optimizer": log.base_optimizer,
        "Parameters under the mask": _amount(log.masked_parameters),
        "Run time": log.duration,
        "Optimizer steps": f"{step} of {log.max_steps:,}" if step and log.max_steps else step,
        "Epochs": None if log.epoch is None else f"{log.epoch:.4g}",
        "Tokens a second": _rate(log.tokens_per_second),
        "Trained tokens a second, per device, mean": _rate(log.trained_tokens_per_second),
    }
    for label, key, number, spec in (
        ("Final loss", "loss", log.last, ".4g"),
        ("Final evaluation loss", "eval_loss", log.last, ".4g"),
        ("Forgetting, final", FORGETTING, log.last, "+.4f"),
        ("Held-out loss, final", FORGETTING_LOSS, log.last, ".4g"),
        ("Kept fraction, mean", KEPT_FRACTION, log.mean, ".2%"),
        ("Gradient norm kept, mean", GRAD_NORM_KEPT, log.mean, ".2%"),
        ("L1 norm kept, mean", L1_KEPT, log.mean, ".2%"),
        ("Mask overlap, mean", MASK_OVERLAP, log.mean, ".2%"),
        ("Mask overlap by chance, mean", MASK_OVERLAP_BY_CHANCE, log.mean, ".2%"),
        ("Ever kept, final", EVER_KEPT, log.last, ".2%"),
    ):
        if key in log.curves:
            value = number(key)
            texts[label] = "NaN or infinite" if value is None else format(value, spec)
    return [(label, str(text)) for label, text in texts.items() if text is not None]


def _amount(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _rate(number: float | None) -> str | None:
    return None if number is None else f"{number:,.4g}" if number < 1000 else f"{number:,.0f}"


def pictures(log: TrainingLog) -> list[Picture]:
    """The pictures that the log has something to show in."""
    return [*_charts(log), *(item for item in _maps(log) if isinstance(item, Picture))]


def _charts(log: TrainingLog) -> Iterator[Picture]:
    losses = {"training": "loss", "evaluation": "eval_loss"}
    yield from _chart(log, "Loss", losses, "Loss at each logged optimizer step.")
    forgetting = (
        "Loss on a text that the model is not trained on (mean negative log-likelihood of its "
        "tokens), less that before training; above 0 the model predicts the text worse than it did."
    )
    before = ("before training", 0.0)
    yield from _chart(log, "Forgetting", {"forgetting": FORGETTING}, forgetting, before)
    kept = (
        "Non-zero gradient entries that survived the mask, over all entries subject to it. Entries "
        "whose gradient is exactly 0, such as embedding rows of tokens that are not in the batch, "
        "never count as kept; entries that equal the threshold all stay."
    )
    norm = "Norm of the masked gradient over the norm of the gradient."
    l1_norm = (
        "Sum of the masked gradient's magnitudes over the sum of the gradient's. Under Adam, whose "
        "step is nearly as long for every entry, it says more than the norm, which squares."
    )
    target = random = l1_random = None
    if (ratio := log.mask_ratio) is not None:
        target = (f"1 - mask ratio = {1 - ratio:.4g}", 1 - ratio)
        random = (f"random mask: √(1 - {ratio:.4g})", math.sqrt(1 - ratio))
        l1_random = (f"random mask: 1 - {ratio:.4g}", 1 - ratio)
        norm += (
            " Dashed: what a random mask of the same size leaves, in root mean square; the further "
            "above it, the more of the gradient lies in few entries."
        )
        l1_norm += " Dashed: what a random mask of the same size leaves, in the mean."
    yield from _chart(log, "Kept fraction", {"kept": KEPT_FRACTION}, kept, target)
    yield from _chart(log, "Gradient norm kept", {"kept": GRAD_NORM_KEPT}, norm, random)
    yield from _chart(log, "L1 norm kept", {"kept": L1_KEPT}, l1_norm, l1_random)
    overlap = (
        "Entries kept both at this step and at the previous logged one, over those kept at either. "
        "By chance: what two random masks that keep as much of each tensor would have; the further "
        "above it, the longer the mask stays with the same entries."
    )
    overlaps = {"measured": MASK_OVERLAP, "by chance": MASK_OVERLAP_BY_CHANCE}
    yield from _chart(log, "Mask overlap", overlaps, overlap)
    ever = (
        "Entries kept at one step at least since training began or was last resumed, over all "
        "entries under the mask."
    )
    yield from _chart(log, "Ever kept", {"kept so far": EVER_KEPT}, ever)
    gradient = "Norm of the gradient as the trainer logs it: before it is clipped and masked."
    yield from _chart(log, "Gradient norm", {"gradient norm": "grad_norm"}, gradient)
    rate = "Learning rate of the base optimizer at each logged step."
    yield from _chart(log, "Learning rate", {"learning rate": "learning_rate"}, rate)


def _chart(
    log: TrainingLog,
    title: str,
    keys: Mapping[str, str],
    caption: str,
    reference: tuple[str, float] | None = None,
) -> Iterator[Picture]:
    """A chart of what was logged under ``keys``, by the name of each line, if anything was."""
    curves = {name: log.curves[key] for name, key in keys.items() if key in log.curves}
    if not any(curve.finite.size for curve in curves.values()):
        return
    key = next(iter(keys.values()))
    is_share = key in STATISTICS
    named = {name.capitalize(): curve for name, curve in curves.items()}
    yield Picture(
        file=_file(key),
        title=title,
        alt=f"{title} {describe(named.items(), is_share)}",
        caption=" ".join([caption, *remarks(curves.items())]),
        width=6.4,
        height=3.5,
        draw=partial(
            figures.line_chart,
            curves=curves,
            label=NAMES.get(key, title.lower()),
            reference=reference,
            is_share=is_share,
            smooth=key != "learning_rate",
        ),
    )


def describe(curves: Iterable[tuple[str, Curve]], is_share: bool) -> str:
    """What a chart shows, for those who do not see it: the steps, and where each curve goes."""
    curves = list(curves)
    spec = ".2%" if is_share else ".4g"
    first_step = min(curve.steps[0] for _, curve in curves)
    last_step = max(curve.steps[-1] for _, curve in curves)
    text = f"from step {first_step} to step {last_step}."
    for name, curve in curves:
        if (finite := curve.finite).size:
            ends = [finite[0], finite[-1], finite.min(), finite.max()]
            first, last, low, high = (format(value, spec) for value in ends)
            text += f" {name}: from {first} to {last}, between {low} and {high}."
    return text


def remarks(curves: Iterable[tuple[str, Curve]]) -> Iterator[str]:
    """Sentences on values that a chart cannot show."""
    for name, curve in curves:
        logged, finite = len(curve.steps), curve.finite.size
        if finite < logged:
            yield (
                f"{logged - finite:,} of {logged:,} values ({name}) were NaN or infinite, and "
                "leave gaps."
            )
        if logged > figures.MOST_POINTS:
            yield (
                f"{logged:,} values ({name}) were logged: drawn are the lowest and the highest of "
                f"each {figures.neighbours(logged):,} neighbours."
            )


def _maps(log: TrainingLog) -> Iterator[Picture | str]:
    """Heat maps of the modules' statistics, or a sentence in place of one of a single colour."""
    for key, modules in log.modules.items():
        over_layers = "Each cell is the mean over layers"
        if modules.logs_a_column > 1:
            many = modules.logs_a_column
            over_layers += f" and over up to {many:,} logged steps, from the one written below"
        over_steps = "Each cell is the mean over all logged steps."
        yield from _map(key, "step", modules.by_step(), f"{over_layers}.")
        yield from _map(key, "layer", modules.by_layer(), over_steps)


def _map(key: str, axis: str, grid: Grid, caption: str) -> Iterator[Picture | str]:
    title = f"{NAMES[key].capitalize()} by module and {axis}"
    low, high = grid.bounds
    if not grid.rows:
        return
    if high - low < _FLAT:
        bounds = f"{low:.2%}", f"{high:.2%}"
        span = "between {} and {}".format(*bounds) if len({*bounds}) > 1 else bounds[0]
        yield f"{title}: {span} everywhere, so there is nothing to draw."
        return
    shown = Grid(grid.rows[:_MOST_ROWS], grid.columns, grid.values[:_MOST_ROWS])
    if len(grid.rows) > len(shown.rows):
        caption += f" The first {len(shown.rows)} of {len(grid.rows):,} kinds of modules are shown."
    if not math.isfinite(shown.values.sum()):
        caption += " Grey: nothing was logged, as of a module that is not under the mask."

    limits = figures.at_least(figures.LEAST_SPAN, *shown.bounds)

    def draw(axes: Axes) -> None:
        rows = [_short(row) for row in shown.rows]
        figures.heat_map(axes, shown.values, rows, shown.columns, limits, NAMES[key])
        axes.set_xlabel(f"optimizer {axis}" if axis == "step" else axis)

    extremes = [_cell(shown, bound, axis) for bound in shown.bounds]
    yield Picture(
        file=_file(key, axis),
        title=title,
        alt=f"{title}: a heat map, from {extremes[0]} to {extremes[1]}.",
        caption=caption,
        width=11.0,
        height=1.1 + 0.28 * len(shown.rows),
        draw=draw,
        is_map=True,
    )


def _cell(grid: Grid, value: float, axis: str) -> str:
    """``value``, and a cell that has it, in words."""
    row, column = (int(at[0]) for at in (grid.values == value).nonzero())
    return f"{value:.2%} in {grid.rows[row]} at {axis} {grid.columns[column]}"


def _short(name: str) -> str:
    """The end of a long name, which says more than its start."""
    return name if len(name) <= _LONGEST_LABEL else f"...{name[-_LONGEST_LABEL + 3 :]}"


def _render(log: TrainingLog, track: Track) -> dict[str, bytes]:
    """The report's files by their names."""
    drawn, files = [], {}
    for picture in track(pictures(log)):
        drawn.append(Drawn.of(picture))
        size = (picture.width, picture.height)
        files[picture.file] = figures.render_figure(picture.on_figure, *size)
    return {PAGE: _page(log, drawn).encode()} | files


def _page(log: TrainingLog, drawn: Sequence[Drawn]) -> str:
    means = {key: modules.means() for key, modules in log.modules.items()}
    return render(
        "report.html",
        title=f"GMT report: {log.name}",
        generator=f"{_GENERATOR} {__version__}",
        log=log,
        facts=facts(log),
        charts=[each for each in drawn if not each.picture.is_map],
        maps=[each for each in drawn if each.picture.is_map],
        remarks=[item for item in _maps(log) if isinstance(item, str)],
        statistics=[NAMES[key].capitalize() for key in means],
        means=means.values(),
        kinds=dict.fromkeys(kind for of_kinds in means.values() for kind in of_kinds),
        settings=log.settings_yaml,
        config_text=log.config_text,
    )


def render(template: str, **values: object) -> str:
    """A page of one of the package's templates, in which texts are escaped."""
    environment = Environment(
        loader=PackageLoader("axolotl_gmt"),
        autoescape=True,  # Names in a log are whatever somebody wrote into it.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def _check_replaceable(folder: Path) -> None:
    """Refuse to write over anything but nothing and an older report."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file. Name a folder for the report.")
    names = {path.name for path in folder.iterdir()}
    foreign = names - _report_files()
    if names and (foreign or not has_mark(folder / PAGE, _GENERATOR)):
        raise UserError(
            f"{folder} holds {min(foreign or names)}, which is not of a report. Name another "
            "folder, or move it."
        )


def _report_files() -> set[str]:
    maps = {_file(key, axis) for key in STATISTICS for axis in ("step", "layer")}
    charts = ("loss", "learning_rate", "grad_norm", FORGETTING, *STATISTICS)
    return {PAGE, *map(_file, charts), *maps}


def _file(key: str, axis: str | None = None) -> str:
    name = key.removeprefix("gmt/")
    return f"{name}_by_{axis}.png" if axis else f"{name}.png"


def has_mark(page: Path, generator: str) -> bool:
    """Whether ``page`` is one that ``generator`` made."""
    mark = f'<meta name="generator" content="{generator} '
    return page.is_file() and mark in page.read_text(encoding="utf-8", errors="replace")[:2000]
