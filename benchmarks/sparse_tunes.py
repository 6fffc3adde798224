"""What sparse tunes cost in quality and save in size, on the quickstart's task.

``python benchmarks/sparse_tunes.py FOLDER`` trains the quickstart's recipe in FOLDER with each of
the settings below, scores the models, and measures the delta of each. Models that are there already
are kept, so that it can be interrupted. Writes ``results/sparse_tunes.json`` and
``docs/sparse-tunes.png``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from matplotlib.axes import Axes

from axolotl_gmt.report.log import find_state, read_log
from axolotl_gmt.tools import scoring
from axolotl_gmt.tools.delta.diff import diff
from axolotl_gmt.tools.quickstart import Folder, is_trained, prepare, train

HERE = Path(__file__).parent
BLUE, GREY = "#1f6fb2", "#9aa4ad"

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"gmt_mask_ratio": 0.5},
    "sparse": {"gmt_mask_ratio": 0.95, "gmt_mask_interval": "once", "gmt_hold": True},
}
LABELS = {
    "default": "ratio 0.5, the defaults",
    "sparse": "ratio 0.95, once, hold",
}


def train_as(name: str, folder: Folder) -> Path:
    """The model that the quickstart's recipe trains with the settings of that name."""
    recipe = yaml.safe_load(folder.sft_recipe.read_text())
    recipe |= {"gmt_log_modules": False, "save_strategy": "no", "output_dir": f"./{name}"}
    path = folder.path / f"{name}.yml"
    path.write_text(yaml.safe_dump(recipe | SETTINGS[name], sort_keys=False))
    model = folder.path / name
    if not is_trained(model):
        train(path)
    return model


def measure(name: str, folder: Folder) -> dict[str, Any]:
    """What is known of the model of that name."""
    model = train_as(name, folder)
    log = read_log(find_state(model))
    problems = scoring.read_problems(folder.held_out_data)
    (score,) = scoring.score_models([model], problems)
    with tempfile.TemporaryDirectory(dir=folder.path) as place:
        result = diff(folder.base_model, model, Path(place, "delta.safetensors"), force=True)
    losses = log.curves["loss"]
    return {
        "settings": SETTINGS[name],
        "exact": score.exact,
        "problems": score.problems,
        "changed": result.changed,
        "entries": result.entries,
        "delta bytes": result.nbytes,
        "model bytes": result.model_nbytes,
        "steps": losses.steps.tolist(),
        "loss": losses.values.tolist(),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row in Markdown for each setting."""
    lines = [
        "| settings | right | entries changed | delta | of the model |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in results.items():
        size = row["delta bytes"]
        lines.append(
            f"| {LABELS[name]} | {row['exact']} of {row['problems']} "
            f"| {row['changed'] / row['entries']:.2%} | {size / 1e6:,.0f} MB "
            f"| {size / row['model bytes']:.1%} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """The sizes of the deltas, the right answers and the losses, in one picture."""
    figure, (sizes, answers, curves) = plt.subplots(
        1, 3, figsize=(13, 2.6), width_ratios=(1, 1, 1.3), layout="constrained"
    )
    names = list(results)[::-1]
    colors = [BLUE if name == "sparse" else GREY for name in names]
    labels = [LABELS[name] for name in names]
    megabytes = [results[name]["delta bytes"] / 1e6 for name in names]
    bars(sizes, labels, megabytes, colors, "{:,.0f}")
    whole = results[names[0]]["model bytes"] / 1e6
    sizes.axvline(whole, color="black", ls=":", lw=1)
    sizes.set_title(f"MB of the delta (dotted: the model, {whole:,.0f})", fontsize=10)
    right = [100 * results[name]["exact"] / results[name]["problems"] for name in names]
    bars(answers, [""] * len(names), right, colors, "{:.0f}")
    answers.set_title("right answers, % of 100 new sums", fontsize=10)
    for name, color in zip(names, colors, strict=True):
        curves.plot(results[name]["steps"], results[name]["loss"], color=color, label=LABELS[name])
    curves.set_title("training loss", fontsize=10)
    curves.set_xlabel("step")
    curves.legend(frameon=False, fontsize=8, reverse=True)
    curves.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def bars(axes: Axes, labels: list[str], values: list[float], colors: list[str], form: str) -> None:
    """One bar for each value, from the bottom up."""
    drawn = axes.barh(range(len(values)), values, color=colors)
    axes.bar_label(drawn, [form.format(value) for value in values], padding=3)
    axes.set_yticks(range(len(values)), labels)
    axes.set_xlim(0, max(values) * 1.18)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Train, measure, and write the results and the picture."""
    folder = Folder(Path(sys.argv[1]))
    prepare(folder)
    path = HERE / "results" / "sparse_tunes.json"
    results = {}
    for name in SETTINGS:
        results[name] = measure(name, folder)
        print(f"{LABELS[name]}: {results[name]['exact']} of {results[name]['problems']} right")
    print(table(results))
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, HERE.parent / "docs" / "sparse-tunes.png")


if __name__ == "__main__":
    main()
