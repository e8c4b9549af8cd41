"""Owns every exemption from the laws, each with its reason; one that no file needs any more fails the check.

Knows nothing of how a law is checked.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from .source import Violation

# (law, path pattern, symbol pattern) -> why the law must give way there
EXEMPT: dict[tuple[str, str, str], str] = {
    ("function-parameters", "deepcore/ops/reference/*.py", "*"): "an op's arguments are its schema's",
    ("function-parameters", "deepcore/optim/schedules/one_cycle.py", "OneCycle.__init__"): "DeepSpeed fixes the names",
    ("function-parameters", "deepcore/optim/adam.py", "FusedAdam.__init__"): "torch and DeepSpeed fix the names",
    ("function-parameters", "deepcore/optim/muon.py", "Muon.__init__"): "DeepSpeed and torch.optim.Muon fix the names",
    ("function-parameters", "deepcore/zero/init.py", "*"): "DeepSpeed fixes the signature, and each is refused by name",
    ("function-parameters", "deepcore/parallel/pipeline/module.py", "*"): "DeepSpeed fixes the names and their order",
    ("function-parameters", "deepcore/front_door.py", "initialize"): "DeepSpeed fixes the signature and its order",
}


def match(violation: Violation) -> tuple[str, str, str] | None:
    """The exemption that covers a violation, or None."""
    for key in EXEMPT:
        law, path, symbol = key
        if violation.law == law and fnmatchcase(violation.path, path) and fnmatchcase(violation.symbol, symbol):
            return key
    return None
