"""The persistent batch: every running request's row in numpy arrays, updated by difference, and one step's inputs.

This is the one place where a step becomes tensors, copied to the device in a single transfer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.interfaces.attention import PAD_SLOT, BatchLayout, BatchLimits
from octavo.interfaces.executor import NewRow, ScheduledRow, Step
from octavo.interfaces.kernels import SamplingInputs
from octavo.interfaces.lora import NO_ADAPTER
from octavo.runner.step_inputs import PromptTargets, Samples, StepInputs
from octavo.runner.transfer import Array, StepTransfer

_MAX_INT32 = 2**31 - 1
_MOST_BYTES_PER_ROW = 256  # of a step's arrays, the block table apart
_MOST_PADDING = 4  # times as many requests as there are: sizes may have been left out
_KNOWN = -1  # a token's source when it is known on the host


@dataclass(kw_only=True, slots=True)
class _Draws:
    """Samples on the host, one an entry."""

    request_ids: list[str]
    tokens: Array
    rows: Array
    positions: Array


class PersistentBatch:
    """Rows of the running requests. A row holds its tokens (its own samples included) and its block table.

    Args:
        max_graph_size: the largest of the sizes to which steps of decodes alone may be padded; 0: none are.

    Attributes:
        graph_sizes: those sizes, rising; steps of more requests are not padded.
    """

    def __init__(self, limits: BatchLimits, max_graph_size: int = 0) -> None:
        rows, blocks = limits.max_num_requests, -(-limits.max_model_len // limits.block_size)
        self.graph_sizes: Sequence[int] = ()
        self._block_size = limits.block_size
        self._max_model_len = limits.max_model_len
        fixed_bytes = rows * (_MOST_BYTES_PER_ROW + 4 * blocks) + _MOST_BYTES_PER_ROW if max_graph_size else 0
        self._transfer = StepTransfer(limits.device, fixed_bytes)
        self._fixed_block_table = torch.zeros((max_graph_size, blocks), dtype=torch.int32, device=limits.device)
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
        self._num_tokens = np.zeros(rows, np.int64)  # that are known here: what comes behind is still on the device
        self._num_entries = np.zeros(rows, np.int64)
        self._adapter_position = np.full(rows, NO_ADAPTER, np.int32)
        self._num_logprobs: dict[int, int] = {}
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}  # row -> (tokens of the prompt, logprobs of each)

    def row_of(self, request_id: str) -> int:
        """The row of a request that has entered: below `max_num_requests`, its own until it leaves."""
        return self._row_of[request_id]

    def find_row(self, request_id: str) -> int | None:
        """The same; None when it has left."""
        return self._row_of.get(request_id)

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

    def adapter_positions(self, rows: Array) -> Array | None:
        """[num_rows] int32, the device position of each row's LoRA adapter or NO_ADAPTER; None: no row has one."""
        positions = self._adapter_position[rows]
        return positions if positions.max(initial=NO_ADAPTER) > NO_ADAPTER else None

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
                self._num_tokens[row] = max(self._num_tokens[row], end)

    def _enter(self, new: NewRow) -> None:
        row = self._row_of[new.request_id] = self._free_rows.pop()
        params = new.params
        self._num_entries[row] += 1
        self._token_ids[row, : len(new.token_ids)] = new.token_ids
        self._num_tokens[row] = len(new.token_ids)
        self._block_table[row, : self._num_blocks[row]] = 0  # of the request that had the row before
        self._num_blocks[row] = 0
        self._temperature[row], self._top_p[row], self._min_p[row] = params.temperature, params.top_p, params.min_p
        self._top_k[row] = min(max(0, params.top_k), _MAX_INT32)
        self._seed[row], self._sample_index[row] = new.seed, new.sample_index
        self._adapter_position[row] = NO_ADAPTER if new.adapter_position is None else new.adapter_position
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

        graph_size = None if is_prefill.any() else self._graph_size(num_requests)
        unknown = positions >= self._num_tokens[token_rows]
        arrays = {  # what a captured step reads comes first: its place must not depend on what varies
            "token_ids": self._token_ids[token_rows, positions],
            "token_sources": np.where(unknown, token_rows, _KNOWN),
            "positions": positions,
            "slot_mapping": blocks * self._block_size + positions % self._block_size,
            "seq_lens": seq_lens,
            "query_start_loc": query_start_loc,
        }
        adapter_positions = self.adapter_positions(token_rows)
        if graph_size is not None:
            arrays = _padded(arrays, graph_size)
            if adapter_positions is not None:
                adapter_positions = _filled(adapter_positions, graph_size, NO_ADAPTER)
        arrays |= self._of_samples(draws)
        arrays["block_table"] = self._block_table[rows, : -(-max_seq_len // self._block_size)]
        device = self._transfer.send(arrays, fixed=graph_size is not None)
        num_decodes = num_requests - int(is_prefill.sum())
        layout = BatchLayout(
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
        )
        if graph_size is not None:
            self._fixed_block_table[:num_requests, : device["block_table"].shape[1]] = device["block_table"]
            layout = self._fixed_layout(device, graph_size)
        return StepInputs(
            token_ids=device["token_ids"],
            token_sources=device["token_sources"] if graph_size is not None or unknown.any() else None,
            positions=device["positions"],
            layout=layout,
            samples=self._samples(draws, drafts, device) if draws.request_ids else None,
            prompt_targets=self._prompt_targets(rows, starts, lengths, query_start_loc, scheduled),
            adapter_positions=adapter_positions,
            graph_size=graph_size,
        )

    def padding(self, graph_size: int) -> StepInputs:
        """A step of that many padding requests and no other, its tensors where those of every step of the size lie."""
        none = np.zeros(0, np.int64)
        arrays = dict.fromkeys(("token_ids", "token_sources", "positions", "slot_mapping"), none)
        arrays |= {"seq_lens": none.astype(np.int32), "query_start_loc": np.zeros(1, np.int32)}
        device = self._transfer.send(_padded(arrays, graph_size), fixed=True)
        return StepInputs(
            token_ids=device["token_ids"],
            token_sources=device["token_sources"],
            positions=device["positions"],
            layout=self._fixed_layout(device, graph_size),
            samples=None,
            prompt_targets=[],
            graph_size=graph_size,
        )

    def _graph_size(self, num_requests: int) -> int | None:
        index = bisect_left(self.graph_sizes, num_requests)
        if index == len(self.graph_sizes) or self.graph_sizes[index] > _MOST_PADDING * num_requests:
            return None
        return self.graph_sizes[index]

    def _fixed_layout(self, device: Mapping[str, Tensor], graph_size: int) -> BatchLayout:
        """Of a padded step of decodes; its host sizes hold for every step of the size."""
        return BatchLayout(
            num_requests=graph_size,
            num_tokens=graph_size,
            num_decode_requests=graph_size,
            num_decode_tokens=graph_size,
            max_query_len=1,
            max_seq_len=self._max_model_len,
            block_size=self._block_size,
            query_start_loc=device["query_start_loc"],
            seq_lens=device["seq_lens"],
            block_table=self._fixed_block_table[:graph_size],
            slot_mapping=device["slot_mapping"],
            host_query_start_loc=np.arange(graph_size + 1, dtype=np.int32),
            host_seq_lens=np.full(graph_size, self._max_model_len, np.int32),
            has_padding=True,
        )

    def append(self, samples: Samples, token_ids: Mapping[str, Sequence[int]]) -> list[str]:
        """Put the samples that were kept behind each row, where later steps read them.

        Returns:
            whose they are; requests that have left since, or left and come again, are not among them.
        """
        end = self._token_ids.shape[1]
        known: dict[str, None] = {}
        entries = self._num_entries[samples.rows]
        for request_id, row, then, now, position in zip(
            *(samples.request_ids, samples.rows.tolist(), samples.entries.tolist(), entries.tolist()),
            samples.positions.tolist(),
            strict=True,
        ):
            # The first sample of a request comes first; it says where those of one with drafts begin.
            if then != now or request_id in known or self._row_of.get(request_id) != row:
                continue
            known[request_id] = None
            kept = token_ids[request_id][: end - position]  # the last token of a full context is never computed
            self._token_ids[row, position : position + len(kept)] = kept
            self._num_tokens[row] = position + len(kept)
        return list(known)

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

    def _of_samples(self, draws: _Draws) -> dict[str, Array]:
        """What is sent of the samples."""
        rows = draws.rows
        return {
            "sampled_tokens": draws.tokens,
            "sampled_rows": rows,
            "seed": self._seed[rows],
            "temperature": self._temperature[rows],
            "top_p": self._top_p[rows],
            "min_p": self._min_p[rows],
            "top_k": self._top_k[rows],
            "sample_index": self._sample_index[rows],
            "sample_position": draws.positions.astype(np.int32),
        }

    def _samples(self, draws: _Draws, drafts: Mapping[str, tuple[int, ...]], device: Mapping[str, Tensor]) -> Samples:
        rows = draws.rows
        in_order = np.array_equal(draws.tokens, np.arange(len(rows)))
        return Samples(
            tokens=None if in_order else device["sampled_tokens"],
            request_ids=draws.request_ids,
            rows=rows,
            device_rows=device["sampled_rows"],
            entries=self._num_entries[rows],
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
                all_greedy=not self._temperature[rows].any(),
                any_top_k=bool(self._top_k[rows].any()),
                any_top_p=bool((self._top_p[rows] < 1).any()),
                any_min_p=bool(self._min_p[rows].any()),
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


def _padded(arrays: Mapping[str, Array], size: int) -> dict[str, Array]:
    """Arrays of a step of decodes, with requests that are nobody's behind those it has."""
    fillings = {"token_sources": _KNOWN, "slot_mapping": PAD_SLOT}
    padded = {name: _filled(array, size, fillings.get(name, 0)) for name, array in arrays.items()}
    return padded | {"query_start_loc": np.arange(size + 1, dtype=np.int32)}


def _filled(array: Array, size: int, filling: int) -> Array:
    filled = np.full(size, filling, array.dtype)
    filled[: len(array)] = array[:size]
    return filled


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
