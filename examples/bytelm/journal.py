"""Owns what a run shows and leaves behind: the progress bar, log.jsonl (one JSON object a line) and loss.png.

Knows nothing of training; it is given numbers.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from tqdm import tqdm


class Journal:
    """Shows progress and writes records into a folder; silent where ``enabled`` is false (ranks other than 0)."""

    def __init__(self, folder: str, num_steps: int, bytes_per_step: int, enabled: bool) -> None:
        self.folder, self.enabled, self.records = Path(folder), enabled, list[dict[str, float]]()
        self.bytes_per_step = bytes_per_step
        if enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "log.jsonl").write_text("")
        self.bar = tqdm(total=num_steps, unit="step", disable=not enabled, dynamic_ncols=True, mininterval=0.5)
        self.started = self._interval_started = time.perf_counter()
        self._interval_step, self._validation_loss = 0, float("nan")

    @property
    def seconds(self) -> float:
        """Since the journal was opened."""
        return time.perf_counter() - self.started

    def train(self, step: int, loss: float, grad_norm: float, lr: float) -> None:
        """Record the mean training loss since the last record, and how fast it went."""
        steps, elapsed = step - self._interval_step, time.perf_counter() - self._interval_started
        speed = steps * self.bytes_per_step / elapsed
        self._write(step, loss=loss, grad_norm=grad_norm, lr=lr, tokens_per_second=speed, seconds=self.seconds)
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, held-out {self._validation_loss:.3f}, {speed:,.0f} tokens/s, grad norm {grad_norm:.2f}"
        )
        self._interval_step, self._interval_started = step, time.perf_counter()

    def validate(self, step: int, loss: float) -> None:
        """Record a loss on held-out text; the time it took does not count as training speed."""
        self._validation_loss = loss
        self._write(step, validation_loss=loss, seconds=self.seconds)
        if self.enabled and step:
            self._draw()
        self._interval_started = time.perf_counter()

    def _write(self, step: int, **values: float) -> None:
        if self.enabled:
            self.records.append({"step": step, "bytes": step * self.bytes_per_step, **values})
            with (self.folder / "log.jsonl").open("a") as file:  # at once: an interrupted run keeps its log
                file.write(json.dumps(self.records[-1]) + "\n")

    def _draw(self) -> None:
        import matplotlib

        matplotlib.use("Agg")  # no display needed
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for key, label, style in (("loss", "training", "-"), ("validation_loss", "held-out files", "o-")):
            points = [(record["bytes"] / 1e6, record[key]) for record in self.records if key in record]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=f"{label}: {points[-1][1]:.3f}", markersize=4)
        axes.set(xlabel="bytes seen (millions)", ylabel="loss (nats per byte)", ylim=(0, None))
        axes.set_title("A byte-level GPT learns the Python standard library")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.folder / "loss.png", dpi=120)
        plt.close(figure)
