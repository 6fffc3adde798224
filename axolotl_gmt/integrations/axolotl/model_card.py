"""The section on GMT in a model card.

Knows Hugging Face's model cards and what a training log says, not who writes either.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard

from axolotl_gmt.files import whole
from axolotl_gmt.record import FOLDER, GRAD_NORM_KEPT, KEPT_FRACTION, L1_KEPT
from axolotl_gmt.report.log import TrainingLog

TAGS = ("gmt", "gradient-mask-tuning")
HEADING = "## Gradient-Mask Tuning"

# Invisible in a rendered card; what stands between them is replaced when the card is made again.
_START, _END = "<!-- axolotl-gmt -->", "<!-- /axolotl-gmt -->"
_SECTION = re.compile(rf"\n*{_START}.*?{_END}\n*", re.DOTALL)
_PAPER = (
    "Li et al., *Enhancing Large Language Model Performance with Gradient-Based Parameter "
    "Selection*, AAAI 2025, [arXiv 2406.15330](https://arxiv.org/abs/2406.15330)"
)


def add_section(card_file: Path, log: TrainingLog) -> None:
    """Put the section and the tags of GMT into a card, once, and leave the rest as it is.

    Args:
        card_file: The card, ``README.md`` in the run's output folder.
        log: The run, with its settings.

    Raises:
        OSError: If the card cannot be read or written.
        ValueError: If its front matter is not what a card's should be.
    """
    card = ModelCard.load(card_file)
    tags = [card.data.tags] if isinstance(card.data.tags, str) else card.data.tags or []
    card.data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    card.text = f"{_SECTION.sub('\n', card.text).rstrip()}\n\n{_section(log, card_file.parent)}\n"
    with whole(card_file) as part:
        card.save(part)


def _section(log: TrainingLog, folder: Path) -> str:
    criterion = log.settings.get("criterion", "gradient")
    selected = (
        "of largest magnitude" if criterion == "gradient" else f"that the rule `{criterion}` picked"
    )
    ratio = log.mask_ratio
    facts = [
        f"of each group of gradient entries, {ratio:.4g} was masked and {1 - ratio:.4g} kept"
        if ratio is not None
        else None,
        f"base optimizer: {log.base_optimizer}" if log.base_optimizer else None,
        f"parameters under the mask: {log.masked_parameters:,}" if log.masked_parameters else None,
        _mean("kept fraction (non-zero entries that survived)", log.mean(KEPT_FRACTION)),
        _mean("gradient norm kept", log.mean(GRAD_NORM_KEPT)),
        _mean("L1 norm kept", log.mean(L1_KEPT)),
    ]
    picture = Path(FOLDER, "grad_norm_kept_by_layer.png")
    parts = [
        _START,
        HEADING,
        "This model was trained with Gradient-Mask Tuning (GMT): at each optimizer step, only the "
        f"gradient entries {selected} reached the optimizer ({_PAPER}).",
        f"```yaml\n{log.settings_yaml}```",
        "\n".join(f"- {fact}" for fact in facts if fact),
        f"![Share of the gradient's norm that GMT kept, by kind of module and layer]({picture})"
        if (folder / picture).is_file()
        else "",
        _END,
    ]
    return "\n\n".join(part for part in parts if part)


def _mean(label: str, value: float | None) -> str | None:
    return None if value is None else f"{label}, mean of the logged steps: {value:.2%}"
