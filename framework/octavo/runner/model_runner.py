"""The runner: one step from its plain data to its sampled tokens.

A step is submitted, which on a GPU only queues its work, and collected, which waits for it. Sampled tokens stay on the
device, where the next step finds them, so that it can be submitted before this one is collected.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from octavo.interfaces.attention import AttentionBackend, BatchLimits, KVCache
from octavo.interfaces.executor import BlockCopy, Step, StepOutput
from octavo.interfaces.kernels import Kernels
from octavo.interfaces.logits_rule import LogitsRule
from octavo.interfaces.lora import NO_ADAPTER, LoraBackend
from octavo.interfaces.model import ForwardContext, ModelArchitecture
from octavo.nn.rotary import RotaryTable
from octavo.outputs import TokenLogprobs
from octavo.runner.batch import PersistentBatch
from octavo.runner.drafting import Drafter
from octavo.runner.graphs import DecodeGraphs, Forward, GraphPlan
from octavo.runner.logprobs import LogprobTensors, chunks, token_logprobs
from octavo.runner.rules import RuleSet
from octavo.runner.step_inputs import PromptTargets, Samples, StepInputs
from octavo.runner.transfer import Array, Moment, to_device, to_host


@dataclass(kw_only=True, slots=True)
class StepInFlight:
    """A step that was submitted, and what it gives once the device has come to `done`.

    Attributes:
        drawn: [num_samples] int64 on the host, on its way.
        token_ids: of each request what it keeps of its samples; None until somebody had to know.
        logprobs: with the request of each row. prompt_logprobs: by request, a long prompt's in several parts.
    """

    step_id: int
    done: Moment
    samples: Samples | None = None
    drawn: Tensor | None = None
    token_ids: dict[str, list[int]] | None = None
    logprobs: tuple[list[str], list[LogprobTensors]] | None = None
    prompt_logprobs: dict[str, list[LogprobTensors]] = field(default_factory=dict)


class ModelRunner:
    """Runs steps in the order given: batch, model, sampler.

    Args:
        lora: what the model's layers ask for each row's adapter; None: no adapters are served.
        graph_plan: which steps of decodes alone are captured, where the attention backend lets them be; None: no step.
    """

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
        graph_plan: GraphPlan | None = None,
        lora: LoraBackend | None = None,
    ) -> None:
        self._model = model
        self._lora = lora
        self._rotary = rotary
        self._attention = attention
        self._kernels = kernels
        self._kv_caches = kv_caches
        self._attention_state = attention.make_state(limits)
        self._limits = limits
        self._rules = RuleSet(rules)
        self._drafter = drafter
        self._in_flight: deque[StepInFlight] = deque()  # those whose tokens are not known here
        self._last_sampled = torch.zeros(limits.max_num_requests, dtype=torch.int64, device=limits.device)  # by row
        self._graphs = None
        if graph_plan is not None and attention.graph_mode == "decode" and model.can_be_captured:
            self._graphs = DecodeGraphs(graph_plan, with_adapters=lora is not None and lora.can_be_captured)
        self._batch = PersistentBatch(limits, self._graphs.max_size if self._graphs is not None else 0)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture what the plan says, now that the device's memory is taken by all that stays."""
        if self._graphs is not None:
            self._batch.graph_sizes = self._graphs.capture(self._padded_step)

    def execute(self, step: Step) -> StepOutput:
        """Submit a step and wait for it."""
        return self.collect(self.submit(step))

    @torch.inference_mode()
    def submit(self, step: Step) -> StepInFlight:
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
        in_flight = self._launch(step) if step.rows else StepInFlight(step_id=step.step_id, done=Moment("cpu"))
        self._in_flight.append(in_flight)
        return in_flight

    def _launch(self, step: Step) -> StepInFlight:
        """Queue a step's work; on a CPU do it."""
        self._copy_blocks([copy for row in step.rows for copy in row.copied_blocks])
        inputs = self._batch.inputs(step)
        hidden, residual = self._forward(inputs)
        samples, drawn, logprobs = inputs.samples, None, None
        prompt_logprobs = {
            targets.request_id: self._prompt_logprobs(targets, hidden, residual) for targets in inputs.prompt_targets
        }
        if samples is not None:
            positions = self._batch.adapter_positions(samples.rows)
            logits = self._head(samples.of(hidden), samples.of(residual), positions)
            if self._in_flight and self._rules.looks_back_at(samples.rows.tolist()):
                self._know_tokens()  # of the steps before
            sampled = self._kernels.sample(self._rules.apply(logits, samples), samples.inputs)
            self._last_sampled.index_copy_(0, samples.device_rows, sampled)
            logprobs = self._logprobs(samples, logits, sampled)
            drawn = to_host(sampled)
        return StepInFlight(
            step_id=step.step_id,
            done=Moment(self._limits.device),
            samples=samples,
            drawn=drawn,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def collect(self, step: StepInFlight) -> StepOutput:
        """Wait for a submitted step; steps are collected in the order they were submitted."""
        if self._in_flight and self._in_flight[0] is step:
            self._know_tokens(1)
        assert step.token_ids is not None, "steps are collected in the order they were submitted"
        return StepOutput(
            step_id=step.step_id,
            token_ids=step.token_ids,
            logprobs=_by_request(*step.logprobs, step.token_ids) if step.logprobs is not None else {},
            prompt_logprobs={
                request_id: [one for part in parts for one in part.read()]
                for request_id, parts in step.prompt_logprobs.items()
            },
            draft_token_ids=self._propose(step.token_ids),
        )

    def _know_tokens(self, num_steps: int | None = None) -> None:
        """Wait for the oldest steps in flight (None: all) and tell everyone here what was sampled."""
        for _ in range(len(self._in_flight) if num_steps is None else num_steps):
            step = self._in_flight.popleft()
            step.done.wait()
            step.token_ids = {}
            if step.samples is None or step.drawn is None:
                continue
            step.token_ids = _kept(step.samples, step.drawn.tolist())
            here = self._batch.append(step.samples, step.token_ids)
            if self._rules.any:
                for request_id in here:
                    self._rules.accept(self._batch.row_of(request_id), step.token_ids[request_id])

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        if not copies:
            return
        pairs = np.array([[copy.source for copy in copies], [copy.target for copy in copies]])
        sources, targets = to_device(pairs, self._limits.device).unbind()
        for kv_cache in self._kv_caches:
            for buffer in kv_cache:
                buffer[targets] = buffer[sources]

    def _logprobs(
        self, samples: Samples, logits: Tensor, sampled: Tensor
    ) -> tuple[list[str], list[LogprobTensors]] | None:
        """Of the requests that ask for them."""
        if not self._batch.any_logprobs:
            return None
        wanted = [(index, self._batch.num_logprobs(row)) for index, row in enumerate(samples.rows.tolist())]
        indices = [index for index, count in wanted if count is not None]
        if not indices:
            return None
        counts = [count for _, count in wanted if count is not None]
        tensors = []
        for rows in chunks(len(indices)):
            chosen = to_device(np.array(indices[rows]), logits.device)
            tensors.append(token_logprobs(logits[chosen], sampled[chosen], counts[rows]))
        return [samples.request_ids[index] for index in indices], tensors

    def _prompt_logprobs(self, targets: PromptTargets, hidden: Tensor, residual: Tensor) -> list[LogprobTensors]:
        logprobs = []
        position = self._batch.adapter_positions(np.array([self._batch.row_of(targets.request_id)]))
        for rows in chunks(len(targets.token_ids)):
            span = slice(targets.first + rows.start, targets.first + rows.stop)
            positions = None if position is None else np.repeat(position, rows.stop - rows.start)
            logits = self._head(hidden[span], residual[span], positions)
            token_ids = to_device(targets.token_ids[rows], logits.device)
            logprobs.append(token_logprobs(logits, token_ids, [targets.num_logprobs] * (rows.stop - rows.start)))
        return logprobs

    def _propose(self, token_ids: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """What is guessed to follow each request's samples; nothing where a rule looks at the samples before."""
        if self._drafter is None:
            return {}
        rows = {one: row for one in token_ids if (row := self._batch.find_row(one)) is not None}
        return self._drafter.propose(
            {
                request_id: self._batch.token_ids(row)
                for request_id, row in rows.items()
                if not self._rules.looks_back_at([row])
            }
        )

    def _forward(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """(hidden, residual) of the last layer, [num_tokens, hidden_size] each."""
        self._attention.plan(inputs.layout, self._attention_state)
        with_adapters = inputs.adapter_positions is not None
        graphs = self._graphs if inputs.graph_size is not None else None
        if graphs is not None and with_adapters not in graphs.variants:
            graphs = None  # a padded step can be computed as any other
        self._plan_adapters(inputs.adapter_positions, captured=graphs is not None)
        if graphs is None or inputs.graph_size is None:
            return self._compute(inputs)
        return graphs.replay(inputs.graph_size, with_adapters)

    def _head(self, hidden: Tensor, residual: Tensor, positions: Array | None) -> Tensor:
        """The logits of some of a step's rows; `positions` are of their adapters, as in StepInputs."""
        acts = self._lora is not None and self._lora.acts_on_head
        self._plan_adapters(positions if acts else None)
        return self._model.head(hidden, residual)

    def _plan_adapters(self, positions: Array | None, captured: bool = False) -> None:
        if self._lora is not None and (positions is not None or self._lora.active):
            self._lora.plan(positions, captured=captured and positions is not None)

    def _padded_step(self, graph_size: int, with_adapters: bool) -> Forward:
        inputs = self._batch.padding(graph_size)
        self._attention.plan(inputs.layout, self._attention_state)
        self._plan_adapters(np.full(graph_size, NO_ADAPTER, np.int32) if with_adapters else None, captured=True)
        return partial(self._compute, inputs)

    def _compute(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        token_ids = inputs.token_ids
        if inputs.token_sources is not None:
            sources = inputs.token_sources
            token_ids = torch.where(sources >= 0, self._last_sampled[sources.clamp(min=0)], token_ids)
        context = ForwardContext(
            positions=inputs.positions,
            rotary=[table(inputs.positions) for table in self._rotary],
            kv_caches=self._kv_caches,
            attention_state=self._attention_state,
        )
        hidden, residual = self._model.embed(token_ids), None
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


def _by_request(
    request_ids: Sequence[str], parts: Sequence[LogprobTensors], token_ids: Mapping[str, list[int]]
) -> dict[str, list[TokenLogprobs]]:
    """Of the kept samples; drafts that were not kept have none."""
    logprobs: dict[str, list[TokenLogprobs]] = {}
    for request_id, one in zip(request_ids, (one for part in parts for one in part.read()), strict=True):
        of_request = logprobs.setdefault(request_id, [])
        if len(of_request) < len(token_ids[request_id]):
            of_request.append(one)
    return logprobs
