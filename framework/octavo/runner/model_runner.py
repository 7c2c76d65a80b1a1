"""The runner: one step from its plain data to its sampled tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from octavo.interfaces.attention import AttentionBackend, BatchLimits, KVCache
from octavo.interfaces.executor import BlockCopy, Step, StepOutput
from octavo.interfaces.kernels import Kernels
from octavo.interfaces.logits_rule import LogitsRule
from octavo.interfaces.model import ForwardContext, ModelArchitecture
from octavo.nn.rotary import RotaryTable
from octavo.outputs import TokenLogprobs
from octavo.runner.batch import PersistentBatch, PromptTargets, Samples, StepInputs
from octavo.runner.drafting import Drafter
from octavo.runner.logprobs import chunks, token_logprobs
from octavo.runner.rules import RuleSet


class ModelRunner:
    """Runs steps in the order given: batch, model, sampler."""

    def __init__(
        self,
        model: ModelArchitecture,
        rotary: Sequence[RotaryTable],
        attention: AttentionBackend,
        kernels: Kernels,
        kv_caches: Sequence[KVCache],
        limits: BatchLimits,
        rules: Sequence[LogitsRule] = (),
        drafter: Drafter | None = None,
    ) -> None:
        self._model = model
        self._rotary = rotary
        self._attention = attention
        self._kernels = kernels
        self._kv_caches = kv_caches
        self._attention_state = attention.make_state(limits)
        self._limits = limits
        self._batch = PersistentBatch(limits)
        self._rules = RuleSet(rules)
        self._drafter = drafter

    @torch.inference_mode()
    def execute(self, step: Step) -> StepOutput:
        """Compute every row of `step` and sample those that ask for it."""
        for request_id in step.leaving:
            self._rules.leave(request_id)
            if self._drafter is not None:
                self._drafter.leave(request_id)
        self._batch.update(step)
        for new in step.entering:
            self._rules.enter(self._batch.row_of(new.request_id), new)
            if self._drafter is not None:
                self._drafter.enter(new)
        self._copy_blocks([copy for row in step.rows for copy in row.copied_blocks])
        inputs = self._batch.inputs(step)
        hidden, residual = self._forward(inputs)
        prompt_logprobs = {
            targets.request_id: self._prompt_logprobs(targets, hidden, residual) for targets in inputs.prompt_targets
        }
        samples = inputs.samples
        if samples is None:
            return StepOutput(step_id=step.step_id, token_ids={}, prompt_logprobs=prompt_logprobs)
        logits = self._model.head(hidden[samples.tokens], residual[samples.tokens])
        drawn = self._kernels.sample(self._rules.apply(logits, samples), samples.inputs)
        token_ids = _kept(samples, drawn.tolist())
        self._batch.append(samples, token_ids)
        if self._rules.any:
            for request_id, kept in token_ids.items():
                self._rules.accept(self._batch.row_of(request_id), kept)
        return StepOutput(
            step_id=step.step_id,
            token_ids=token_ids,
            logprobs=self._logprobs(samples, logits, drawn, token_ids),
            prompt_logprobs=prompt_logprobs,
            draft_token_ids=self._propose(token_ids),
        )

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        if not copies:
            return
        sources, targets = [copy.source for copy in copies], [copy.target for copy in copies]
        for kv_cache in self._kv_caches:
            for buffer in kv_cache:
                buffer[targets] = buffer[sources]

    def _logprobs(
        self, samples: Samples, logits: Tensor, drawn: Tensor, token_ids: Mapping[str, list[int]]
    ) -> dict[str, list[TokenLogprobs]]:
        """Of the kept samples of the requests that ask for them; drafts that were not kept have none."""
        if not self._batch.any_logprobs:
            return {}
        wanted = [(index, self._batch.num_logprobs(row)) for index, row in enumerate(samples.rows.tolist())]
        indices = [index for index, count in wanted if count is not None]
        if not indices:
            return {}
        counts = [count for _, count in wanted if count is not None]
        logprobs: dict[str, list[TokenLogprobs]] = {}
        for index, one in zip(indices, token_logprobs(logits[indices], drawn[indices], counts), strict=True):
            request_id = samples.request_ids[index]
            of_request = logprobs.setdefault(request_id, [])
            if len(of_request) < len(token_ids[request_id]):
                of_request.append(one)
        return logprobs

    def _prompt_logprobs(self, targets: PromptTargets, hidden: Tensor, residual: Tensor) -> list[TokenLogprobs]:
        logprobs = []
        for rows in chunks(len(targets.token_ids)):
            span = slice(targets.first + rows.start, targets.first + rows.stop)
            logits = self._model.head(hidden[span], residual[span])
            token_ids = torch.from_numpy(targets.token_ids[rows]).to(logits.device)
            logprobs += token_logprobs(logits, token_ids, [targets.num_logprobs] * (rows.stop - rows.start))
        return logprobs

    def _propose(self, token_ids: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """What is guessed to follow each request's samples; nothing where a rule looks at the samples before."""
        if self._drafter is None:
            return {}
        rows = {request_id: self._batch.row_of(request_id) for request_id in token_ids}
        return self._drafter.propose(
            {
                request_id: self._batch.token_ids(row)
                for request_id, row in rows.items()
                if not self._rules.looks_back(row)
            }
        )

    def _forward(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """(hidden, residual) of the last layer, [num_tokens, hidden_size] each."""
        self._attention.plan(inputs.layout, self._attention_state)
        context = ForwardContext(
            positions=inputs.positions,
            rotary=[table(inputs.positions) for table in self._rotary],
            kv_caches=self._kv_caches,
            attention_state=self._attention_state,
        )
        hidden, residual = self._model.embed(inputs.token_ids), None
        for layer in self._model.layers:
            hidden, residual = layer(hidden, residual, context)
        assert residual is not None
        return hidden, residual


def _kept(samples: Samples, token_ids: Sequence[int]) -> dict[str, list[int]]:
    """By request its samples up to the first that differs from its draft: those are what it would have drawn anyway."""
    kept: dict[str, list[int]] = {}
    for request_id, token_id in zip(samples.request_ids, token_ids, strict=True):
        of_request = kept.setdefault(request_id, [])
        if len(of_request) == 0 or of_request == list(samples.drafts[request_id][: len(of_request)]):
            of_request.append(token_id)
    return kept
