"""The ``gmt_*`` keys of an Axolotl config, each with its type and meaning.

Imports neither Axolotl nor Transformers, so that the schema of the keys comes at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, Field, ValidationError, create_model

from axolotl_gmt.config import GMTConfig, explain

PREFIX = "gmt_"
DEFAULT_BASE_OPTIMIZER = "adamw_torch_fused"


class _SwitchArgs(BaseModel):
    """The keys that only the plugin reads; the rest are GMTConfig's."""

    gmt_enabled: bool | None = Field(
        default=None,
        description="Whether GMT masks gradients. Unset: it does if `optimizer` is `gmt` or the "
        "plugin is listed under `plugins`.",
    )
    gmt_base_optimizer: str | None = Field(
        default=None,
        description="The optimizer that `optimizer: gmt` steps with, any name that Axolotl's "
        f"`optimizer` takes. Unset: {DEFAULT_BASE_OPTIMIZER}.",
    )
    gmt_report: bool | None = Field(
        default=None,
        description="Whether a report of the run is left in `output_dir/gmt_report` when training "
        "ends. Unset: it is.",
    )
    gmt_forgetting: bool | str | None = Field(
        default=None,
        description="A text that the model is not trained on: a file, or `true` for one in English "
        "that comes with GMT. The loss on it joins the log as `gmt/forgetting`. Unset: none is.",
    )


_CONFIG_TYPES = get_type_hints(GMTConfig, include_extras=True)
_CONFIG_ARGS: dict[str, Any] = {
    PREFIX + name: (_CONFIG_TYPES[name] | None, Field(default=None, description=field.description))
    for name, field in GMTConfig.model_fields.items()
}
GMTArgs = create_model(
    "GMTArgs",
    __base__=_SwitchArgs,
    __module__=__name__,
    __doc__="The keys that GMT adds to Axolotl's config, all unset by default.",
    **_CONFIG_ARGS,
)


def read_config(cfg: Mapping[str, Any]) -> GMTConfig:
    """The settings of GMT in an Axolotl config.

    Raises:
        ValueError: Naming each bad key, its value and the fix.
    """
    settings: dict[str, Any] = {
        name: value
        for name in GMTConfig.model_fields
        if (value := cfg.get(PREFIX + name)) is not None
    }
    if "seed" not in settings and cfg.get("seed") is not None:
        settings["seed"] = cfg["seed"]
    try:
        return GMTConfig(**settings)
    except ValidationError as error:
        raise ValueError(explain(error, PREFIX)) from None
