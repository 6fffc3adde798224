"""The report of a run, left in its output folder when training ends. Knows nothing of Axolotl."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_gmt.files import whole
from axolotl_gmt.integrations.announcement import announce
from axolotl_gmt.record import FOLDER, STATE_FILE

LOG = logging.getLogger(__name__)


class GMTReportCallback(TrainerCallback):
    """Leaves a page with the run's curves in ``OUTPUT_DIR/gmt_report`` when training ends.

    Add it beside :class:`~axolotl_gmt.GMTCallback`, which logs what the page shows. It also writes
    the trainer's state, ``trainer_state.json``, which the page is made of. No failure stops a run.
    """

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write both, on the first process only."""
        if state.is_world_process_zero:
            _leave_report(state, Path(args.output_dir))


def _leave_report(state: TrainerState, folder: Path) -> None:
    from axolotl_gmt.report.log import NothingLoggedError, parse_state

    try:
        # Takes a second, and may fail where matplotlib is broken.
        from axolotl_gmt.report.page import write_report

        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / STATE_FILE) as part:
            state.save_to_json(str(part))
        page, *_ = write_report(parse_state(vars(state), folder.resolve().name), folder / FOLDER)
        announce(LOG, f"The report of this run with GMT is {page}")
    except NothingLoggedError:
        LOG.warning(
            f"Gradient-Mask Tuning: there is no report, since this run ended after "
            f"{state.global_step} steps, before its first log. For the next one set logging_steps "
            f"(now {state.logging_steps}) to a part of these."
        )
    except Exception as error:  # The model has yet to be saved, and no report is worth a model.
        LOG.warning(
            f"Gradient-Mask Tuning: the report was not written: {error} Training goes on; make it "
            f"later with: python -m axolotl_gmt report {shlex.quote(str(folder))}"
        )
