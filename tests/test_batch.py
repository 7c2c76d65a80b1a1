"""The persistent batch: whatever happened before, a step's inputs are those built slowly from the requests alone."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from batch_scene import (
    BLOCK_SIZE,
    LIMITS,
    MAX_MODEL_LEN,
    MAX_NUM_REQUESTS,
    VOCAB_SIZE,
    Sequence,
    entered,
    samples_of,
    updated_inputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.interfaces import NewRow, ScheduledRow, Step
from octavo.interfaces.executor import BlockCopy
from octavo.runner.batch import PersistentBatch
from octavo.runner.step_inputs import StepInputs
from octavo.sampling_params import SamplingParams


class Owner:
    """Makes random steps, as a scheduler would: requests enter, compute, sample, leave, and come back preempted."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.running: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.free_blocks = random.sample(range(1, 100), 60)
        self.num_made = 0

    def step(self, step_id: int) -> tuple[Step, list[tuple[Sequence, ScheduledRow]]]:
        leaving = [sequence for sequence in self.running if self._is_full(sequence) or self.random.random() < 0.15]
        for sequence in leaving:
            self._leave(sequence)
        entering = [self._enter() for _ in range(self.random.randint(0, MAX_NUM_REQUESTS - len(self.running)))]
        if not self.running:
            entering.append(self._enter())
        rows = [(sequence, self._row(sequence)) for sequence in self.running if self._takes_part(sequence, entering)]
        step = Step(
            step_id=step_id,
            leaving=[sequence.request_id for sequence in leaving],
            entering=[sequence.row() for sequence in entering],
            rows=[row for _, row in rows],
        )
        return step, rows

    def collect(self, sequences: list[Sequence], token_ids: list[int]) -> None:
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            sequence.token_ids.append(token_id)

    def _takes_part(self, sequence: Sequence, entering: list[Sequence]) -> bool:
        return any(sequence is other for other in (*entering, self.running[0])) or self.random.random() < 0.8

    def _is_full(self, sequence: Sequence) -> bool:
        return len(sequence.token_ids) > MAX_MODEL_LEN

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.free_blocks += sequence.block_ids
        sequence.block_ids, sequence.num_computed_tokens = [], 0
        if not self._is_full(sequence) and self.random.random() < 0.5:
            self.preempted.append(sequence)

    def _enter(self) -> Sequence:
        sequence = self.preempted.pop() if self.preempted and self.random.random() < 0.7 else self._new()
        self.running.append(sequence)
        if self.random.random() < 0.3:  # a prefix-cache hit: these are computed already
            sequence.num_computed_tokens = (len(sequence.token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE
        return sequence

    def _new(self) -> Sequence:
        self.num_made += 1
        num_prompt_tokens = self.random.randint(1, MAX_MODEL_LEN)
        return Sequence(
            request_id=f"request {self.num_made}",
            token_ids=[self.random.randrange(VOCAB_SIZE) for _ in range(num_prompt_tokens)],
            num_prompt_tokens=num_prompt_tokens,
            temperature=self.random.choice([0.0, 0.0, 0.5]),
            top_p=self.random.choice([1.0, 1.0, 0.25]),
            top_k=self.random.choice([0, 0, 5]),
            seed=self.random.randrange(-(2**63), 2**63),
            sample_index=self.random.randrange(3),
            min_p=self.random.choice([0.0, 0.0, 0.5]),
        )

    def _row(self, sequence: Sequence) -> ScheduledRow:
        """Any number of the tokens that are left, and the blocks they need."""
        start = sequence.num_computed_tokens
        left = len(sequence.token_ids) - start
        num_tokens = self.random.choice([left, self.random.randint(1, left)])
        num_new_blocks = -(-(start + num_tokens) // BLOCK_SIZE) - len(sequence.block_ids)
        new_block_ids = [self.free_blocks.pop() for _ in range(num_new_blocks)]
        sequence.block_ids += new_block_ids
        sequence.num_computed_tokens += num_tokens
        return ScheduledRow(
            request_id=sequence.request_id,
            num_computed_tokens=start,
            num_tokens=num_tokens,
            new_block_ids=new_block_ids,
            samples=num_tokens == left,
        )


def plainly_built(rows: list[tuple[Sequence, ScheduledRow]]) -> dict[str, Any]:
    """A step's inputs, from what the requests' owner knows."""
    decodes = [entry for entry in rows if entry[1].num_tokens == 1 and entry[1].num_computed_tokens > 0]
    ordered = decodes + [entry for entry in rows if not any(entry[1] is decode for _, decode in decodes)]
    token_ids, positions, slots, query_start_loc = [], [], [], [0]
    seq_lens = [row.num_computed_tokens + row.num_tokens for _, row in ordered]
    for (sequence, row), seq_len in zip(ordered, seq_lens, strict=True):
        for position in range(row.num_computed_tokens, seq_len):
            token_ids.append(sequence.token_ids[position])
            positions.append(position)
            slots.append(sequence.block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        query_start_loc.append(len(token_ids))
    columns = -(-max(seq_lens) // BLOCK_SIZE)
    sampling = [(index, sequence) for index, (sequence, row) in enumerate(ordered) if row.samples]
    return {
        "token_ids": token_ids,
        "positions": positions,
        "slot_mapping": slots,
        "query_start_loc": query_start_loc,
        "seq_lens": seq_lens,
        "block_table": [(sequence.block_ids + [0] * columns)[:columns] for sequence, _ in ordered],
        "num_decode_requests": len(decodes),
        "max_query_len": max(row.num_tokens for _, row in ordered),
        "max_seq_len": max(seq_lens),
        "sampled_tokens": [query_start_loc[index + 1] - 1 for index, _ in sampling],
        "sample_request_ids": [sequence.request_id for _, sequence in sampling],
        **{
            name: [getattr(sequence, name) for _, sequence in sampling]
            for name in ("temperature", "top_p", "min_p", "top_k", "seed", "sample_index")
        },
        "position": [len(sequence.token_ids) for _, sequence in sampling],
        "all_greedy": not any(sequence.temperature for _, sequence in sampling),
        "any_top_k": any(sequence.top_k for _, sequence in sampling),
        "any_top_p": any(sequence.top_p < 1 for _, sequence in sampling),
        "any_min_p": any(sequence.min_p > 0 for _, sequence in sampling),
    }


def plainly_read(inputs: StepInputs) -> dict[str, Any]:
    layout = inputs.layout
    assert layout.num_decode_tokens == layout.num_decode_requests
    assert layout.num_tokens == len(inputs.token_ids)
    assert layout.host_query_start_loc.tolist() == layout.query_start_loc.tolist()
    assert layout.host_seq_lens.tolist() == layout.seq_lens.tolist()
    found = {
        "token_ids": inputs.token_ids.tolist(),
        "positions": inputs.positions.tolist(),
        "slot_mapping": layout.slot_mapping.tolist(),
        "query_start_loc": layout.query_start_loc.tolist(),
        "seq_lens": layout.seq_lens.tolist(),
        "block_table": layout.block_table.tolist(),
        "num_decode_requests": layout.num_decode_requests,
        "max_query_len": layout.max_query_len,
        "max_seq_len": layout.max_seq_len,
    }
    if (samples := inputs.samples) is None:
        return found | NOTHING_SAMPLED
    assert samples.positions.tolist() == samples.inputs.position.tolist()
    return found | {
        "sampled_tokens": samples.of(torch.arange(layout.num_tokens)).tolist(),
        "sample_request_ids": samples.request_ids,
        **{
            name: getattr(samples.inputs, name).tolist()
            for name in ("temperature", "top_p", "min_p", "top_k", "seed", "sample_index", "position")
        },
        **{name: getattr(samples.inputs, name) for name in ("all_greedy", "any_top_k", "any_top_p", "any_min_p")},
    }


NOTHING_SAMPLED: dict[str, Any] = {
    **{name: [] for name in ("sampled_tokens", "sample_request_ids", "temperature", "top_p", "min_p", "top_k", "seed")},
    "sample_index": [],
    "position": [],
    "all_greedy": True,
    "any_top_k": False,
    "any_top_p": False,
    "any_min_p": False,
}


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(st.randoms(use_true_random=False), st.integers(1, 25))
def test_inputs_equal_those_built_plainly_whatever_happened_before(random: Random, num_steps: int) -> None:
    owner, batch = Owner(random), PersistentBatch(LIMITS)
    for step_id in range(num_steps):
        step, rows = owner.step(step_id)
        batch.update(step)
        inputs = batch.inputs(step)
        assert plainly_read(inputs) == plainly_built(rows)
        if inputs.samples is None:
            continue
        request_ids = inputs.samples.request_ids
        sampled = [random.randrange(VOCAB_SIZE) for _ in request_ids]
        batch.append(inputs.samples, {request_id: [one] for request_id, one in zip(request_ids, sampled, strict=True)})
        by_id = {sequence.request_id: sequence for sequence, _ in rows}
        owner.collect([by_id[request_id] for request_id in request_ids], sampled)


def test_a_token_the_engine_has_not_seen_yet_feeds_the_next_step() -> None:
    batch, sequence = PersistentBatch(LIMITS), Sequence(request_id="a", token_ids=[4, 5], num_prompt_tokens=2)
    first = ScheduledRow(request_id="a", num_computed_tokens=0, num_tokens=2, new_block_ids=[3], samples=True)
    second = ScheduledRow(request_id="a", num_computed_tokens=2, num_tokens=1, new_block_ids=[], samples=True)
    step = Step(step_id=0, entering=[sequence.row()], rows=[first])
    batch.update(step)
    batch.append(samples_of(batch.inputs(step)), {"a": [42]})
    inputs = batch.inputs(Step(step_id=1, rows=[second]))
    assert inputs.token_ids.tolist() == [42]
    assert inputs.positions.tolist() == [2]


def test_a_top_k_that_no_int32_holds_keeps_all_tokens() -> None:
    batch = PersistentBatch(LIMITS)
    sequence = Sequence(request_id="a", token_ids=[4], num_prompt_tokens=1, top_k=2**40)
    row = ScheduledRow(request_id="a", num_computed_tokens=0, num_tokens=1, new_block_ids=[3], samples=True)
    step = Step(step_id=0, entering=[sequence.row()], rows=[row])
    batch.update(step)
    assert samples_of(batch.inputs(step)).inputs.top_k.item() >= VOCAB_SIZE


def test_all_fields_of_a_step_are_one_transfer() -> None:
    batch, sequence = PersistentBatch(LIMITS), Sequence(request_id="a", token_ids=[4, 5], num_prompt_tokens=2)
    row = ScheduledRow(request_id="a", num_computed_tokens=0, num_tokens=2, new_block_ids=[3], samples=True)
    step = Step(step_id=0, entering=[sequence.row()], rows=[row])
    batch.update(step)
    inputs = batch.inputs(step)
    sampling = samples_of(inputs).inputs
    tensors = [
        *(inputs.token_ids, inputs.positions, samples_of(inputs).device_rows, inputs.layout.slot_mapping),
        *(inputs.layout.query_start_loc, inputs.layout.seq_lens, inputs.layout.block_table),
        *(sampling.seed, sampling.temperature, sampling.top_k, sampling.position),
    ]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


# ----------------------------------------------------------------------------------------- drafts, forks, choices


def test_a_row_with_drafts_samples_after_the_token_before_them_and_after_each() -> None:
    batch = entered(
        Sequence(request_id="a", token_ids=[1, 2, 3], num_prompt_tokens=3, block_ids=[5, 6]),
        Sequence(request_id="b", token_ids=[4, 5], num_prompt_tokens=2, block_ids=[7]),
    )
    with_drafts = ScheduledRow(
        request_id="a",
        num_computed_tokens=2,
        num_tokens=3,
        new_block_ids=[],
        samples=True,
        token_ids=(8, 9),
        num_drafts=2,
    )
    plain = ScheduledRow(request_id="b", num_computed_tokens=1, num_tokens=1, new_block_ids=[], samples=True)
    inputs = updated_inputs(batch, with_drafts, plain)
    assert inputs.token_ids.tolist() == [5, 3, 8, 9]  # "b" decodes and comes first
    samples = samples_of(inputs)
    assert samples.request_ids == ["b", "a", "a", "a"]
    assert samples.of(torch.arange(4)).tolist() == [0, 1, 2, 3]
    assert samples.positions.tolist() == [2, 3, 4, 5]
    assert samples.drafts == {"a": (8, 9)}


def test_the_samples_kept_after_drafts_feed_the_next_step() -> None:
    batch = entered(Sequence(request_id="a", token_ids=[1, 2, 3], num_prompt_tokens=3, block_ids=[5, 6]))
    row = ScheduledRow(
        request_id="a",
        num_computed_tokens=2,
        num_tokens=3,
        new_block_ids=[],
        samples=True,
        token_ids=(8, 9),
        num_drafts=2,
    )
    batch.append(samples_of(updated_inputs(batch, row)), {"a": [8, 4]})  # the second draft, 9, was wrong
    following = ScheduledRow(request_id="a", num_computed_tokens=4, num_tokens=1, new_block_ids=[], samples=True)
    assert updated_inputs(batch, following).token_ids.tolist() == [4]
    assert batch.token_ids(batch.row_of("a")).tolist() == [1, 2, 3, 8, 4]


def test_a_fork_samples_from_its_origin_s_last_token_with_a_key_of_its_own() -> None:
    batch = PersistentBatch(LIMITS)
    origin = Sequence(request_id="a", token_ids=[1, 2, 3], num_prompt_tokens=3, seed=5, sample_index=0)
    fork = Sequence(request_id="b", token_ids=[1, 2, 3], num_prompt_tokens=3, seed=5, sample_index=1)
    rows = [
        ScheduledRow(request_id="a", num_computed_tokens=0, num_tokens=3, new_block_ids=[5], samples=True),
        ScheduledRow(
            request_id="b", num_computed_tokens=3, num_tokens=0, new_block_ids=[5], samples=True, forked_from="a"
        ),
    ]
    inputs = updated_inputs(batch, *rows, entering=[origin.row(), fork.row()])
    assert inputs.layout.num_requests == 1
    samples = samples_of(inputs)
    assert samples.request_ids == ["a", "b"]
    assert samples.of(torch.arange(3)).tolist() == [2, 2]
    assert samples.positions.tolist() == [3, 3]
    assert samples.inputs.sample_index.tolist() == [0, 1]
    batch.append(samples, {"a": [7], "b": [8]})
    following = [
        ScheduledRow(request_id=name, num_computed_tokens=3, num_tokens=1, new_block_ids=[], samples=True)
        for name in ("a", "b")
    ]
    assert updated_inputs(batch, *following).token_ids.tolist() == [7, 8]


def test_a_copied_block_takes_the_place_of_the_shared_one() -> None:
    batch = entered(Sequence(request_id="a", token_ids=[1, 2, 3], num_prompt_tokens=3, block_ids=[5]))
    copy = BlockCopy(index=0, source=5, target=9)
    row = ScheduledRow(
        request_id="a", num_computed_tokens=2, num_tokens=1, new_block_ids=[], samples=True, copied_blocks=(copy,)
    )
    inputs = updated_inputs(batch, row)
    assert inputs.layout.block_table.tolist() == [[9]]
    assert inputs.layout.slot_mapping.tolist() == [9 * BLOCK_SIZE + 2]


def test_a_token_chosen_outside_replaces_the_runner_s_own_sample() -> None:
    batch = entered(Sequence(request_id="a", token_ids=[1, 2], num_prompt_tokens=2, block_ids=[5]))
    row = ScheduledRow(request_id="a", num_computed_tokens=1, num_tokens=1, new_block_ids=[], samples=True)
    batch.append(samples_of(updated_inputs(batch, row)), {"a": [7]})
    chosen = ScheduledRow(
        request_id="a", num_computed_tokens=2, num_tokens=1, new_block_ids=[], samples=True, token_ids=(3,)
    )
    assert updated_inputs(batch, chosen).token_ids.tolist() == [3]


def test_prompt_logprobs_are_asked_of_every_prompt_token_but_the_first_chunk_by_chunk() -> None:
    batch = PersistentBatch(LIMITS)
    params = SamplingParams(prompt_logprobs=2)
    new = NewRow(request_id="a", token_ids=[1, 2, 3, 4], num_prompt_tokens=4, params=params, seed=0, sample_index=0)
    first = ScheduledRow(request_id="a", num_computed_tokens=0, num_tokens=2, new_block_ids=[5], samples=False)
    (targets,) = updated_inputs(batch, first, entering=[new]).prompt_targets
    assert (targets.first, targets.token_ids.tolist(), targets.num_logprobs) == (0, [2, 3], 2)
    second = ScheduledRow(request_id="a", num_computed_tokens=2, num_tokens=2, new_block_ids=[], samples=True)
    (targets,) = updated_inputs(batch, second).prompt_targets
    assert targets.token_ids.tolist() == [4]
