"""The persistent batch: every running request's row in numpy arrays, updated by difference, and one step's inputs.

This is the one place where a step becomes tensors, copied to the device in a single transfer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.interfaces.attention import BatchLayout, BatchLimits
from octavo.interfaces.executor import NewRow, ScheduledRow, Step
from octavo.interfaces.kernels import SamplingInputs

Array = np.ndarray[Any, np.dtype[Any]]

_ALIGNMENT = 16  # bytes; every field of the transfer starts at a multiple of it
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The tokens a step draws. A request with drafts has several, in order of position; the others one.

    Attributes:
        tokens: [num_samples] int64 on the device: the token of the step whose logits each is drawn from.
        request_ids: whose each is.
        rows: their rows in the batch, [num_samples] int64 on the host.
        positions: where in its request each drawn token will stand, [num_samples] int64 on the host.
        drafts: request id -> the guesses that its samples are to be compared with.
    """

    tokens: Tensor
    request_ids: list[str]
    rows: Array
    positions: Array
    drafts: Mapping[str, tuple[int, ...]]
    inputs: SamplingInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTargets:
    """Prompt tokens whose logprobs are asked for: `token_ids[i]` follows token `first + i` of the step."""

    request_id: str
    first: int
    token_ids: Array
    num_logprobs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """One step as tensors.

    Attributes:
        token_ids: [num_tokens] int64; positions: [num_tokens] int64.
        layout: where each request's tokens are, for attention.
        samples: what is drawn; None when no row samples.
        prompt_targets: of the requests that want their prompts' logprobs.
    """

    token_ids: Tensor
    positions: Tensor
    layout: BatchLayout
    samples: Samples | None
    prompt_targets: list[PromptTargets]


@dataclass(kw_only=True, slots=True)
class _Draws:
    """Samples on the host, one an entry."""

    request_ids: list[str]
    tokens: Array
    rows: Array
    positions: Array


class PersistentBatch:
    """Rows of the running requests. A row holds its tokens (its own samples included) and its block table."""

    def __init__(self, limits: BatchLimits) -> None:
        rows, blocks = limits.max_num_requests, -(-limits.max_model_len // limits.block_size)
        self._block_size = limits.block_size
        self._device = limits.device
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(rows - 1, -1, -1))
        self._token_ids = np.zeros((rows, limits.max_model_len), np.int64)
        self._block_table = np.zeros((rows, blocks), np.int32)
        self._num_blocks = np.zeros(rows, np.int32)
        self._temperature = np.zeros(rows, np.float32)
        self._top_p = np.ones(rows, np.float32)
        self._min_p = np.zeros(rows, np.float32)
        self._top_k = np.zeros(rows, np.int32)
        self._seed = np.zeros(rows, np.int64)
        self._sample_index = np.zeros(rows, np.int32)
        self._num_tokens = np.zeros(rows, np.int64)  # up to the last sample
        self._num_logprobs: dict[int, int] = {}
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}  # row -> (tokens of the prompt, logprobs of each)

    def row_of(self, request_id: str) -> int:
        """The row of a request that has entered: below `max_num_requests`, its own until it leaves."""
        return self._row_of[request_id]

    @property
    def any_logprobs(self) -> bool:
        """Whether any row wants logprobs of its samples."""
        return bool(self._num_logprobs)

    def num_logprobs(self, row: int) -> int | None:
        """How many of the most probable tokens a row wants beside each sample; None: no logprobs at all."""
        return self._num_logprobs.get(row)

    def token_ids(self, row: int) -> Array:
        """[num_tokens] int64, a row's tokens up to its last sample; a view, good until the next step."""
        return self._token_ids[row, : self._num_tokens[row]]

    def update(self, step: Step) -> None:
        """Take in who left, who entered, and which blocks and tokens were added."""
        for request_id in step.leaving:
            row = self._row_of.pop(request_id)
            self._num_logprobs.pop(row, None)
            self._prompt_logprobs.pop(row, None)
            self._free_rows.append(row)
        for new in step.entering:
            self._enter(new)
        for scheduled in step.rows:
            if scheduled.new_block_ids:
                row = self._row_of[scheduled.request_id]
                begin = self._num_blocks[row]
                end = begin + len(scheduled.new_block_ids)
                self._block_table[row, begin:end] = scheduled.new_block_ids
                self._num_blocks[row] = end
            for copy in scheduled.copied_blocks:
                self._block_table[self._row_of[scheduled.request_id], copy.index] = copy.target
            if scheduled.token_ids:
                end = scheduled.num_computed_tokens + scheduled.num_tokens
                row = self._row_of[scheduled.request_id]
                self._token_ids[row, end - len(scheduled.token_ids) : end] = scheduled.token_ids

    def _enter(self, new: NewRow) -> None:
        row = self._row_of[new.request_id] = self._free_rows.pop()
        params = new.params
        self._token_ids[row, : len(new.token_ids)] = new.token_ids
        self._block_table[row, : self._num_blocks[row]] = 0  # of the request that had the row before
        self._num_blocks[row] = 0
        self._temperature[row], self._top_p[row], self._min_p[row] = params.temperature, params.top_p, params.min_p
        self._top_k[row] = min(max(0, params.top_k), _MAX_INT32)
        self._seed[row], self._sample_index[row] = new.seed, new.sample_index
        if params.logprobs is not None:
            self._num_logprobs[row] = params.logprobs
        if params.prompt_logprobs is not None and len(new.token_ids) == new.num_prompt_tokens:  # else they were told
            self._prompt_logprobs[row] = (new.num_prompt_tokens, params.prompt_logprobs)

    def inputs(self, step: Step) -> StepInputs:
        """The step's tensors; requests with one token and a context come first."""
        computing = [row for row in step.rows if row.forked_from is None]
        num_requests = len(computing)
        starts = np.fromiter((row.num_computed_tokens for row in computing), np.int64, num_requests)
        lengths = np.fromiter((row.num_tokens for row in computing), np.int64, num_requests)
        is_prefill = (lengths > 1) | (starts == 0)
        order = np.argsort(is_prefill, kind="stable")
        starts, lengths = starts[order], lengths[order]
        scheduled = [computing[index] for index in order]
        rows = np.fromiter((self._row_of[row.request_id] for row in scheduled), np.int64, num_requests)

        query_start_loc = np.zeros(num_requests + 1, np.int32)
        np.cumsum(lengths, out=query_start_loc[1:])
        token_rows = np.repeat(rows, lengths)
        positions = np.arange(query_start_loc[-1]) + np.repeat(starts - query_start_loc[:-1], lengths)
        blocks = self._block_table[token_rows, positions // self._block_size].astype(np.int64)
        seq_lens = (starts + lengths).astype(np.int32)
        max_seq_len = int(seq_lens.max())
        draws = self._draws(scheduled, rows, query_start_loc[1:].astype(np.int64) - 1, starts + lengths)
        drafts = {row.request_id: row.token_ids[-row.num_drafts :] for row in scheduled if row.num_drafts}
        if drafts:
            draws = _one_more_for_each_draft(draws, drafts)
        if num_requests < len(step.rows):
            draws = self._with_forks(draws, step)

        device = self._to_device(
            {
                "token_ids": self._token_ids[token_rows, positions],
                "positions": positions,
                "slot_mapping": blocks * self._block_size + positions % self._block_size,
                "sampled_tokens": draws.tokens,
                "seed": self._seed[draws.rows],
                "query_start_loc": query_start_loc,
                "seq_lens": seq_lens,
                "block_table": self._block_table[rows, : -(-max_seq_len // self._block_size)],
                "temperature": self._temperature[draws.rows],
                "top_p": self._top_p[draws.rows],
                "min_p": self._min_p[draws.rows],
                "top_k": self._top_k[draws.rows],
                "sample_index": self._sample_index[draws.rows],
                "sample_position": draws.positions.astype(np.int32),
            }
        )
        num_decodes = num_requests - int(is_prefill.sum())
        return StepInputs(
            token_ids=device["token_ids"],
            positions=device["positions"],
            layout=BatchLayout(
                num_requests=num_requests,
                num_tokens=len(positions),
                num_decode_requests=num_decodes,
                num_decode_tokens=num_decodes,
                max_query_len=int(lengths.max()),
                max_seq_len=max_seq_len,
                block_size=self._block_size,
                query_start_loc=device["query_start_loc"],
                seq_lens=device["seq_lens"],
                block_table=device["block_table"],
                slot_mapping=device["slot_mapping"],
                host_query_start_loc=query_start_loc,
                host_seq_lens=seq_lens,
            ),
            samples=self._samples(draws, drafts, device) if draws.request_ids else None,
            prompt_targets=self._prompt_targets(rows, starts, lengths, query_start_loc, scheduled),
        )

    def append(self, samples: Samples, token_ids: Mapping[str, Sequence[int]]) -> None:
        """Put the samples that were kept behind each row, where the next step reads them."""
        end = self._token_ids.shape[1]
        seen: set[str] = set()
        for request_id, row, position in zip(samples.request_ids, samples.rows, samples.positions, strict=True):
            if samples.drafts:  # the first sample of a request comes first; it says where they begin
                if request_id in seen:
                    continue
                seen.add(request_id)
            kept = token_ids[request_id][: end - position]  # the last token of a full context is never computed
            self._token_ids[row, position : position + len(kept)] = kept
            self._num_tokens[row] = position + len(kept)

    # ---------------------------------------------------------------------------------------------------- draws

    def _draws(self, scheduled: Sequence[ScheduledRow], rows: Array, last_tokens: Array, ends: Array) -> _Draws:
        """One sample for each row that samples, drawn from its last token."""
        sampling = np.fromiter((row.samples for row in scheduled), np.bool_, len(scheduled))
        return _Draws(
            request_ids=[row.request_id for row in scheduled if row.samples],
            tokens=last_tokens[sampling],
            rows=rows[sampling],
            positions=ends[sampling],
        )

    def _with_forks(self, draws: _Draws, step: Step) -> _Draws:
        """A sample for each fork, drawn from the same token as its origin's."""
        forks = [row for row in step.rows if row.forked_from is not None]
        index_of = {request_id: index for index, request_id in enumerate(draws.request_ids)}
        origins = [index_of[row.forked_from] for row in forks if row.forked_from is not None]
        rows = np.fromiter((self._row_of[row.request_id] for row in forks), np.int64, len(forks))
        return _Draws(
            request_ids=draws.request_ids + [row.request_id for row in forks],
            tokens=np.concatenate((draws.tokens, draws.tokens[origins])),
            rows=np.concatenate((draws.rows, rows)),
            positions=np.concatenate((draws.positions, draws.positions[origins])),
        )

    def _samples(self, draws: _Draws, drafts: Mapping[str, tuple[int, ...]], device: Mapping[str, Tensor]) -> Samples:
        return Samples(
            tokens=device["sampled_tokens"],
            request_ids=draws.request_ids,
            rows=draws.rows,
            positions=draws.positions,
            drafts=drafts,
            inputs=SamplingInputs(
                temperature=device["temperature"],
                top_p=device["top_p"],
                min_p=device["min_p"],
                top_k=device["top_k"],
                seed=device["seed"],
                sample_index=device["sample_index"],
                position=device["sample_position"],
                all_greedy=not self._temperature[draws.rows].any(),
                any_top_k=bool(self._top_k[draws.rows].any()),
                any_top_p=bool((self._top_p[draws.rows] < 1).any()),
                any_min_p=bool(self._min_p[draws.rows].any()),
            ),
        )

    def _prompt_targets(
        self, rows: Array, starts: Array, lengths: Array, query_start_loc: Array, scheduled: Sequence[ScheduledRow]
    ) -> list[PromptTargets]:
        if not self._prompt_logprobs:
            return []
        targets = []
        for index, row in enumerate(rows.tolist()):
            num_prompt_tokens, num_logprobs = self._prompt_logprobs.get(row, (0, 0))
            start = int(starts[index]) + 1  # the token after the first of this step
            end = min(start + int(lengths[index]), num_prompt_tokens)
            if start < end:
                targets.append(
                    PromptTargets(
                        request_id=scheduled[index].request_id,
                        first=int(query_start_loc[index]),
                        token_ids=self._token_ids[row, start:end].copy(),
                        num_logprobs=num_logprobs,
                    )
                )
        return targets

    def _to_device(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        """All arrays in one transfer: packed into one buffer, copied once, handed out as views."""
        offsets, size = {}, 0
        for name, array in arrays.items():
            offsets[name] = size
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        host = np.empty(size, np.uint8)
        for name, array in arrays.items():
            view = host[offsets[name] : offsets[name] + array.nbytes]
            view.view(array.dtype).reshape(array.shape)[...] = array
        device = torch.from_numpy(host).to(self._device)
        return {
            name: device[offsets[name] : offsets[name] + array.nbytes]
            .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
            .view(array.shape)
            for name, array in arrays.items()
        }


def _one_more_for_each_draft(draws: _Draws, drafts: Mapping[str, tuple[int, ...]]) -> _Draws:
    """A request with drafts draws after the token before them and after each of them."""
    counts = np.fromiter((len(drafts.get(request_id, ())) for request_id in draws.request_ids), np.int64) + 1
    last = np.cumsum(counts) - 1
    back = np.repeat(last, counts) - np.arange(counts.sum())  # how far before its request's last sample each is
    return _Draws(
        request_ids=np.repeat(np.array(draws.request_ids, dtype=object), counts).tolist(),
        tokens=np.repeat(draws.tokens, counts) - back,
        rows=np.repeat(draws.rows, counts),
        positions=np.repeat(draws.positions, counts) - back,
    )
