"""Which source gives the gradients of an optimizer; only that one is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from axolotl_gmt.gradients.shard import StepGradients


def step_gradients(optimizer: object, names: Mapping[Tensor, Sequence[str]]) -> StepGradients:
    """The gradients of ``optimizer``, which may be wrapped by Accelerate or made by DeepSpeed.

    Raises:
        ValueError: For a way to train in which GMT cannot be exact, with what to use instead.
        TypeError: For what is no torch optimizer.
    """
    given = optimizer
    while not (made_by_deepspeed := type(optimizer).__module__.startswith("deepspeed.")):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
    if made_by_deepspeed:
        from axolotl_gmt.gradients.zero import ZeroGradients

        return ZeroGradients(optimizer, names)
    if not isinstance(optimizer, Optimizer):
        attributes = getattr(optimizer, "__dict__", {})
        inside = [name for name, value in attributes.items() if isinstance(value, Optimizer)]
        fix = (
            f"Attach to its optimizer, which is its attribute {inside[0]}."
            if inside
            else "Attach to the torch optimizer whose step() updates the model, or to Accelerate's "
            "or DeepSpeed's around one."
        )
        raise TypeError(f"{type(given).__name__} is no torch optimizer, so it has no hook. {fix}")
    from axolotl_gmt.gradients.plain import PlainGradients

    return PlainGradients(optimizer, names)
