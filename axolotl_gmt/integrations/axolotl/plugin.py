"""GMT as an Axolotl plugin: checks the ``gmt_*`` keys, adds the callbacks to the trainer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from transformers import Trainer, TrainerCallback

from axolotl_gmt.integrations.axolotl.args import GMTArgs, read_config
from axolotl_gmt.integrations.axolotl.description import config_text, data_names
from axolotl_gmt.integrations.axolotl.model_card import add_section
from axolotl_gmt.integrations.axolotl.raw_config import (
    NAME,
    PLUGIN_NAMES,
    check_command_line,
    check_held_out_text,
    settle,
)
from axolotl_gmt.integrations.callback import GMTCallback
from axolotl_gmt.integrations.report_callback import GMTReportCallback
from axolotl_gmt.report.log import parse_state

# Axolotl shows INFO of loggers whose name starts with "axolotl"; this sets the package's level.
LOG = get_logger("axolotl_gmt")

_CHARACTERS = frozenset("".join(PLUGIN_NAMES))


class GMTPlugin(BasePlugin):
    """Gradient-Mask Tuning for Axolotl: ``plugins: [axolotl_gmt]``."""

    def __init__(self) -> None:
        super().__init__()
        # Axolotl has loaded NAME by its entry point. Do-nothing plugins under the other spellings
        # keep it from failing on them, or from loading a second one.
        plugins = PluginManager().plugins
        for name in PLUGIN_NAMES - {NAME}:
            plugins.setdefault(name, BasePlugin())
        # Of `plugins: axolotl_gmt` Axolotl would load each character, before `register` can say
        # that a list is needed.
        for character in _CHARACTERS:
            plugins.setdefault(character, BasePlugin())

    def register(self, cfg: DictDefault) -> None:
        """Settle a raw config, before Axolotl validates it.

        Raises:
            ValueError: For a bad setting, naming key, value and fix.
            SystemExit: The same, in the process of ``axolotl``, which then ends with this line and
                not below a traceback.
        """
        plugins = PluginManager().plugins
        for character in _CHARACTERS:
            plugins.pop(character, None)
        with _last_line():
            is_enabled = settle(cfg).enabled
            if is_enabled or _is_axolotl():
                check_command_line(sys.argv)
            if is_enabled:
                check_held_out_text(cfg)

    def get_input_args(self) -> str:
        """The keys that join Axolotl's config schema."""
        return f"{GMTArgs.__module__}.GMTArgs"

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Refuse patterns that match no parameter, where the model's config tells its names.

        Raises:
            ValueError: Naming the setting, the pattern and the fix.
            SystemExit: The same, as in :meth:`register`.
        """
        if cfg.get("gmt_enabled"):
            # It imports what loads models, which other commands do without.
            from axolotl_gmt.integrations.axolotl.meta_model import check_patterns

            with _last_line():
                check_patterns(cfg)

    def add_callbacks_post_trainer(
        self, cfg: DictDefault, trainer: Trainer
    ) -> list[TrainerCallback]:
        """The callbacks that mask gradients and leave a report, if GMT is on."""
        if not cfg.get("gmt_enabled"):
            return []
        callback = GMTCallback(read_config(cfg), forgetting=cfg.get("gmt_forgetting") or False)
        if isinstance(cfg.get("resume_from_checkpoint"), str):
            callback.resume_from = cfg["resume_from_checkpoint"]
        if cfg.get("gmt_report") is False:
            return [callback]
        callback.data, callback.config_file = data_names(cfg), config_text(cfg)
        return [callback, GMTReportCallback()]

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Put the callback before those that report, and have each model card tell of GMT.

        The card is not completed in ``post_train``: Axolotl calls that after it has pushed the card
        to the hub, and once more before there is a card.
        """
        if not cfg.get("gmt_enabled"):
            return
        callback = trainer.pop_callback(GMTCallback)
        callback.put_first(trainer.callback_handler.callbacks)
        callback.is_placed = True
        create_model_card = trainer.create_model_card

        @functools.wraps(create_model_card)
        def create_model_card_with_section(*args: Any, **kwargs: Any) -> None:
            create_model_card(*args, **kwargs)
            if trainer.is_world_process_zero():
                _complete_model_card(trainer)

        trainer.create_model_card = create_model_card_with_section


def _is_axolotl() -> bool:
    """Whether this process is a command of Axolotl; an option of another may mean anything."""
    program = Path(sys.argv[0])
    return program.name == "axolotl" or program.match("axolotl/cli/*.py")


@contextmanager
def _last_line() -> Iterator[None]:
    """End a command of Axolotl with the message of an error, not with a traceback above it."""
    try:
        yield
    except ValueError as error:
        if _is_axolotl():
            raise SystemExit(f"Error: {error}") from error
        raise


def _complete_model_card(trainer: Trainer) -> None:
    card = Path(trainer.args.output_dir, "README.md")
    try:
        add_section(card, parse_state(vars(trainer.state), card.parent.name))
    except Exception as error:  # A card may lack a section, but a trained model must be saved.
        LOG.warning(f"The section on GMT is missing in {card}: {error}")
