"""Proposer socket: guesses the next tokens of requests, for the model to verify several in one step.

A guess can only cost time: what is kept is what the model would have sampled without it, token for token.
Source: Leviathan et al. 2023, arXiv:2211.17192.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.interfaces.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """A request whose next tokens may be guessed.

    Attributes:
        request_id: as in the steps.
        token_ids: [num_tokens] int64 on the host: every token so far, the one just sampled included. Read only, and
            good during the call.
        max_drafts: guess at most this many, >= 1.
    """

    request_id: str
    token_ids: np.ndarray[Any, np.dtype[np.int64]]
    max_drafts: int


class Proposer(ABC):
    """Constructed once, in the process that runs the model, with the manifest of what is built there."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @abstractmethod
    def propose(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        """For each request the tokens guessed to come next, at most `max_drafts`; an empty list guesses nothing."""

    def forget(self, request_id: str) -> None:
        """A request has ended, or was put back; when it comes again, its tokens come whole."""
        return None
