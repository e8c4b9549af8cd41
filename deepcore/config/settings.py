"""Owns ``Settings``, the whole config as frozen data, under the names of the JSON file.

Knows nothing of how raw dicts become settings; that is ``parser.py``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PrivateAttr

from deepcore.config.explain import Row, explain_rows
from deepcore.config.ledger import Ledger
from deepcore.config.sections.activations import ActivationCheckpointing
from deepcore.config.sections.aio import Aio
from deepcore.config.sections.base import FloatType, Positive, Rate, Section
from deepcore.config.sections.checkpoint import Checkpoint
from deepcore.config.sections.compilation import Compile
from deepcore.config.sections.elasticity import Elasticity
from deepcore.config.sections.hybrid import HybridEngineSection
from deepcore.config.sections.monitors import Comet, CsvMonitor, Tensorboard, Wandb
from deepcore.config.sections.optimizer import OptimizerSection, SchedulerSection
from deepcore.config.sections.parallel import Pipeline, TensorParallel
from deepcore.config.sections.precision import Amp, Bf16, DataTypes, Fp16, TorchAutocast
from deepcore.config.sections.profiling import CommsLogger, FlopsProfiler, Timers
from deepcore.config.sections.zero import ZeroOptimization


class Settings(Section):
    """Every setting, resolved: the batch sizes are integers, no value is "auto"."""

    train_batch_size: Positive = Field(description="Samples per optimizer step, over all ranks.")
    train_micro_batch_size_per_gpu: Positive = Field(description="Samples per forward on one rank.")
    gradient_accumulation_steps: Positive = Field(description="Micro-batches per optimizer step.")
    managed_gradient_accumulation: bool = Field(default=True, description="False: the caller owns the boundary.")
    gradient_clipping: Rate = Field(default=0.0, description="Largest global gradient norm; 0 means no clipping.")
    steps_per_print: Positive | None = Field(default=None, description="Steps between progress lines; null: never.")
    wall_clock_breakdown: bool = Field(default=False, description="Time forward, backward and step.")
    memory_breakdown: bool = Field(default=False, description="Report memory after each phase.")
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = Field(
        default=None, description="Level of the deepcore logger."
    )
    dataloader_drop_last: bool = Field(default=False, description="Drop the last, incomplete batch of an epoch.")
    deterministic: bool = Field(default=False, description="Same bits at every stage and world size, at some cost.")

    optimizer: OptimizerSection | None = Field(default=None, description="Built when the client passes none.")
    scheduler: SchedulerSection | None = Field(default=None, description="Built when the client passes none.")
    zero_allow_untested_optimizer: bool = Field(default=False, description="Accepted for compatibility.")
    zero_force_ds_cpu_optimizer: bool = Field(default=True, description="Accepted for compatibility.")

    fp16: Fp16 = Field(default_factory=Fp16, description="Half precision.")
    bf16: Bf16 = Field(default_factory=Bf16, description="bfloat16.")
    amp: Amp = Field(default_factory=Amp, description="Mixed precision in apex's terms.")
    torch_autocast: TorchAutocast = Field(default_factory=TorchAutocast, description="torch.autocast.")
    data_types: DataTypes = Field(default_factory=DataTypes, description="Formats that differ from the regime's.")
    communication_data_type: FloatType | None = Field(
        default=None, description="Dtype that gradients travel in; unset: the dtype they are accumulated in."
    )
    seq_parallel_communication_data_type: FloatType = Field(default="fp32", description="That over sequence ranks.")
    gradient_allreduce_op: Literal["mean", "sum"] = Field(default="mean", description="How gradients combine.")
    prescale_gradients: bool = Field(default=False, description="Divide gradients before they are reduced.")
    gradient_predivide_factor: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Part of the division that happens before the reduction."
    )

    zero_optimization: ZeroOptimization = Field(default_factory=ZeroOptimization, description="What is sharded.")
    sequence_parallel_size: Positive = Field(default=1, description="Ranks that share one sequence.")
    data_parallel_size: Positive | None = Field(default=None, description="Data-parallel ranks; unset: derived.")
    tensor_parallel: TensorParallel = Field(default_factory=TensorParallel, description="Layers cut over ranks.")
    pipeline: Pipeline = Field(default_factory=Pipeline, description="Used with a pipeline module.")
    hybrid_engine: HybridEngineSection = Field(default_factory=HybridEngineSection, description="Train and generate.")

    activation_checkpointing: ActivationCheckpointing = Field(
        default_factory=ActivationCheckpointing, description="How recomputed activations are kept."
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="How training state is written and read.")
    compile: Compile = Field(default_factory=Compile, description="Options of DeepCompile.")
    aio: Aio = Field(default_factory=Aio, description="The file engine under NVMe offload.")
    elasticity: Elasticity = Field(default_factory=Elasticity, description="Batch sizes for many world sizes.")

    tensorboard: Tensorboard = Field(default_factory=Tensorboard, description="TensorBoard.")
    wandb: Wandb = Field(default_factory=Wandb, description="Weights & Biases.")
    csv_monitor: CsvMonitor = Field(default_factory=CsvMonitor, description="Metrics as CSV files.")
    comet: Comet = Field(default_factory=Comet, description="Comet.")
    flops_profiler: FlopsProfiler = Field(default_factory=FlopsProfiler, description="Operations by module.")
    comms_logger: CommsLogger = Field(default_factory=CommsLogger, description="A record of collectives.")
    timers: Timers = Field(default_factory=Timers, description="What is timed without being asked.")

    _ledger: Ledger = PrivateAttr(default_factory=Ledger)

    def at(self, path: str) -> Any:
        """The value at a dotted path under the names of the JSON file; None where a section on the way is unset."""
        node: Any = self
        for part in path.split("."):
            if isinstance(node, dict):
                node = node.get(part)
            elif node is not None:
                node = getattr(node, "async_" if part == "async" else part)
        return node

    def explain(self) -> list[Row]:
        """Every resolved value as (dotted key, value, source, note); source is user, default or inferred."""
        return explain_rows(self, self._ledger)
