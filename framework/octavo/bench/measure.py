"""Measure an engine offline: its throughput with many prompts at once, its latency batch by batch.

The field's definitions, those of vLLM's `bench`: TTFT is from a prompt's arrival to its first token; TPOT is
(latency - TTFT) / (output tokens - 1), of prompts with more than one output token; ITL are the gaps between the pieces
of a stream, all pooled; throughputs are sums over the time from the first prompt's start to the last one's end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Protocol

from octavo.input_processor import Prompt
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams

Clock = Callable[[], float]


class Generator(Protocol):
    """What is measured of LLM."""

    def generate(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams, *, use_tqdm: bool
    ) -> list[RequestOutput]: ...

    def stream(self, prompt: Prompt, sampling_params: SamplingParams) -> Iterator[RequestOutput]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Of some seconds; the 99th percentile is between the nearest two, as numpy has it."""

    mean: float
    median: float
    p99: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Many prompts at once.

    Attributes:
        ttft_seconds: all prompts come at once, so it holds the time that they wait for each other.
        tpot_seconds: None when no prompt had two output tokens.
    """

    num_prompts: int
    num_prompt_tokens: int
    num_output_tokens: int
    elapsed_seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    ttft_seconds: Spread
    tpot_seconds: Spread | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """One batch after the other.

    Attributes:
        latencies_seconds: of each batch, from its start to the end of all its prompts.
        itl_seconds: only of batches of one, which are streamed.
    """

    batch_size: int
    num_prompt_tokens: int
    num_output_tokens: int
    latencies_seconds: tuple[float, ...]
    latency_seconds: Spread
    ttft_seconds: Spread
    tpot_seconds: Spread | None
    itl_seconds: Spread | None


def measure_throughput(
    llm: Generator, prompts: Sequence[Prompt], params: SamplingParams, clock: Clock = time.perf_counter
) -> Throughput:
    """Complete all prompts, which come at once."""
    start = clock()
    outputs = llm.generate(prompts, params, use_tqdm=True)
    elapsed = clock() - start
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_output_tokens = _num_output_tokens(outputs)
    return Throughput(
        num_prompts=len(outputs),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        elapsed_seconds=elapsed,
        requests_per_second=len(outputs) / elapsed,
        output_tokens_per_second=num_output_tokens / elapsed,
        total_tokens_per_second=(num_prompt_tokens + num_output_tokens) / elapsed,
        ttft_seconds=spread([ttft(output) for output in outputs]),
        tpot_seconds=_spread_if_any([tpot(output) for output in outputs]),
    )


def measure_latency(
    llm: Generator, batches: Sequence[Sequence[Prompt]], params: SamplingParams, clock: Clock = time.perf_counter
) -> Latency:
    """Complete one batch after the other."""
    latencies: list[float] = []
    outputs: list[RequestOutput] = []
    gaps: list[float] = []
    for batch in batches:
        start = clock()
        if len(batch) == 1:
            pieces = [(clock(), output) for output in llm.stream(batch[0], params)]
            latencies.append(clock() - start)
            outputs.append(pieces[-1][1])
            gaps += [later - earlier for (earlier, _), (later, _) in pairwise(pieces)]
        else:
            outputs += llm.generate(batch, params, use_tqdm=False)
            latencies.append(clock() - start)
    return Latency(
        batch_size=len(batches[0]),
        num_prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        num_output_tokens=_num_output_tokens(outputs),
        latencies_seconds=tuple(latencies),
        latency_seconds=spread(latencies),
        ttft_seconds=spread([ttft(output) for output in outputs]),
        tpot_seconds=_spread_if_any([tpot(output) for output in outputs]),
        itl_seconds=_spread_if_any(list[float | None](gaps)),
    )


def ttft(output: RequestOutput) -> float:
    """Seconds from a finished prompt's arrival to its first token."""
    assert output.metrics is not None
    assert output.metrics.first_token_time is not None
    return output.metrics.first_token_time - output.metrics.arrival_time


def tpot(output: RequestOutput) -> float | None:
    """Seconds for each output token after the first; None when there is no other."""
    metrics, num_tokens = output.metrics, len(output.outputs[0].token_ids)
    if num_tokens < 2:
        return None
    assert metrics is not None
    assert metrics.first_token_time is not None
    assert metrics.last_token_time is not None
    return (metrics.last_token_time - metrics.first_token_time) / (num_tokens - 1)


def spread(seconds: Sequence[float]) -> Spread:
    """Of at least one value."""
    ordered = sorted(seconds)
    place = 0.99 * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return Spread(mean=fmean(ordered), median=median(ordered), p99=below + (place % 1) * (above - below))


def _spread_if_any(seconds: Sequence[float | None]) -> Spread | None:
    known = [value for value in seconds if value is not None]
    return spread(known) if known else None


def _num_output_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
