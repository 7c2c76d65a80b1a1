"""What a user can set: `--attention.max-query-tokens 128`. A module of its own: checking options imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SDPAOptions(BaseModel):
    """Options of the sdpa backend."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_query_tokens: int = Field(
        default=256, ge=1, description="tokens of a prefill attended at once; the mask has as many rows"
    )
