"""The parts of a day: what each runs, what it needs, and what its figures should be.

The targets are those of docs/performance.md. On tiny shapes no speed is held to one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_day.record import Line, Row

Rows = Sequence[Row]


@dataclass(frozen=True)
class Place:
    """Where a part's child works.

    Attributes:
        device: ``cuda``, or ``cpu`` for tiny shapes.
        rows: The JSON file that it writes.
        folder: For files that parts share, such as the model that is trained.
    """

    device: str
    rows: Path
    folder: Path

    @property
    def tiny(self) -> bool:
        """Whether the child should be quick rather than telling."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Part:
    """One part of a day.

    Attributes:
        name: What the user writes after ``--parts``.
        what: What it shows.
        command: The child process, which must write ``Place.rows``.
        lines: What the rows say; the part fails if a line does.
        limit: Seconds after which it is ended.
        needs_gpu: Whether it means nothing on the CPU.
        needs_gib: GPU memory that it needs, estimated from its shapes; on the CPU none is.
        needs_packages: Distributions that it imports, beside those that all parts need.
    """

    name: str
    what: str
    command: Callable[[Place], Sequence[str]]
    lines: Callable[[Rows, Place], Iterable[Line]]
    limit: float
    needs_gpu: bool = False
    needs_gib: float = 0
    needs_packages: tuple[str, ...] = ()


def script(file: str, model: str, *more: str) -> Callable[[Place], Sequence[str]]:
    """A benchmark beside this folder; on the CPU it measures its trial model."""

    def command(place: Place) -> Sequence[str]:
        chosen = ("--model", "trial" if place.tiny else model) if model else ()
        options = ("--device", place.device, *chosen, *more, "--json", str(place.rows))
        return (sys.executable, f"benchmarks/{file}", *options)

    return command


def module(name: str, *more: str, folder: bool = False) -> Callable[[Place], Sequence[str]]:
    """A module of this folder."""

    def command(place: Place) -> Sequence[str]:
        shared = ("--folder", str(place.folder)) if folder else ()
        options = ("--device", place.device, *shared, "--json", str(place.rows))
        return (sys.executable, "-m", f"benchmarks.gpu_day.{name}", *more, *options)

    return command


def at_most(what: str, value: float, limit: float, unit: str, place: Place) -> Line:
    """A figure that should not exceed ``limit``; on tiny shapes only the figure."""
    measured = f"{value:.3g} {unit}"
    if place.tiny:
        return Line(what=what, measured=measured)
    target = f"at most {limit:g} {unit}"
    return Line(what=what, measured=measured, target=target, passed=value <= limit)


def exact(rows: Rows, _: Place) -> Iterable[Line]:
    """A line for each kind of check."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        wrong = [row for row in of_kind if row["error"]]
        measured = f"{len(of_kind) - len(wrong)} of {len(of_kind)}"
        if wrong:
            measured += f"; {wrong[0]['check']}: {wrong[0]['error'][:150]}"
        if len(wrong) > 1:
            measured += f"; and {len(wrong) - 1} more in the log"
        what = f"{kind}: checks that are exact"
        yield Line(what=what, measured=measured, target="all", passed=not wrong)


def synchronisations(rows: Rows, _: Place) -> Iterable[Line]:
    """A line for each dtype and criterion."""
    for row in rows:
        found = str(row["synchronisations"])
        what = f"host-device synchronisations in {row['steps']} steps, {row['what']}"
        yield Line(what=what, measured=found[:200], target="0", passed=found == "0")


def mask_step(rows: Rows, place: Place) -> Iterable[Line]:
    """The mask step of each dtype beside its contenders; targets are for bf16."""
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        ways = {row["what"]: row for row in rows if row["dtype"] == dtype}
        step = ways["GMT mask step"]
        model = f"{step['model']}, {dtype}"
        yield Line(what=f"{model}: mask step", measured=f"{step['median ms']:.3g} ms")
        moves = f"{model}: against moving its bytes 3 times at the speed of a copy"
        times = step["times 3 moves of the bytes"]
        if dtype == "bf16":
            yield at_most(moves, times, 1.3, "times", place)
        else:
            yield Line(what=moves, measured=f"{times:.3g} times")
        controls = [way for way in ways if way.startswith("GMT mask step, ")]
        for way in (*controls, "torch.topk", "torch.topk, unsorted", "fused AdamW step"):
            longer = ways[way]["times the mask step"]
            measured = f"{longer:.3g} times as long ({ways[way]['median ms']:.3g} ms)"
            what = f"{model}: {way}, against the mask step"
            if way == "torch.topk" and dtype == "bf16" and not place.tiny:
                target = "at least 20 times"
                yield Line(what=what, measured=measured, target=target, passed=longer >= 20)
            else:
                yield Line(what=what, measured=measured)


def step_share(rows: Rows, place: Place) -> Iterable[Line]:
    """The mask step's share of a training step."""
    ways = {row["what"]: row for row in rows}
    share = ways["GMT mask step"]
    what = f"{share['model']}, {share['tokens']:,} tokens, bf16: share of a training step"
    yield at_most(what, share["share of the step, %"], 1, "%", place)
    whole = f"{ways['whole step']['median ms']:,.0f} ms"
    yield Line(what="the whole step: forward, backward, mask, AdamW", measured=whole)


def memory(rows: Rows, place: Place) -> Iterable[Line]:
    """Extra memory of a mask step at its peak, for each model and dtype."""
    for row in rows:
        if row["what"] == "GMT mask step":
            share = row["extra, % of the gradients"]
            extra = f"{row['extra MiB']:.3g} MiB"
            what = f"{row['model']}, {row['dtype']}: extra memory at the peak ({extra})"
            yield at_most(what, share, 1, "% of the gradients", place)


def training(**seen: str) -> Callable[[Rows, Place], Iterable[Line]]:
    """What the log of a run with Axolotl says, and the classes that it must have met.

    Args:
        seen: ``parameters`` or ``optimizer``, and the name of its class.
    """

    def lines(rows: Rows, place: Place) -> Iterable[Line]:
        (row,) = rows
        kept = row["kept fractions"]
        # Half of each tensor's entries stay, and all that equal the threshold. On a GPU gradients
        # are bf16, which has only 128 values between a power of two and the next.
        highest = 0.501 if place.tiny else 0.52
        yield Line(
            what=f"{row['model']}: kept fraction in {row['steps']} steps",
            measured=f"{min(kept):.4f} to {max(kept):.4f}",
            target=f"0.4999 to {highest}",
            passed=min(kept) >= 0.4999 and max(kept) <= highest,
        )
        losses = row["losses"]
        finite = None not in losses
        measured = f"{losses[0]:.3f} to {losses[-1]:.3f}" if finite else "NaN or infinite"
        yield Line(
            what="loss, first to last step", measured=measured, target="finite", passed=finite
        )
        for key, expected in seen.items():
            found = [row[key]] if isinstance(row[key], str) else row[key]
            yield Line(
                what=f"class of the {key}",
                measured=", ".join(found),
                target=expected,
                passed=expected in found,
            )

    return lines


_AXOLOTL = ("axolotl",)

PARTS = (
    Part(
        "exactness",
        "kernels against torch, and mask steps against sorting, bit for bit",
        module("exactness"),
        exact,
        limit=180,
    ),
    Part(
        "syncs",
        "does the host wait for the device?",
        script("syncs.py", ""),
        synchronisations,
        limit=90,
        needs_gpu=True,
        needs_gib=16,
    ),
    Part(
        "mask_step_1b",
        "mask step over a 1B Llama's gradients, against copy, topk and fused AdamW",
        script("mask_step.py", "Llama-1B", "--runs", "5"),
        mask_step,
        limit=180,
        needs_gib=28,
    ),
    Part(
        "mask_step_7b",
        "the same over a 7B Llama's",
        script("mask_step.py", "Llama-7B", "--runs", "3"),
        mask_step,
        limit=240,
        needs_gpu=True,
        needs_gib=66,
    ),
    Part(
        "step_share",
        "the mask step's share of a 1B training step",
        script("step_share.py", "Llama-1B"),
        step_share,
        limit=120,
        needs_gib=36,
    ),
    Part(
        "memory_1b",
        "extra memory of a mask step, 1B",
        script("memory.py", "Llama-1B"),
        memory,
        limit=90,
        needs_gib=20,
    ),
    Part(
        "memory_7b",
        "extra memory of a mask step, 7B",
        script("memory.py", "Llama-7B"),
        memory,
        limit=90,
        needs_gpu=True,
        needs_gib=44,
    ),
    Part(
        "sft",
        "Axolotl: supervised fine-tuning",
        module("training", "sft", folder=True),
        training(),
        limit=180,
        needs_packages=_AXOLOTL,
    ),
    Part(
        "dpo",
        "Axolotl: preference tuning",
        module("training", "dpo", folder=True),
        training(),
        limit=180,
        needs_packages=_AXOLOTL,
    ),
    Part(
        "fsdp2",
        "Axolotl: FSDP2 on one rank",
        module("training", "fsdp2", folder=True),
        training(parameters="DTensor"),
        limit=180,
        needs_gpu=True,
        needs_packages=_AXOLOTL,
    ),
    Part(
        "zero",
        "DeepSpeed ZeRO-2 and 3 with CPU offload under NCCL, bit for bit",
        module("zero"),
        exact,
        limit=120,
        needs_gpu=True,
        needs_packages=("deepspeed",),
    ),
    Part(
        "zero3",
        "Axolotl: ZeRO-3 with CPU offload",
        module("training", "zero3", folder=True),
        training(optimizer="DeepSpeedZeroOptimizer_Stage3"),
        limit=180,
        needs_gpu=True,
        needs_packages=(*_AXOLOTL, "deepspeed"),
    ),
)
