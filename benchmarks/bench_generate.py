"""Owns the benchmark of generation between training steps: one phase of a model whose weights are in shards.

Knows nothing of sampling: tokens are the likeliest. A sample is ``eval``, the answers to one batch, ``train``.
``layerwise`` is the model's own generate under stage 3, which gathers every layer for every token. ``whole`` is that
generate on weights that are whole on every rank, without an engine: what generation itself costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.contest import sampler
from benchmarks.harness import OURS, Contender, Options, Result, interleave
from benchmarks.ranks import run_ranks

NUM_RANKS, PROMPT, VOCABULARY = 2, 32, 2048
SIZES = {False: (4, 1024, 32), True: (1, 32, 4)}  # layers, width, new tokens
ROWS = (1, 4)  # prompts per rank

Job = tuple[Callable[[], object], Callable[[], object]]  # one phase; the end


def bench(options: Options) -> Iterator[Result]:
    """fp32 on two Gloo ranks. The more rows, the more of the time goes into what all contenders compute."""
    if options.device != "cpu":
        return
    names = [name for name in JOBS if options.wants(name)]
    for rows in ROWS:
        arguments = {"names": names, "quick": options.quick, "rounds": min(options.rounds, 5), "rows": rows}
        samples = run_ranks(NUM_RANKS, "benchmarks.bench_generate:compete", arguments, timeout=580)[0]
        tokens = rows * SIZES[options.quick][2]
        params = {"ranks": NUM_RANKS, "tokens per rank": tokens, "threads": 1, "device": "cpu", "zero stage": 3}
        size = "tiny" if options.quick else "54M Llama"
        result = Result("generate", f"{size}, {rows} row{'s' if rows > 1 else ''} per rank", samples, params)
        for name, times in samples.items():
            result.notes.append(f"{name}: {tokens / sorted(times)[len(times) // 2]:.1f} tokens/s per rank")
        yield result


def compete(names: list[str], quick: bool, rounds: int, rows: int) -> dict[str, list[float]]:
    """On every rank: build all contenders, then let them generate in turns."""
    torch.distributed.init_process_group("gloo")
    contenders, closings = [], []
    for name in names:
        phase, close = JOBS[name](quick, rows)
        contenders.append(Contender(name, sampler(phase, torch.distributed.barrier)))
        closings.append(close)
    samples = interleave(contenders, rounds, warmups=1)
    for close in closings:
        close()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return samples


def _model(quick: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, _ = SIZES[quick]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        vocab_size=VOCABULARY,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def _prompts(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    return torch.randint(3, VOCABULARY, (rows, PROMPT), generator=generator)


def _engine(quick: bool, *, hybrid: bool) -> Any:
    import deepcore

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 3},
        "hybrid_engine": {"enabled": hybrid},
    }
    return deepcore.initialize(model=_model(quick), config=config)[0]


def _ours(quick: bool, rows: int) -> Job:
    engine, prompts, new = _engine(quick, hybrid=True), _prompts(rows), SIZES[quick][2]

    def phase() -> None:
        engine.eval()
        engine.generate(prompts, max_new_tokens=new)
        engine.train()

    return phase, engine.destroy


def _layerwise(quick: bool, rows: int) -> Job:
    engine, prompts, new = _engine(quick, hybrid=False), _prompts(rows), SIZES[quick][2]

    def phase() -> None:
        engine.eval()
        engine.module.generate(prompts, max_new_tokens=new, do_sample=False)
        engine.train()

    return phase, engine.destroy


def _whole(quick: bool, rows: int) -> Job:
    model, prompts, new = _model(quick).eval(), _prompts(rows), SIZES[quick][2]
    return lambda: model.generate(prompts, max_new_tokens=new, do_sample=False), lambda: None


JOBS: dict[str, Callable[[bool, int], Job]] = {OURS: _ours, "layerwise": _layerwise, "whole": _whole}
