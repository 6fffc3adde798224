"""GMT in a Transformers or TRL trainer: attaches the masker when training begins, logs statistics.

Knows nothing of Axolotl, and draws nothing.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.gradients.of_optimizer import nested
from axolotl_gmt.gradients.shard import plain_name, shape
from axolotl_gmt.integrations import mask_files
from axolotl_gmt.integrations.announcement import announce
from axolotl_gmt.integrations.console_callback import ShortConsoleCallback
from axolotl_gmt.integrations.deepspeed_config import check_deepspeed_config
from axolotl_gmt.integrations.forgetting import Forgetting, longest_window
from axolotl_gmt.integrations.held_out_text import HeldOutText
from axolotl_gmt.masking.masker import GradientMasker
from axolotl_gmt.names import kind_name, module_name
from axolotl_gmt.record import RECORD, Attributes, Record, RunState, shown_name

LOG = logging.getLogger(__name__)


class GMTCallback(TrainerCallback):
    """Trains with Gradient-Mask Tuning: ``Trainer(..., callbacks=[GMTCallback(mask_ratio=0.5)])``.

    Works in ``Trainer`` and what derives from it, such as TRL's ``SFTTrainer`` and ``DPOTrainer``,
    with the optimizer that the trainer has. ``gmt/kept_fraction``, ``gmt/grad_norm_kept`` and
    ``gmt/l1_kept`` of the last step join each training log.

    Args:
        config: All settings at once.
        forgetting: A text that the model is not trained on: the path of a file, or True for one in
            English that comes with GMT. The mean negative log-likelihood of its tokens, in nats,
            is measured before training, at each evaluation and at the end, and logged as
            ``gmt/forgetting_loss``, and less that before training as ``gmt/forgetting``. Each
            measurement costs a forward pass over the text.
        **settings: The fields of :class:`GMTConfig`, such as ``mask_ratio``.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) For a bad or unknown setting.
        ValueError: If ``forgetting`` names no text.
        TypeError: If both ``config`` and settings are given, or ``config`` is no GMTConfig.
    """

    is_placed = False
    """Whether it is in front of its trainer's callbacks already, by :meth:`put_first`."""
    resume_from: str | None = None
    """The checkpoint that training resumes from.

    Needed only if masks stay (``mask_interval``) and the checkpoint is neither in the output folder
    nor what ``TrainingArguments`` have: a trainer does not tell its callbacks.
    """

    data: str | Sequence[str] = ()
    """Names of the data sets, for the report. A trainer does not tell its callbacks."""
    config_file: str = ""
    """Text of the file that the run is configured by, for the report."""

    def __init__(
        self,
        config: GMTConfig | None = None,
        *,
        forgetting: str | Path | bool = False,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise TypeError("Give GMTCallback either a config or settings, not both.")
        if not isinstance(config, GMTConfig | None):
            raise TypeError(
                f"GMTCallback({config!r}) does not say what that is. Write settings by name, such "
                "as GMTCallback(mask_ratio=0.5), or give a GMTConfig."
            )
        self.config = config or GMTConfig(**settings)
        self.held_out_text: HeldOutText | None = None  # On which forgetting is measured.
        if forgetting is not False:
            try:
                self.held_out_text = HeldOutText.read(forgetting)
            except ValueError as error:
                raise ValueError(f"forgetting: {error}") from None
        self._setting = forgetting if isinstance(forgetting, bool) else str(forgetting)
        self._forgetting: Forgetting | None = None
        self._masker: GradientMasker | None = None
        self._handle: RemovableHandle | None = None
        self._shown: Callable[[], None] = _nothing

    def put_first(self, callbacks: list[TrainerCallback]) -> None:
        """Move this callback to the front of the list of a trainer's callback handler.

        A trainer hands one dictionary of logs to its callbacks in turn, those of TensorBoard and
        wandb before those that a user adds.
        """
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Come before the trackers already when training begins, which is when they read settings.

        Not called if the callback is added to a trainer that exists.
        """
        if not self.is_placed and (callbacks := _calling_list()) is not None:
            self.put_first(callbacks)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        optimizer: object = None,
        processing_class: object = None,
        **kwargs: Any,
    ) -> None:
        """Attach the masker to the optimizer that the trainer has made by now."""
        assert model is not None
        assert optimizer is not None
        deepspeed = getattr(args, "hf_deepspeed_config", None)
        if deepspeed is not None:
            check_deepspeed_config(deepspeed.config)
        if not self.is_placed and (callbacks := _calling_list()) is not None:
            self.put_first(callbacks)
        self._detach()
        seed = args.seed if self.config.seed is None else self.config.seed
        self._masker = GradientMasker(
            model.named_parameters(remove_duplicate=False),
            self.config.model_copy(update={"seed": seed}),
        )
        self._handle = self._masker.attach(optimizer)
        self._masker.step = state.global_step
        if self._masker.goes_on_with_masks():
            self._masker.load_state_dict(self._load_masks(args, state))
        tensors = [shape(tensor) for _, tensor in self._masker.masked_parameters(optimizer)]
        *_, base_optimizer = nested(optimizer)
        before = RunState.read(vars(state)).record.attributes  # Of the run that is resumed.
        self._begin_to_measure(args, state, model, processing_class, before)
        attributes = Attributes(
            base_optimizer=type(base_optimizer).__name__,
            masked_parameters=sum(size.numel() for size in tensors),
            module_order=_module_order(model) if self.config.log_modules else [],
            model_name=_model_name(model),
            data_names=[self.data] if isinstance(self.data, str) else list(self.data),
            began=datetime.now(UTC).isoformat(timespec="seconds"),
            config_text=self.config_file,
            loss_before=self._forgetting.loss_before if self._forgetting else None,
            held_out_digest=self.held_out_text.digest if self.held_out_text else None,
        )
        if state.global_step:  # What began earlier is not known of every checkpoint.
            attributes.began = before.began
        # A trainer that makes its callbacks anew makes them without what they were told.
        attributes.data_names = attributes.data_names or before.data_names
        attributes.config_text = attributes.config_text or before.config_text
        # Joins every trainer_state.json, so that a checkpoint says how it was trained. A callback
        # that is an ExportableState fails to resume a run that began without it.
        settings = self._masker.config.model_dump(mode="json")
        if self.held_out_text:
            settings["forgetting"] = self._setting
        record = Record(args=settings, attributes=attributes)
        state.stateful_callbacks[RECORD] = record.model_dump()
        if state.is_world_process_zero:
            extra = self._masker.extra_bytes(optimizer)
            announce(
                LOG,
                f"Gradient-Mask Tuning: base optimizer {attributes.base_optimizer}, "
                f"{self.config.summary}; {len(tensors)} tensors with "
                f"{attributes.masked_parameters:,} parameters under the mask"
                + (f"; takes {extra / 1e6:,.1f} MB of memory in this process." if extra else "."),
            )
        self._shown = _show_trackers(self._masker.config, model)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave the model's config as it was, now that trackers have read it."""
        self._shown()
        self._shown = _nothing
        if self.config.log_modules and (callbacks := _calling_list()) is not None:
            ShortConsoleCallback.put_before_printers(callbacks, behind=self)

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
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the statistics of the last step to a training log, and to the trainer's history.

        Forgetting joins the log of an evaluation and the last one, both of which all ranks make.
        """
        if self._masker is None or logs is None:
            return
        if "loss" not in logs:
            is_last = "train_runtime" in logs
            if self._forgetting and (is_last or any(key.startswith("eval_") for key in logs)):
                assert model is not None
                is_new = self._forgetting.step != state.global_step
                measured = self._forgetting.measure(model, state.global_step)
                logs.update(measured)
                if is_new:
                    _remember(state, measured)
            return
        statistics = {f"gmt/{key}": value for key, value in self._masker.statistics().items()}
        if state.is_world_process_zero:  # Other ranks need not remember hundreds of numbers a log.
            for module, of_module in self._masker.module_statistics().items():
                # One string for each, however many logs refer to it.
                keys = (sys.intern(f"gmt/{key}/{module}") for key in of_module)
                statistics |= dict(zip(keys, of_module.values(), strict=True))
        if not statistics and state.is_world_process_zero:
            LOG.warning(
                "GMT has masked nothing so far: no step of the optimizer has shown a gradient. "
                "Unless a gradient scaler skipped every step, use an optimizer that does not step "
                "inside the backward pass."
            )
        logs.update(statistics)
        if state.log_history:  # The trainer copied the log there before it called this.
            state.log_history[-1].update(statistics)

    def _begin_to_measure(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: torch.nn.Module,
        processing_class: object,
        before: Attributes,
    ) -> None:
        """Measure the loss on the held-out text, or take that of the run that is resumed.

        Raises:
            ValueError: If the trainer's tokenizer or model cannot read the text.
        """
        self._forgetting, text = None, self.held_out_text
        if text is None:
            return
        # Models that read more than text come with a processor, which has the tokenizer.
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"forgetting: {text.name} cannot be read without a tokenizer. Give it to the "
                "trainer as processing_class."
            )
        is_same_text = before.held_out_digest == text.digest
        windows = text.windows(tokenizer, longest_window(model))
        self._forgetting = Forgetting(
            windows, args.device, before.loss_before if is_same_text else None
        )
        if self._forgetting.loss_before is None:
            if state.global_step and state.is_world_process_zero:
                LOG.warning(
                    f"Training resumes at step {state.global_step} from a checkpoint that has no "
                    f"loss on {text.name}: gmt/forgetting is what is forgotten from here on."
                )
            _remember(state, self._forgetting.measure(model, state.global_step))
        if state.is_world_process_zero:
            announce(
                LOG,
                f"Forgetting is measured on {self._forgetting.tokens:,} tokens of {text.name}, "
                f"against a loss of {self._forgetting.loss_before:.4f} nats a token.",
            )

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Put the masks that stay into the checkpoint that the trainer has just saved."""
        if self._masker is not None and self._masker.keeps_masks and not args.save_only_model:
            path = _masks_in(_checkpoint(args, state), args)
            mask_files.save(path, self._masker.state_dict())

    def _load_masks(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """The masks of the checkpoint that training resumes from.

        Raises:
            ValueError: If it has none for this process, or is not known.
        """
        step = state.global_step
        named = self.resume_from or args.resume_from_checkpoint
        folder = Path(named) if isinstance(named, str) else _checkpoint(args, state)
        anew = (
            f"Or set warmup_steps (gmt_warmup_steps in YAML): {step}, so that a new mask is made "
            "here."
        )
        if not mask_files.is_checkpoint_of(folder, step, state.log_history):
            raise ValueError(
                f"Training resumes at step {step} and would go on with the masks of its "
                f"checkpoint, but {folder} is not that checkpoint. Set resume_from of the "
                f"GMTCallback to its folder. {anew}"
            )
        path = _masks_in(folder, args)
        try:
            return mask_files.load(path)
        except FileNotFoundError:
            found = sorted(file.name for file in path.parent.glob("rank_*"))
            raise ValueError(
                f"{path} is missing, so that training cannot go on with the masks of the "
                f"checkpoint ({'it has ' + found[0] if found else 'it has none'}). Resume with as "
                f"many processes as saved it. {anew}"
            ) from None

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave the optimizer as it was."""
        self._shown()
        self._detach()
        self._forgetting = None

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where a trainer saves the checkpoint of the step that it is at."""
    return Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _masks_in(checkpoint: Path, args: TrainingArguments) -> Path:
    return mask_files.path_in(checkpoint, args.process_index, args.world_size)


def _remember(state: TrainerState, measured: dict[str, float]) -> None:
    """Put what was measured into the trainer's history, in an entry of its own.

    Transformers makes a table of a model card of the entries of evaluations.
    """
    state.log_history.append({"epoch": state.epoch or 0, **measured, "step": state.global_step})


def _nothing() -> None:
    """There is nothing to take back."""


def _show_trackers(settings: GMTConfig, model: torch.nn.Module) -> Callable[[], None]:
    """Put the settings where wandb, TensorBoard and other trackers look for a run's configuration.

    Transformers' own callbacks hand them the model's config, as it is when training begins.

    Returns:
        What takes the settings out again, so that they are in no ``config.json`` that is saved.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return _nothing
    shown = {f"gmt_{name}": value for name, value in settings.model_dump(mode="json").items()}
    vars(config).update(shown)

    def take_back() -> None:
        for key in shown:
            vars(config).pop(key, None)

    return take_back


def _model_name(model: torch.nn.Module) -> str | None:
    """What the model was loaded as, if it tells."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return shown_name(name) if name else None


def _module_order(model: torch.nn.Module) -> list[str]:
    """The kinds of the modules that have parameters, in the order in which the model has them."""
    names = (plain_name(name) for name, _ in model.named_parameters())
    return list(dict.fromkeys(kind_name(module_name(name)) for name in names))


def _calling_list() -> list[TrainerCallback] | None:
    """The callbacks of the trainer that is calling one of them right now.

    A trainer gives a callback no reference to itself or to the list. It is that of the
    ``CallbackHandler`` which is calling, so it is read from the calling frame.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is None:
        LOG.warning(
            "GMT's statistics will not reach reporting callbacks that come before GMTCallback."
        )
        return None
    callbacks: list[TrainerCallback] = frame.f_locals["self"].callbacks
    return callbacks
