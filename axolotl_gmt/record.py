"""What a run with GMT writes of itself into ``trainer_state.json``, and how it is read back.

The callback writes it, the report reads it. Nothing in a file is trusted: a field that does not
hold what it should reads as if it were missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

FOLDER = "gmt_report"
"""The name of a report's folder in a run's output folder, unless the user names another."""
STATE_FILE = "trainer_state.json"
RECORD = "GMTCallback"
"""The key of the record among the ``stateful_callbacks`` of a state: the class that wrote it."""

KEPT_FRACTION = "gmt/kept_fraction"
GRAD_NORM_KEPT = "gmt/grad_norm_kept"
L1_KEPT = "gmt/l1_kept"
MASK_OVERLAP = "gmt/mask_overlap"
MASK_OVERLAP_BY_CHANCE = "gmt/mask_overlap_by_chance"
EVER_KEPT = "gmt/ever_kept"
STATISTICS = (
    KEPT_FRACTION,
    GRAD_NORM_KEPT,
    L1_KEPT,
    MASK_OVERLAP,
    MASK_OVERLAP_BY_CHANCE,
    EVER_KEPT,
)
"""Keys in a log; with ``/MODULE`` behind them, those of one module."""

FORGETTING = "gmt/forgetting"
FORGETTING_LOSS = "gmt/forgetting_loss"
"""Keys of the loss on a held-out text, in nats a token: less that before training, and as it is."""

Count = Annotated[int, Field(ge=0, lt=2**53)]


def shown_name(path: str) -> str:
    """A hub id or a relative path as it is; of an absolute one the end, as a disk is private."""
    return Path(path).name if Path(path).is_absolute() else path


class _Lenient(BaseModel):
    """Takes the default for each field that is not valid."""

    model_config = ConfigDict(strict=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _default_if_not_valid(
        cls, value: object, validate: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> object:
        try:
            return validate(value)
        except ValidationError:
            assert info.field_name is not None
            return cls.model_fields[info.field_name].get_default(call_default_factory=True)


class Attributes(_Lenient):
    """What the callback saw when training began.

    Transformers can set them on a new callback, so none has the name of an attribute that it uses.
    """

    base_optimizer: str | None = None
    """Class name of the optimizer whose gradients are masked."""
    masked_parameters: Count | None = None
    """Number of entries under the mask."""
    module_order: list[str] = []
    """Kinds of modules, as :func:`~axolotl_gmt.names.kind_name` names them, in the model's order.

    Empty unless modules are logged. Needed since the JSON log is sorted by name.
    """
    model_name: str | None = None
    """Name of the model on the hub, or of its folder."""
    data_names: list[str] = []
    """Names of the data sets, as far as the callback was told them."""
    began: str | None = None
    """When training began first, in ISO 8601."""
    config_text: Annotated[str, Field(max_length=100_000)] = ""
    """Text of the file that the run was configured by, if the callback was told it."""
    loss_before: float | None = None
    """Loss on the held-out text before training, if it is measured; a resumed run goes on with it.
    """
    held_out_digest: str | None = None
    """Digest of that text, since the loss on another one tells nothing."""


class Record(_Lenient):
    """The state of the callback, in the form in which Transformers resumes callbacks."""

    args: dict[str, Any] = {}
    """The fields of :class:`~axolotl_gmt.config.GMTConfig`, which a new callback is made with."""
    attributes: Attributes = Attributes()


class RunState(_Lenient):
    """What the report reads of Transformers' ``TrainerState``."""

    log_history: list[Any] | None = None
    global_step: Count | None = None
    max_steps: Count | None = None
    train_batch_size: Count | None = None
    epoch: Annotated[float, Field(ge=0, lt=1e30)] | None = None
    stateful_callbacks: dict[str, Any] = {}

    @classmethod
    def read(cls, state: object) -> Self:
        """The fields of ``state`` that are valid; whatever it is, nothing is raised."""
        return cls.model_validate(state if isinstance(state, Mapping) else {})

    @property
    def record(self) -> Record:
        """What the callback left; empty if it was not there."""
        record = self.stateful_callbacks.get(RECORD)
        return Record.model_validate(record if isinstance(record, Mapping) else {})
