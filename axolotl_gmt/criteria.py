"""What makes a gradient entry important: the built-in criteria, and the contract for your own.

A criterion is a function ``(shapes, seed) -> scorers``. It is called when masking is attached to an
optimizer, and again if parameters join later; what it said of the others then stays:

- ``shapes``: the shape of each parameter subject to masking, by its name in the unwrapped model
  (``model.layers.3.mlp.down_proj.weight``). Shapes are those of whole parameters, however they are
  sharded, and the mapping is the same on every rank.
- ``seed``: ``gmt_seed``, else the run's seed; the same on every rank.
- ``scorers``: for each of these names, how its entries are scored. One of

  - :data:`MAGNITUDE`: an entry's score is the magnitude of its gradient. Takes the fast path.
  - :data:`SMALLEST`: the smaller the magnitude of its gradient, the larger an entry's score; an
    entry whose gradient is 0 has the smallest. Such scores have no scale, so in one group mix them
    with no others.
  - :data:`KEEP`: the whole gradient always survives, and competes with no other.
  - :data:`DROP`: the whole gradient is always set to zero, but for NaN and infinity.
  - a function from :class:`Entries` to scores, called at every optimizer step.

With a mask ratio of 0 nothing is masked and no criterion is asked. Else, of n entries that compete
(those of a tensor, a layer or all, see ``gmt_granularity``) the
k = max(1, n - round(mask_ratio * n)) with the largest scores survive, and those that tie with the
k-th. Scores are a flat float32 tensor, one for each local entry in the order of
``entries.gradient``, on its device, non-negative and not NaN. An entry whose gradient is NaN or
infinite survives whatever its score is. (Scorers of built-in criteria may return one of
:mod:`axolotl_gmt.kernels.scores` instead, which tells the passes how to make a score where they
need it.)

What is promised about sharding: under FSDP2, tensor parallel and ZeRO a function sees the entries
that live in its process, and ``gradient``, ``weight`` and ``positions`` line up. Thresholds are
found over all ranks. A score that depends on an entry's own gradient, weight and position alone
gives the same mask on any number of ranks; one that depends on its neighbours (a mean over the
tensor, say) does not, unless the function talks to the other ranks itself. Functions are called for
the same parameters in the same order on every rank, also where a rank holds no entry.

Gradients are as they are when they are masked: accumulated and reduced; under ZeRO before clipping
and with the scale of the loss in fp16, elsewhere clipped. These factors are common to all entries,
so a rule that does not depend on the scale of the whole gradient selects the same.

A package offers criteria by a module with a hook, registered under the entry-point group
``axolotl_gmt``. A complete one, which prefers the entries of the largest weights, whatever their
gradients are::

    # weight_magnitude.py
    from axolotl_gmt.criteria import hookimpl

    def weight_magnitude(shapes, seed):
        def score(entries):
            return entries.weight.float().abs()
        return dict.fromkeys(shapes, score)

    @hookimpl
    def gmt_criteria():
        return {"weight_magnitude": weight_magnitude}

    # pyproject.toml
    [project.entry-points.axolotl_gmt]
    weight_magnitude = "weight_magnitude"

With it installed, ``gmt_criterion: weight_magnitude`` selects by it.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

import pluggy
import torch
from torch import Tensor

from axolotl_gmt.kernels.contract import chunk_size
from axolotl_gmt.kernels.scores import Given, Hashes, Products, Quotients, Scores, uniform
from axolotl_gmt.names import layer_name, place

ENTRY_POINT_GROUP = "axolotl_gmt"

hookspec = pluggy.HookspecMarker(ENTRY_POINT_GROUP)
hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


class Verdict(Enum):
    """How a parameter is masked that no function scores."""

    MAGNITUDE = "the magnitude of its gradient is an entry's score"
    SMALLEST = "the smaller the magnitude of its gradient, the larger an entry's score"
    KEEP = "every entry survives"
    DROP = "no entry survives"


MAGNITUDE, SMALLEST = Verdict.MAGNITUDE, Verdict.SMALLEST
KEEP, DROP = Verdict.KEEP, Verdict.DROP


@dataclass(frozen=True)
class Entries:
    """The entries of one parameter that live in this process, at one optimizer step.

    Attributes:
        name: The parameter's name in the unwrapped model.
        gradient: Flat, shape ``(local entries,)``, bf16, fp16, fp32 or fp64: the gradient itself,
            so it must not be written to.
        step: The number of optimizer steps before this one, counted from the start of training,
            resumed or not.
        read_weight: Fetches :attr:`weight` when it is asked for: under ZeRO it may be a copy.
        positions: ``positions(start, stop)`` gives, for the local entries from ``start`` to
            ``stop``, the index of each in the whole, flattened parameter: int64
            ``(stop - start,)`` on the gradient's device. It does not depend on how the parameter
            is sharded.
        first_position: Position of the first local entry where positions are consecutive, as in
            one process, under FSDP2's sharding by rows and under ZeRO; else None.
    """

    name: str
    gradient: Tensor
    step: int
    read_weight: Callable[[], Tensor]
    positions: Callable[[int, int], Tensor]
    first_position: int | None = None

    @property
    def weight(self) -> Tensor:
        """The parameter's entries in the order of the gradient's, shape ``(local entries,)``.

        Of the parameter that the optimizer steps: under ZeRO the fp32 one.
        """
        return self.read_weight()


Scorer = Verdict | Callable[[Entries], Tensor | Scores]
Criterion = Callable[[Mapping[str, torch.Size], int], Mapping[str, Scorer]]


def checked(scores: object, entries: Entries) -> tuple[Given, Tensor]:
    """What a function returned for ``entries``, infinite where the gradient's is not finite.

    Returns:
        The scores, and a bool tensor of shape ``()``: whether one is negative or NaN. It stays on
        the device, so that asking costs no synchronisation.

    Raises:
        ValueError: If the scores have another shape, dtype or device than the contract says.
    """
    gradient = entries.gradient
    expected = (gradient.shape, torch.float32, gradient.device)
    if not isinstance(scores, Tensor) or (scores.shape, scores.dtype, scores.device) != expected:
        got = (
            f"{tuple(scores.shape)} of {scores.dtype} on {scores.device}"
            if isinstance(scores, Tensor)
            else repr(scores)
        )
        raise ValueError(
            f"criterion (gmt_criterion in YAML): the scores of {entries.name} must be a tensor of "
            f"shape {tuple(gradient.shape)} of torch.float32 on {gradient.device}, but it returned "
            f"{got}. Mend it or set another one."
        )
    copy = torch.empty_like(scores)
    bad = torch.zeros((), dtype=torch.bool, device=scores.device)
    chunk = chunk_size(scores.device)
    parts = zip(*(tensor.split(chunk) for tensor in (gradient, scores, copy)), strict=True)
    for of_gradient, of_scores, of_copy in parts:
        broken = ~of_gradient.isfinite()
        bad |= (~(of_scores >= 0) & ~broken).any()  # NaN compares false
        of_copy.copy_(of_scores.masked_fill(broken, math.inf))
    return Given(gradient, copy), bad


class _Hooks:
    @hookspec
    def gmt_criteria(self) -> Mapping[str, Criterion]:  # type: ignore[empty-body]
        """The criteria that a package brings, by the name that ``gmt_criterion`` gives them."""


def gradient(shapes: Mapping[str, torch.Size], seed: int) -> Mapping[str, Scorer]:
    """|g|, the magnitude of the gradient: Gradient-Mask Tuning itself (Li et al. 2025)."""
    del seed
    return dict.fromkeys(shapes, MAGNITUDE)


def smallest(shapes: Mapping[str, torch.Size], seed: int) -> Mapping[str, Scorer]:
    """The reverse of ``gradient``: the smallest magnitudes survive.

    The sharpest control for whether magnitude matters. What is compared is exact in every dtype,
    see :class:`~axolotl_gmt.kernels.scores.Inverses`. An entry whose gradient is 0 ranks below all
    others, so that the mask is not spent on entries that the gradient does not move.
    """
    del seed
    return dict.fromkeys(shapes, SMALLEST)


def gradient_weight(shapes: Mapping[str, torch.Size], seed: int) -> Mapping[str, Scorer]:
    """|g * w|: to first order, how much the loss would change if the weight were zero."""
    del seed

    return dict.fromkeys(shapes, lambda entries: Products(entries.gradient, entries.weight))


def relative(shapes: Mapping[str, torch.Size], seed: int) -> Mapping[str, Scorer]:
    """|g| / (|w| + 1e-8), the gradient relative to its weight, in float32.

    Source: the gradient-to-weight ratio of GEM (Kang et al., arXiv 2508.16191). Unlike there, w is
    the weight as it is at this step, and every tensor keeps the same share. Where w is 0 the ratio
    is finite unless |g| is above 3e30; where w is infinite and g is not, it is 0.
    """
    del seed

    return dict.fromkeys(shapes, lambda entries: Quotients(entries.gradient, entries.weight))


def random_uniform(shapes: Mapping[str, torch.Size], seed: int) -> Mapping[str, Scorer]:
    """A uniform random mask of the same size, drawn anew at every step.

    The control for whether magnitude matters at all. A score is a hash of the seed, the step, the
    parameter's name and the entry's position in the whole parameter, so the mask does not depend
    on the number of ranks, on the device or on where the run was resumed.
    """
    return dict.fromkeys(
        shapes, lambda entries: _hashed(entries, _key(seed, entries.step, entries.name))
    )


def fixed_random(shapes: Mapping[str, torch.Size], seed: int) -> Mapping[str, Scorer]:
    """A uniform random mask of the same size, drawn once and the same at every step.

    The control for persistence: masks of successive steps overlap far more by ``gradient`` than by
    ``random``. A score is the hash of ``random`` without the step.
    """
    return dict.fromkeys(shapes, lambda entries: _hashed(entries, _key(seed, entries.name)))


def _hashed(entries: Entries, key: int) -> Scores | Tensor:
    """Uniform scores, made of the positions of the entries."""
    if entries.first_position is not None:
        return Hashes(entries.gradient, key, entries.first_position)
    size = len(entries.gradient)
    scores = torch.empty(size, dtype=torch.float32, device=entries.gradient.device)
    chunk = chunk_size(scores.device)
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        scores[start:stop] = uniform(entries.positions(start, stop), key)
    return scores


def _key(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


# What names the matrices of a pair apart: .lora_A.default of q_proj.lora_A.default.weight.
_LORA_MATRIX = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.(?!weight)[^.]+)?")


def half(shapes: Mapping[str, torch.Size], seed: int) -> Mapping[str, Scorer]:
    """Half of the matrices of each decoder layer frozen for the whole run, the others free.

    A baseline in the manner of Half Fine-Tuning (Hui et al. 2024, arXiv 2404.18466). As there,
    whole matrices are frozen, half of each category, and the rest is trained. The category is the
    module in the layer that a matrix belongs to: its attention, its MLP; matrices that belong to
    the layer itself are one more. A pair of LoRA matrices counts as one. Unlike there, the halves
    are drawn once and stay for the run, where the paper draws anew for each stage of fine-tuning;
    of an odd number of matrices, layers with an even number freeze one less than layers with an odd
    number; and everything but a layer's matrices (embeddings, norms, biases, head) is trained.
    ``mask_ratio`` has no effect unless it is 0.

    A frozen matrix has a gradient of zero, so weight decay would still move it: set that to 0. Its
    gradient still counts in the norm by which all gradients are clipped.

    Raises:
        ValueError: If nothing would be frozen.
    """
    scorers: dict[str, Scorer] = dict.fromkeys(shapes, KEEP)
    categories: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, shape in shapes.items():
        layer = layer_name(name)
        if layer is not None and len(shape) >= 2:
            matrix = _LORA_MATRIX.sub("", name)
            category, _, _ = place(matrix).module.rpartition(".")
            categories[layer, category.partition(".")[0]][matrix].append(name)
    for (layer, category), matrices in categories.items():
        number = int(layer.rpartition(".")[2])
        frozen = (len(matrices) + number % 2) // 2
        draw = random.Random(_key(seed, layer, category))
        for matrix in draw.sample(sorted(matrices), frozen):
            scorers.update(dict.fromkeys(matrices[matrix], DROP))
    if DROP not in scorers.values():
        raise ValueError(
            "criterion (gmt_criterion in YAML): 'half' would freeze nothing, since no layer has "
            "two matrices of one kind under the mask. Set another criterion, or wider patterns."
        )
    return scorers


BUILT_IN: Mapping[str, Criterion] = {
    "gradient": gradient,
    "random": random_uniform,
    "fixed_random": fixed_random,
    "smallest": smallest,
    "gradient_weight": gradient_weight,
    "relative": relative,
    "half": half,
}


class _Offer(NamedTuple):
    package: str
    criterion: Criterion


@cache
def _installed(
    points: tuple[EntryPoint, ...],
) -> tuple[Mapping[str, Sequence[_Offer]], Sequence[str]]:
    """What the packages of ``points`` offer by name, and what is wrong with which package."""
    manager = pluggy.PluginManager(ENTRY_POINT_GROUP)
    manager.add_hookspecs(_Hooks)
    offers: dict[str, list[_Offer]] = defaultdict(list)
    broken = []
    # Not load_setuptools_entrypoints, which skips a second entry point of the same name in silence.
    for point in points:
        package = f"{point.dist.name if point.dist else 'of an unknown name'} ({point.value})"
        try:
            for name, criterion in _offered(manager, point.load(), package).items():
                offers[name].append(_Offer(package, criterion))
        except Exception as error:  # Somebody else's module raises anything as it is imported.
            broken.append(
                f"The package {package} offers criteria, but fails ({type(error).__name__}: "
                f"{error}). Repair or uninstall it."
            )
    return offers, broken


def _offered(
    manager: pluggy.PluginManager, module: object, package: str
) -> Mapping[str, Criterion]:
    """The criteria of one module; none if it has been asked already."""
    if manager.is_registered(module):
        return {}
    others = manager.get_plugins()
    manager.register(module, name=package)
    if not manager.get_hookcallers(module):
        raise TypeError("it has no function gmt_criteria marked with hookimpl")
    results = manager.subset_hook_caller("gmt_criteria", others)()
    if not all(isinstance(result, Mapping) for result in results):
        raise TypeError("its function gmt_criteria must return a dictionary of criteria by name")
    offered = {name: criterion for result in results for name, criterion in result.items()}
    if taken := BUILT_IN.keys() & offered:
        raise ValueError(f"it claims the built-in name {min(taken)!r}, so it must choose another")
    return offered


def find(name: object) -> Criterion:
    """The criterion of that name, built in or of an installed package.

    Packages are imported only to look for a name that is not built in.

    Raises:
        ValueError: If there is none, or if two packages claim the name. A package that is broken
            is no error unless it may be the one that is meant.
    """
    if isinstance(name, str) and name in BUILT_IN:
        return BUILT_IN[name]
    offers, broken = _installed(tuple(entry_points(group=ENTRY_POINT_GROUP)))
    offered = offers.get(name, ()) if isinstance(name, str) else ()
    if not offered:
        problems = "".join(f" {problem}" for problem in broken)
        raise ValueError(
            f"{name!r} is not one of {', '.join([*BUILT_IN, *offers])}. Set one of these, or "
            f"install the package that offers it.{problems}"
        )
    if len(offered) > 1:
        packages = " and by ".join(offer.package for offer in offered)
        raise ValueError(
            f"{name!r} is claimed by {packages}. Uninstall all but one, or rename its criterion."
        )
    return offered[0].criterion
