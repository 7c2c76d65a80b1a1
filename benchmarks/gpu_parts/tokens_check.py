"""The engine's greedy tokens against transformers' by the margin rule: random Llama and Qwen2, float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gpu_parts.models import write_small
from gpu_parts.part import Part
from octavo import LLM

# After gpu_parts.models, which puts the tests' folder on the path.
from greedy_reference import prompts, reference_of  # isort: skip
from margin_rule import Reference, check, generate, next_tokens_of, token_ids_of  # isort: skip


def ways(part: Part) -> dict[str, dict[str, Any]]:
    """How the engine is started: as users start it, and so that other code runs."""
    triton = {"prefill": "triton-flash", "decode": "triton-paged"}
    if part.tiny:
        return {"triton": {"attention": triton, "kernels": "triton"}}
    return {
        "as chosen": {},
        "eager, chunks of 64 tokens, one step in flight": {
            "enforce_eager": True,
            "max_num_batched_tokens": 64,
            "max_steps_in_flight": 1,
        },
        "attention the other way round": {"attention": {"prefill": "triton-paged", "decode": "triton-flash"}},
    }


def run(part: Part) -> None:
    for architecture in ("llama", "qwen2"):
        part.attempt(f"tokens of {architecture}", partial(_check_architecture, part, architecture))


def _check_architecture(part: Part, architecture: str) -> None:
    folder = write_small(part, architecture)
    references = references_of(part, folder)
    for way, settings in ways(part).items():
        check = partial(_check, part, architecture, folder, references, way, settings)
        part.attempt(f"tokens of {architecture}, {way}", check, seconds=0 if part.tiny else 5)


def references_of(part: Part, folder: Path) -> list[Reference]:
    """What transformers generates on the CPU, where float32 is float32."""
    lengths: Sequence[int] = part.choose((1, 3, 15, 16, 17, 40, 100, 200), (3, 16, 100), (3, 17))
    num_tokens = part.choose(32, 16, 3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [reference_of(model, prompt, num_tokens) for prompt in prompts(*lengths)]


def _check(
    part: Part, architecture: str, folder: Path, references: list[Reference], way: str, settings: dict[str, Any]
) -> None:
    small = {"kv_cache_memory_bytes": 2**26 if part.tiny else 2**28, "max_model_len": 512, "max_num_seqs": 16}
    with LLM(str(folder), device=part.device, dtype="float32", **{**small, **settings}) as llm:
        found = token_ids_of(generate(llm, references))
        fault = ""
        try:
            check(references, found, next_tokens_of(llm))
        except AssertionError as error:
            fault = str(error).partition("\n")[0]
        components = llm.manifest.components
        part.add(
            "tokens",
            model=architecture,
            way=way,
            attention="/".join(components[f"attention.{phase}"].name for phase in ("prefill", "decode")),
            kernels=components["kernels"].name,
            requests=len(references),
            same=sum(one == reference.token_ids for one, reference in zip(found, references, strict=True)),
            ok=not fault,
            fault=fault,
        )
