"""From the engine's tokens to what a user reads: text without half characters, stop strings, one output a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from octavo.detokenizer import IncrementalDetokenizer
from octavo.engine.engine import EngineOutput
from octavo.errors import RequestError
from octavo.input_processor import child_id
from octavo.logprob_texts import LogprobTexts
from octavo.outputs import CompletionOutput, RequestMetrics, RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.tokenizer import Tokenizer


@dataclass(slots=True)
class _Completion:
    """One completion on its way, and the output it belongs to."""

    completion: CompletionOutput
    detokenizer: IncrementalDetokenizer | None
    logprob_texts: LogprobTexts | None
    output: RequestOutput
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessedOutputs:
    """What one step changed.

    Attributes:
        changed: outputs with new tokens or an end, each once; they go on changing in later steps.
        to_stop: engine request ids of completions that met a stop string.
    """

    changed: list[RequestOutput]
    to_stop: list[str]


class OutputProcessor:
    """Holds the outputs of all unfinished prompts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._completions: dict[str, _Completion] = {}

    def add(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        arrival_time: float,
    ) -> RequestOutput:
        """Start the output of a prompt.

        Raises:
            RequestError: the id, or that of one of its completions, is in use.
        """
        request_ids = [child_id(request_id, index, params.n) for index in range(params.n)]
        if taken := [each for each in request_ids if each in self._completions]:
            raise RequestError(f"Request id {taken[0]!r} is in use; ids must be unique while they run.")
        output = RequestOutput(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=[_new_completion(index, params) for index in range(params.n)],
            finished=False,
            metrics=RequestMetrics(arrival_time=arrival_time),
        )
        tokenizer = self._tokenizer if params.detokenize else None
        self._completions |= {
            request_id: _Completion(
                completion=completion,
                detokenizer=(
                    IncrementalDetokenizer(tokenizer, prompt_token_ids, params) if tokenizer is not None else None
                ),
                logprob_texts=None if params.logprobs is None else LogprobTexts(tokenizer, prompt_token_ids),
                output=output,
                params=params,
            )
            for request_id, completion in zip(request_ids, output.outputs, strict=True)
        }
        return output

    def process(self, engine_outputs: Iterable[EngineOutput], now: float) -> ProcessedOutputs:
        """Take in one step. `now` is seconds of `time.monotonic()`."""
        changed: dict[str, RequestOutput] = {}
        to_stop = []
        for engine_output in engine_outputs:
            entry = self._completions.get(engine_output.request_id)
            if entry is None:  # ended here by a stop string while a later step was on its way
                continue
            if entry.params.prompt_logprobs is not None:
                self._show_prompt_logprobs(entry, engine_output)
            reason = self._extend(entry, engine_output)
            _time(entry.output, engine_output, now)
            if reason is not None:
                if engine_output.finish_reason is None:
                    to_stop.append(engine_output.request_id)
                self._finish(engine_output.request_id, entry, reason)
            changed[entry.output.request_id] = entry.output
        return ProcessedOutputs(changed=list(changed.values()), to_stop=to_stop)

    def abort(self, output: RequestOutput) -> list[str]:
        """End what is unfinished of an output; returns the engine's ids to abort, the first completion's last.

        While they wait, the others hang on the first: ended before it, they need not be handed on.
        """
        request_ids = [
            child_id(output.request_id, completion.index, len(output.outputs))
            for completion in output.outputs
            if completion.finish_reason is None
        ]
        for request_id in request_ids:
            if (entry := self._completions.get(request_id)) is not None:
                if entry.detokenizer is not None:
                    entry.completion.text += entry.detokenizer.update([], finished=True)
                self._finish(request_id, entry, "abort")
        return request_ids[::-1]

    def _extend(self, entry: _Completion, engine_output: EngineOutput) -> str | None:
        """Add tokens and text; the reason if this ends the completion."""
        completion, reason = entry.completion, engine_output.finish_reason
        num_before = len(completion.token_ids)
        completion.token_ids += engine_output.new_token_ids
        if reason is not None:
            completion.stop_reason = engine_output.stop_reason
        if entry.detokenizer is not None:
            shown = engine_output.new_token_ids
            if reason == "stop" and not entry.params.include_stop_str_in_output:
                shown = shown[:-1]
            completion.text += entry.detokenizer.update(shown, finished=reason is not None)
            if entry.detokenizer.stop_reason is not None:
                completion.stop_reason = entry.detokenizer.stop_reason
                del completion.token_ids[entry.detokenizer.num_tokens :]  # the step may have given more
                reason = "stop"
        if entry.logprob_texts is not None:
            assert completion.logprobs is not None
            assert completion.cumulative_logprob is not None
            for token_id, logprobs in zip(completion.token_ids[num_before:], engine_output.logprobs, strict=False):
                completion.logprobs.append(entry.logprob_texts.next(logprobs))
                completion.cumulative_logprob += completion.logprobs[-1][token_id].logprob
        return reason

    def _show_prompt_logprobs(self, entry: _Completion, engine_output: EngineOutput) -> None:
        """They come with a first token: of the completion that computed the prompt, or of several, all the same."""
        output = entry.output
        is_there = len(engine_output.prompt_logprobs) == len(output.prompt_token_ids) - 1
        if output.prompt_logprobs is None and engine_output.new_token_ids and is_there:
            tokenizer = self._tokenizer if entry.params.detokenize else None
            texts = LogprobTexts(tokenizer, output.prompt_token_ids[:1])
            output.prompt_logprobs = [None, *map(texts.next, engine_output.prompt_logprobs)]

    def _finish(self, request_id: str, entry: _Completion, reason: str) -> None:
        entry.completion.finish_reason = reason
        entry.output.finished = all(completion.finish_reason for completion in entry.output.outputs)
        del self._completions[request_id]


def snapshot(output: RequestOutput) -> RequestOutput:
    """A copy that later steps do not change."""
    completions = [
        replace(
            completion,
            token_ids=list(completion.token_ids),
            logprobs=None if completion.logprobs is None else list(completion.logprobs),
        )
        for completion in output.outputs
    ]
    return replace(output, outputs=completions, metrics=output.metrics and replace(output.metrics))


def _new_completion(index: int, params: SamplingParams) -> CompletionOutput:
    if params.logprobs is None:
        return CompletionOutput(index=index)
    return CompletionOutput(index=index, cumulative_logprob=0.0, logprobs=[])


def _time(output: RequestOutput, engine_output: EngineOutput, now: float) -> None:
    output.num_cached_tokens = max(output.num_cached_tokens, engine_output.num_cached_tokens)
    metrics = output.metrics
    assert metrics is not None
    metrics.first_scheduled_time = metrics.first_scheduled_time or engine_output.first_scheduled_time
    metrics.num_preemptions = max(metrics.num_preemptions, engine_output.num_preemptions)
    if engine_output.new_token_ids:
        metrics.first_token_time = metrics.first_token_time or now
        metrics.last_token_time = now
