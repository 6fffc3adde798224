"""How long a study takes on an H100, by arithmetic: an estimate that nothing here has measured."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.study.grid import Size, Task

# NVIDIA's figures for an H100 SXM: dense bf16 and float32 without tensor cores in FLOP/s, and
# memory in bytes a second. The shares of them that are reached are guesses.
_BF16, _FP32, _MEMORY = 989e12 * 0.3, 67e12 * 0.5, 3.35e12 * 0.6
_TOKENS = 200  # of a problem or a reply with its question
_START = 60.0  # seconds to import, load and save
_HOST = 0.025  # seconds in which Python launches the kernels of one token
_TOGETHER = 32  # problems that are answered at a time
_TEST = 1319  # problems in GSM8K's test file

ASSUMED = (
    "an H100 that reaches 30% of its bf16 speed in training and 50% of its float32 speed in "
    "scoring, 200 tokens an example, 25 ms of host time for each token of a reply, one minute to "
    "start each cell, and one cell at a time"
)


def hours(size: Size, parameters: float) -> float:
    """Estimated hours of the whole study for a model of so many parameters."""
    return (_task_hours(size, size.sft, parameters)) + _task_hours(size, size.dpo, parameters)


def _task_hours(size: Size, task: Task, parameters: float) -> float:
    tuning, judged, both = size.counts(task)
    is_dpo = task.name == "dpo"
    # Forward and backward are 6 FLOP a parameter and token. A pair is two replies, which the
    # reference model reads too.
    flop = (6 + 2) * 2 if is_dpo else 6
    trained = task.steps * task.batch * _TOKENS * flop * parameters / _BF16
    test = task.test or _TEST
    scored = 2 * parameters * _TOKENS * (2 if is_dpo else 1) / _FP32
    seconds = (tuning + judged - both) * (_START + trained + task.validation * scored)
    seconds += judged * test * scored
    if not is_dpo:
        batches = -(-(size.replies or test) // _TOGETHER)
        token = _HOST + 4 * parameters / _MEMORY
        seconds += (judged + 1) * batches * size.max_new_tokens * token
    return seconds / 3600


def lines(size: Size, parameters: Sequence[float]) -> list[str]:
    """What the user reads before the study starts."""
    cells = [size.counts(task) for task in (size.sft, size.dpo)]
    trained = sum(tuning + judged - both for tuning, judged, both in cells)
    return [
        f"{trained} cells. Hours by FLOPs, estimated and not measured:",
        *(f"  {each / 1e9:.2g}B parameters: {hours(size, each):.0f} h" for each in parameters),
        f"for {ASSUMED}. Cells that fit into the GPU's memory together shorten this.",
    ]
