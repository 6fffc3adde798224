"""The settings of Gradient-Mask Tuning: each one once, with its default, range and meaning.

Knows nothing of Axolotl, trainers or how training is distributed. The YAML keys of the Axolotl
plugin are these names with the prefix ``gmt_``.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from typing import Annotated, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import InitErrorDetails, PydanticCustomError


def _check_mask_ratio(value: object) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        ratio = float(value)  # type: ignore[arg-type]
    except OverflowError:
        ratio = math.inf
    except (TypeError, ValueError):
        raise ValueError(
            f"{value!r} is not a number. Set the fraction of gradient entries to mask, "
            "at least 0 and below 1, such as 0.5."
        ) from None
    if not 0 <= ratio < 1:  # As NaN is not.
        raise ValueError(
            f"{value!r} is outside [0, 1). It is the fraction of gradient entries that is masked "
            "(0.3 keeps the largest 70 %). Set at least 0 and below 1, such as 0.5."
        )
    return ratio


def _one_of(*choices: str) -> BeforeValidator:
    def check(value: object) -> object:
        if value not in choices:
            raise ValueError(f"{value!r} is not one of {', '.join(choices)}. Set one of these.")
        return value

    return BeforeValidator(check)


def _check_patterns(value: object) -> object:
    patterns = [value] if isinstance(value, str) else value
    if patterns is None:
        return None
    if not isinstance(patterns, list | tuple) or not patterns:
        raise ValueError(
            f"{value!r} is not a regular expression or a list of them. "
            "Set patterns over parameter names, or remove the setting to cover every parameter."
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{reprlib.repr(pattern)} is not a valid regular expression ({error}). "
                "Fix the pattern; it is searched for in parameter names, dots escaped as '\\.'."
            ) from None
    return tuple(patterns)


def _check_mask_interval(value: object) -> object:
    if value != "once" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(
            f"{value!r} is neither a number of optimizer steps nor once. Set 1 for a new mask at "
            "every step, N for one every N steps, or once for one mask in the whole run."
        )
    return value


def _check_warmup_steps(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"{value!r} is not a number of optimizer steps. Set how many come before the first "
            "mask, such as 10, or 0."
        )
    return value


def _check_criterion(value: object) -> object:
    from axolotl_gmt import criteria  # It imports torch, which a JSON schema does not need.

    criteria.find(value)
    return value


Granularity = Literal["tensor", "layer", "global"]

# The validators make the messages; what stands beside them is for the JSON schema.
MaskRatio = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_check_mask_ratio)]
GranularitySetting = Annotated[Granularity, _one_of(*get_args(Granularity))]
CriterionSetting = Annotated[
    str,
    BeforeValidator(_check_criterion),
    Field(
        examples=[
            "gradient",
            "random",
            "fixed_random",
            "smallest",
            "gradient_weight",
            "relative",
            "half",
        ]
    ),
]
_PATTERN: JsonDict = {"type": "string", "format": "regex"}
MaskInterval = Annotated[
    Annotated[int, Field(ge=1)] | Literal["once"], BeforeValidator(_check_mask_interval)
]
WarmupSteps = Annotated[int, Field(ge=0), BeforeValidator(_check_warmup_steps)]
Patterns = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(_check_patterns),
    WithJsonSchema(
        {"anyOf": [_PATTERN, {"type": "array", "items": _PATTERN, "minItems": 1}, {"type": "null"}]}
    ),
]


class GMTConfig(BaseModel):
    """Settings of one Gradient-Mask Tuning run.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) naming the setting, its value and the fix.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mask_ratio: MaskRatio = Field(
        default=0.5,
        description="Fraction of each group of gradient entries that is masked (dropped), "
        "in [0, 1). 0 masks nothing.",
    )
    granularity: GranularitySetting = Field(
        default="tensor",
        description="Which entries compete for one threshold: those of one `tensor`, of one "
        "decoder `layer` (tensors outside any layer keep one threshold each), or all (`global`).",
    )
    criterion: CriterionSetting = Field(
        default="gradient",
        description="What makes an entry important: `gradient` is the magnitude of its gradient, "
        "the paper's; `random`, `fixed_random`, `smallest`, `gradient_weight`, `relative`, `half` "
        "and those of installed packages are for comparisons.",
    )
    include: Patterns = Field(
        default=None,
        description="Regular expressions searched for in parameter names; only parameters that "
        "match one are masked. Unset: all are.",
    )
    exclude: Patterns = Field(
        default=None,
        description="Regular expressions searched for in parameter names; parameters that match "
        "one are stepped unmasked, even if `include` names them.",
    )
    seed: int | None = Field(
        default=None,
        description="Seed for criteria that draw at random (`random`, `fixed_random`, "
        "`half`). Unset: the run's seed.",
    )
    mask_interval: MaskInterval = Field(
        default=1,
        description="A new mask every so many optimizer steps, kept in between; `once`: the first "
        "mask stays for the whole run. 1 is the paper's.",
    )
    warmup_steps: WarmupSteps = Field(
        default=0,
        description="Optimizer steps before the first mask, in which nothing is masked.",
    )
    hold: bool = Field(
        default=False,
        description="Whether an entry whose masked gradient is 0 keeps its weight in that step, "
        "bit for bit: no momentum, no weight decay. Costs a copy of the weights.",
    )
    log_modules: bool = Field(
        default=False,
        description="Whether the statistics of each module join the training log: "
        "`gmt/kept_fraction/MODULE`, `gmt/grad_norm_kept/MODULE` and `gmt/l1_kept/MODULE`.",
    )
    log_overlap: bool = Field(
        default=False,
        description="Whether the log tells how masks change over time: `gmt/mask_overlap`, "
        "`gmt/mask_overlap_by_chance` and `gmt/ever_kept`. Costs 3 bits an entry.",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_names(cls, settings: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Say of a setting that does not exist which one may have been meant."""
        try:
            return handler(settings)
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                error.title,
                [
                    InitErrorDetails(
                        type=_no_such_setting(str(item["loc"][-1]))
                        if item["type"] == "extra_forbidden"
                        else item["type"],
                        loc=item["loc"],
                        input=item["input"],
                        ctx=item.get("ctx", {}),
                    )
                    for item in error.errors()
                ],
            ) from None

    @property
    def summary(self) -> str:
        """How entries are selected, for a log."""
        if self.criterion == "half" and self.mask_ratio:  # It has no ratio of its own.
            return "criterion half"
        words = [
            f"ratio masked {self.mask_ratio:.4g} (kept {1 - self.mask_ratio:.4g}), granularity "
            f"{self.granularity}, criterion {self.criterion}"
        ]
        if self.mask_ratio:  # Else there is no mask.
            if self.warmup_steps:
                words.append(f"no mask in the first {self.warmup_steps} steps")
            if self.mask_interval == "once":
                words.append("one mask for the whole run")
            elif self.mask_interval > 1:
                words.append(f"a new mask every {self.mask_interval} steps")
            if self.hold:
                words.append("weights of masked entries held")
        return ", ".join(words)


def _no_such_setting(name: str) -> PydanticCustomError:
    known = GMTConfig.model_fields
    nearest = difflib.get_close_matches(name.removeprefix("gmt_"), known, n=1, cutoff=0)[0]
    return PydanticCustomError(
        "no_such_setting",
        "there is no such setting. Did you mean {nearest}? The settings are {known}.",
        {"nearest": nearest, "known": ", ".join(known)},
    )


def explain(error: ValidationError, prefix: str = "") -> str:
    """One line per bad setting of ``error``, each starting with the setting's name.

    Args:
        error: What ``GMTConfig(...)`` raised.
        prefix: Put before each name, such as ``gmt_`` for the keys of a YAML file.
    """
    lines = []
    for item in error.errors():
        name = f"{prefix}{item['loc'][0]}"
        if item["type"] == "value_error":
            lines.append(f"{name}: {item['ctx']['error']}")
        elif item["type"] == "no_such_setting":
            lines.append(f"{name}: {item['msg']}")
        else:
            lines.append(f"{name}: {item['input']!r} is not valid: {item['msg']}.")
    return "\n".join(lines)
