"""Hugging Face transformers on the same GPU: `generate` in static batches of 16, in order of arrival."""

from __future__ import annotations

import time

import torch
from transformers import GenerationConfig, PreTrainedModel

from gpu_parts.engine_table import add, sample_of_conversations
from gpu_parts.lengths import Conversation
from gpu_parts.models import load_transformers, write_shape
from gpu_parts.part import Part

BATCH_SIZE = 16


def run(part: Part) -> None:
    model = load_transformers(write_shape(part, part.num_layers), "bfloat16", part.device)
    # generate() takes from here what its caller leaves open, and end-of-sequence tokens shall stay open.
    model.generation_config = GenerationConfig()
    measure(part, model, sample_of_conversations(part, part.choose(64, 16, 3)))


def measure(part: Part, model: PreTrainedModel, given: list[Conversation]) -> None:
    """Output tokens that requests asked for, a second, over as many whole batches as there is time for."""
    batches = [given[start : start + BATCH_SIZE] for start in range(0, len(given), BATCH_SIZE)]
    generate(model, [Conversation(prompt_token_ids=[1, 2, 3], num_output_tokens=2)] * 2)
    num_tokens, seconds, num_done = 0, 0.0, 0
    for batch in batches:
        if num_done and part.seconds_left < 1.3 * seconds / num_done:
            break
        begin = time.perf_counter()
        generate(model, batch)
        seconds += time.perf_counter() - begin
        num_tokens += sum(one.num_output_tokens for one in batch)
        num_done += 1
        part.add("peer_batches", batch=num_done, output_tokens=num_tokens, seconds=seconds)
    if num_done < len(batches):
        part.not_run(f"transformers: {len(batches) - num_done} of {len(batches)} batches", "time was up")
    note = f"{num_done} static batches of {BATCH_SIZE}, {num_tokens} tokens out, {seconds:.1f} s"
    add(part, "ShareGPT-like, transformers generate", num_tokens / seconds, "output tok/s", note)


@torch.inference_mode()
def generate(model: PreTrainedModel, batch: list[Conversation]) -> None:
    """Padded on the left; runs until the longest output is there. What goes beyond a request's own is thrown away."""
    longest = max(len(one.prompt_token_ids) for one in batch)
    padding = [longest - len(one.prompt_token_ids) for one in batch]
    token_ids = [[0] * count + one.prompt_token_ids for count, one in zip(padding, batch, strict=True)]
    mask = [[0] * count + [1] * (longest - count) for count in padding]
    num_tokens = max(one.num_output_tokens for one in batch)
    output = model.generate(
        torch.tensor(token_ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=GenerationConfig(max_new_tokens=num_tokens, pad_token_id=0, do_sample=False),
    )
    assert output.shape[1] == longest + num_tokens
    output.cpu()  # waits for the device
