"""The persistent batch while steps are in flight: tokens only the device knows, late samples, padded steps."""

from __future__ import annotations

from batch_scene import BLOCK_SIZE, LIMITS, Sequence, entered, samples_of, updated_inputs

from octavo.interfaces import ScheduledRow, Step
from octavo.runner.batch import PersistentBatch
from octavo.runner.step_inputs import StepInputs


def decode(request_id: str, position: int) -> ScheduledRow:
    return ScheduledRow(
        request_id=request_id, num_computed_tokens=position, num_tokens=1, new_block_ids=[], samples=True
    )


def test_a_token_that_was_sampled_but_not_collected_is_taken_from_the_device() -> None:
    a = Sequence(request_id="a", token_ids=[1, 2], num_prompt_tokens=2, block_ids=[5])
    b = Sequence(request_id="b", token_ids=[3, 4], num_prompt_tokens=2, block_ids=[6])
    batch = entered(a, b)
    first = updated_inputs(batch, decode("a", 1))
    second = updated_inputs(batch, decode("a", 2), decode("b", 1))
    assert first.token_sources is None
    assert second.token_sources is not None
    assert second.token_sources.tolist() == [batch.row_of("a"), -1]


def test_a_token_is_known_once_its_step_was_collected() -> None:
    batch = entered(Sequence(request_id="a", token_ids=[1, 2], num_prompt_tokens=2, block_ids=[5]))
    batch.append(samples_of(updated_inputs(batch, decode("a", 1))), {"a": [42]})
    following = updated_inputs(batch, decode("a", 2))
    assert following.token_sources is None
    assert following.token_ids.tolist() == [42]


def test_a_sample_of_a_request_that_left_and_came_again_is_late() -> None:
    a = Sequence(request_id="a", token_ids=[1, 2], num_prompt_tokens=2, block_ids=[5])
    batch = entered(a)
    late = samples_of(updated_inputs(batch, decode("a", 1)))
    batch.update(Step(step_id=2, leaving=["a"], entering=[a.row()]))
    assert batch.append(late, {"a": [42]}) == []
    assert updated_inputs(batch, decode("a", 2)).token_sources is not None


def test_a_sample_of_a_request_that_came_again_in_another_row_is_late() -> None:
    a = Sequence(request_id="a", token_ids=[1, 2], num_prompt_tokens=2, block_ids=[5])
    b = Sequence(request_id="b", token_ids=[3, 4], num_prompt_tokens=2, block_ids=[6])
    batch = entered(a, b)
    late = samples_of(updated_inputs(batch, decode("a", 1)))
    batch.update(Step(step_id=2, leaving=["a", "b"], entering=[a.row()]))
    assert batch.append(late, {"a": [42]}) == []


def test_a_sample_of_a_request_that_left_touches_nobody_who_has_its_row() -> None:
    batch = entered(Sequence(request_id="a", token_ids=[1, 2], num_prompt_tokens=2, block_ids=[5]))
    late = samples_of(updated_inputs(batch, decode("a", 1)))
    other = Sequence(request_id="b", token_ids=[7, 8, 9], num_prompt_tokens=3, block_ids=[6])
    batch.update(Step(step_id=2, leaving=["a"], entering=[other.row()]))
    assert batch.append(late, {"a": [42]}) == []
    assert updated_inputs(batch, decode("b", 2)).token_ids.tolist() == [9]


def padded_batch(*sequences: Sequence) -> PersistentBatch:
    """As `entered`, its steps of decodes padded to 4."""
    batch = PersistentBatch(LIMITS, max_graph_size=4)
    batch.graph_sizes = (4,)
    rows = [decode(one.request_id, 1)._replace(new_block_ids=one.block_ids) for one in sequences]
    batch.update(Step(step_id=0, entering=[one.row() for one in sequences], rows=rows))
    return batch


def test_a_padded_step_has_requests_of_no_length_that_write_nowhere() -> None:
    batch = padded_batch(Sequence(request_id="a", token_ids=[1, 2], num_prompt_tokens=2, block_ids=[5]))
    inputs = updated_inputs(batch, decode("a", 1))
    assert inputs.graph_size == inputs.layout.num_requests == inputs.layout.num_decode_tokens == 4
    assert inputs.layout.seq_lens.tolist() == [2, 0, 0, 0]
    assert inputs.layout.slot_mapping.tolist() == [5 * BLOCK_SIZE + 1, -1, -1, -1]
    assert inputs.layout.query_start_loc.tolist() == [0, 1, 2, 3, 4]
    assert inputs.layout.block_table[0, :1].tolist() == [5]
    assert inputs.layout.has_padding
    assert samples_of(inputs).request_ids == ["a"]


def test_a_step_with_a_prefill_is_not_padded() -> None:
    batch = padded_batch(Sequence(request_id="a", token_ids=[1, 2], num_prompt_tokens=2, block_ids=[5]))
    inputs = updated_inputs(batch, decode("a", 0)._replace(num_tokens=2))
    assert inputs.graph_size is None
    assert inputs.layout.num_tokens == 2


def test_a_step_is_not_padded_to_a_size_that_is_far_too_large() -> None:
    batch = padded_batch(Sequence(request_id="a", token_ids=[1, 2], num_prompt_tokens=2, block_ids=[5]))
    batch.graph_sizes = (5,)
    assert updated_inputs(batch, decode("a", 1)).graph_size is None


def test_the_tensors_of_padded_steps_lie_where_they_lay() -> None:
    batch = padded_batch(
        Sequence(request_id="a", token_ids=[1, 2], num_prompt_tokens=2, block_ids=[5]),
        Sequence(request_id="b", token_ids=[3, 4], num_prompt_tokens=2, block_ids=[6]),
    )

    def places(inputs: StepInputs) -> list[int]:
        layout, sources = inputs.layout, inputs.token_sources
        assert sources is not None
        tensors = (inputs.token_ids, sources, inputs.positions, layout.slot_mapping, layout.seq_lens)
        return [tensor.data_ptr() for tensor in (*tensors, layout.query_start_loc, layout.block_table)]

    empty = places(batch.padding(4))
    assert places(updated_inputs(batch, decode("a", 1))) == empty
    assert places(updated_inputs(batch, decode("a", 1), decode("b", 1))) == empty
