"""What one rank does: trains a small model sharded in some way and compares every mask and weight
with one process that holds the whole gradient.

Run by torchrun: ``worker.py CASE [CRITERION...]``. A case says that it is ok, or raises.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from axolotl_gmt import GMTConfig, GradientMasker, criteria
from axolotl_gmt.criteria import DROP, KEEP
from axolotl_gmt.gradients.shard import plain_name
from axolotl_gmt.masking.masker import group_name
from tests.reference.gmt_reference import masked_by, masked_by_scores
from tests.reference.overlap_reference import MaskHistory

GRANULARITIES: tuple[Any, ...] = ("tensor", "layer", "global")
STEPS = 3
LR = 2.0**-7  # a power of two: exact, and small enough to keep the model finite

criterion = "gradient"  # what the command line says


def expected_step(
    gradients: dict[str, Tensor],
    mask_ratio: float,
    granularity: Any,
    weights: dict[str, Tensor],
    step: int,
) -> dict[str, Tensor]:
    """The masked gradients that one process finds, by sorting."""
    result: dict[str, Tensor] = {}
    if mask_ratio == 0:
        return gradients
    if criterion == "half":
        scorers = criteria.half({name: weight.shape for name, weight in weights.items()}, 0)
        assert {DROP, KEEP} == set(scorers.values())
        return {
            name: gradient if scorers[name] is KEEP else torch.zeros_like(gradient)
            for name, gradient in gradients.items()
        }
    groups: dict[str, list[str]] = {}
    for name in gradients:
        groups.setdefault(group_name(name, granularity), []).append(name)
    for names in groups.values():
        compete = {name: gradients[name] for name in names}
        result |= masked_by(criterion, compete, weights, mask_ratio, seed=0, step=step)
    return result


def config_of(mask_ratio: float, granularity: Any) -> GMTConfig:
    return GMTConfig(mask_ratio=mask_ratio, granularity=granularity, criterion=criterion)


def full(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return result


class Toy(nn.Module):
    """Odd sizes, so that shards are uneven, and tensors smaller than the number of ranks."""

    def __init__(self, dtype: torch.dtype = torch.float32, hidden: int = 13) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 7)
        self.layers = nn.ModuleList([Block(7, hidden) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(7, 5)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x) * self.scale.float().mean().to(x.dtype)
        return result


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, 11, (4, 6), generator=generator)


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().sum()


def check_steps(
    model: nn.Module,
    mask_ratio: float,
    granularity: Any,
    backward: Callable[[int], None],
) -> None:
    """Compare gradients after masking, and weights after SGD steps, with the reference."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    masker = GradientMasker(model.named_parameters(), config_of(mask_ratio, granularity))
    masker.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(step)
        named = {plain_name(name): p for name, p in model.named_parameters()}
        before = {name: full(p) for name, p in named.items()}
        gradients = {name: full(p.grad) for name, p in named.items() if p.grad is not None}
        expected = expected_step(gradients, mask_ratio, granularity, before, step)
        optimizer.step()
        for name, survivor in expected.items():
            parameter = named[name]
            assert parameter.grad is not None
            assert torch.equal(full(parameter.grad), survivor), (granularity, step, name)
            assert torch.equal(full(parameter), before[name] - LR * survivor), name
        statistics = masker.statistics()
        entries = sum(tensor.numel() for tensor in gradients.values())
        kept = sum(int(tensor.count_nonzero()) for tensor in expected.values())
        assert statistics["kept_fraction"] == kept / entries, (statistics, kept / entries)
        whole = torch.cat([g.flatten().double() for g in gradients.values()]).norm()
        part = torch.cat([g.flatten().double() for g in expected.values()]).norm()
        assert abs(statistics["grad_norm_kept"] - float(part / whole)) < 1e-6
        whole = torch.cat([g.flatten().double() for g in gradients.values()]).norm(1)
        part = torch.cat([g.flatten().double() for g in expected.values()]).norm(1)
        assert abs(statistics["l1_kept"] - float(part / whole)) < 1e-6


def every_setting(check: Callable[[float, Any], None]) -> None:
    for granularity in GRANULARITIES:
        for mask_ratio in (0.0, 0.5, 0.93):
            check(mask_ratio, granularity)


def ddp() -> None:
    def check(mask_ratio: float, granularity: Any) -> None:
        model = nn.parallel.DistributedDataParallel(Toy(), find_unused_parameters=False)
        check_steps(
            model,
            mask_ratio,
            granularity,
            lambda step: loss_of(model(batch(step, dist.get_rank()))).backward(),
        )

    every_setting(check)


def fully_sharded(mesh: DeviceMesh, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    def check(mask_ratio: float, granularity: Any) -> None:
        model = Toy(dtype)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, **settings)
        fully_shard(model, mesh=mesh, **settings)
        check_steps(
            model,
            mask_ratio,
            granularity,
            lambda step: loss_of(model(batch(step, dist.get_rank()))).backward(),
        )

    every_setting(check)


def fsdp2() -> None:
    fully_sharded(init_device_mesh("cpu", (dist.get_world_size(),)))


def fsdp2_bf16() -> None:
    fully_sharded(init_device_mesh("cpu", (dist.get_world_size(),)), torch.bfloat16)


def fsdp2_mixed_precision() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_sharded(init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)


def fsdp2_cpu_offload() -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    policy = CPUOffloadPolicy(pin_memory=False)
    fully_sharded(init_device_mesh("cpu", (dist.get_world_size(),)), offload_policy=policy)


def hsdp() -> None:
    fully_sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for layer in model.layers:  # type: ignore[union-attr]
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def tp() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def check(mask_ratio: float, granularity: Any) -> None:
        model = Toy(hidden=12)  # torch's tensor parallel layers want even shards
        tensor_parallel(model, mesh)
        # Every rank works on the same batch; norms and head are whole on each.
        check_steps(
            model, mask_ratio, granularity, lambda step: loss_of(model(batch(step, 0))).backward()
        )

    every_setting(check)


def fsdp2_and_tp() -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))

    def check(mask_ratio: float, granularity: Any) -> None:
        model = Toy(hidden=12)  # torch's tensor parallel layers want even shards
        tensor_parallel(model, mesh["tp"])
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["fsdp"])
        fully_shard(model, mesh=mesh["fsdp"])
        row = mesh.get_local_rank("fsdp")
        check_steps(
            model, mask_ratio, granularity, lambda step: loss_of(model(batch(step, row))).backward()
        )

    every_setting(check)


def zero(stage: int, dtype: torch.dtype = torch.float32, **config: Any) -> None:
    """A DeepSpeed engine with two parameter groups, as trainers make them."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    clip = config.pop("gradient_clipping", 0.0)
    for granularity in GRANULARITIES:
        for mask_ratio in (0.0, 0.5, 0.93):
            model, plain = Toy(dtype), Toy(dtype)
            names = list(model.named_parameters())
            groups = [
                {"params": [p for _, p in names if p.dim() > 1]},
                {"params": [p for _, p in names if p.dim() == 1]},
            ]
            engine, optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=torch.optim.SGD(groups, lr=LR),
                config={
                    "train_micro_batch_size_per_gpu": 4,
                    "gradient_clipping": clip,
                    "bf16": {"enabled": dtype == torch.bfloat16},
                    "zero_optimization": {"stage": stage, **config},
                    "zero_force_ds_cpu_optimizer": False,
                    "zero_allow_untested_optimizer": True,
                },
            )
            masker = GradientMasker(
                engine.module.named_parameters(),
                config_of(mask_ratio, granularity),
            )
            masker.attach(optimizer)
            for step in range(STEPS):
                with torch.no_grad():
                    before = {name: safe_get_full_fp32_param(p).clone() for name, p in names}
                    for name, parameter in plain.named_parameters():
                        parameter.copy_(before[name].view_as(parameter))
                plain.zero_grad()
                loss_of(plain(batch(step, dist.get_rank()))).backward()
                gradients = {}
                for name, parameter in plain.named_parameters():
                    assert parameter.grad is not None
                    dist.all_reduce(parameter.grad)
                    gradients[name] = parameter.grad / dist.get_world_size()
                weights = {n: before[n].view_as(gradient) for n, gradient in gradients.items()}
                expected = expected_step(gradients, mask_ratio, granularity, weights, step)
                engine.backward(loss_of(engine(batch(step, dist.get_rank()))))
                engine.step()
                norm = torch.cat([g.flatten().float() for g in gradients.values()]).norm()
                factor = 1.0 if clip == 0 else min(1.0, clip / float(norm))
                assert clip == 0 or factor < 1
                for name, parameter in names:
                    old = before[name].view_as(expected[name])
                    new = safe_get_full_fp32_param(parameter).view_as(old)
                    if clip == 0:
                        wanted = old - LR * expected[name].float()
                        assert torch.equal(new, wanted), (granularity, mask_ratio, step, name)
                    else:
                        dropped = expected[name] == 0
                        assert torch.equal(new[dropped], old[dropped]), (granularity, name)
                        moved = LR * factor * expected[name].float()
                        torch.testing.assert_close(old - new, moved, atol=1e-6, rtol=1e-3)
                entries = sum(tensor.numel() for tensor in gradients.values())
                kept = sum(int(tensor.count_nonzero()) for tensor in expected.values())
                assert masker.statistics()["kept_fraction"] == kept / entries
            engine.destroy()


def zero_1() -> None:
    zero(1)


def zero_2() -> None:
    zero(2)


def zero_3() -> None:
    zero(3, sub_group_size=100, stage3_param_persistence_threshold=0)


def zero_2_bf16() -> None:
    zero(2, torch.bfloat16)


def zero_3_bf16() -> None:
    zero(3, torch.bfloat16, sub_group_size=100)


def zero_1_clipped() -> None:
    zero(1, gradient_clipping=0.5)


def zero_2_clipped() -> None:
    zero(2, gradient_clipping=0.5)


def zero_3_clipped() -> None:
    zero(3, gradient_clipping=0.5, sub_group_size=100)


def zero_2_cpu_offload() -> None:
    zero(2, offload_optimizer={"device": "cpu"})


def zero_3_cpu_offload() -> None:
    zero(3, offload_optimizer={"device": "cpu"}, sub_group_size=100)


def random_shardings() -> None:
    """Any mesh, placements, dtypes, granularity and ratio, with gradients missing here and there.

    Every rank draws the same examples, and a failure is not shrunk: ranks would part ways.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    world = dist.get_world_size()
    meshes = [init_device_mesh("cpu", (world,))]
    if world == 4:
        meshes += [init_device_mesh("cpu", shape) for shape in ((2, 2), (4, 1), (1, 4))]
    tensor = st.tuples(
        st.sampled_from(range(len(meshes))),
        st.lists(st.integers(0, 9), min_size=1, max_size=3),
        st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        st.lists(st.sampled_from([None, 0, 1, 2]), min_size=2, max_size=2),
        st.booleans(),
    )

    @settings(
        max_examples=60,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        tensors=st.lists(tensor, min_size=1, max_size=6),
        granularity=st.sampled_from(GRANULARITIES),
        mask_ratio=st.floats(0, 0.99),
        seed=st.integers(0, 2**32),
    )
    def check(tensors: list[Any], granularity: Any, mask_ratio: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        parameters: dict[str, nn.Parameter] = {}
        gradients: dict[str, Tensor] = {}
        for index, (mesh, shape, dtype, dims, present) in enumerate(tensors):
            name = f"layers.{index % 2}.{index}.weight" if index % 3 else f"other_{index}"
            gradients[name] = torch.randn(shape, generator=generator).to(dtype)
            placements = [
                Replicate() if dim is None or dim >= len(shape) else Shard(dim)
                for dim in dims[: meshes[mesh].ndim]
            ]
            weight = torch.randn(shape, generator=generator).to(dtype)
            parameter = distribute_tensor(weight, meshes[mesh], placements)
            parameters[name] = nn.Parameter(parameter)
            if present:
                parameters[name].grad = distribute_tensor(gradients[name], meshes[mesh], placements)
        optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
        config = config_of(mask_ratio, granularity)
        GradientMasker(parameters.items(), config).attach(optimizer)
        there = {n: g for n, g in gradients.items() if parameters[n].grad is not None}
        before = {name: full(parameter) for name, parameter in parameters.items()}
        expected = expected_step(there, mask_ratio, granularity, before, 0)
        optimizer.step()
        for name, gradient in expected.items():
            moved = before[name] - gradient
            assert torch.equal(full(parameters[name]), moved), (name, tensors, granularity)

    check()


def gradients_missing_on_one_rank() -> None:
    """An expert without a token on one rank: its shard is absent there and counts for nothing."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = 2 * dist.get_world_size()
    for granularity in GRANULARITIES:
        whole = {
            f"layers.{i}.weight": torch.randn(rows, 5, generator=torch.Generator().manual_seed(i))
            for i in range(3)
        }
        parameters = {
            name: nn.Parameter(distribute_tensor(torch.zeros(rows, 5), mesh, [Shard(0)]))
            for name in whole
        }
        for name, gradient in whole.items():
            parameters[name].grad = distribute_tensor(gradient, mesh, [Shard(0)])
        there = dict(whole)
        there["layers.1.weight"] = whole["layers.1.weight"][2:]
        if dist.get_rank() == 0:
            parameters["layers.1.weight"].grad = None
        optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
        config = GMTConfig(mask_ratio=0.6, granularity=granularity)
        GradientMasker(parameters.items(), config).attach(optimizer)
        optimizer.step()
        for name, gradient in expected_step(there, 0.6, granularity, {}, 0).items():
            moved = full(parameters[name])[-len(gradient) :]
            assert torch.equal(moved, -gradient), (granularity, name)


def ddp_with_unused_parameters() -> None:
    def check(mask_ratio: float, granularity: Any) -> None:
        toy = Toy()
        toy.layers[1].requires_grad_(False)
        toy.register_module("unused", nn.Linear(3, 3))
        model = nn.parallel.DistributedDataParallel(toy, find_unused_parameters=True)
        check_steps(
            model,
            mask_ratio,
            granularity,
            lambda step: loss_of(model(batch(step, dist.get_rank()))).backward(),
        )

    every_setting(check)


def a_rank_that_dies_ends_the_others() -> None:
    """Rank 1 leaves before the collectives of a step; the others must fail, not wait."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.zeros(8, 8), mesh, [Shard(0)]))
    weight.grad = distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    GradientMasker([("weight", weight)]).attach(optimizer)
    if dist.get_rank() == 1:
        os._exit(7)
    optimizer.step()


def sharded_weights(
    dtype: torch.dtype = torch.float32, mesh: DeviceMesh | None = None
) -> dict[str, nn.Parameter]:
    """Three weights of 2 rows a rank with gradients, sharded over every dimension of a mesh."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    places = [Shard(dim) for dim in range(mesh.ndim)]
    weights = {}
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        whole = torch.randn(2 * dist.get_world_size(), 64, generator=generator).to(dtype)
        weights[f"layers.{index}.weight"] = nn.Parameter(distribute_tensor(whole, mesh, places))
        weights[f"layers.{index}.weight"].grad = distribute_tensor(whole, mesh, places)
    return weights


def parameters_in_another_order() -> None:
    for granularity in GRANULARITIES:
        weights = sharded_weights()
        before = {name: full(weight) for name, weight in weights.items()}
        named = list(weights.items())
        if dist.get_rank() == 1:
            named.reverse()
        optimizer = torch.optim.SGD([weight for _, weight in named], lr=1.0)
        GradientMasker(named, config_of(0.7, granularity)).attach(optimizer)
        optimizer.step()
        expected = expected_step(before, 0.7, granularity, before, 0)
        for name, gradient in expected.items():
            assert torch.equal(full(weights[name]), before[name] - gradient), (granularity, name)


def ranks_that_differ_are_refused() -> None:
    """Every rank raises at attach, and says which two differ in what."""
    last = dist.get_world_size() - 1
    is_last = dist.get_rank() == last
    weights = sharded_weights()
    renamed = {name.replace("layers.2", "layers.9"): weight for name, weight in weights.items()}
    cases: list[tuple[dict[str, nn.Parameter], dict[str, Any], str]] = [
        (weights, {"mask_ratio": 0.6}, f"mask_ratio.* is 0.5 on rank 0 and 0.6 on rank {last}"),
        (weights, {"criterion": "random", "seed": last}, "criterion .* is 'gradient' on rank 0"),
        (weights, {"exclude": [r"layers\.1"]}, "exclude .* is None on rank 0"),
        (renamed, {}, r"layers\.2\.weight is .* on rank 0 and absent on rank"),
    ]
    for named, settings, message in cases:
        config = GMTConfig(**settings) if is_last else GMTConfig()
        masker = GradientMasker((named if is_last else weights).items(), config)
        with pytest.raises(ValueError, match=message):
            masker.attach(torch.optim.SGD(weights.values(), lr=1.0))


def a_gradient_missing_on_one_rank_has_its_parameters_dtype() -> None:
    """fp32 gradients of bf16 weights, one of them absent on rank 0: its shard there is fp32 too."""
    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    for granularity in GRANULARITIES:
        weights = sharded_weights(torch.bfloat16)
        name, *rest = weights
        expected = {other: full(weights[other].detach()) for other in rest}
        whole = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(9))
        weights[name].grad = None
        weights[name].grad_dtype = torch.float32
        if rank != 0:
            weights[name].grad = distribute_tensor(whole, mesh, [Shard(0)])
        else:
            distribute_tensor(whole, mesh, [Shard(0)])  # It takes part in the scattering.
        optimizer = torch.optim.SGD(weights.values(), lr=0.0)
        GradientMasker(weights.items(), config_of(0.6, granularity)).attach(optimizer)
        masker_step(optimizer)
        expected = expected_step({name: whole[2:], **expected}, 0.6, granularity, {}, 0)
        for other, gradient in expected.items():
            local = weights[other].grad
            if local is None:
                assert (rank, other) == (0, name)
                continue
            assert isinstance(local, DTensor)
            start = 2 * rank - (2 if other == name else 0)
            assert torch.equal(local.to_local(), gradient[start : start + 2]), (granularity, other)


def a_gradient_sharded_otherwise_than_its_parameter_is_refused() -> None:
    """Also where the parameter is whole on every rank. Placements over one rank may differ."""
    world = dist.get_world_size()
    mesh, deep = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (world, 1))
    whole = torch.randn(2 * world, 6, generator=torch.Generator().manual_seed(5))
    cases: list[tuple[DeviceMesh, list[Any], list[Any], str | None]] = [
        (mesh, [Replicate()], [Shard(0)], "placements"),
        (mesh, [Shard(0)], [Replicate()], "placements"),
        (mesh, [Shard(0)], [Shard(1)], "placements"),
        (deep, [Replicate(), Shard(0)], [Shard(1), Shard(0)], "placements"),
        (deep, [Replicate(), Shard(0)], [Replicate(), Replicate()], None),
        (deep, [Shard(0), Replicate()], [Shard(0), Shard(1)], None),
    ]
    for used, of_parameter, of_gradient, message in cases:
        weight = nn.Parameter(distribute_tensor(whole, used, of_parameter))
        weight.grad = distribute_tensor(whole, used, of_gradient)
        optimizer = torch.optim.SGD([weight], lr=0.0)
        GradientMasker([("w", weight)], GMTConfig(criterion="gradient_weight")).attach(optimizer)
        if message is None:
            masker_step(optimizer)
            (expected,) = masked_by_scores([whole], [whole * whole], 0.5)
            assert torch.equal(full(weight.grad), expected), of_gradient
        else:
            with pytest.raises(TypeError, match=f"another {message} than its parameter"):
                masker_step(optimizer)


def hashes_that_one_rank_cannot_make_change_nothing() -> None:
    """`random` where ranks differ in what they could do: in layout, gradients, and Numba."""
    from axolotl_gmt.kernels import dispatch

    global criterion
    criterion = "random"
    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    for case, granularity in itertools.product(("layout", "absent", "no Numba"), GRANULARITIES):
        weights = sharded_weights()
        if case == "layout":  # A part of one row is contiguous, one of two by column is not.
            whole = torch.randn(2 * dist.get_world_size() - 1, 5)
            dist.broadcast(whole, 0)
            weights["layers.1.weight"] = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
            gradient = distribute_tensor(whole, mesh, [Shard(0)])
            local = gradient.to_local().t().contiguous().t()
            weights["layers.1.weight"].grad = DTensor.from_local(
                local, mesh, [Shard(0)], shape=whole.shape, stride=whole.stride()
            )
        elif case == "absent" and rank == 0:
            weights["layers.1.weight"].grad = None
        elif case == "no Numba" and rank == 1:
            dispatch.forget_backends()
            dispatch._failed["cpu", None] = RuntimeError("for this test")
        gradients: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if case != "absent" or name != "layers.1.weight":
                assert weight.grad is not None
                gradients[name] = full(weight.grad)
        optimizer = torch.optim.SGD(weights.values(), lr=0.0)
        masker = GradientMasker(
            weights.items(), GMTConfig(criterion="random", seed=0, granularity=granularity)
        )
        masker.attach(optimizer)
        optimizer.step()
        assert 0.3 < masker.statistics()["kept_fraction"] < 0.7
        if case != "absent":
            for name, expected in expected_step(gradients, 0.5, granularity, {}, 0).items():
                left = weights[name].grad
                assert left is not None
                assert torch.equal(full(left), expected), (case, granularity, name)
        dispatch.forget_backends()
    criterion = "gradient"


def no_gradient_at_all_on_one_rank() -> None:
    """It has nothing to mask, but others wait for its counts."""
    for granularity in GRANULARITIES:
        weights = sharded_weights()
        before = {name: full(weight.detach()) for name, weight in weights.items()}
        if dist.get_rank() == 0:
            for weight in weights.values():
                weight.grad = None
        optimizer = torch.optim.SGD(weights.values(), lr=1.0)
        GradientMasker(weights.items(), config_of(0.7, granularity)).attach(optimizer)
        optimizer.step()
        there = {name: whole[2:] for name, whole in before.items()}
        for name, gradient in expected_step(there, 0.7, granularity, {}, 0).items():
            moved = before[name] - full(weights[name].detach())
            assert torch.equal(moved != 0, torch.cat([torch.zeros(2, 64), gradient]) != 0)


def nothing_is_sent_where_nothing_is_sharded() -> None:
    """GMT on rank 0 alone, as independent trainings may have it: it must wait for nobody."""
    if dist.get_rank() == 0:
        model = Toy()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        masker = GradientMasker(model.named_parameters(), GMTConfig())
        masker.attach(optimizer)
        loss_of(model(batch(0, 0))).backward()
        optimizer.step()
        assert masker.statistics()
    dist.barrier()


def masker_step(optimizer: torch.optim.Optimizer) -> None:
    """The hooks of a step and nothing else: SGD would refuse a gradient of another dtype."""
    for hook in list(optimizer._optimizer_step_pre_hooks.values()):
        hook(optimizer, (optimizer,), {})


def an_error_on_one_rank_is_raised_on_all() -> None:
    """A gradient of another dtype on the last rank, in the first step and in the third.

    On four ranks also in a mesh of two by two, where the last shares no group with the first.
    """
    last = dist.get_world_size() - 1
    meshes = [init_device_mesh("cpu", (last + 1,))]
    if last == 3:
        meshes.append(init_device_mesh("cpu", (2, 2)))
    for mesh, faulty_step in itertools.product(meshes, (0, 2)):
        weights = sharded_weights(mesh=mesh)
        optimizer = torch.optim.SGD(weights.values(), lr=0.0)
        masker = GradientMasker(weights.items(), GMTConfig())
        masker.attach(optimizer)
        for step in range(3):
            if step == faulty_step and dist.get_rank() == last:
                weight = weights["layers.1.weight"]
                gradient = weight.grad
                assert gradient is not None
                weight.grad = None
                weight.grad_dtype = None
                weight.grad = gradient.bfloat16()
            if step != faulty_step:
                masker_step(optimizer)
                continue
            start = time.monotonic()
            with pytest.raises((TypeError, RuntimeError)) as raised:
                masker_step(optimizer)
            assert time.monotonic() - start < 5
            text = str(raised.value)
            assert "layers.1.weight has another dtype than its parameter" in text
            assert (raised.type is TypeError) == (dist.get_rank() == last)
            assert dist.get_rank() == last or f"On rank {last}: TypeError" in text
            break


def a_criterion_that_fails_on_one_rank_ends_the_others() -> None:
    """Not agreed on beforehand: rank 1 leaves in the middle of a step, by its own error."""
    weights = sharded_weights()
    optimizer = torch.optim.SGD(weights.values(), lr=0.0)
    masker = GradientMasker(weights.items(), GMTConfig(criterion="random"))
    masker.attach(optimizer)
    optimizer.step()

    def fail(entries: Any) -> Tensor:
        raise torch.OutOfMemoryError("planted")

    if dist.get_rank() == 1:
        masker._scorers._by_name["layers.2.weight"] = fail
        masker._scorers._by_name["layers.1.weight"] = fail
    optimizer.step()


def experts_of_other_ranks_are_refused() -> None:
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    for ep_size in (1, dist.get_world_size()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), MoE(8, nn.Linear(8, 8), 4, ep_size=ep_size))
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
        engine, optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(groups, lr=LR),
            config={
                "train_micro_batch_size_per_gpu": 4,
                "zero_optimization": {"stage": 2},
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,
            },
        )
        masker = GradientMasker(engine.module.named_parameters(), GMTConfig())
        if ep_size == 1:
            masker.attach(optimizer)
            continue
        with pytest.raises(ValueError, match="MoE with ep_size above 1"):
            masker.attach(optimizer)


def deepspeed_trainer() -> None:
    """Transformers' Trainer with DeepSpeed and GMTCallback, DeepSpeed's own optimizer included."""
    import tempfile

    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from axolotl_gmt import GMTCallback

    own = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    for optimizer in ({}, {"optimizer": own}):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        )
        rows = [[1 + i % 7, 2 + i % 5, 3 + i % 3, 4] for i in range(32)]
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model,
                TrainingArguments(
                    folder,
                    use_cpu=True,
                    max_steps=3,
                    logging_steps=1,
                    per_device_train_batch_size=2,
                    report_to=[],
                    save_strategy="no",
                    disable_tqdm=True,
                    learning_rate=1e-3,
                    deepspeed={
                        "train_micro_batch_size_per_gpu": "auto",
                        "gradient_clipping": "auto",
                        "zero_optimization": {"stage": 2},
                        "zero_allow_untested_optimizer": True,
                        "zero_force_ds_cpu_optimizer": False,
                        **optimizer,
                    },
                ),
                train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
                callbacks=[GMTCallback(mask_ratio=0.75, granularity="layer", exclude=["embed"])],
            )
            trainer.train()
        kept = [log["gmt/kept_fraction"] for log in trainer.state.log_history if "loss" in log]
        assert len(kept) == 3
        assert all(0.2 < fraction < 0.3 for fraction in kept), kept


def follow_masks(
    masker: GradientMasker,
    sizes: dict[str, int],
    make_step: Callable[[int], dict[str, Tensor]],
    are_shared: bool,
) -> None:
    """Compare what is said of the overlap of masks with one process that sees all of them.

    ``make_step`` makes a step and returns its masked gradients, each of them whole.
    """
    history = MaskHistory(sizes)

    def check(step: int) -> None:
        logged, expected = masker.statistics(), history.log([*sizes])
        assert {key: logged.get(key) for key in expected} == expected, (step, logged, expected)
        assert ("mask_overlap" in logged) == ("mask_overlap" in expected)

    for step in range(6):
        history.step(make_step(step))
        for _ in range((0, 1, 2, 0, 0, 1)[step]):
            check(step)
    # One rank reads alone: nobody waits for it, and no number is one of different steps.
    history.step(make_step(6))
    if dist.get_rank() == 0:
        masker.statistics()
    history.step(make_step(7))
    assert ("mask_overlap" in masker.statistics()) != are_shared
    history.log([*sizes])
    history.step(make_step(8))
    check(8)


def sizes_of(model: nn.Module) -> dict[str, int]:
    return {plain_name(name): parameter.numel() for name, parameter in model.named_parameters()}


def follow_masks_of(model: nn.Module, are_shared: bool, log_modules: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    config = GMTConfig(mask_ratio=0.7, log_overlap=True, log_modules=log_modules)
    masker = GradientMasker(model.named_parameters(), config)
    masker.attach(optimizer)

    def make_step(step: int) -> dict[str, Tensor]:
        optimizer.zero_grad()
        loss_of(model(batch(step, dist.get_rank()))).backward()
        optimizer.step()
        named = model.named_parameters()
        return {plain_name(name): full(p.grad) for name, p in named if p.grad is not None}

    follow_masks(masker, sizes_of(model), make_step, are_shared)


def mask_overlap_ddp() -> None:
    model = nn.parallel.DistributedDataParallel(Toy(), find_unused_parameters=False)
    follow_masks_of(model, are_shared=False, log_modules=False)


def mask_overlap_fsdp2() -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for log_modules in (False, True):
        model = Toy()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        follow_masks_of(model, are_shared=True, log_modules=log_modules)


def mask_overlap_of_gradients_missing_on_one_rank() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = sharded_weights(mesh=mesh)
    optimizer = torch.optim.SGD(weights.values(), lr=0.0)
    masker = GradientMasker(weights.items(), GMTConfig(log_overlap=True))
    masker.attach(optimizer)

    def make_step(step: int) -> dict[str, Tensor]:
        for index, weight in enumerate(weights.values()):
            generator = torch.Generator().manual_seed(100 * step + index)
            whole = torch.randn(weight.shape, generator=generator)
            weight.grad = distribute_tensor(whole, mesh, [Shard(0)])
            if step % 3 == index and dist.get_rank() == 0:
                weight.grad = None
        optimizer.step()
        masked = {}
        for name, weight in weights.items():
            local = torch.zeros(2, 64) if weight.grad is None else full_local(weight.grad)
            parts = [torch.empty(2, 64) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, local)
            masked[name] = torch.cat(parts)
        return masked

    follow_masks(masker, {name: w.numel() for name, w in weights.items()}, make_step, True)


def full_local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().contiguous()


def mask_overlap_zero(stage: int) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    model, plain = Toy(), Toy()
    sizes = sizes_of(model)
    names = list(model.named_parameters())
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        },
    )
    config = GMTConfig(mask_ratio=0.7, log_overlap=True)
    masker = GradientMasker(engine.module.named_parameters(), config)
    masker.attach(optimizer)

    def make_step(step: int) -> dict[str, Tensor]:
        with torch.no_grad():
            of_plain = dict(plain.named_parameters())
            for name, parameter in names:
                weight = safe_get_full_fp32_param(parameter)
                of_plain[name].copy_(weight.view_as(of_plain[name]))
        plain.zero_grad()
        loss_of(plain(batch(step, dist.get_rank()))).backward()
        gradients = {}
        for name, parameter in of_plain.items():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            gradients[name] = parameter.grad / dist.get_world_size()
        engine.backward(loss_of(engine(batch(step, dist.get_rank()))))
        engine.step()
        return expected_step(gradients, 0.7, "tensor", {}, step)

    follow_masks(masker, sizes, make_step, are_shared=True)
    engine.destroy()


def mask_overlap_zero_2() -> None:
    mask_overlap_zero(2)


def mask_overlap_zero_3() -> None:
    mask_overlap_zero(3)


CASES = {
    case.__name__: case
    for case in (
        ddp,
        ddp_with_unused_parameters,
        gradients_missing_on_one_rank,
        a_rank_that_dies_ends_the_others,
        parameters_in_another_order,
        ranks_that_differ_are_refused,
        a_gradient_missing_on_one_rank_has_its_parameters_dtype,
        an_error_on_one_rank_is_raised_on_all,
        a_gradient_sharded_otherwise_than_its_parameter_is_refused,
        no_gradient_at_all_on_one_rank,
        nothing_is_sent_where_nothing_is_sharded,
        hashes_that_one_rank_cannot_make_change_nothing,
        a_criterion_that_fails_on_one_rank_ends_the_others,
        experts_of_other_ranks_are_refused,
        random_shardings,
        deepspeed_trainer,
        mask_overlap_ddp,
        mask_overlap_fsdp2,
        mask_overlap_of_gradients_missing_on_one_rank,
        mask_overlap_zero_2,
        mask_overlap_zero_3,
        fsdp2,
        fsdp2_bf16,
        fsdp2_mixed_precision,
        fsdp2_cpu_offload,
        hsdp,
        tp,
        fsdp2_and_tp,
        zero_1,
        zero_2,
        zero_3,
        zero_2_bf16,
        zero_3_bf16,
        zero_1_clipped,
        zero_2_clipped,
        zero_3_clipped,
        zero_2_cpu_offload,
        zero_3_cpu_offload,
    )
}


def main() -> None:
    global criterion
    torch.set_num_threads(1)
    if any(
        name.startswith(("zero", "deepspeed", "experts", "mask_overlap_zero")) for name in sys.argv
    ):
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    try:
        name, *selected = sys.argv[1:]
        for criterion in selected or ["gradient"]:
            CASES[name]()
            if dist.get_rank() == 0:
                print(f"ok {name} {criterion}", flush=True)
    finally:
        dist.destroy_process_group()
    # Not the interpreter's own end: a thread of torch or DeepSpeed that asks for the GIL then now
    # and again aborts the process ("terminate called without an active exception").
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
