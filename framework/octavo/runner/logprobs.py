"""Log-probabilities that a user asked for: computed with the step, read when it is collected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.outputs import TokenLogprobs
from octavo.runner.transfer import to_host

_MAX_ROWS = 256  # of logits at once, for long prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobTensors:
    """Of some rows the token that is there and the most probable ones, on their way to the host.

    Attributes:
        token_ids, logprobs, ranks: [num_rows], of the tokens that are there.
        best_ids, best_logprobs: [num_rows, most], best first.
        counts: for each row how many of the best it wants.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    best_ids: Tensor
    best_logprobs: Tensor
    counts: Sequence[int]

    def read(self) -> list[TokenLogprobs]:
        """As plain data, once the device is done with them."""
        if min(self.counts) == max(self.counts):
            best = zip(self.best_ids.tolist(), self.best_logprobs.tolist(), strict=True)
        else:  # row by row, for one that wants the whole vocabulary may stand among many that want a few
            best = zip(
                (row[:count].tolist() for row, count in zip(self.best_ids, self.counts, strict=True)),
                (row[:count].tolist() for row, count in zip(self.best_logprobs, self.counts, strict=True)),
                strict=True,
            )
        return [
            TokenLogprobs(token_ids=(token_id, *ids), logprobs=(logprob, *values), rank=rank)
            for token_id, logprob, rank, (ids, values) in zip(
                self.token_ids.tolist(), self.logprobs.tolist(), self.ranks.tolist(), best, strict=True
            )
        ]


def token_logprobs(logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> LogprobTensors:
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
    best = logprobs.topk(max(wanted), dim=-1)
    return LogprobTensors(
        token_ids=to_host(token_ids),
        logprobs=to_host(there.squeeze(1)),
        ranks=to_host((logprobs > there).sum(dim=-1) + 1),
        best_ids=to_host(best.indices),
        best_logprobs=to_host(best.values),
        counts=wanted,
    )


def chunks(num_rows: int) -> list[slice]:
    """Slices of a long prompt's rows, so that their logits are never all in memory at once."""
    return [slice(start, min(start + _MAX_ROWS, num_rows)) for start in range(0, num_rows, _MAX_ROWS)]
