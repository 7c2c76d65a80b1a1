"""A second model beside the served one: its steps, and which blocks of its KV cache hold which request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from octavo.interfaces.attention import BatchLimits
from octavo.interfaces.executor import NewRow, ScheduledRow, Step
from octavo.interfaces.proposer import Continuation, IncrementalModel
from octavo.runner.model_runner import ModelRunner
from octavo.runner.transfer import Array
from octavo.sampling_params import SamplingParams


@dataclass(kw_only=True, slots=True)
class _Sequence:
    """A request here: the tokens whose keys and values its blocks hold."""

    token_ids: Array
    block_ids: list[int] = field(default_factory=list)
    num_sent_blocks: int = 0


@dataclass(kw_only=True, slots=True)
class _Work:
    """What is left to compute of one request, from position `start` on."""

    continuation: Continuation
    sequence: _Sequence
    start: int
    enters: bool


class PagedIncrementalModel(IncrementalModel):
    """Makes the steps of a runner of its own. When blocks are short, who was asked about longest ago is forgotten.

    Args:
        limits: what `runner` was made for; at most `max_num_requests` are remembered at once.
    """

    def __init__(self, runner: ModelRunner, limits: BatchLimits, num_blocks: int) -> None:
        self._runner = runner
        self._limits = limits
        self._free_blocks = list(range(num_blocks - 1, -1, -1))
        self._sequences: dict[str, _Sequence] = {}  # the one asked about longest ago first
        self._leaving: list[str] = []  # news the runner has not had yet
        self._num_steps = 0

    def next_tokens(self, continuations: Sequence[Continuation]) -> dict[str, int]:
        asked = {one.request_id for one in continuations}
        pending = [work for one in continuations if (work := self._prepare(one, asked)) is not None]
        next_tokens: dict[str, int] = {}
        while pending:
            step = self._step(pending)
            for request_id, token_ids in self._runner.execute(step).token_ids.items():
                next_tokens[request_id] = token_ids[0]
            pending = [work for work in pending if work.start < len(work.continuation.token_ids)]
        return next_tokens

    def forget(self, request_id: str) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._free_blocks += sequence.block_ids
            self._leaving.append(request_id)

    def _prepare(self, one: Continuation, asked: set[str]) -> _Work | None:
        """Find blocks for all of a request's tokens; None when there is no room."""
        if len(one.token_ids) > self._limits.max_model_len:
            return None
        known = self._sequences.get(one.request_id)
        sequence = known or _Sequence(token_ids=one.token_ids[:0])
        num_needed = -(-len(one.token_ids) // self._limits.block_size) - len(sequence.block_ids)
        if num_needed > len(self._free_blocks):
            for request_id in [other for other in self._sequences if other not in asked]:
                self.forget(request_id)
                if num_needed <= len(self._free_blocks):
                    break
            else:
                return None
        sequence.block_ids += [self._free_blocks.pop() for _ in range(num_needed)]
        start = min(_num_equal(sequence.token_ids, one.token_ids), len(one.token_ids) - 1)
        sequence.token_ids = one.token_ids.copy()
        self._sequences.pop(one.request_id, None)
        self._sequences[one.request_id] = sequence  # as the last
        return _Work(continuation=one, sequence=sequence, start=start, enters=known is None)

    def _step(self, pending: Sequence[_Work]) -> Step:
        """As much of the work as one step may compute; each request's `start` moves on."""
        budget, entering, rows = self._limits.max_num_tokens, list[NewRow](), list[ScheduledRow]()
        for work in pending:
            if not budget:
                break
            one, sequence = work.continuation, work.sequence
            end = min(len(one.token_ids), work.start + budget)
            if work.enters:
                entering.append(_new_row(one))
                work.enters = False
            rows.append(
                ScheduledRow(
                    request_id=one.request_id,
                    num_computed_tokens=work.start,
                    num_tokens=end - work.start,
                    new_block_ids=sequence.block_ids[sequence.num_sent_blocks :],
                    samples=end == len(one.token_ids),
                    token_ids=tuple(one.token_ids[work.start : end].tolist()),
                )
            )
            sequence.num_sent_blocks = len(sequence.block_ids)
            budget -= end - work.start
            work.start = end
        leaving, self._leaving = self._leaving, []
        self._num_steps += 1
        return Step(step_id=self._num_steps, leaving=leaving, entering=entering, rows=rows)


def _new_row(one: Continuation) -> NewRow:
    """The request as this model draws for it. Its tokens come with the rows; no logprobs are asked for."""
    params = one.params
    return NewRow(
        request_id=one.request_id,
        token_ids=[],
        num_prompt_tokens=0,
        params=SamplingParams(
            temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, min_p=params.min_p
        ),
        seed=one.seed,
        sample_index=one.sample_index,
    )


def _num_equal(first: Array, second: Array) -> int:
    """How many tokens two texts have in common from the start."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
