"""Keeps the statistics of modules off the console, where they would be hundreds a line."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_gmt.record import STATISTICS

# By name, since the last one is TRL's, which need not be installed.
_PRINTERS = {"PrinterCallback", "ProgressCallback", "RichProgressCallback"}
_OF_MODULES = tuple(f"{statistic}/" for statistic in STATISTICS)


class ShortConsoleCallback(TrainerCallback):
    """Takes the statistics of modules out of a log that trackers have seen and printers have not.

    A trainer hands one dictionary of logs to all of its callbacks in turn.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take them out."""
        for key in [key for key in logs or () if key.startswith(_OF_MODULES)]:
            del logs[key]  # type: ignore[union-attr]

    @classmethod
    def put_before_printers(cls, callbacks: list[TrainerCallback], behind: TrainerCallback) -> None:
        """Move printers to the end of a trainer's callbacks, and one of this class before them.

        Args:
            callbacks: The list, which the trainer may be going through right now.
            behind: The callback that it is calling. What comes before that one stays in its place,
                so that the trainer calls no callback twice and leaves none out.
        """
        if any(isinstance(callback, cls) for callback in callbacks):
            return
        start = callbacks.index(behind) + 1
        printers = [callback for callback in callbacks[start:] if _is_printer(callback)]
        rest = [callback for callback in callbacks[start:] if callback not in printers]
        callbacks[start:] = [*rest, cls(), *printers]


def _is_printer(callback: TrainerCallback) -> bool:
    return any(base.__name__ in _PRINTERS for base in type(callback).__mro__)
