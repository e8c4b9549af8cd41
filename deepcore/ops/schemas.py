"""Owns the schema of every deepcore op and registers its pure-torch reference and fake kernel.

Knows nothing of native libraries: those register faster kernels for the same schemas later.
"""

from __future__ import annotations

import torch

from deepcore.ops.reference import adagrad, adam, bucket, cast, flatten, grad_stats, lamb, lion, loss_scale, muon, sgd

LIBRARY = torch.library.Library("deepcore", "DEF")

SCHEMAS = {
    "flatten": flatten,
    "bucket": bucket,
    "cast": cast,
    "grad_stats": grad_stats,
    "adam": adam,
    "lamb": lamb,
    "lion": lion,
    "adagrad": adagrad,
    "sgd": sgd,
    "muon": muon,
    "loss_scale": loss_scale,
}

NAMES = tuple(schema.split("(", 1)[0] for stem in SCHEMAS.values() for schema in stem.OPS)  # such as "adam_"

# Stems without a folder in csrc/: they run on their references everywhere, and nobody is warned.
REFERENCE_ONLY: frozenset[str] = frozenset()

for _stem in SCHEMAS.values():
    for _schema, _kernel in _stem.OPS.items():
        _name = _schema.split("(", 1)[0]
        LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"deepcore::{_name}", _stem.FAKES[_name], lib=LIBRARY)
