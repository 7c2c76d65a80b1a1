"""Log-probabilities that a user asked for, from logits to plain data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.outputs import TokenLogprobs

_MAX_ROWS = 256  # of logits at once, for long prompts


def token_logprobs(logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """For each row the token that is there and the most probable ones.

    Args:
        logits: [num_rows, vocab_size], any float dtype.
        token_ids: [num_rows] int64, the tokens that are there.
        counts: for each row how many of the most probable tokens; -1 is the whole vocabulary.
    """
    vocab_size = logits.shape[1]
    wanted = [vocab_size if count < 0 else min(count, vocab_size) for count in counts]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    there = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = (logprobs > there).sum(dim=-1) + 1
    best = _best(logprobs, wanted)
    return [
        TokenLogprobs(token_ids=(token_id, *ids), logprobs=(logprob, *values), rank=rank)
        for token_id, logprob, rank, (ids, values) in zip(
            token_ids.tolist(), there.squeeze(1).tolist(), ranks.tolist(), best, strict=True
        )
    ]


def _best(logprobs: Tensor, counts: Sequence[int]) -> list[tuple[list[int], list[float]]]:
    """For each row the ids and logprobs of its `count` most probable tokens, best first."""
    most = max(counts)
    if not most:
        return [([], [])] * len(counts)
    best = logprobs.topk(most, dim=-1)
    if min(counts) == most:
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return [  # row by row, for one that wants the whole vocabulary may stand among many that want a few
        (best.indices[row, :count].tolist(), best.values[row, :count].tolist()) for row, count in enumerate(counts)
    ]


def chunks(num_rows: int) -> list[slice]:
    """Slices of a long prompt's rows, so that their logits are never all in memory at once."""
    return [slice(start, min(start + _MAX_ROWS, num_rows)) for start in range(0, num_rows, _MAX_ROWS)]
