"""The report of a run: pictures, and one page that holds them all and needs nothing else.

Knows what a training log says, not where it comes from.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from axolotl_gmt import __version__
from axolotl_gmt.errors import UserError
from axolotl_gmt.files import whole
from axolotl_gmt.report import figures
from axolotl_gmt.report.log import (
    GRAD_NORM_KEPT,
    KEPT_FRACTION,
    STATISTICS,
    Grid,
    TrainingLog,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = "gmt_report"
"""The name of a report's folder in a run's output folder, unless the user names another."""

PAGE = "index.html"
_GENERATOR = "axolotl-gmt"
_NAMES = {KEPT_FRACTION: "kept fraction", GRAD_NORM_KEPT: "gradient norm kept"}
_CHARTS = {key: f"{key.removeprefix('gmt/')}.png" for key in ("loss", "learning_rate", *STATISTICS)}
_MAPS = {key: f"{key.removeprefix('gmt/')}_by_{{}}.png" for key in STATISTICS}

_MOST_ROWS = 40
_LONGEST_LABEL = 44
# Differences below this are noise; no axis or colour bar spreads them over its whole length.
_LEAST_SPAN = 0.02
_FLAT = 0.002


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
    ratio = log.mask_ratio
    finals = {"Final loss": "loss", "Final evaluation loss": "eval_loss"}
    means = {"Kept fraction, mean": KEPT_FRACTION, "Gradient norm kept, mean": GRAD_NORM_KEPT}
    step = f"{log.step:,}" if log.step is not None else None
    if step is not None and log.max_steps:
        step += f" of {log.max_steps:,}"
    texts = {
        "Gradient-Mask Tuning": None if log.has_gmt else "not in the log",
        "Mask ratio": f"{ratio:.4g} (kept {1 - ratio:.4g})" if ratio is not None else None,
        "Granularity": log.settings.get("granularity"),
        "Criterion": log.settings.get("criterion"),
        "Base optimizer": log.base_optimizer,
        "Parameters under the mask": (
            f"{log.masked_parameters:,}" if log.masked_parameters is not None else None
        ),
        "Optimizer steps": step,
        "Epochs": f"{log.epoch:.4g}" if log.epoch is not None else None,
        **{
            label: "NaN or infinite" if (value := log.last(key)) is None else f"{value:.4g}"
            for label, key in finals.items()
            if key in log.curves
        },
        **{
            label: "NaN or infinite" if (value := log.mean(key)) is None else f"{value:.2%}"
            for label, key in means.items()
            if key in log.curves
        },
    }
    return [(label, str(text)) for label, text in texts.items() if text is not None]


def settings_yaml(log: TrainingLog) -> str:
    """The recorded settings as an Axolotl config spells them; empty if there are none."""
    if not log.settings:
        return ""
    keys = {f"gmt_{name}": value for name, value in log.settings.items()}
    return yaml.safe_dump(keys, sort_keys=False, width=math.inf)


def pictures(log: TrainingLog) -> list[Picture]:
    """The pictures that the log has something to show in."""
    return [*_charts(log), *_maps(log)]


def _charts(log: TrainingLog) -> Iterator[Picture]:
    losses = {"training": "loss", "evaluation": "eval_loss"}
    yield from _chart(log, "Loss", losses, "Loss at each logged optimizer step.")
    kept = (
        "Non-zero gradient entries that survived the mask, over all entries subject to it. Entries "
        "whose gradient is exactly 0, such as embedding rows of tokens that are not in the batch, "
        "never count as kept; entries that equal the threshold all stay."
    )
    norm = "Norm of the masked gradient over the norm of the gradient."
    target = random = None
    if (ratio := log.mask_ratio) is not None:
        target = figures.Reference(f"1 - mask ratio = {1 - ratio:.4g}", 1 - ratio)
        random = figures.Reference(f"random mask: √(1 - {ratio:.4g})", math.sqrt(1 - ratio))
        norm += (
            " Dashed: what a random mask of the same size leaves, in root mean square; the further "
            "above it, the more of the gradient lies in few entries."
        )
    yield from _chart(log, "Kept fraction", {"kept": KEPT_FRACTION}, kept, target)
    yield from _chart(log, "Gradient norm kept", {"kept": GRAD_NORM_KEPT}, norm, random)
    rate = "Learning rate of the base optimizer at each logged step."
    yield from _chart(log, "Learning rate", {"learning rate": "learning_rate"}, rate)


def _chart(
    log: TrainingLog,
    title: str,
    keys: Mapping[str, str],
    caption: str,
    reference: figures.Reference | None = None,
) -> Iterator[Picture]:
    """A chart of what was logged under ``keys``, by the name of each line, if anything was."""
    from matplotlib.ticker import PercentFormatter

    curves = {name: log.curves[key] for name, key in keys.items() if key in log.curves}
    lines = [figures.Curve(name, curve.steps, curve.values) for name, curve in curves.items()]
    if not any(curve.finite.size for curve in curves.values()):
        return
    first_key = next(iter(keys.values()))
    is_share = first_key in STATISTICS
    spec = ".2%" if is_share else ".4g"
    steps = [step for curve in curves.values() for step in curve.steps]
    alt = [f"{title} from step {min(steps)} to step {max(steps)}."]
    for name, curve in curves.items():
        if curve.finite.size:
            ends = [curve.finite[0], curve.finite[-1], curve.finite.min(), curve.finite.max()]
            first, last, low, high = (format(value, spec) for value in ends)
            alt.append(f"{name.capitalize()}: from {first} to {last}, between {low} and {high}.")
        broken = len(curve.steps) - curve.finite.size
        if broken:
            caption += (
                f" {broken} of {len(curve.steps)} values ({name}) were NaN or infinite, and leave "
                "gaps."
            )
    yield Picture(
        file=_CHARTS[first_key],
        title=title,
        alt=" ".join(alt),
        caption=caption,
        width=6.4,
        height=3.5,
        draw=partial(
            figures.line_chart,
            curves=lines,
            label=title.lower(),
            reference=reference,
            unit=PercentFormatter(1) if is_share else None,
            least_span=_LEAST_SPAN if is_share else 0.0,
            most=1.0 if is_share else None,
            smooth=first_key != "learning_rate",
        ),
    )


def _maps(log: TrainingLog) -> Iterator[Picture]:
    return (_map(*described) for described in _grids(log, flat=False))


def _remarks(log: TrainingLog) -> list[str]:
    """What is said instead of drawing a map of a single colour."""
    remarks = []
    for key, axis, grid, _ in _grids(log, flat=True):
        low, high = (f"{bound:.2%}" for bound in grid.bounds)
        span = low if low == high else f"between {low} and {high}"
        remarks.append(f"{_title(key, axis)}: {span} everywhere, so there is nothing to draw.")
    return remarks


def _grids(log: TrainingLog, flat: bool) -> Iterator[tuple[str, str, Grid, str]]:
    """Statistic, horizontal axis, cells and caption of the heat maps with one colour, or others."""
    for key, modules in log.modules.items():
        over_layers = "Each cell is the mean over layers"
        if modules.logs_a_column > 1:
            many = modules.logs_a_column
            over_layers += f" and over up to {many} logged steps, from the one written below"
        for axis, grid, caption in (
            ("step", modules.by_step(), f"{over_layers}."),
            ("layer", modules.by_layer(), "Each cell is the mean over all logged steps."),
        ):
            low, high = grid.bounds
            if grid.rows and (high - low < _FLAT) == flat:
                yield key, axis, grid, caption


def _title(key: str, axis: str) -> str:
    return f"{_NAMES[key].capitalize()} by module and {axis}"


def _map(key: str, axis: str, grid: Grid, caption: str) -> Picture:
    from matplotlib.ticker import PercentFormatter

    shown = Grid(grid.rows[:_MOST_ROWS], grid.columns, grid.values[:_MOST_ROWS])
    if len(grid.rows) > len(shown.rows):
        caption += f" The first {len(shown.rows)} of {len(grid.rows)} kinds of modules are shown."
    if not math.isfinite(shown.values.sum()):
        caption += " Grey: nothing was logged, as of a module that is not under the mask."
    low, high = shown.bounds
    middle, half = (low + high) / 2, max(high - low, _LEAST_SPAN) / 2

    def draw(axes: Axes) -> None:
        figures.heat_map(
            axes,
            shown.values,
            [_short(row) for row in shown.rows],
            shown.columns,
            label=_NAMES[key],
            unit=PercentFormatter(1),
            limits=(middle - half, middle + half),
        )
        axes.set_xlabel(f"optimizer {axis}" if axis == "step" else axis)

    extremes = [_place_of(shown, bound, axis) for bound in shown.bounds]
    return Picture(
        file=_MAPS[key].format(axis),
        title=_title(key, axis),
        alt=f"{_title(key, axis)}: a heat map, from {extremes[0]} to {extremes[1]}.",
        caption=caption,
        width=11.0,
        height=1.1 + 0.28 * len(shown.rows),
        draw=draw,
    )


def _place_of(grid: Grid, value: float, axis: str) -> str:
    row, column = (int(at[0]) for at in (grid.values == value).nonzero())
    return f"{value:.2%} in {grid.rows[row]} at {axis} {grid.columns[column]}"


def _short(name: str) -> str:
    """The end of a long name, which says more than its start."""
    return name if len(name) <= _LONGEST_LABEL else f"...{name[-_LONGEST_LABEL + 3 :]}"


def _render(log: TrainingLog, track: Track) -> dict[str, bytes]:
    """The report's files by their names."""
    files: dict[str, bytes] = {}
    shown: dict[str, dict[str, object]] = {}
    for picture in track(pictures(log)):
        light, dark = (
            figures.render_png(picture.draw, picture.width, picture.height, dark=dark)
            for dark in (False, True)
        )
        files[picture.file] = light
        shown[picture.file] = {
            "title": picture.title,
            "alt": picture.alt,
            "caption": picture.caption,
            "width": round(picture.width * 100),
            "height": round(picture.height * 100),
            "light": _data_uri(light),
            "dark": _data_uri(dark),
        }
    return {PAGE: _page(log, shown).encode(), **files}


def _page(log: TrainingLog, shown: Mapping[str, Mapping[str, object]]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("axolotl_gmt"),
        autoescape=True,  # Names in a log are whatever somebody wrote into it.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = [picture for file, picture in shown.items() if file in _CHARTS.values()]
    maps = [picture for file, picture in shown.items() if file not in _CHARTS.values()]
    means = {key: modules.means() for key, modules in log.modules.items()}
    kinds = dict.fromkeys(kind for found in means.values() for kind in found)
    return environment.get_template("report.html").render(
        title="GMT report",
        generator=f"{_GENERATOR} {__version__}",
        log=log,
        facts=facts(log),
        charts=charts,
        maps=maps,
        remarks=_remarks(log),
        statistics=[_NAMES[key].capitalize() for key in means],
        module_means=[
            (kind, [_percent(found.get(kind)) for found in means.values()]) for kind in kinds
        ],
        settings=settings_yaml(log),
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _check_replaceable(folder: Path) -> None:
    """Refuse to write over anything but nothing and an older report."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file. Name a folder for the report.")
    names = {path.name for path in folder.iterdir()}
    foreign = names - set(_own_files())
    if names and (foreign or not _is_own_page(folder / PAGE)):
        raise UserError(
            f"{folder} holds {min(foreign or names)}, which is not of a report. Name another "
            "folder, or move it."
        )


def _own_files() -> Sequence[str]:
    maps = [name.format(axis) for name in _MAPS.values() for axis in ("step", "layer")]
    return [PAGE, *_CHARTS.values(), *maps]


def _is_own_page(page: Path) -> bool:
    mark = f'<meta name="generator" content="{_GENERATOR} '
    return page.is_file() and mark in page.read_text(encoding="utf-8", errors="replace")[:2000]
