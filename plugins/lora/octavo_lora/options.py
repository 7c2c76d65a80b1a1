"""The resolvers' options, as `--help` shows them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, field_validator


class FilesystemOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    root: str
    """folder whose sub-folders are adapters by name"""


class HuggingFaceOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    allowed: tuple[str, ...] = ()
    """patterns of the Hugging Face ids that requests may name, as "org/*"; without one, none"""

    @field_validator("allowed", mode="before")
    @classmethod
    def _one_is_short_for_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value
