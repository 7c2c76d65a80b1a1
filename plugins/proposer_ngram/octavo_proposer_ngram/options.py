"""The options, as `--help` shows them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

_DEFAULT = 5


class NgramOptions(BaseModel):
    """vLLM's names and defaults. Where only one is given, the other is the same; where none is, both are 5."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prompt_lookup_min: int | None = Field(default=None, ge=1)
    """tokens that must stand there again before anything is guessed"""
    prompt_lookup_max: int | None = Field(default=None, ge=1)
    """tokens to look for at most; of the places the one where most of them stand is taken"""

    @model_validator(mode="after")
    def _in_order(self) -> NgramOptions:
        shortest, longest = self.lengths
        if shortest > longest:
            raise ValueError(f"prompt_lookup_min={shortest} is more than prompt_lookup_max={longest}")
        return self

    @property
    def lengths(self) -> tuple[int, int]:
        """(shortest, longest) n-gram that is looked for."""
        shortest, longest = self.prompt_lookup_min, self.prompt_lookup_max
        return shortest or longest or _DEFAULT, longest or shortest or _DEFAULT
