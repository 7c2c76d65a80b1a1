"""Guesses what a smaller model would say, token by token, for all requests at once.

It draws with each request's own parameters and its own noise. So a sampled request's guess is not the draft model's
likeliest token but the one that this very noise picks from its probabilities, and the served model's noise is the same:
where the two models agree on the probabilities, they agree on the token.

Source: Leviathan et al. 2023, arXiv:2211.17192; the shared noise: Daliri et al. 2024, arXiv:2408.07978.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from octavo.interfaces.proposer import Continuation, Proposer, ProposerContext
from octavo_proposer_draft_model.options import DraftModelOptions


class DraftModelProposer(Proposer):
    """What it knows of a request lies in the draft model's KV cache."""

    def __init__(self, context: ProposerContext, *, options: DraftModelOptions) -> None:
        super().__init__(context)
        assert context.draft_model is not None, "the spec says draft_model"
        self._model = context.draft_model

    def propose(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        drafts: dict[str, list[int]] = {one.request_id: [] for one in continuations}
        going = list(continuations)
        while going:
            next_tokens = self._model.next_tokens(going)
            for request_id, token_id in next_tokens.items():
                drafts[request_id].append(token_id)
            going = [
                _longer(one, next_tokens[one.request_id])
                for one in going
                if one.request_id in next_tokens and one.max_drafts > 1
            ]
        return list(drafts.values())

    def forget(self, request_id: str) -> None:
        self._model.forget(request_id)


def _longer(one: Continuation, token_id: int) -> Continuation:
    return replace(one, token_ids=np.append(one.token_ids, token_id), max_drafts=one.max_drafts - 1)
