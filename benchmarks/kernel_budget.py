# mypy: disable-error-code="import-untyped"
"""What the Triton kernels cost a GPU, read from their machine code. No GPU is needed.

Compiles each kernel ahead of time, disassembles it and counts the instructions on the way that most
entries take. Nothing here is measured. A kernel takes at least as long as its bytes take to move
and as its instructions take to issue; waiting, and additions to one place, may take longer.

    python -m benchmarks.kernel_budget
"""

from __future__ import annotations

import heapq
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from axolotl_gmt.kernels import triton_gpu
from axolotl_gmt.kernels.dtypes import FORMATS, Digit
from axolotl_gmt.kernels.triton_gpu import Launch, Variant
from benchmarks.measuring import arguments, save

# NVIDIA H100 SXM: multiprocessors, warp instructions that each issues a cycle, cycles a second at
# base of the boost range, and bytes a second.
MULTIPROCESSORS, ISSUED, CLOCK, BANDWIDTH = 132, 4, 1.755e9, 3.35e12
LANES = 32

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of all pairs of entries and weights those that training has, and the widest of either.
WITH_WEIGHTS = [
    ("bf16", "bf16"),
    ("fp16", "fp16"),
    ("bf16", "fp32"),
    ("fp32", "bf16"),
    ("fp32", "fp32"),
]

_ARGUMENTS = {
    "table": "*i64",
    "prefixes": "*i64",
    "thresholds": "*i64",
    "totals": "*fp64",
    "counts": "*i32",
    "tensors": "i32",
}
_INSTRUCTION_BYTES = 16
_SKIPPED = 4  # instructions; a branch over no more is how one of them is predicated
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


class Case(NamedTuple):
    """A kernel as it is launched.

    Attributes:
        step: What it does: "count upper", "count lower" or "mask".
        kind: What it is specialised for.
        launch: How it is started.
    """

    step: str
    kind: Variant
    launch: Launch

    @property
    def name(self) -> str:
        """The step and the scores."""
        entry, weight = (
            next(name for name, dtype in DTYPES.items() if dtype == of)
            for of in (self.kind.entry, self.kind.weight)
        )
        of_weights = f" x {weight}" if self.reads_weights else ""
        return f"{self.step}, {self.kind.score} {entry}{of_weights}"

    @property
    def reads_weights(self) -> bool:
        """Whether a score is made of a weight too."""
        return self.kind.score in ("product", "quotient")

    @property
    def bytes_an_entry(self) -> float:
        """Bytes that are read and written for an entry."""
        moves = 2 if self.step == "mask" else 1
        weight = self.kind.weight.itemsize if self.reads_weights else 0
        weight += (self.kind.score == "bit") / 8
        return moves * self.kind.entry.itemsize + weight

    @property
    def cores(self) -> Sequence[str]:
        """How the instructions begin that the way of most entries has the most of, in order."""
        return {"count upper": ["LDG.E.128", "ATOMS"], "mask": ["STG.E.128"]}.get(
            self.step, ["LDG"]
        )

    @property
    def entries_a_thread(self) -> float:
        """Entries that a thread takes on the way of most entries."""
        return int(self.launch.constants["block"]) / (LANES * self.launch.options["num_warps"])


def cases() -> Iterator[Case]:
    """Every kernel, for every dtype and source of scores."""
    kinds = [Variant("magnitude", dtype, dtype, True) for dtype in DTYPES.values()]
    kinds += [
        Variant(score, DTYPES[entry], DTYPES[weight], True)
        for score in ("product", "quotient")
        for entry, weight in WITH_WEIGHTS
    ]
    kinds += [Variant("hash", dtype, dtype, True) for dtype in DTYPES.values()]
    kinds += [Variant("inverse", dtype, dtype, True) for dtype in DTYPES.values()]
    kinds += [Variant("widened", dtype, dtype, True) for dtype in (torch.bfloat16, torch.float16)]
    for kind in kinds:
        upper = Digit(FORMATS[kind.dtype()].first_shift, 15)
        yield Case("count upper", kind, triton_gpu.count_launch(kind, upper, False))
        if upper.shift:
            yield Case("count lower", kind, triton_gpu.count_launch(kind, Digit(0, 16), True))
        yield Case("mask", kind, triton_gpu.mask_launch(kind))
    for dtype in DTYPES.values():
        kind = Variant("bit", dtype, dtype, True)
        yield Case("mask", kind, triton_gpu.mask_launch(kind))


@dataclass(frozen=True)
class Instruction:
    """A line of machine code."""

    address: int
    is_predicated: bool
    opcode: str
    operands: str


@dataclass(frozen=True)
class Budget:
    """What a kernel needs of an NVIDIA GPU.

    Attributes:
        registers: A thread.
        stack: Bytes a thread.
        spills: Instructions that move a register to the stack, or back.
        shared: Bytes a program.
        reciprocals: Each of which is part of a division, of integers or of floats.
        path: The instructions on the way of most entries, without the search for a program's
            tensor.
        ptx: What the machine code was made of.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    reciprocals: int
    path: list[Instruction]
    ptx: str

    def accesses(self, opcode: str) -> set[str]:
        """The kinds of ``opcode`` (LDG, STG) on the way of most entries."""
        return {found.opcode for found in self.path if found.opcode.split(".")[0] == opcode}


def compiled(launch: Launch, backend: str, architecture: int | str) -> Any:
    """What Triton makes of a kernel, specialised as at a launch with tensors of PyTorch."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {name: _ARGUMENTS.get(name, "constexpr") for name in names}
    source = ASTSource(
        launch.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if signature[name].startswith("*")
        },
    )
    options: dict[str, int] = dict(launch.options)
    if backend == "hip":
        options.pop("maxnreg", None)
    target = GPUTarget(backend, architecture, 64 if backend == "hip" else LANES)
    return compile_kernel(source, target=target, options=options)


def budget(case: Case, architecture: int) -> Budget:
    """Compile and read a kernel for an NVIDIA GPU of that compute capability, 90 for 9.0."""
    from triton import knobs

    made = compiled(case.launch, "cuda", architecture)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(made.asm["cubin"])

        def dump(option: str) -> str:
            command = [knobs.nvidia.cuobjdump.path, option, str(file)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = _USAGE.search(dump("-res-usage"))
        lines = [match for match in map(_LINE.match, dump("-sass").splitlines()) if match]
    assert usage is not None
    code = [
        Instruction(int(match[1], 16), match[2] is not None, match[3], match[4]) for match in lines
    ]
    families = [instruction.opcode.split(".")[0] for instruction in code]
    return Budget(
        registers=int(usage[1]),
        stack=int(usage[2]),
        spills=families.count("STL") + families.count("LDL"),
        shared=made.metadata.shared,
        reciprocals=families.count("MUFU"),
        path=main_path(code, case.cores),
        ptx=made.asm["ptx"],
    )


class Block(NamedTuple):
    """Instructions that run one after the other, and the addresses of the blocks that follow."""

    instructions: list[Instruction]
    following: list[int]


def _blocks(code: list[Instruction]) -> dict[int, Block]:
    """The blocks of a kernel by their first addresses."""
    leads: dict[int, list[int]] = {}
    for instruction in code:
        after = instruction.address + _INSTRUCTION_BYTES
        following = [after] if instruction.is_predicated else []
        if instruction.opcode.startswith("BRA"):
            target = int(instruction.operands.rpartition("0x")[2], 16)
            if not 0 <= target - after <= _SKIPPED * _INSTRUCTION_BYTES:
                leads[instruction.address] = [target, *following]
        elif instruction.opcode.startswith("EXIT"):
            leads[instruction.address] = following
    starts = {code[0].address, *itertools.chain(*leads.values())}
    starts |= {address + _INSTRUCTION_BYTES for address in leads}
    blocks: dict[int, Block] = {}
    for instruction in code:
        if instruction.address in starts:
            block = blocks[instruction.address] = Block([], [])
        block.instructions.append(instruction)
        after = instruction.address + _INSTRUCTION_BYTES
        if instruction.address in leads:
            block.following.extend(leads[instruction.address])
        elif after in starts:
            block.following.append(after)
    return blocks


def _way(blocks: dict[int, Block], start: int, end: int) -> list[Instruction] | None:
    """The fewest instructions from the first of block ``start`` to the first of ``end``.

    None if there is no way. From a block to itself the way is around a loop.
    """
    waiting: list[tuple[int, int, tuple[int, ...]]] = [(0, start, ())]
    done = set()
    while waiting:
        length, block, before = heapq.heappop(waiting)
        if block == end and before:
            return list(itertools.chain(*(blocks[passed].instructions for passed in before)))
        if block in done:
            continue
        if before or block != end:
            done.add(block)
        length += len(blocks[block].instructions)
        for following in blocks[block].following:
            if following in blocks:
                heapq.heappush(waiting, (length, following, (*before, block)))
    return None


def main_path(code: list[Instruction], cores: Sequence[str]) -> list[Instruction]:
    """What runs for most entries: the shortest way through the blocks that matter most.

    These are, for each of ``cores``, the blocks with the most instructions that begin so. Where the
    last one is in a loop the way leads around it; else from the first instruction to the last.
    """
    blocks = _blocks(code)

    def with_most(opcode: str) -> list[int]:
        counts = {
            start: sum(instruction.opcode.startswith(opcode) for instruction in block.instructions)
            for start, block in blocks.items()
        }
        return [start for start in blocks if counts[start] == max(counts.values()) > 0]

    loops = [way for start in with_most(cores[-1]) if (way := _way(blocks, start, start))]
    if loops:
        return min(loops, key=len)
    stops = [code[0].address, *(with_most(core)[0] for core in cores if with_most(core))]
    ways = [_way(blocks, *stop) for stop in itertools.pairwise(dict.fromkeys(stops))]
    ends = [start for start, block in blocks.items() if not block.following]
    out = [
        way + blocks[end].instructions
        for end in ends
        if (way := _way(blocks, stops[-1], end)) is not None
    ]
    return [*itertools.chain(*(way or [] for way in ways)), *min(out, key=len)]


def _width(opcodes: set[str]) -> int:
    """The most bytes that one of these accesses moves for a thread."""
    bits = [re.search(r"\.[US]?(8|16|64|128)\b", opcode) for opcode in opcodes]
    return max((int(match[1]) if match else 32 for match in bits), default=0) // 8


def row(case: Case, found: Budget) -> dict[str, Any]:
    """The figures of a kernel on an H100."""
    instructions = len(found.path) / case.entries_a_thread
    moving = case.bytes_an_entry / BANDWIDTH
    issuing = instructions / (MULTIPROCESSORS * ISSUED * CLOCK * LANES)
    return {
        "kernel": case.name,
        "registers": found.registers,
        "shared bytes": found.shared,
        "bytes a load": _width(found.accesses("LDG")),
        "instructions an entry": round(instructions, 1),
        "% of the issue rate": round(100 * issuing / moving),
        "bytes an entry": case.bytes_an_entry,
        "ms for 1e9 entries, at least": round(1e12 * max(moving, issuing), 2),
    }


def main() -> None:
    """Print the figures for an H100 as a table in Markdown."""
    options = arguments(__doc__)
    rows = [row(case, budget(case, 90)) for case in cases()]
    print("Kernels on sm_90, read from the machine code, not measured:\n")
    print("|", " | ".join(rows[0]), "|")
    print("|", " | ".join("---" for _ in rows[0]), "|")
    for figures in rows:
        print("|", " | ".join(str(figure) for figure in figures.values()), "|")
    save(options.json, rows)


if __name__ == "__main__":
    main()
