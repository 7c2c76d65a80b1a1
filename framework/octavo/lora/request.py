"""LoRARequest: which adapter a request wants, under vLLM's name and module."""

from __future__ import annotations

from collections.abc import Sequence
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


AdapterWish = LoRARequest | str | None
"""The adapter a prompt is to be answered with: by request, by the name of one that is known or found, or none."""


def adapter_wishes(
    lora_request: LoRARequest | Sequence[LoRARequest | None] | None,
    adapter: str | Sequence[str | None] | None,
    num_prompts: int,
) -> list[AdapterWish]:
    """One wish for each prompt, whichever way the caller said it.

    Raises:
        RequestError: both ways at once, another number of them than of prompts, or what is neither.
    """
    if lora_request is not None and adapter is not None:
        raise RequestError("An adapter is named by lora_request or by adapter, not by both.")
    said = lora_request if adapter is None else adapter
    if said is None or isinstance(said, (str, LoRARequest)):
        wishes: list[AdapterWish] = [said] * num_prompts
    elif isinstance(said, Sequence):
        wishes = list(said)
    else:
        raise RequestError(f"An adapter is a name or a LoRARequest, one for all prompts or one each; found {said!r}.")
    wanted = LoRARequest if adapter is None else str
    if wrong := [wish for wish in wishes if wish is not None and not isinstance(wish, wanted)]:
        name = "lora_request is a LoRARequest" if adapter is None else "adapter is a name"
        raise RequestError(f"{name}, or None for the model as it is; found {wrong[0]!r}.")
    if len(wishes) != num_prompts:
        raise RequestError(f"{num_prompts} prompts came with {len(wishes)} adapters; give one, or one for each.")
    return wishes
