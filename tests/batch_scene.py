"""Requests in a persistent batch, as their owner knows them."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.interfaces import BatchLimits, NewRow, ScheduledRow, Step
from octavo.runner.batch import PersistentBatch
from octavo.runner.step_inputs import Samples, StepInputs
from octavo.sampling_params import SamplingParams

BLOCK_SIZE = 4
MAX_MODEL_LEN = 24
MAX_NUM_REQUESTS = 4
VOCAB_SIZE = 1000
LIMITS = BatchLimits(
    max_num_requests=MAX_NUM_REQUESTS,
    max_num_tokens=MAX_NUM_REQUESTS * MAX_MODEL_LEN,
    max_model_len=MAX_MODEL_LEN,
    block_size=BLOCK_SIZE,
    device="cpu",
)


@dataclass(kw_only=True)
class Sequence:
    """A request as its owner knows it."""

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    sample_index: int = 0
    min_p: float = 0.0

    def row(self) -> NewRow:
        return NewRow(
            request_id=self.request_id,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            params=SamplingParams(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p),
            seed=self.seed,
            sample_index=self.sample_index,
        )


def samples_of(inputs: StepInputs) -> Samples:
    assert inputs.samples is not None
    return inputs.samples


def entered(*sequences: Sequence) -> PersistentBatch:
    """A batch in which these have computed all their tokens but the last."""
    batch = PersistentBatch(LIMITS)
    rows = [
        ScheduledRow(
            request_id=one.request_id,
            num_computed_tokens=0,
            num_tokens=len(one.token_ids) - 1,
            new_block_ids=one.block_ids,
            samples=False,
        )
        for one in sequences
    ]
    batch.update(Step(step_id=0, entering=[one.row() for one in sequences], rows=rows))
    return batch


def updated_inputs(batch: PersistentBatch, *rows: ScheduledRow, entering: list[NewRow] | None = None) -> StepInputs:
    step = Step(step_id=1, entering=entering or [], rows=list(rows))
    batch.update(step)
    return batch.inputs(step)
