"""The trial before an engine starts: the largest steps, within the limits, through the engine's own runner."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_tiny_llama
from torch import Tensor

from octavo.builtin.torch_kernels import TorchKernels
from octavo.config import EngineConfig
from octavo.interfaces import BatchLimits, SamplingInputs, Step
from octavo.runner.loaded_model import LoadedModel, load_model
from octavo.runner.model_runner import ModelRunner
from octavo.runner.trial import make_trial_steps, num_trial_blocks, trial_steps
from octavo.sampling_params import SamplingParams
from octavo.selection import select

limits = st.builds(
    BatchLimits,
    max_num_requests=st.integers(1, 40),
    max_num_tokens=st.integers(1, 300),
    max_model_len=st.integers(1, 200),
    block_size=st.sampled_from([1, 4, 16]),
    device=st.just("cpu"),
)


@given(limits)
def test_no_step_of_the_trial_goes_beyond_the_limits(limits: BatchLimits) -> None:
    blocks: dict[str, list[int]] = {}
    running: set[str] = set()
    for step in trial_steps(limits, SamplingParams()):
        for request_id in step.leaving:
            running.remove(request_id)
            del blocks[request_id]
        assert step.num_tokens <= limits.max_num_tokens
        running |= {row.request_id for row in step.entering}
        assert len(running) <= limits.max_num_requests
        for row in step.rows:
            blocks.setdefault(row.request_id, []).extend(row.new_block_ids)
            end = row.num_computed_tokens + row.num_tokens
            assert end <= limits.max_model_len
            assert end <= len(blocks[row.request_id]) * limits.block_size
        used = [block for of_request in blocks.values() for block in of_request]
        assert len(used) == len(set(used))
        assert max(used) < num_trial_blocks(limits)


@given(limits)
def test_one_step_of_the_trial_has_as_long_a_prompt_as_there_can_be(limits: BatchLimits) -> None:
    longest = max(row.num_tokens for step in trial_steps(limits, SamplingParams()) for row in step.rows)
    assert longest == min(limits.max_num_tokens, limits.max_model_len)


@given(limits)
def test_one_step_of_the_trial_samples_for_as_many_requests_as_there_can_be(limits: BatchLimits) -> None:
    most = max(sum(row.samples for row in step.rows) for step in trial_steps(limits, SamplingParams()))
    assert most >= min(limits.max_num_requests, limits.max_num_tokens) - 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    config = EngineConfig.create(model=str(folder), dtype="float32", max_num_seqs=4, max_num_batched_tokens=32)
    return load_model(select(config).manifest(), lambda _: nullcontext())


def test_the_trial_runs_through_the_engine_s_own_runner(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[int] = []
    submit = ModelRunner.submit

    def record(self: ModelRunner, step: Step) -> object:
        in_flight = submit(self, step)
        sampled.append(0 if in_flight.drawn is None else len(in_flight.drawn))
        return in_flight

    monkeypatch.setattr(ModelRunner, "submit", record)
    make_trial_steps(model)
    assert sampled == [1, 4, 4, 1, 1, 1, 1, 1, 1] * 2


def test_the_trial_draws_in_every_way_that_differs_on_the_device(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: set[tuple[bool, bool]] = set()
    sample = TorchKernels.sample

    def record(self: TorchKernels, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        ways.add((inputs.all_greedy, inputs.any_top_k and inputs.any_top_p and inputs.any_min_p))
        return sample(self, logits, inputs)

    monkeypatch.setattr(TorchKernels, "sample", record)
    make_trial_steps(model)
    assert ways == {(True, False), (False, False), (False, True)}
