"""The runner: one step from its plain data to its sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.interfaces.attention import AttentionBackend, BatchLimits, KVCache
from octavo.interfaces.executor import Step, StepOutput
from octavo.interfaces.model import ForwardContext, ModelArchitecture
from octavo.nn.rotary import RotaryTable
from octavo.runner.batch import PersistentBatch, StepInputs
from octavo.runner.sampler import sample


class ModelRunner:
    """Runs steps in the order given: batch, model, sampler."""

    def __init__(
        self,
        model: ModelArchitecture,
        rotary: RotaryTable,
        attention: AttentionBackend,
        kv_caches: Sequence[KVCache],
        limits: BatchLimits,
    ) -> None:
        self._model = model
        self._rotary = rotary
        self._attention = attention
        self._kv_caches = kv_caches
        self._attention_state = attention.make_state(limits)
        self._batch = PersistentBatch(limits)

    @torch.inference_mode()
    def execute(self, step: Step) -> StepOutput:
        """Compute every row of `step` and sample those that ask for it."""
        self._batch.update(step)
        inputs = self._batch.inputs(step)
        hidden, residual = self._forward(inputs)
        if not inputs.sample_request_ids:
            return StepOutput(step_id=step.step_id, token_ids={})
        logits = self._model.head(hidden[inputs.sample_rows], residual[inputs.sample_rows])
        token_ids = sample(logits, inputs.sampling).cpu().numpy()
        self._batch.append(inputs, token_ids)
        return StepOutput(
            step_id=step.step_id,
            token_ids={
                request_id: [token_id]
                for request_id, token_id in zip(inputs.sample_request_ids, token_ids.tolist(), strict=True)
            },
        )

    def _forward(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """(hidden, residual) of the last layer, [num_tokens, hidden_size] each."""
        self._attention.plan(inputs.layout, self._attention_state)
        context = ForwardContext(
            positions=inputs.positions,
            cos_sin=self._rotary(inputs.positions),
            kv_caches=self._kv_caches,
            attention_state=self._attention_state,
        )
        hidden, residual = self._model.embed(inputs.token_ids), None
        for layer in self._model.layers:
            hidden, residual = layer(hidden, residual, context)
        assert residual is not None
        return hidden, residual
