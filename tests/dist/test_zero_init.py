"""zero.Init: models of which no rank ever holds the whole, with the weights that ordinary construction gives."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

import deepcore
from deepcore.errors import ConfigError, UsageError
from deepcore.optim import FusedAdam
from deepcore.zero import GatheredParameters, Init, register_external_parameter, safe_get_full_fp32_param
from tests.dist.pool import run_ranks
from tests.parity.model import batch, build
from tests.parity.optimizers import RECIPES
from tests.parity.reference import Case, Weights, train_reference, worst_difference


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Like every rank: sums inside torch's own kernels depend on the number of threads."""
    earlier = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(earlier)


class Block(nn.Module):
    """Parameters of its own around those of children, one used while it is built."""

    def __init__(self, width: int, first: nn.Module | None = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))
        self.inner = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
        self.attention = nn.MultiheadAttention(width, 2)
        self.doubled = nn.Parameter(self.gain * 2)
        self.bias = nn.Parameter(torch.zeros(width), requires_grad=False)
        nn.init.uniform_(self.gain)
        if first is not None:
            register_external_parameter(self, first.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.inner(x * self.gain) + y * self.doubled + self.bias


class Everything(nn.Module):
    """The ways in which real models are put together."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width, padding_idx=1)
        self.blocks = nn.ModuleList([Block(width, self.embed) for _ in range(2)])
        self.copied = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 2, 12, batch_first=True), 2)
        self.recurrent = nn.LSTM(width, 5)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(width, 5))
        self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.randn(0, 3))
        self.table = nn.ParameterDict({"a": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.randn(2))})
        self.counts = nn.Parameter(torch.arange(5), requires_grad=False)
        self.lazy = nn.LazyLinear(4)
        self.register_buffer("noise", torch.randn(7))
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight
        self.half = nn.Linear(width, 3).to(torch.bfloat16)
        kept = self.normed.bias.data  # a view of what is scattered while it lives
        self.apply(self.again)
        kept += torch.randn(5)
        self.sizes = [param.numel() for param in self.parameters() if not isinstance(param, nn.UninitializedParameter)]

    def again(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and not isinstance(module, nn.LazyLinear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
            with torch.no_grad():
                module.weight[module.padding_idx].fill_(0)


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def config(**zero: Any) -> dict[str, Any]:
    section = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 200, **zero}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": section,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }


def build_scattered(ranks_differ: bool) -> tuple[Weights, list[int], torch.Tensor]:
    torch.manual_seed(7 + (rank() if ranks_differ else 0))
    with Init():
        model = Everything()
    after = torch.rand(3)
    assert not torch_module._global_parameter_registration_hooks
    assert not torch_module._global_module_registration_hooks
    assert torch._C._len_torch_function_stack() == 0
    named = {name: p for name, p in model.named_parameters() if not isinstance(p, nn.UninitializedParameter)}
    assert all(p.numel() == 0 for p in named.values())
    assert isinstance(model.lazy.weight, nn.UninitializedParameter)
    with GatheredParameters(list(named.values())):
        weights = {name: p.detach().clone() for name, p in named.items()}
    assert all(p.numel() == 0 for p in named.values())
    assert model.head.weight is model.embed.weight
    weights["noise"] = model.noise
    return weights, model.sizes, after


@pytest.mark.parametrize(("world", "ranks_differ"), [(1, False), (2, False), (3, False), (2, True)])
def test_the_weights_are_those_of_ordinary_construction(world: int, ranks_differ: bool) -> None:
    torch.manual_seed(7)
    model = Everything()
    after = torch.rand(3)
    for index, (weights, sizes, theirs) in enumerate(
        run_ranks(world, build_scattered, ranks_differ, hostile=world == 3)
    ):
        assert sizes == model.sizes
        if not ranks_differ or index == 0:
            assert torch.equal(theirs, after), "as many random numbers were drawn"
        for name, param in model.named_parameters():
            if isinstance(param, nn.UninitializedParameter):
                continue
            # Written through a view that outlived the scattering, each rank's part with its own numbers.
            if not (ranks_differ and name == "normed.bias"):
                assert torch.equal(weights[name], param), name
            assert weights[name].dtype == param.dtype
            assert weights[name].stride() == param.stride(), name
        assert "noise" in weights


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors held at the end of any operation. What is older than ``gc.freeze`` is left out."""

    def __init__(self, idle: bool = False) -> None:
        super().__init__()
        self.peak, self.idle = 0, idle

    @staticmethod
    def now() -> int:
        with torch._C.DisableTorchFunction():
            tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
        return sum(storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.peak = 0 if self.idle else max(self.peak, self.now())
        return result


class Tower(nn.Module):
    """Layers made before any of them is registered, and re-initialised by their parent."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
        self.out = nn.Linear(width, 8)
        self.apply(self.again)

    def again(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.02)
            module.bias.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layers(x)).square().mean()


DEPTH, WIDTH = 12, 64


def measure_tower() -> dict[str, int]:
    with LiveBytes(idle=True), Init():  # what is imported at first use is imported now
        model = Tower(1, 2)
    deepcore.initialize(model=model, config=config())[0].destroy()
    del model
    gc.collect()
    gc.freeze()
    try:
        with LiveBytes() as building, Init():
            model = Tower(DEPTH, WIDTH)
        gc.collect()
        held = LiveBytes.now()
        with LiveBytes() as starting:
            engine, *_ = deepcore.initialize(model=model, config=config(reduce_bucket_size=5000))
    finally:
        gc.unfreeze()
    engine.backward(engine(torch.ones(1, WIDTH)))
    engine.step()
    engine.destroy()
    return {"building": building.peak, "held": held, "starting": starting.peak}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_no_rank_holds_more_than_its_parts_and_one_module(world: int) -> None:
    total = 4 * sum(param.numel() for param in Tower(DEPTH, WIDTH).parameters())
    module = 4 * (WIDTH * WIDTH + WIDTH)
    small = 1000  # bytes: paddings and the odd number
    for found in run_ranks(world, measure_tower):
        assert found["held"] <= total / world + small
        assert found["building"] <= total / world + module + small
        assert found["building"] >= total / world, "the measure sees what there is"
        # Parts become shards unit by unit, and then come gradients and two moments.
        assert found["starting"] <= 4 * (total / world + DEPTH * 64 * 4) + 2 * module + small


def train_scattered(case: Case, recipe: str = "") -> Weights:
    with Init(config_dict_or_path=case.config()):
        model = build(100)
    settings: dict[str, Any] = {**case.config()}
    if recipe:
        settings |= RECIPES[recipe].section()
    engine, *_ = deepcore.initialize(model=model, model_parameters=model.parameters(), config=settings)
    for step in range(case.steps):
        for micro in range(case.accumulation):
            engine.backward(engine(*batch(step, rank(), micro)))
            engine.step()
    weights: Weights = engine.module_state_dict()
    engine.destroy()
    assert model.body.weight.shape == (19, 8)
    return weights


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=3, world=1),
        Case(stage=3, world=2, bf16=True, persistent=100),
        Case(stage=3, world=3, accumulation=2, clip=0.3),
        Case(stage=3, world=2, fp16=True),
    ],
    ids=str,
)
def test_training_equals_the_reference(case: Case) -> None:
    expected = train_reference(case, lambda ps: FusedAdam(ps, lr=case.lr, eps=case.eps, weight_decay=0.1))
    limit = 1e-6 if case.world == 3 else 0.0
    for result in run_ranks(case.world, train_scattered, case, hostile=True):
        difference, name = worst_difference(result, expected)
        assert difference <= limit, f"{name} differs by {difference}"


def test_muon_knows_matrices_that_are_in_parts() -> None:
    case = Case(stage=3, world=2)
    names = [name for name, param in build(100).named_parameters() if param.requires_grad]
    expected = train_reference(case, lambda params: RECIPES["muon"].alone(names, params))
    for result in run_ranks(2, train_scattered, case, "muon"):
        assert worst_difference(result, expected)[0] <= 1e-4


def evaluates_and_keeps_bits() -> None:
    torch.manual_seed(0)
    plain = Tower(2, 6)
    torch.manual_seed(0)
    with Init():
        model = Tower(2, 6)
    settings = config()
    del settings["optimizer"]
    engine, *_ = deepcore.initialize(model=model, config=settings)
    assert all(param.numel() == 0 for param in model.parameters()), "a reference model is sharded too"
    with torch.no_grad():
        assert torch.equal(engine(torch.ones(1, 6)), plain(torch.ones(1, 6)))
    engine.destroy()
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        with Init(dtype=dtype, remote_device="cpu", pin_memory=True):
            model = Tower(2, 6)
            assert model.out.weight.dtype == torch.float32, "so that as many random numbers are drawn"
        assert model.out.weight.dtype == (dtype or torch.float32)
        engine, *_ = deepcore.initialize(model=model, config={**config(), "bf16": {"enabled": True}})
        for name, param in plain.named_parameters():
            master = safe_get_full_fp32_param(dict(model.named_parameters())[name])
            assert torch.equal(master, param.detach().to(dtype or torch.float32).float()), name
        engine.destroy()


def test_engines_without_an_optimizer_and_masters_of_every_bit() -> None:
    run_ranks(2, evaluates_and_keeps_bits)


def changes_before_the_engine() -> None:
    torch.manual_seed(0)
    with Init():
        model = Tower(2, 6)
        with GatheredParameters([model.out.weight, model.out.bias], modifier_rank=1):
            assert model.out.weight.shape == (8, 6)
            model.out.weight.data.fill_(float(rank()))
            assert model.layers[0].weight.shape == (6, 6)
        with GatheredParameters(model.out.bias):
            assert not model.out.bias.any()
    with (
        pytest.raises(UsageError, match=r"a parameter of shape \(8,\) was changed"),
        GatheredParameters(model.out.bias),
    ):
        change(model.out.bias)
    with pytest.raises(ZeroDivisionError), GatheredParameters(model.out.bias, modifier_rank=0):
        raise ZeroDivisionError
    with GatheredParameters([*model.out.parameters()], modifier_rank=0):
        if rank() == 0:
            model.out.load_state_dict({"weight": model.out.weight + 3, "bias": torch.full((8,), 2.0)})
    engine, *_ = deepcore.initialize(model=model, config=config())
    state = engine.module_state_dict()
    assert torch.equal(state["out.weight"], torch.full((8, 6), 4.0))
    assert torch.equal(state["out.bias"], torch.full((8,), 2.0))
    engine.destroy()


def change(param: torch.Tensor) -> None:
    with torch.no_grad():
        param.add_(1)


def test_gathered_parameters_work_inside_and_after() -> None:
    run_ranks(2, changes_before_the_engine, hostile=True)


def existing_modules_and_nesting() -> None:
    torch.manual_seed(0)
    model = Tower(1, 4)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    with Init(enabled=False):
        assert nn.Linear(2, 2).weight.numel() == 4
    Init(module=model)
    assert all(param.numel() == 0 for param in model.parameters())
    with Init():
        with Init(), Init(enabled=False):
            inner = nn.Linear(2, 2)
        outer = nn.Linear(3, 3)
        twin = copy.deepcopy(outer)
        holder = nn.ModuleList([twin])
    assert [p.numel() for p in (inner.weight, outer.weight, twin.weight)] == [0, 0, 0]
    with GatheredParameters([*model.parameters(), outer.weight, *holder.parameters()]):
        for name, param in model.named_parameters():
            assert torch.equal(param, before[name])
        assert torch.equal(twin.weight, outer.weight)
    assert nn.Linear(2, 2).weight.numel() == 4


def test_existing_modules_nesting_and_copies() -> None:
    run_ranks(2, existing_modules_and_nesting)


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        raise ZeroDivisionError


def wrong_uses() -> None:
    with pytest.raises(ZeroDivisionError), Init():
        Fails()
    assert torch._C._len_torch_function_stack() == 0
    assert not torch_module._global_parameter_registration_hooks
    assert nn.Linear(2, 2).weight.numel() == 4
    with Init():
        model = Tower(1, 4)
    for stage in (0, 2):
        with pytest.raises(ConfigError, match=r"needs ZeRO stage 3, and parameter 'layers.0.weight' is in parts"):
            deepcore.initialize(model=model, config=config(stage=stage))
    with Init(config_dict_or_path=config(stage=2)):
        assert nn.Linear(2, 2).weight.numel() == 4
    with Init(config={**config(), "train_batch_size": "auto"}):
        assert nn.Linear(2, 2).weight.shape == (2, 2)
    for arguments, message in (
        ({"mpu": object()}, "does not support 'mpu'"),
        ({"zero_quantized_weights": True}, "does not support 'zero_quantized_weights'"),
        ({"remote_device": "nvme"}, "remote_device='nvme'"),
        ({"dtype": torch.int8}, r"dtype=torch.int8"),
    ):
        with pytest.raises(ConfigError, match=message):
            Init(**arguments)  # type: ignore[arg-type]
    deepcore.initialize(model=model, config=config())[0].destroy()


def test_wrong_uses_leave_nothing_behind() -> None:
    run_ranks(1, wrong_uses)
