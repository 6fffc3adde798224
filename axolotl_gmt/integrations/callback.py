"""GMT in a Transformers or TRL trainer: attaches the masker when training begins, logs statistics.

The only module that knows trainers. It knows nothing of Axolotl.
"""

from __future__ import annotations

import inspect
import logging
import shlex
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.files import whole
from axolotl_gmt.gradients.shard import shape
from axolotl_gmt.gradients.zero import check_deepspeed_config
from axolotl_gmt.masking.masker import GradientMasker
from axolotl_gmt.report.log import RECORD, STATE_FILE, NothingLoggedError, parse_state
from axolotl_gmt.report.page import FOLDER, write_report

LOG = logging.getLogger(__name__)


class GMTCallback(TrainerCallback):
    """Trains with Gradient-Mask Tuning: ``Trainer(..., callbacks=[GMTCallback(mask_ratio=0.5)])``.

    Works in ``Trainer`` and what derives from it, such as TRL's ``SFTTrainer`` and ``DPOTrainer``,
    with the optimizer that the trainer has. ``gmt/kept_fraction`` and ``gmt/grad_norm_kept`` of
    the last step join each training log.

    Args:
        config: All settings at once, or none of them here.
        **settings: The fields of :class:`GMTConfig`, such as ``mask_ratio``.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) For a bad or unknown setting.
        TypeError: If both ``config`` and settings are given.
    """

    def __init__(self, config: GMTConfig | None = None, **settings: Any) -> None:
        if config is not None and settings:
            raise TypeError("Give GMTCallback either a config or settings, not both.")
        self.config = config or GMTConfig(**settings)
        self.base_optimizer: str | None = None
        self.masked_parameters: int | None = None
        self._masker: GradientMasker | None = None
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        optimizer: object = None,
        **kwargs: Any,
    ) -> None:
        """Attach the masker to the optimizer that the trainer has made by now."""
        assert model is not None
        assert optimizer is not None
        deepspeed = getattr(args, "hf_deepspeed_config", None)
        if deepspeed is not None:
            check_deepspeed_config(deepspeed.config)
        _move_to_front(self)
        self._detach()
        seed = args.seed if self.config.seed is None else self.config.seed
        self._masker = GradientMasker(
            model.named_parameters(remove_duplicate=False),
            self.config.model_copy(update={"seed": seed}),
        )
        self._handle = self._masker.attach(optimizer)
        tensors = [shape(tensor) for _, tensor in self._masker.masked_parameters(optimizer)]
        self.base_optimizer = _innermost(optimizer)
        self.masked_parameters = sum(size.numel() for size in tensors)
        # Joins every trainer_state.json, so that a checkpoint says how it was trained. A callback
        # that is an ExportableState fails to resume a run that began without it.
        state.stateful_callbacks[RECORD] = {
            "args": self._masker.config.model_dump(mode="json"),
            "attributes": {
                "base_optimizer": self.base_optimizer,
                "masked_parameters": self.masked_parameters,
            },
        }
        if state.is_world_process_zero:
            LOG.info(self._describe(len(tensors)))

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Tell the masker the step, so that a resumed run draws what it would have drawn."""
        if self._masker is not None:
            self._masker.step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the statistics of the last step to a training log, and to the trainer's history."""
        if self._masker is None or logs is None or "loss" not in logs:
            return
        statistics = {f"gmt/{key}": value for key, value in self._masker.statistics().items()}
        if state.is_world_process_zero:  # Other ranks need not remember hundreds of numbers a log.
            for module, found in self._masker.module_statistics().items():
                # One string for each, however many logs refer to it.
                keys = (sys.intern(f"gmt/{key}/{module}") for key in found)
                statistics |= dict(zip(keys, found.values(), strict=True))
        if not statistics and state.is_world_process_zero:
            LOG.warning(
                "GMT has masked nothing so far: no step of the optimizer has shown a gradient. "
                "Unless a gradient scaler skipped every step, use an optimizer that does not step "
                "inside the backward pass."
            )
        logs.update(statistics)
        if state.log_history:  # The trainer copied the log there before it called this.
            state.log_history[-1].update(statistics)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave the optimizer as it was, and a report of the run in its output folder."""
        self._detach()
        if state.is_world_process_zero:
            _leave_report(state, Path(args.output_dir))

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _describe(self, tensors: int) -> str:
        return (
            f"Gradient-Mask Tuning: base optimizer {self.base_optimizer}, {self.config.selection}; "
            f"{tensors} tensors with {self.masked_parameters:,} parameters under the mask."
        )


def _innermost(optimizer: object) -> str:
    """Class name of the torch optimizer in those that Accelerate and DeepSpeed put around it."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return type(optimizer).__name__


def _leave_report(state: TrainerState, folder: Path) -> None:
    """Write the trainer's state, which no last checkpoint need have, and the report made of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / STATE_FILE) as part:
            state.save_to_json(str(part))
        log = parse_state(vars(state), folder.resolve().name)
        page, *_ = write_report(log, folder / FOLDER)
        LOG.info(f"The report of this run with GMT is {page}")
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


def _move_to_front(callback: GMTCallback) -> None:
    """Put ``callback`` before the reporting callbacks of its trainer.

    A trainer hands one dictionary of logs to its callbacks in turn, TensorBoard and wandb first,
    and gives a callback no reference to itself or to the list. The list is that of the
    ``CallbackHandler`` which is calling right now, so it is read from the calling frame.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is None:
        LOG.warning(
            "GMT's statistics will not reach reporting callbacks that come before GMTCallback."
        )
        return
    callbacks = frame.f_locals["self"].callbacks
    callbacks.remove(callback)
    callbacks.insert(0, callback)
