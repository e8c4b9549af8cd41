"""Owns the benchmark of cut layers: forward and backward of a small Llama on two ranks, beside torch's DTensor.

Knows nothing of optimizers: what surrounds the layers is the same for all contenders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.harness import OURS, Options, Result
from benchmarks.ranks import run_ranks

RANKS = 2
CONTENDERS = {OURS: "ours", "DTensor": "dtensor"}
SIZES = {"tiny": (64, 32), "small": (512, 128)}  # width, tokens
ROUNDS, PASSES = 5, 8


def bench(options: Options) -> Iterator[Result]:
    """Seconds of a forward and backward, on the slower rank; rounds of the contenders take turns."""
    for size in list(SIZES)[: 1 if options.quick else None]:
        arguments = {"size": size, "rounds": 1 if options.quick else ROUNDS}
        ranks = run_ranks(RANKS, "benchmarks.bench_tensor:timed", arguments, timeout=600)
        samples = {
            name: [max(times) for times in zip(*(found[layers] for found in ranks), strict=True)]
            for name, layers in CONTENDERS.items()
        }
        params = {"ranks": RANKS, "width": SIZES[size][0], "tokens": SIZES[size][1], "dtype": "fp32", "threads": 1}
        yield Result("tensor", "forward_backward", samples, params)


def timed(size: str, rounds: int) -> dict[str, list[float]]:
    """On every rank: join the others and measure all contenders, a round of each in turn."""
    torch.distributed.init_process_group("gloo")
    found: dict[str, list[float]] = {layers: [] for layers in CONTENDERS.values()}
    for _ in range(rounds):
        for layers, times in found.items():
            times.append(seconds(layers, size))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


def seconds(layers: str, size: str, passes: int = PASSES) -> float:
    """The median time of a pass."""
    model, ids = build(size)
    {"ours": cut_by_us, "dtensor": cut_by_dtensor}[layers](model)
    times = []
    for number in range(passes + 2):
        torch.distributed.barrier()
        begin = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if number >= 2:
            times.append(time.perf_counter() - begin)
        model.zero_grad(set_to_none=True)
    return sorted(times)[len(times) // 2]


def build(size: str) -> tuple[Any, torch.Tensor]:
    """The model of transformers, with random weights, and a batch."""
    import transformers

    width, tokens = SIZES[size]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
    )
    return transformers.LlamaForCausalLM(config), torch.randint(1024, (2, tokens))


def cut_by_us(model: Any) -> None:
    """As ``initialize()`` does it."""
    from deepcore.comm.mesh import Mesh
    from deepcore.comm.setup import init_distributed
    from deepcore.config.sections.parallel import TensorParallel
    from deepcore.parallel.tensor.apply import TensorShards
    from deepcore.parallel.tensor.build import make_plan

    mesh = Mesh.build(init_distributed(), tp=RANKS)
    TensorShards(model, mesh.tp, make_plan(model, RANKS, TensorParallel()), mesh.zero_axis)


def cut_by_dtensor(model: Any) -> None:
    """The same layers, by torch's ``parallelize_module``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    column: Callable[[], Any] = ColwiseParallel
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = column()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)
