"""One step of a torch optimizer, however it is nested, with a closure or without."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from axolotl_gmt.gradients.shard import Handles, Step


def hook_steps(
    optimizer: Optimizer,
    stepped: Callable[[], Iterator[Tensor]],
    begin_step: Callable[[], Step],
    holds: bool,
) -> RemovableHandle:
    """Call ``begin_step`` once a step, and tell what it returns how far the step is.

    The gradients are complete at once, or after each call of a closure, which makes them. A step
    within a step, as ``super().step()`` is where torch has hooked the parent's class too, begins
    none: what has been masked stays as it is, and gradients that are new are masked as part of the
    step.

    Args:
        optimizer: Whose steps.
        stepped: Gives the parameters that it steps.
        begin_step: What a step begins with.
        holds: Whether to tell of more than the gradients.
    """
    step = _StepUnderWay(stepped)

    def hook(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        is_outermost = _steps_under_way(optimizer) <= 1
        if is_outermost:
            step.begin(begin_step(), holds)
        _, *positional = args
        closure = positional[0] if positional else kwargs.get("closure")
        if closure is None:
            if is_outermost:  # Also without a gradient here: other ranks may have some.
                step.mask()
            else:
                step.mask_new_gradients()
            return None

        def closure_then_mask() -> Any:  # A closure makes the gradients, so masking follows it.
            times = step.times_masked
            with torch.enable_grad():
                loss = closure()
            if step.times_masked == times:  # Else an outer step wrapped it and has masked.
                step.mask()
            return loss

        if positional:
            return (optimizer, closure_then_mask, *positional[1:]), kwargs
        return args, {**kwargs, "closure": closure_then_mask}

    # A compiled step must not trace the masker: its Python would be compiled anew at each step.
    handle: RemovableHandle = optimizer.register_step_pre_hook(torch.compiler.disable(hook))
    if not holds:
        return handle

    def end(optimizer: Optimizer, *_: object) -> None:
        if _steps_under_way(optimizer) <= 1:
            step.end()

    return Handles(handle, optimizer.register_step_post_hook(torch.compiler.disable(end)))


class _StepUnderWay:
    """The optimizer step under way, which may hold others.

    Args:
        parameters: Gives what the optimizer steps.
    """

    def __init__(self, parameters: Callable[[], Iterator[Tensor]]) -> None:
        self._parameters = parameters
        self._step: Step | None = None
        self._left: list[ReferenceType[Tensor]] = []  # The gradients that masking left.
        self.times_masked = 0

    def begin(self, step: Step, holds: bool) -> None:
        """Go through ``step`` from now on; nothing is masked yet."""
        self._step = step
        self._left = []
        if holds:
            step.hold(self._parameters())

    def mask(self) -> None:
        """Mask the gradients as they are."""
        assert self._step is not None
        torch.compiler.disable(self._step.mask)()
        self.times_masked += 1
        self._left = [ref(gradient) for gradient in self._gradients()]

    def mask_new_gradients(self) -> None:
        """Mask, unless all gradients are those that have been masked."""
        left = {id(reference()) for reference in self._left}
        if self._step is not None and any(id(each) not in left for each in self._gradients()):
            self.mask()

    def end(self) -> None:
        """The weights have been stepped."""
        assert self._step is not None
        self._step.release()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters() if p.grad is not None]


def _steps_under_way(optimizer: Optimizer) -> int:
    """How many calls of ``optimizer.step()`` that torch has hooked stand on this thread's stack.

    Asked of the stack and not of a counter, which an error in a step would leave wrong.
    """
    steps = 0
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == _HOOKED_STEP.co_name and code.co_filename == _HOOKED_STEP.co_filename:
            steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps


# The code around every step() in which torch calls the hooks; it calls its optimizer `self`.
_HOOKED_STEP = Optimizer.profile_hook_step(lambda: None).__code__
