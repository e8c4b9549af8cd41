"""Owns what makes seeding cheap where there is no accelerator.

torch.manual_seed queues a call for every kind of device, with the stack that it was called from, until one is there:
three stacks for each of the many seeds of a test run, kept for ever.
"""

from __future__ import annotations

import torch


def forget_other_devices() -> None:
    """From now on in this process torch.manual_seed seeds the CPU alone."""
    for device in (torch.cuda, torch.xpu, torch.mtia):
        setattr(device, "manual_seed_all", lambda seed: None)  # noqa: B010  # torch does not declare all of them
