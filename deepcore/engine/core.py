"""Owns one training step from loss to new weights; every engine drives one of these.

Knows nothing of data, configs or which ZeRO stage is active.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from deepcore.engine.agreement import Agreement
from deepcore.engine.clock import Clock
from deepcore.engine.report import StepReport
from deepcore.engine.tokens import TokenCount
from deepcore.engine.trainability import LateThaws
from deepcore.errors import StorageError, UsageError
from deepcore.optim.clip import GradientVerdict, judge
from deepcore.optim.factory import EngineOptimizer
from deepcore.precision.policy import LOW_PRECISION
from deepcore.precision.scaler import LossScaler
from deepcore.zero.strategy import ZeroStrategy


@dataclass(frozen=True)
class StepSettings:
    """What of the config the core itself needs.

    Attributes:
        max_norm: clipping threshold of the global gradient norm; 0 is off.
        num_replicas: what the summed gradient is divided by: the ranks it is averaged over, 1 to sum.
        check_finite: skip a step whose gradients hold inf or nan.
    """

    max_norm: float
    num_replicas: int
    check_finite: bool = True


class TrainCore:
    """Backward and step over a strategy and an optimizer.

    A window is the backward passes between two optimizer steps.

    Attributes:
        agreement: with ranks that hold other parameters; an engine that has such ranks replaces it.
    """

    def __init__(
        self,
        strategy: ZeroStrategy,
        optimizer: EngineOptimizer,
        scaler: LossScaler,
        clock: Clock,
        settings: StepSettings,
        thaws: LateThaws,
        tokens: TokenCount,
    ) -> None:
        self._thaws, self._tokens = thaws, tokens
        self.on_death: Callable[[str], None] = lambda reason: None  # told why this core refuses all further work
        self.strategy, self.optimizer, self.scaler = strategy, optimizer, scaler
        self.clock, self.settings = clock, settings
        self.agreement = Agreement()
        self.last_report: StepReport | None = None
        self.fresh_report: StepReport | None = None  # of a step that the engine has not accounted for yet
        self._backwards = 0  # in this window
        self._hold = False
        self._dead: str | None = None
        self._half_loaded = False

    @property
    def is_alive(self) -> bool:
        """Whether it is known of no reason why it could not go on."""
        return self._dead is None

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass happened since the last step."""
        return self._backwards > 0

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate; the next one outside, or the step, reduces them all."""
        earlier, self._hold = self._hold, True
        try:
            yield
        finally:
            self._hold = earlier

    @property
    def holds(self) -> bool:
        return self._hold

    def backward(
        self,
        loss: torch.Tensor,
        *,
        divide: bool = True,
        retain_graph: bool = False,
        num_tokens: int | torch.Tensor | None = None,
    ) -> None:
        """Run autograd from ``loss`` (one element), and reduce at a boundary.

        With ``num_tokens`` the loss is a sum over that many tokens, and the step divides by those of the whole window.
        """
        self.require_alive()
        self._tokens.add(num_tokens)
        accumulation = self.clock.accumulation if divide else 1
        seed, rest = 1.0, 1.0
        if num_tokens is None:
            seed, rest = split_divisor(accumulation, self.settings.num_replicas, loss.dtype)
        with self.backward_pass(rest, hold=self._hold):
            torch.autograd.backward(self.scaler.scaled(loss, seed), retain_graph=retain_graph)

    @contextmanager
    def backward_pass(self, divisor: float, *, hold: bool) -> Iterator[None]:
        """A with-block that leaves gradients in ``p.grad``; they are taken in, or reduced, at its end.

        Args:
            divisor: of the reduced sums: what the seed of the backward did not carry.
            hold: only accumulate.
        """
        self.require_alive()
        done = False
        try:
            self.strategy.set_divisor(divisor)
            self.strategy.begin_backward(boundary=self.clock.is_boundary(), hold=hold)
            yield
            self.strategy.finish_backward()
            if self.clock.is_boundary() and not hold:
                self._tokens.agree()
            done = True
        finally:
            if not done:
                self._abandon(sys.exc_info()[1])
        self._backwards += 1

    def weigh(self, num_tokens: torch.Tensor) -> None:
        """The losses of this window, already backward, were sums over so many tokens of this rank."""
        self._tokens.add(num_tokens)

    @property
    def unscale(self) -> torch.Tensor | float:
        """What turns reduced gradients into those of the user's loss: fp32 (1,), or 1.0."""
        return self.scaler.inverse * self._tokens.inverse

    def _abandon(self, cause: BaseException | None) -> None:
        self._backwards = 0
        self._tokens.clear()
        if not self.strategy.abandon():
            words = f"{type(cause).__name__}: {cause}".splitlines()[0]
            self.kill(f"an error in backward left collectives half done on this rank: {words}")

    def optimizer_step(self) -> None:
        """A full step: reduce what is unreduced, judge the gradients, update, publish, end the window."""
        self.require_alive()
        if not self._backwards:
            raise no_gradients()
        assert self.fresh_report is None, "the engine settles the last step before the next"
        self._thaws.check()
        with torch.no_grad():
            self.strategy.watch.absorb()
        verdict = self.judge_gradients()
        with torch.no_grad():
            self._update(verdict)
            self.strategy.publish()
            names = self.agreement.names or self.strategy.arena.names
            self.last_report = self.fresh_report = StepReport(verdict, names, self.scaler.state)
            self.scaler.update(verdict.skip)
        self.clear()
        self.clock.tick_step()

    def _update(self, verdict: GradientVerdict) -> None:
        try:
            self.optimizer.update(verdict.grad_scale, verdict.skip)
        except StorageError as error:  # only this rank knows: the others have to be told, or would train on with a part
            self.kill(f"offloaded state is torn, for an update failed half way: {str(error).splitlines()[0]}")
            raise

    @torch.no_grad()
    def judge_gradients(self) -> GradientVerdict:
        """Reduce what is unreduced and decide on clipping and skipping. Collective."""
        self.strategy.make_boundary()
        self._tokens.agree()
        self.agreement.sum_shared()
        return judge(
            self.agreement.complete(self.strategy.measure()),
            max_norm=self.settings.max_norm,
            unscale=self.unscale,
            check=self.settings.check_finite,
        )

    def settle(self) -> StepReport | None:
        """The report of a step not yet accounted for, once: the caller advances what depends on it."""
        report, self.fresh_report = self.fresh_report, None
        if report is not None and not report.applied:
            self.clock.skipped_steps += 1
        return report

    def clear(self) -> None:
        """Drop all gradients of the window."""
        self._backwards = 0
        self._tokens.clear()
        self.strategy.clear()

    def kill(self, reason: str) -> None:
        """Refuse all further work, with this reason."""
        self._dead = reason
        self.on_death(reason)

    def begin_load(self) -> None:
        """State is about to be overwritten: drop the window, and refuse to train until ``finish_load``."""
        self._half_loaded = False
        self.require_alive()
        self.clear()
        self.last_report = self.fresh_report = None
        self._half_loaded = True

    def finish_load(self) -> None:
        """The state is whole again."""
        self._half_loaded = False

    def require_one_state(self) -> None:
        """Raise where weights and optimizer state are not of one step."""
        self.strategy.arena.require_whole()
        self._require_loaded()

    def require_alive(self) -> None:
        self._require_loaded()
        if self._dead is not None:
            raise UsageError(
                "this engine cannot train any more",
                got=self._dead,
                expected="a live engine",
                do="build a new one with deepcore.initialize() and load a checkpoint",
            )

    def _require_loaded(self) -> None:
        if self._half_loaded:
            raise UsageError(
                "this engine's state is a mixture",
                got="load_checkpoint() failed after it had begun to overwrite weights",
                expected="a load that ends well",
                do="load another checkpoint into it",
            )


def no_gradients() -> UsageError:
    """The error of a step that has nothing to step on."""
    return UsageError(
        "step() without gradients",
        got="no backward since the last step",
        expected="engine.backward(loss) first",
        do="call engine.backward(loss) before engine.step() or optimizer.step()",
    )


def split_divisor(accumulation: int, replicas: int, loss_dtype: torch.dtype) -> tuple[float, float]:
    """(seed, rest): backward starts from ``seed`` and the reduced sum is divided by ``rest``.

    Together they divide by accumulation * replicas. The replicas' power of two rides on the seed, where it rounds
    nothing; what is left (1 <= rest < 2 for each) divides the sum once. The accumulation rides on the seed of an
    fp32 loss as ``(loss / accumulation).backward()`` would have it; a 16-bit seed of 1/3 would be 0.2% off, so there
    it is split like the replicas.
    """
    if loss_dtype not in LOW_PRECISION:
        seed, rest = split_divisor(1, replicas, torch.bfloat16)
        return seed / accumulation, rest
    divisor = accumulation * replicas
    seed = math.ldexp(1.0, 1 - math.frexp(divisor)[1])  # 2^-floor(log2(divisor))
    return seed, divisor * seed


def require_loss(loss: Any) -> torch.Tensor:
    """Raise unless ``loss`` is a tensor of one element that depends on trainable parameters."""
    expected = "a scalar tensor computed from the engine's outputs"
    if not isinstance(loss, torch.Tensor):
        raise UsageError("backward needs a tensor", got=type(loss).__name__, expected=expected, do="pass the loss")
    if not loss.requires_grad:
        raise UsageError(
            "backward on a tensor that does not require grad",
            got=f"{tuple(loss.shape)} {loss.dtype}, detached or computed under no_grad",
            expected=expected,
            do="compute the loss outside torch.no_grad(), and check that the model has trainable parameters",
        )
    if loss.numel() != 1:
        raise UsageError(
            "backward needs one number",
            got=f"a tensor of shape {tuple(loss.shape)}",
            expected=expected,
            do="reduce it first, for example loss.mean()",
        )
    return loss
