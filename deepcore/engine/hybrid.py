"""Owns the engine that trains and generates with the same weights, and the phases in which these are whole.

Knows nothing of how tokens are made (``generate``) or of where weights are otherwise (the strategy does).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from deepcore.comm.exchange import gather_records
from deepcore.engine.core import TrainCore
from deepcore.engine.engine import Engine
from deepcore.errors import UsageError
from deepcore.generate import generator
from deepcore.generate.calling import TokenModel
from deepcore.generate.lora import Fusion, find_adapters
from deepcore.generate.options import Options, read_options
from deepcore.generate.prompts import read_prompts
from deepcore.parallel.randomness import mixed
from deepcore.parallel.sequence.binding import bind


class HybridEngine(Engine):
    """An ``Engine`` whose model also generates: ``engine.eval(); engine.generate(ids); engine.train()``.

    A generation phase begins with the first ``generate`` after ``eval()``, or with ``begin_generation()``. In it every
    rank has all weights whole, gathered once, and no call of the model waits for another rank. It ends with
    ``train()``, and at the latest when weights change: at a step, or when something is loaded.

    Ranks that share layers (``tensor_parallel``) generate together: each call is made by all of them, with the same
    prompts and options, and every one gets the same tokens. Ranks of one sequence generate each by itself, on whole
    sequences: the same tokens from the same prompts.

    Training after a phase is what it would be without it, bit for bit: sampling has generators of its own.
    """

    _phase: ExitStack | None = None
    _fusion: Fusion | None = None
    _calls: tuple[int, int] = (-1, 0)  # the step that the last calls of generate came after, and their number

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        shares = self.mesh.sp.size > 1
        self._common_seed: int | None = gather_records(torch.initial_seed(), self.mesh.sp)[0] if shares else None

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> torch.Tensor:
        """Continue every row of ``input_ids``.

        Collective where it begins a phase, that is, in the first call after ``eval()`` at stage 3; in training mode,
        and with ``hybrid_engine.pin_parameters`` off, in every call. A rank without prompts passes shape (0, n). The
        model runs in eval mode, whatever mode it is in.

        Args:
            input_ids: (rows, length) int; padding on the left. A further name of it is ``inputs``.
            attention_mask: the same shape: 0 for padding, 1 for tokens.
            options: of ``deepcore.generate.options.Options``; those of the model's generation_config otherwise.

        Returns:
            (rows, length + answer) int64, on the engine's device: prompts and answers, padded after their end.

        Raises:
            UsageError: prompts or options that cannot be served, or logits that are not finite.
        """
        self._require_live("generate")
        keeps = self._phase is not None or (self.settings.hybrid_engine.pin_parameters and not self.module.training)
        self.begin_generation()  # before anything that is wrong on one rank only
        try:
            if "inputs" in options and input_ids is None:
                input_ids = options.pop("inputs")
            if self.parts is not None:
                self.parts.require_same_request(input_ids, attention_mask, options)
            config = getattr(self.module, "generation_config", None)
            chosen = read_options(options, config)
            prompts = read_prompts(input_ids, attention_mask, chosen, self.device)
            total = chosen.total_length(prompts.ids.shape[1], self.settings.hybrid_engine.max_out_tokens)
            drawing = self._generator(chosen) if chosen.do_sample else None
            with self._casts.region(), _evaluating(self.module), self._whole_sequences():
                return generator.generate(TokenModel(self.module), prompts, chosen, total, drawing)
        finally:
            if not keeps:
                self.end_generation()

    def begin_generation(self) -> None:
        """Make all weights whole until ``end_generation()`` or ``train()``; nothing where they are. Collective.

        Inside, whatever calls the model without gradients may do so on one rank alone:
        ``engine.module.generate(num_beams=4)`` of a transformers model, for one.
        """
        self._require_live("begin_generation")
        if self._phase is None:
            with ExitStack() as stack:
                stack.enter_context(self.strategy.materialize())
                self._phase = stack.pop_all()

    def end_generation(self) -> None:
        """Undo LoRA's fusion and let the weights go; nothing outside of a phase. Not collective."""
        self._unfuse()
        phase, self._phase = self._phase, None
        if phase is not None:
            phase.close()

    def train(self, mode: bool = True) -> HybridEngine:
        """Training mode ends the generation phase; ``eval()`` (``train(False)``) begins none by itself."""
        if mode and not self._destroyed:
            self.end_generation()
        super().train(mode)
        return self

    # --- LoRA -----------------------------------------------------------------------------------------------------

    def fuse_lora_weight(self) -> int:
        """Add every adapter to the weight that it adapts, until ``unfuse_lora_weight()`` or ``train()``.

        Begins a phase. A copy of each weight is kept, so that it comes back bit for bit. Nothing trains in between.

        Returns:
            How many adapters were fused; ``deepcore.generate.lora`` says which forms can be.

        Raises:
            UsageError: there is none.
        """
        self.begin_generation()
        if self._fusion is None:
            adapters = find_adapters(self.module)
            if not adapters:
                raise UsageError(
                    "there is no LoRA adapter that can be fused",
                    got=type(self.module).__name__,
                    expected="modules with lora_A, lora_B, scaling and merged, or peft's, or DeepSpeed-Chat's",
                    do="leave the call out: adapters that are not fused take part in generate() as they are",
                )
            with torch.no_grad():
                self._fusion = Fusion(adapters)
            if self._holdings is not None:
                self._holdings.away = self._require_unfused
        return len(self._fusion)

    def unfuse_lora_weight(self) -> None:
        """Give every weight its bits back; nothing where none is fused."""
        self._require_live("unfuse_lora_weight")
        self._unfuse()

    def _unfuse(self) -> None:
        fusion, self._fusion = self._fusion, None
        if fusion is not None:
            with torch.no_grad():
                fusion.undo()
            if self._holdings is not None:
                self._holdings.away = None

    def _require_unfused(self, what: str) -> None:
        if self._fusion is not None:
            raise UsageError(
                f"{what} while LoRA is fused",
                got=f"weights with {len(self._fusion)} adapters in them",
                expected="the weights themselves",
                do="call engine.unfuse_lora_weight() or engine.train() first",
            )

    # --- what needs weights that are up to date, or lets them change ----------------------------------------------

    def _require_core(self, verb: str) -> TrainCore:
        self._require_unfused(verb)
        return super()._require_core(verb)

    def _close_window(self, core: TrainCore) -> None:
        self.end_generation()
        super()._close_window(core)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[str | None, dict[str, Any] | None]:
        self.end_generation()
        return super().load_checkpoint(*args, **kwargs)

    def load_module_state_dict(self, state_dict: Any, strict: bool = True) -> Any:
        self.end_generation()
        return super().load_module_state_dict(state_dict, strict)

    def refresh_masters(self) -> None:
        self._require_unfused("refresh_masters")
        super().refresh_masters()

    def prepare_to_save(self) -> None:
        self._require_unfused("a checkpoint")
        super().prepare_to_save()

    def module_state_dict(self) -> dict[str, Any]:
        self._require_unfused("module_state_dict")
        return super().module_state_dict()

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        self.end_generation()
        super().offload_states(*args, **kwargs)

    def empty_partition_cache(self) -> None:
        self.end_generation()
        super().empty_partition_cache()

    def destroy(self) -> None:
        if not self._destroyed:
            self.end_generation()
        super().destroy()

    def _require_live(self, verb: str) -> None:
        if self._destroyed:
            raise UsageError(
                f"{verb} on a destroyed engine",
                got="engine.destroy() was called",
                expected="a live engine",
                do="use engine.module, or build a new engine with deepcore.initialize()",
            )
        self.residence.require_home(verb, "lp_params")

    @contextmanager
    def _whole_sequences(self) -> Iterator[None]:
        """Attention inside sees whole sequences; outside, where parts may be evaluated in a phase too, it does not."""
        if self.mesh.sp.size == 1:
            yield
            return
        bind(self.module, None)
        try:
            yield
        finally:
            bind(self.module, self.mesh.sp)

    def _generator(self, options: Options) -> torch.Generator:
        """Whoever draws in this call: other numbers on every replica, and in every call unless a seed says which.

        Without a seed they follow from torch's own, the step and the number of the call since it: a run that is
        repeated or resumed draws alike, and torch's generator is left where it is.
        """
        if options.generator is not None:
            return options.generator
        step, count = self._calls
        now = self.clock.global_steps
        self._calls = (now, count + 1 if step == now else 0)
        rank = self.mesh.dp.rank  # the same where layers are shared, as the seed has to be
        seed = torch.initial_seed() if self._common_seed is None else self._common_seed
        if self.parts is not None:
            seed = self.parts.draws[0]
        drawn = (options.seed, rank) if options.seed is not None else (seed, *self._calls, rank)
        return torch.Generator(self.device).manual_seed(mixed(*drawn))


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """All of ``module`` in eval mode inside; afterwards each part in its own again."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
