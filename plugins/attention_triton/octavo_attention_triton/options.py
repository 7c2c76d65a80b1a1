"""The options, as `--help` shows them; read where there may be neither a GPU nor Triton."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_SPLITS = 64  # whose states a merge holds in registers


class PagedOptions(BaseModel):
    """Of "triton-paged"."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_kv_splits: Annotated[int, Field(ge=1, le=MAX_SPLITS)] | None = None
    """parts that a context is cut into, computed side by side; null: as many as fill the GPU in this step"""
