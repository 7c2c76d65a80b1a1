"""What transformers generates greedily from random prompts, for the equality tests of models made at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from margin_rule import Reference
from tiny_model import VOCAB_SIZE
from transformers import PreTrainedModel


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def reference_of(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> Reference:
    """What transformers generates greedily, and by how much each token won."""
    answer = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        eos_token_id=-1,
        pad_token_id=0,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(answer.logits).topk(2).values
    return Reference(
        name=f"{len(prompt)} tokens",
        prompt_token_ids=list(prompt),
        token_ids=answer.sequences[0, len(prompt) :].tolist(),
        margins=(best[:, 0] - best[:, 1]).tolist(),
    )
