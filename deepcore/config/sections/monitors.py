"""Owns the sections of metric writers: tensorboard, wandb, csv_monitor, comet.

Knows nothing of their libraries.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deepcore.config.sections.base import Positive, Section


class Tensorboard(Section):
    """``tensorboard``: event files."""

    enabled: bool = Field(default=False, description="Write TensorBoard event files.")
    output_path: str = Field(default="", description="Folder of the event files.")
    job_name: str = Field(default="DeepcoreJob", description="Folder below output_path.")


class Wandb(Section):
    """``wandb``: Weights & Biases."""

    enabled: bool = Field(default=False, description="Report to Weights & Biases.")
    group: str | None = Field(default=None, description="Group of the run.")
    team: str | None = Field(default=None, description="Team (entity) that owns the run.")
    project: str = Field(default="deepcore", description="Project of the run.")


class CsvMonitor(Section):
    """``csv_monitor``: one CSV file per metric."""

    enabled: bool = Field(default=False, description="Write metrics as CSV files.")
    output_path: str = Field(default="", description="Folder of the files.")
    job_name: str = Field(default="DeepcoreJob", description="Folder below output_path.")


class Comet(Section):
    """``comet``: Comet experiments."""

    enabled: bool = Field(default=False, description="Report to Comet.")
    samples_log_interval: Positive = Field(default=100, description="Samples between reports.")
    project: str | None = Field(default=None, description="Project of the experiment.")
    workspace: str | None = Field(default=None, description="Workspace of the project.")
    api_key: str | None = Field(default=None, description="Key of the account; better kept out of the file.")
    experiment_name: str | None = Field(default=None, description="Name of the experiment.")
    experiment_key: str | None = Field(default=None, description="Key of the experiment, 32 to 50 characters.")
    online: bool | None = Field(default=None, description="Report live rather than to a file.")
    mode: Literal["get", "create", "get_or_create"] | None = Field(
        default=None, description="Reuse or create the experiment."
    )
