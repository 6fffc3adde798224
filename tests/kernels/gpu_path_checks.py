"""The whole path that a GPU takes, in Triton's interpreter: triton_gpu, tables, thresholds that no
digit is copied for, through :class:`GradientMasker` against the reference that sorts.

Run in a process where Triton interprets its kernels. Tensors are on the CPU there, so that module
is told to take the Triton passes for it, and programs are small, so that there are many of them.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor, nn

from axolotl_gmt import GMTConfig, GradientMasker
from axolotl_gmt.config import Granularity
from axolotl_gmt.kernels import dispatch, self_check
from axolotl_gmt.masking import threshold
from axolotl_gmt.masking.masker import group_name
from tests.kernels.kernel_checks import BITS, CONTENTS, DTYPES
from tests.reference.gmt_reference import masked_by

SPAN = 1 << 7
# Around the end of a program's span, at every offset of 16-bit entries within 16 bytes.
SIZES = [SPAN - missing for missing in (-1, 0, 1, 3, 5, 7, 9)] + [1, 2 * SPAN - 2]


def _as_on_a_gpu() -> ExitStack:
    from axolotl_gmt.kernels import triton_gpu

    size = triton_gpu._Size(SPAN, SPAN // 2, 4)
    stack = ExitStack()
    stack.enter_context(
        mock.patch.multiple(
            triton_gpu,
            _BLOCK=dict.fromkeys(DTYPES.values(), SPAN),
            _WINDOW=dict.fromkeys(DTYPES.values(), 1 << 8),
            _SAMPLE=1 << 5,
            _RARE_BLOCK=SPAN,
            _LOWER=size,
            _MASK=size,
        )
    )
    stack.enter_context(
        mock.patch.multiple(
            dispatch,
            _COMPILED={"cpu": ("axolotl_gmt.kernels.triton_gpu", "Triton")},
        )
    )
    layout = [(0, 500), (3, SPAN + 1), (1, 0), (2, 1)]
    stack.enter_context(mock.patch.object(self_check, "_LAYOUT", layout))
    stack.enter_context(mock.patch.object(threshold, "_may_read_back", return_value=False))
    boundaries = list(triton_gpu.boundary_layouts(2, SPAN))[::17]  # All of them take a minute.
    stack.enter_context(mock.patch.object(triton_gpu, "boundaries", return_value=boundaries))
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of squares that overflow.
    dispatch.forget_backends()
    stack.callback(dispatch.forget_backends)
    return stack


def _dtypes(name: str) -> Iterator[torch.dtype]:
    """The dtypes of the tensors in turn: all of one, or bf16 with an fp32 one here and there."""
    if name == "mixed":
        return itertools.cycle([torch.bfloat16, torch.bfloat16, torch.float32])
    return itertools.repeat(DTYPES[name])


def _parameters(name: str, content: str, step: int) -> dict[str, nn.Parameter]:
    """Weights with gradients that start at every offset that their dtype has within 16 bytes."""
    generator = torch.Generator().manual_seed(step)
    parameters = {}
    for index, (size, dtype) in enumerate(zip(SIZES, _dtypes(name), strict=False)):
        offset = index % (16 // dtype.itemsize)
        memory = CONTENTS[content](offset + size + 8, dtype, generator)
        weight = nn.Parameter(torch.randn(size, generator=generator).to(dtype))
        weight.grad = memory[offset : offset + size]
        assert weight.grad.data_ptr() % 16 == offset * dtype.itemsize
        parameters[f"layers.{index % 3}.block.{index}.weight"] = weight
    return parameters


def _expected(
    gradients: dict[str, Tensor],
    weights: dict[str, Tensor],
    criterion: str,
    granularity: Granularity,
    mask_ratio: float,
) -> dict[str, Tensor]:
    groups: dict[str, list[str]] = {}
    for name in gradients:
        groups.setdefault(group_name(name, granularity), []).append(name)
    expected: dict[str, Tensor] = {}
    for names in groups.values():
        compete = {name: gradients[name] for name in names}
        expected |= masked_by(criterion, compete, weights, mask_ratio, seed=3, step=0)
    return expected


def check(criterion: str, dtype: str) -> None:
    """Masks of every granularity are those of the reference, bit for bit, and none is torch's."""
    steps = [("normal", 0.5), ("ties", 0.5), ("sparse", 0.9), ("any patterns", 0.3)]
    granularities: list[Granularity] = ["tensor", "layer", "global"]
    with _as_on_a_gpu():
        for (step, (content, mask_ratio)), granularity in itertools.product(
            enumerate(steps), granularities
        ):
            parameters = _parameters(dtype, content, step)
            gradients = {
                name: p.grad.clone() for name, p in parameters.items() if p.grad is not None
            }
            weights = {name: p.detach().clone() for name, p in parameters.items()}
            optimizer = torch.optim.SGD(parameters.values(), lr=0.0)
            config = GMTConfig(
                mask_ratio=mask_ratio, granularity=granularity, criterion=criterion, seed=3
            )
            masker = GradientMasker(parameters.items(), config)
            masker.attach(optimizer)
            optimizer.step()
            expected = _expected(gradients, weights, criterion, granularity, mask_ratio)
            for name, gradient in expected.items():
                left = parameters[name].grad
                assert left is not None
                bits = BITS[left.itemsize]
                assert torch.equal(left.view(bits), gradient.view(bits)), (content, name)
            entries = sum(gradient.numel() for gradient in gradients.values())
            kept = sum(int(gradient.count_nonzero()) for gradient in expected.values())
            assert masker.statistics()["kept_fraction"] == kept / entries
        backends = dispatch._backend.cache_info()
        assert backends.currsize, "no backend was asked for"
        assert not dispatch._failed, "Triton was given up"
