"""Teach a byte-level model by reward: it answers, answers are judged, and likelier become those that were better.

    deepcore run --nproc 2 examples/hybrid/train.py

One engine generates and trains (PPO with the mean of a prompt's answers as its baseline). The reward of an answer is
the share of its bytes that are letters or spaces: one in five of a fresh model, to which all bytes are alike.
"""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

import deepcore

WIDTH, HEADS, DEPTH, CONTEXT = 64, 4, 2, 64
PROMPTS, ANSWERS, PROMPT, ANSWER = 8, 8, 8, 16  # per rank and round: prompts, answers to each; their bytes
CLIP, EPOCHS = 0.2, 2
CONFIG = {
    "train_micro_batch_size_per_gpu": PROMPTS * ANSWERS,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.0}},
    "hybrid_engine": {"enabled": True, "max_out_tokens": CONTEXT},
}
Past = list[tuple[torch.Tensor, torch.Tensor]]


class Block(nn.Module):
    """Pre-norm attention, over what came before as well, and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None) -> Any:
        batch, time, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        return x + self.down(gelu(self.up(self.norm2(x)))), (k, v)


class ByteModel(nn.Module):
    """Bytes to logits. ``cache`` holds keys and values of all bytes so far; then the next one is given alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: torch.Tensor, cache: Past | None = None) -> dict[str, Any]:
        begin = 0 if cache is None else cache[0][0].shape[2]
        places = torch.arange(begin, begin + input_ids.shape[1], device=input_ids.device)
        x, held = self.bytes(input_ids) + self.places(places), []
        for number, block in enumerate(self.blocks):
            x, pair = block(x, None if cache is None else cache[number])
            held.append(pair)
        return {"logits": self.head(self.norm(x)), "cache": held}


def prompts(generator: torch.Generator) -> torch.Tensor:
    """Stretches of torch's own source, (PROMPTS, PROMPT) bytes."""
    text = torch.frombuffer(bytearray(inspect.getsource(torch.nn.functional).encode()), dtype=torch.uint8).long()
    starts = torch.randint(len(text) - PROMPT, (PROMPTS, 1), generator=generator)
    return text[starts + torch.arange(PROMPT)]


def judged(answers: torch.Tensor) -> torch.Tensor:
    """(rows,) the share of bytes that are letters or spaces."""
    lower = answers | 32
    return (((lower >= ord("a")) & (lower <= ord("z"))) | (answers == ord(" "))).float().mean(dim=1)


def log_probabilities(engine: Any, texts: torch.Tensor) -> torch.Tensor:
    """(rows, ANSWER) of every byte of the answers."""
    logits = engine(texts[:, :-1])["logits"][:, PROMPT - 1 :].float()
    return logits.log_softmax(-1).gather(2, texts[:, PROMPT:, None]).squeeze(2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach a byte-level model by reward.")
    parser.add_argument("--rounds", type=int, default=30, help="times that the model answers and learns")
    args = parser.parse_args()
    torch.manual_seed(0)
    engine, *_ = deepcore.initialize(model=ByteModel(), config=CONFIG)
    generator = torch.Generator().manual_seed(engine.global_rank)  # every rank has prompts of its own
    for number in range(args.rounds):
        engine.eval()  # weights are gathered by the first generate, once
        questions = prompts(generator).to(engine.device)
        texts = engine.generate(questions, max_new_tokens=ANSWER, do_sample=True, num_return_sequences=ANSWERS)
        with torch.no_grad():
            before = log_probabilities(engine, texts)
        engine.train()  # and let go

        rewards = judged(texts[:, PROMPT:]).view(PROMPTS, ANSWERS)
        advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
        advantage = advantage.view(-1, 1)
        for _ in range(EPOCHS):
            ratio = (log_probabilities(engine, texts) - before).exp()
            loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
            engine.backward(loss)
            engine.step()

        mean = rewards.mean()
        deepcore.comm.all_reduce(mean)
        if engine.global_rank == 0 and (number % 10 == 0 or number == args.rounds - 1):
            print(f"round {number}: reward {mean.item() / engine.world_size:.3f}", flush=True)
    if engine.global_rank == 0:
        print(f"it says {bytes(texts[0, PROMPT:].tolist())!r}", flush=True)
    engine.destroy()


if __name__ == "__main__":
    main()
