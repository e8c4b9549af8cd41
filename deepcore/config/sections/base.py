"""Owns the base of every section and the few value types that sections share.

Knows nothing of any key's meaning; what belongs together across sections is checked in ``conflicts.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FloatType = Literal["fp32", "fp16", "bf16"]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Section(BaseModel):
    """Frozen, closed and strict; built lazily, since most processes only ever build the root."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        defer_build=True,
        protected_namespaces=(),
        arbitrary_types_allowed=True,
    )
