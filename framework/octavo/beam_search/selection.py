"""BeamSelection: from the running beams' probabilities to those that go on, those that are finished, and the end."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from octavo.outputs import TokenLogprobs

_NOTHING = TokenLogprobs(token_ids=(), logprobs=(), rank=0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Beam:
    """A continuation of the prompt: its parent by one token more. The first is empty and has none.

    Attributes:
        cum_logprob: sum of its tokens' log-probabilities.
        num_tokens: how many it has.
        logprobs: the candidates at its last token's position, best first, behind a token that does not matter.
        rank: its last token among them, 1 is the most probable.
    """

    parent: Beam | None = None
    cum_logprob: float = 0.0
    num_tokens: int = 0
    logprobs: TokenLogprobs = _NOTHING
    rank: int = 0

    @property
    def token_id(self) -> int:
        """Its last token."""
        return self.logprobs.token_ids[self.rank]

    @property
    def choices(self) -> list[TokenLogprobs]:
        """For each of its tokens, in order, the token and then the candidates it was chosen from."""
        beam, choices = self, list[TokenLogprobs]()
        while beam.parent is not None:
            token_ids, logprobs = beam.logprobs.token_ids, beam.logprobs.logprobs
            choices.append(
                TokenLogprobs(
                    token_ids=(token_ids[beam.rank], *token_ids[1:]),
                    logprobs=(logprobs[beam.rank], *logprobs[1:]),
                    rank=beam.rank,
                )
            )
            beam = beam.parent
        return choices[::-1]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FinishedBeam:
    """A beam that goes on no more, and what it is ranked by."""

    beam: Beam
    score: float


class BeamSelection:
    """The search of one prompt, without a model: told the probabilities after each running beam, it takes one step.

    Of all continuations the best few are candidates. Those that do not end go on, up to `beam_width`; those that end
    are finished, if they are among the best `beam_width` candidates and their scores among the best `beam_width` ever.

    Args:
        end_token_ids: tokens that finish a beam.
        max_tokens: a beam of so many tokens is finished.
        length_penalty, early_stopping: as in BeamSearchParams.

    Attributes:
        running: beams to be continued, best first.
        finished: best score first.
        is_done: no step is left to take; `finished` is the result.

    Source: transformers' `generate` with num_beams, which it equals.
    """

    def __init__(
        self,
        *,
        beam_width: int,
        max_tokens: int,
        end_token_ids: Set[int] = frozenset(),
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> None:
        self._beam_width = beam_width
        self._max_tokens = max_tokens
        self._end_token_ids = end_token_ids
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self.running = [Beam()]
        self.finished: list[FinishedBeam] = []
        self.is_done = False

    @property
    def num_candidates(self) -> int:
        """So many are looked at: though every beam may have all ends among its best, `beam_width` can go on."""
        return self._beam_width * max(2, 1 + len(self._end_token_ids))

    def advance(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """Take one step.

        Args:
            logprobs: for each running beam its `num_candidates` most probable next tokens, best first, behind a token
                that does not matter.
        """
        candidates = heapq.nlargest(self.num_candidates, self._continuations(logprobs), key=_cum_logprob)
        ends = [beam.num_tokens == self._max_tokens or beam.token_id in self._end_token_ids for beam in candidates]
        best = list(zip(candidates, ends, strict=True))[: self._beam_width]
        self._finish([beam for beam, is_end in best if is_end])
        self.running = [beam for beam, is_end in zip(candidates, ends, strict=True) if not is_end][: self._beam_width]
        self.is_done = not self.running or not self._may_improve()

    def _continuations(self, logprobs: Sequence[TokenLogprobs]) -> Iterator[Beam]:
        for beam, after in zip(self.running, logprobs, strict=True):
            for rank, logprob in enumerate(after.logprobs[1:], 1):
                yield Beam(
                    parent=beam,
                    cum_logprob=beam.cum_logprob + logprob,
                    num_tokens=beam.num_tokens + 1,
                    logprobs=after,
                    rank=rank,
                )

    def _finish(self, beams: Sequence[Beam]) -> None:
        finished = [FinishedBeam(beam=beam, score=self._score(beam, beam.num_tokens)) for beam in beams]
        self.finished = heapq.nlargest(self._beam_width, self.finished + finished, key=lambda one: one.score)

    def _may_improve(self) -> bool:
        """Whether the best running beam may still come among the finished ones; for some lengths that is a guess."""
        if len(self.finished) < self._beam_width:
            return True
        if self._early_stopping is True:
            return False
        best = self.running[0]
        longest = self._early_stopping == "never" and self._length_penalty > 0
        return self._score(best, self._max_tokens if longest else best.num_tokens) > self.finished[-1].score

    def _score(self, beam: Beam, num_tokens: int) -> float:
        return beam.cum_logprob / float(num_tokens**self._length_penalty)


def _cum_logprob(beam: Beam) -> float:
    return beam.cum_logprob
