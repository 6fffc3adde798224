"""Masks on one device against the slow versions, bit for bit; a row for each check.

``python -m benchmarks.gpu_day.exactness --device cuda --json FILE``. On the CPU, Triton interprets
its kernels, and only few are checked.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.gpu_day.record import Row, write_rows

Check = tuple[str, str, Callable[[], None]]
"""Its kind, its name, and what raises if it does not hold."""


class _Warnings(logging.Handler):
    """Remembers what GMT warned of: that a compiled pass failed, and torch took its place."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def check_step(device: str, dtype_name: str, granularity: str) -> None:
    """One step of GradientMasker leaves the gradients that sorting everything leaves.

    Raises:
        AssertionError: If an entry differs, or if the step did not take the compiled passes.
    """
    import torch

    from axolotl_gmt import GMTConfig, GradientMasker
    from axolotl_gmt.masking.masker import group_name
    from tests.kernels.kernel_checks import BITS, DTYPES
    from tests.reference.gmt_reference import masked

    dtype = DTYPES[dtype_name]
    # One flat buffer, cut at odd places, as ZeRO and FSDP lay out what they shard.
    sizes = [1, 4097, 33_000, 250_001, 65_535]
    generator = torch.Generator().manual_seed(0)
    memory = (torch.randn(sum(sizes) + len(sizes), generator=generator) * 1e-3).to(dtype)
    memory[5::17] = 0
    memory = memory.to(device)
    named, gradients, start = [], {}, 0
    for index, size in enumerate(sizes):
        start += index % 2
        parameter = torch.zeros(size, dtype=dtype, device=device, requires_grad=True)
        parameter.grad = memory[start : start + size]
        name = f"model.layers.{index // 2}.part{index}.weight"
        named.append((name, parameter))
        gradients[name] = parameter.grad.cpu().clone()
        start += size
    warned = _Warnings()
    optimizer = torch.optim.SGD([parameter for _, parameter in named], lr=0.0)
    config = GMTConfig.model_validate({"mask_ratio": 0.7, "granularity": granularity})
    GradientMasker(named, config).attach(optimizer)
    logging.getLogger("axolotl_gmt").addHandler(warned)
    try:
        optimizer.step()
    finally:
        logging.getLogger("axolotl_gmt").removeHandler(warned)
    assert not warned.messages, warned.messages[0]
    groups: dict[str, list[str]] = {}
    for name in gradients:
        groups.setdefault(group_name(name, config.granularity), []).append(name)
    parameters = dict(named)
    bits = BITS[dtype.itemsize]
    for names in groups.values():
        for name, survivor in zip(names, masked([gradients[n] for n in names], 0.7), strict=True):
            gradient = parameters[name].grad
            assert gradient is not None
            assert torch.equal(gradient.cpu().view(bits), survivor.view(bits)), name


def checks(device: str) -> list[Check]:
    """The checks of a device."""
    from tests.kernels import kernel_checks

    dtypes: list[str] = list(kernel_checks.DTYPES)
    found: list[Check]
    if device == "cpu":  # Interpreted, which is slow.
        dtypes = ["bf16", "fp32"]
        found = [
            ("kernels", dtype, partial(kernel_checks.check_triton, device, dtype, "ragged"))
            for dtype in dtypes
        ]
    else:
        found = [
            ("kernels", dtype, partial(kernel_checks.check_all, device, dtype)) for dtype in dtypes
        ]
    found += [
        ("mask step", f"{dtype}, {granularity}", partial(check_step, device, dtype, granularity))
        for dtype, granularity in itertools.product(dtypes, ("tensor", "layer", "global"))
    ]
    return found


def run_check(kind: str, name: str, check: Callable[[], None]) -> Row:
    """A row that says whether ``check`` held; what it raised is printed and kept."""
    error = ""
    try:
        check()
    except Exception as raised:
        traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}"
    print(f"{kind}, {name}: {error or 'exact'}", flush=True)
    return {"kind": kind, "check": name, "error": error}


def main() -> None:
    """Run all checks on the device, and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it as it is imported.

    write_rows(options.json, [run_check(*check) for check in checks(options.device)])


if __name__ == "__main__":
    main()
