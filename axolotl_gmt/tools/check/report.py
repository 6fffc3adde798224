"""What a check says of one file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Mask:
    """Tensors and parameters that GMT masks, and those that are trained; tied ones count once."""

    masked_tensors: int
    masked_parameters: int
    trained_tensors: int
    trained_parameters: int


@dataclass
class Plan:
    """What GMT would do with a config.

    Attributes:
        enabled: Whether GMT is on.
        why: The key that decides it.
        base_optimizer: What the run steps with; None if unset in a config that is in error.
        settings: Those of :class:`GMTConfig`, empty if GMT is off.
        mask: Counts, None if GMT is off or the model is not known.
        not_counted: Why there are no counts.
    """

    enabled: bool
    why: str
    base_optimizer: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    mask: Mask | None = None
    not_counted: str | None = None


@dataclass
class Report:
    """What was found in one file.

    Attributes:
        path: As it was given.
        readable: Whether the file holds a config at all.
        gpus: How many GPUs the config was checked for.
        errors: Why a run would not start, a line each.
        warnings: What is likely to be regretted: secrets, paths, keys that nobody reads.
        remarks: Good to know; not held against the file.
        gmt: What GMT would do, if its keys can be read.
    """

    path: str
    readable: bool = True
    gpus: int | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    gmt: Plan | None = None

    @property
    def ok(self) -> bool:
        """Whether there are neither errors nor warnings."""
        return not (self.errors or self.warnings)

    def as_dict(self) -> dict[str, object]:
        """The report with ``ok``, for JSON."""
        return {"path": self.path, "ok": self.ok, **asdict(self)}
