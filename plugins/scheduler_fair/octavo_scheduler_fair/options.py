"""The options of both policies, as `--help` shows them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PriorityOptions(BaseModel):
    """Of "priority"."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    aging_seconds: float | None = Field(default=60.0, gt=0, allow_inf_nan=False)
    """seconds of waiting that make up for one step of priority; null: none do, and low priorities may starve"""


class FairOptions(BaseModel):
    """Of "fair"."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    input_weight: Weight = 1.0
    """what a prompt token that is computed costs its tenant"""
    output_weight: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """what an output token costs its tenant"""
    tenant_weights: dict[str, Weight] = {}
    """shares by tenant, 1 for those not named: a tenant of weight 2 is served twice as much as one of weight 1"""
