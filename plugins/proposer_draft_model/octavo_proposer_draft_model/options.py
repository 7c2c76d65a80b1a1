"""The options, as `--help` shows them: settings of the draft model, each as the engine's own of that name."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DraftModelOptions(BaseModel):
    """What is not here, the draft model has in common with the served one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = Field(min_length=1)
    """a Hugging Face id, a folder, a GGUF file, or "demo": a model of the served one's vocabulary"""
    revision: str | None = None
    """branch, tag or commit of a Hugging Face id"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """of activations and plain weights; without it, as the engine's own setting"""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """bytes for the draft model's KV cache; without it, as many blocks as the served model has"""
