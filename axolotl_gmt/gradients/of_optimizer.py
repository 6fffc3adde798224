"""Which source gives the gradients of an optimizer; only that one is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from axolotl_gmt.gradients.shard import StepGradients


def nested(optimizer: object) -> Iterator[object]:
    """``optimizer``, and those that Accelerate and DeepSpeed put it around, outermost first."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def step_gradients(optimizer: object, names: Mapping[Tensor, Sequence[str]]) -> StepGradients:
    """The gradients of ``optimizer``, which may be wrapped by Accelerate or made by DeepSpeed.

    Raises:
        ValueError: For a way to train in which GMT cannot be exact, with what to use instead.
        TypeError: For what is no torch optimizer.
    """
    innermost = optimizer
    for innermost in nested(optimizer):
        if type(innermost).__module__.startswith("deepspeed."):
            from axolotl_gmt.gradients.zero import ZeroGradients

            return ZeroGradients(innermost, names)
    if not isinstance(innermost, Optimizer):
        attributes = getattr(innermost, "__dict__", {})
        inside = [name for name, value in attributes.items() if isinstance(value, Optimizer)]
        fix = (
            f"Attach to its optimizer, which is its attribute {inside[0]}."
            if inside
            else "Attach to the torch optimizer whose step() updates the model, or to Accelerate's "
            "or DeepSpeed's around one."
        )
        raise TypeError(
            f"{type(optimizer).__name__} is no torch optimizer, so it has no hook. {fix}"
        )
    from axolotl_gmt.gradients.plain import PlainGradients

    return PlainGradients(innermost, names)
