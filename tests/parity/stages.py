"""A row of layers with the shapes that break pipelines, and the same row trained by one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import deepcore
from deepcore.optim import FusedAdam
from deepcore.pipe import LayerSpec, PipelineModule, TiedLayerSpec

VOCABULARY, WIDTH, SEED = 11, 6, 40
Weights = dict[str, torch.Tensor]


class Block(nn.Module):
    """Takes and returns (activations, mask, bias): one tensor without gradient, one that not every stage uses."""

    def __init__(self, hidden: int, uses_bias: bool) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.uses_bias = uses_bias
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, mask, bias = given
        if self.training:
            self.seen += 1
        if self.uses_bias:
            x = x + bias
        x = x + self.outer(torch.tanh(self.inner(x))) * self.scale * mask.to(x.dtype)
        return x, mask, bias


class Start(nn.Module):
    """Tokens become activations, a mask and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(4, WIDTH) * 0.1)

    def forward(self, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, tokens = given
        return x + self.places[: x.shape[1]], (tokens % 2 == 0)[..., None], self.places[0] * 0.1 + x[0, 0] * 0.01


class Finish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.never = nn.Linear(2, 2)

    def forward(self, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.norm(given[0])


def embed(module: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return module(tokens), tokens


def unembed(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x @ module.weight.T


def specs(tied: bool) -> list[Any]:
    """Nine layers; a function among them; the first and the last tied, if asked."""
    table = (nn.Embedding, VOCABULARY, WIDTH)
    first = TiedLayerSpec("table", *table, forward_fn=embed) if tied else LayerSpec(Embed)
    last = TiedLayerSpec("table", *table, forward_fn=unembed) if tied else LayerSpec(nn.Linear, WIDTH, VOCABULARY)
    blocks = [LayerSpec(Block, 5 + index, index % 2 == 0) for index in range(4)]
    return [first, LayerSpec(Start), *blocks[:2], _same, *blocks[2:], LayerSpec(Finish), last]


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.table(tokens), tokens


def _same(given: Any) -> Any:
    return given


def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def batch(step: int, replica: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One micro-batch; its length changes from step to step."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * replica + micro)
    tokens = torch.randint(VOCABULARY, (2, 4 + (step % 2 == 0)), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True)
class Pipe:
    """One row of the contract."""

    pp: int
    dp: int = 1
    schedule: str = "1f1b"
    micro: int = 4
    stage: int = 0
    tied: bool = True
    bf16: bool = False
    fp16: bool = False
    clip: float = 0.3
    steps: int = 4
    interval: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    eps: float = 1e-8

    @property
    def world(self) -> int:
        return self.pp * self.dp

    @property
    def in_tuples(self) -> bool:
        """Whether layers pass tuples on."""
        return True

    def layers(self) -> list[Any]:
        return specs(self.tied)

    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.micro,
            "gradient_clipping": self.clip,
            "bf16": {"enabled": self.bf16},
            "fp16": {"enabled": self.fp16, "initial_scale_power": 7},
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 60},
            "pipeline": {"schedule": self.schedule, "activation_checkpoint_interval": self.interval},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "eps": self.eps}},
            **self.extra,
        }

    def __str__(self) -> str:
        plain = Pipe(self.pp)
        marks = [
            f"{k}={v}" for k, v in vars(self).items() if k not in ("pp", "dp", "schedule") and v != getattr(plain, k)
        ]
        return " ".join([f"{self.schedule} {self.pp}x{self.dp}", *marks])


def pipeline(case: Pipe, **options: Any) -> PipelineModule:
    return PipelineModule(
        case.layers(), num_stages=case.pp, loss_fn=loss_fn, seed_layers=True, base_seed=SEED, **options
    )


def train(case: Pipe) -> dict[str, Any]:
    """Train on this rank; weights are those that this rank holds."""
    engine, *_ = deepcore.initialize(model=pipeline(case), config=case.config())
    replica = engine.get_data_parallel_rank()
    losses, norms = [], []
    for step in range(case.steps):
        losses.append(float(engine.train_batch(batch(step, replica, micro) for micro in range(case.micro))))
        assert engine.was_step_applied()
        norms.append(engine.get_global_grad_norm())
    tokens = iter(batch(99, replica, micro) for micro in range(case.micro))
    evaluated = float(engine.eval_batch(tokens))
    weights = engine.module_state_dict()
    assert engine.global_steps == case.steps
    assert engine.micro_steps == case.steps * case.micro
    shards = engine.parts and engine.parts.shards
    cut = set(shards.names()) if shards else set()
    engine.destroy()
    return {"weights": weights, "losses": losses, "norms": norms, "eval": evaluated, "cut": cut}


class Row(nn.Module):
    """The unpipelined model, under the same names."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict()
        self.functions: list[Callable[[Any], Any]] = []
        for index, spec in enumerate(layers):
            torch.manual_seed(SEED + index)
            if isinstance(spec, TiedLayerSpec):
                if spec.key not in self.tied_modules:
                    self.tied_modules[spec.key] = spec.build()
                module, function = self.tied_modules[spec.key], spec.forward_fn
                self.functions.append(lambda x, m=module, f=function: f(m, x))
            elif isinstance(spec, LayerSpec):
                self.add_module(str(index), spec.build())
                self.functions.append(self._modules[str(index)])
            else:
                self.functions.append(spec)

    def forward(self, x: Any) -> Any:
        for function in self.functions:
            x = function(x)
        return x


def alone(case: Pipe) -> dict[str, Any]:
    """The same training by one process with plain PyTorch: slice by slice, gradients summed in order of replicas."""
    model = Row(case.layers())
    params = list(model.parameters())
    low = torch.bfloat16 if case.bf16 else torch.float16 if case.fp16 else None
    masters = params
    if low is not None:
        masters = [nn.Parameter(param.detach().clone()) for param in params]
        for param in params:
            param.data = param.data.to(low)
    scale = 2.0**7 if case.fp16 else 1.0
    optimizer = FusedAdam(masters, lr=1e-2, weight_decay=0.1, eps=case.eps)
    losses, norms = [], []
    for step in range(case.steps):
        total, mean = [None] * len(params), 0.0
        for replica in range(case.dp):
            sums: list[Any] = [None] * len(params)
            for micro in range(case.micro):
                model.zero_grad()
                inputs, targets = batch(step, replica, micro)
                loss = loss_fn(model(inputs), targets)
                mean += loss.item() / case.micro / case.dp
                (loss * scale / case.micro).backward()
                sums = [_add(have, param.grad) for have, param in zip(sums, params, strict=True)]
            total = [_add(have, mine) for have, mine in zip(total, sums, strict=True)]
        grads = [None if grad is None else grad / (case.dp * scale) for grad in total]
        norm = torch.stack([g.double().square().sum() for g in grads if g is not None]).sum().sqrt().float()
        for master, grad in zip(masters, grads, strict=True):
            clipped = case.clip and grad is not None
            master.grad = grad * (case.clip / (norm + 1e-6)).clamp(max=1.0) if clipped else grad
        optimizer.step()
        if low is not None:
            for param, master in zip(params, masters, strict=True):
                param.data.copy_(master.data)
        losses.append(mean)
        norms.append(norm.item())
    model.eval()
    with torch.no_grad():
        pairs = [batch(99, replica, micro) for replica in range(case.dp) for micro in range(case.micro)]
        evaluated = sum(loss_fn(model(inputs), targets).item() for inputs, targets in pairs) / len(pairs)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name in weights:
        if name.endswith("seen"):  # a replica counts its own micro-batches
            weights[name] = weights[name] / case.dp
    return {"weights": weights, "losses": losses, "norms": norms, "eval": evaluated}


def _add(have: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    if more is None:
        return have
    return more.detach().float().clone() if have is None else have + more.float()
