"""The persistent batch: every running request's row in numpy arrays, updated by difference, and one step's inputs.

This is the one place where a step becomes tensors, copied to the device in a single transfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.interfaces.attention import BatchLayout, BatchLimits
from octavo.interfaces.executor import NewRow, Step

Array = np.ndarray[Any, np.dtype[Any]]

_ALIGNMENT = 16  # bytes; every field of the transfer starts at a multiple of it
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingInputs:
    """How the rows that sample draw their next token, all [num_samples], on the device unless said otherwise.

    Attributes:
        temperature, top_p: float32.
        top_k: int32, 0 is off.
        seed: int64; sample_index, position: int32; together with the token id they key the noise.
        all_greedy, any_top_k, any_top_p: known on the host, so that what nobody asked for is not computed.
        banned: (row, token ids) that may not be drawn yet.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    seed: Tensor
    sample_index: Tensor
    position: Tensor
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool
    banned: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """One step as tensors.

    Attributes:
        token_ids: [num_tokens] int64; positions: [num_tokens] int64.
        layout: where each request's tokens are, for attention.
        sample_rows: [num_samples] int64, the tokens whose logits are wanted.
        sample_request_ids: whose they are.
    """

    token_ids: Tensor
    positions: Tensor
    layout: BatchLayout
    sample_rows: Tensor
    sample_request_ids: list[str]
    sampling: SamplingInputs


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
        self._top_k = np.zeros(rows, np.int32)
        self._seed = np.zeros(rows, np.int64)
        self._sample_index = np.zeros(rows, np.int32)
        self._bans: dict[int, tuple[int, tuple[int, ...]]] = {}  # row -> (allowed from this position, token ids)

    def update(self, step: Step) -> None:
        """Take in who left, who entered, and which blocks were added."""
        for request_id in step.leaving:
            row = self._row_of.pop(request_id)
            self._bans.pop(row, None)
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

    def _enter(self, new: NewRow) -> None:
        row = self._row_of[new.request_id] = self._free_rows.pop()
        self._token_ids[row, : len(new.token_ids)] = new.token_ids
        self._block_table[row, : self._num_blocks[row]] = 0  # of the request that had the row before
        self._num_blocks[row] = 0
        self._temperature[row], self._top_p[row] = new.temperature, new.top_p
        self._top_k[row] = min(new.top_k, _MAX_INT32)
        self._seed[row], self._sample_index[row] = new.seed, new.sample_index
        if new.min_tokens and new.stop_token_ids:
            self._bans[row] = (new.num_prompt_tokens + new.min_tokens, new.stop_token_ids)

    def inputs(self, step: Step) -> StepInputs:
        """The step's tensors; requests with one token and a context come first."""
        num_requests = len(step.rows)
        starts = np.fromiter((row.num_computed_tokens for row in step.rows), np.int64, num_requests)
        lengths = np.fromiter((row.num_tokens for row in step.rows), np.int64, num_requests)
        is_prefill = (lengths > 1) | (starts == 0)
        order = np.argsort(is_prefill, kind="stable")
        starts, lengths = starts[order], lengths[order]
        scheduled = [step.rows[index] for index in order]
        rows = np.fromiter((self._row_of[row.request_id] for row in scheduled), np.int64, num_requests)
        samples = np.fromiter((row.samples for row in scheduled), np.bool_, num_requests)

        query_start_loc = np.zeros(num_requests + 1, np.int32)
        np.cumsum(lengths, out=query_start_loc[1:])
        token_rows = np.repeat(rows, lengths)
        first_tokens = query_start_loc[:-1]
        positions = np.arange(query_start_loc[-1]) + np.repeat(starts - first_tokens, lengths)
        blocks = self._block_table[token_rows, positions // self._block_size].astype(np.int64)
        seq_lens = (starts + lengths).astype(np.int32)
        max_seq_len = int(seq_lens.max())
        sampled_rows, sample_positions = rows[samples], (starts + lengths)[samples]

        device = self._to_device(
            {
                "token_ids": self._token_ids[token_rows, positions],
                "positions": positions,
                "slot_mapping": blocks * self._block_size + positions % self._block_size,
                "sample_rows": (query_start_loc[1:] - 1)[samples].astype(np.int64),
                "seed": self._seed[sampled_rows],
                "query_start_loc": query_start_loc,
                "seq_lens": seq_lens,
                "block_table": self._block_table[rows, : -(-max_seq_len // self._block_size)],
                "temperature": self._temperature[sampled_rows],
                "top_p": self._top_p[sampled_rows],
                "top_k": self._top_k[sampled_rows],
                "sample_index": self._sample_index[sampled_rows],
                "sample_position": sample_positions.astype(np.int32),
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
            sample_rows=device["sample_rows"],
            sample_request_ids=[row.request_id for row in scheduled if row.samples],
            sampling=SamplingInputs(
                temperature=device["temperature"],
                top_p=device["top_p"],
                top_k=device["top_k"],
                seed=device["seed"],
                sample_index=device["sample_index"],
                position=device["sample_position"],
                all_greedy=not self._temperature[sampled_rows].any(),
                any_top_k=bool(self._top_k[sampled_rows].any()),
                any_top_p=bool((self._top_p[sampled_rows] < 1).any()),
                banned=self._banned(sampled_rows, sample_positions),
            ),
        )

    def append(self, inputs: StepInputs, token_ids: Array) -> None:
        """Put each sampled token behind its row, where the next step reads it."""
        rows = [self._row_of[request_id] for request_id in inputs.sample_request_ids]
        positions = inputs.sampling.position.cpu().numpy()
        fits = positions < self._token_ids.shape[1]  # the last token of a full context is never computed
        self._token_ids[np.asarray(rows, np.int64)[fits], positions[fits]] = token_ids[fits]

    def _banned(self, rows: Array, positions: Array) -> tuple[tuple[int, tuple[int, ...]], ...]:
        if not self._bans:
            return ()
        return tuple(
            (index, self._bans[row][1])
            for index, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True))
            if row in self._bans and position < self._bans[row][0]
        )

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
