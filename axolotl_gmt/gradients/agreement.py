"""Whether ranks that share gradients agree, before they wait for each other in a collective."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from axolotl_gmt.gradients.shard import all_reduce


@contextmanager
def agreement(groups: Sequence[dist.ProcessGroup]) -> Iterator[dict[str, str]]:
    """Leave the block on all ranks of ``groups`` if their facts are the same and none has an error.

    Ranks that disagree would each wait for collectives that the others never start, or add up
    counts of different tensors.

    Args:
        groups: The groups that this rank is in, in an order that all ranks share.

    Yields:
        A dictionary for the facts that must be the same, by what they are called in a message.

    Raises:
        Exception: What the block raised.
        RuntimeError: Quoting another rank's error.
        ValueError: Naming a rank whose facts differ, and the first that does.
    """
    facts: dict[str, str] = {}
    error: Exception | None = None
    problem: ValueError | RuntimeError | None = None
    try:
        yield facts
    except Exception as raised:  # Whatever it is, other ranks must not wait for this one.
        error = raised
    if error is not None and groups:
        problem = RuntimeError(
            "Another rank cannot mask its gradients. "
            f"On rank {dist.get_rank()}: {type(error).__name__}: {error}"
        )
    # A mesh of several dimensions has a group for each. Going there and back carries what one
    # rank knows to all of the mesh, also to those that share no group with it.
    for group in (*groups, *reversed(groups)):
        problem = _problem_in(group, facts, problem)
    if error is not None:
        raise error
    if problem is not None:
        raise problem


def _problem_in(
    group: dist.ProcessGroup, facts: Mapping[str, str], problem: ValueError | RuntimeError | None
) -> ValueError | RuntimeError | None:
    """The problem that a rank of ``group`` knows of, or how its ranks differ; None if neither."""
    text = repr(sorted(facts.items())).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())
    # The largest digest is the smallest too if all are the same, so one small all-reduce is all
    # that ranks without a problem need.
    largest = torch.tensor([problem is not None, digest, -digest], device="cpu")
    all_reduce(largest, group, dist.ReduceOp.MAX)
    has_problem, highest, negative_of_lowest = largest.tolist()
    if not has_problem and highest == -negative_of_lowest:
        return None
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (problem, dict(facts)), group=group)
    for known, _ in told:
        if isinstance(known, ValueError | RuntimeError):
            return known
    ranks = dist.get_process_group_ranks(group)
    return _difference(dict(zip(ranks, (of_rank for _, of_rank in told), strict=True)))


def _difference(facts: Mapping[int, Mapping[str, str]]) -> ValueError:
    """What to raise if the facts of ranks are not all the same."""
    first, *others = facts
    rank = next(other for other in others if facts[other] != facts[first])
    keys = (*facts[first], *facts[rank])
    what = next(key for key in keys if facts[first].get(key) != facts[rank].get(key))
    values = [facts[of].get(what, "absent") for of in (first, rank)]
    return ValueError(
        f"Ranks {first} and {rank} do not train alike, so that they would choose different masks: "
        f"{what} is {values[0]} on rank {first} and {values[1]} on rank {rank}. Give all ranks the "
        "same model and settings."
    )
