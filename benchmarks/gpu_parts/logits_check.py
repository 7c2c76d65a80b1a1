"""Teacher-forced logits of the Llama-3-8B shape in bfloat16: the engine's logprobs of given tokens, and transformers'.

How far bfloat16 may be off is not guessed: transformers in bfloat16 is as far from transformers in float32 as rounding
makes it, and the engine may be half as far again.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from gpu_parts.models import load_transformers, write_shape
from gpu_parts.part import Part
from gpu_parts.start import report_start
from octavo import LLM, SamplingParams

Logprobs = np.ndarray[Any, np.dtype[np.float64]]

ALLOWED_RATIO = 1.5
"""The engine's error over transformers' own, both in bfloat16 and against float32."""
SMALLEST_ERROR = 5e-3
"""Errors of few tokens through few layers scatter; below this none is too much."""


def run(part: Part) -> None:
    """Compare a few layers of the shape, then write the others, which later parts read."""
    part.attempt("teacher-forced logits", partial(_check, part, min(part.choose(8, 4, 2), part.num_layers)))
    write_shape(part, part.num_layers)


def _check(part: Part, num_layers: int) -> None:
    folder = write_shape(part, num_layers)
    prompts = given_prompts(part)
    begin = time.monotonic()
    with start_engine(part, folder) as llm:
        report_start(part, llm, f"{num_layers} layers, nothing compiled before, other parts beside", begin)
        found = engine_logprobs(llm, prompts)
    compare(part, folder, num_layers, prompts, found)


def start_engine(part: Part, folder: Path) -> LLM:
    """With little memory: other parts run beside this one."""
    memory = 2**24 if part.tiny else 2**30
    return LLM(str(folder), device=part.device, dtype="bfloat16", kv_cache_memory_bytes=memory, max_model_len=256)


def given_prompts(part: Part) -> list[list[int]]:
    """Random tokens: of random weights no text is more likely than another."""
    generator = torch.Generator().manual_seed(1)
    vocab_size = 256 if part.tiny else 128256
    lengths = part.choose((200, 130, 64, 17), (130, 17), (9,))
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def engine_logprobs(llm: LLM, prompts: list[list[int]]) -> Logprobs:
    """Of each prompt's tokens but the first, given those before it, one after the other."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    found = []
    for output in llm.generate(prompts, params):
        assert output.prompt_logprobs is not None
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        found += [one[token_id].logprob for token_id, one in pairs if one is not None]
    return np.array(found)


@torch.inference_mode()
def transformers_logprobs(model: PreTrainedModel, prompts: list[list[int]]) -> Logprobs:
    """The same of transformers."""
    found = []
    for prompt in prompts:
        token_ids = torch.tensor([prompt], device=model.device)
        logprobs = model(token_ids).logits[0, :-1].double().log_softmax(dim=-1)
        found.append(logprobs.gather(1, token_ids[0, 1:].unsqueeze(1)).squeeze(1).cpu().numpy())
    return np.concatenate(found)


def compare(part: Part, folder: Path, num_layers: int, prompts: list[list[int]], found: Logprobs) -> None:
    """Against transformers in float32, beside transformers in bfloat16."""
    of_dtype = {}
    for dtype in ("float32", "bfloat16"):
        model = load_transformers(folder, dtype, part.device)
        of_dtype[dtype] = transformers_logprobs(model, prompts)
        del model
        if part.on_gpu:
            torch.cuda.empty_cache()
    exact, theirs = of_dtype["float32"], of_dtype["bfloat16"]
    error, their_error = (float(np.sqrt(np.mean((one - exact) ** 2))) for one in (found, theirs))
    allowed = max(ALLOWED_RATIO * their_error, SMALLEST_ERROR)
    part.add(
        "logits",
        layers=num_layers,
        tokens=len(found),
        spread=float(exact.std()),
        error=error,
        largest=float(np.abs(found - exact).max()),
        their_error=their_error,
        their_largest=float(np.abs(theirs - exact).max()),
        allowed=allowed,
        ok=error <= allowed,
    )
