"""LoRARequest: which adapter a request wants, under vLLM's name and module."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import RequestError


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter by name, and where its files lie. Loaded when it is first used; requests of one name share it.

    Attributes:
        lora_name: what it is called from now on, unlike any other.
        lora_int_id: as vLLM's callers give it, at least 1; the name alone tells adapters apart here.
        lora_path: a PEFT folder, or a Hugging Face id.
        load_inplace: load the files again where the name is known already.

    Raises:
        RequestError: a name, path or number that is none.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False

    def __post_init__(self) -> None:
        for field in ("lora_name", "lora_path"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value.strip():
                raise RequestError(f"LoRARequest.{field} is a text that is not empty; found {value!r}.")
        if not isinstance(self.lora_int_id, int) or isinstance(self.lora_int_id, bool) or self.lora_int_id < 1:
            raise RequestError(f"LoRARequest.lora_int_id is an integer of at least 1; found {self.lora_int_id!r}.")

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def path(self) -> str:
        return self.lora_path
