"""A trial before the engine starts: the largest steps there can be, so that what they need is known and compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from octavo.interfaces.attention import BatchLimits
from octavo.interfaces.executor import NewRow, ScheduledRow, Step
from octavo.interfaces.logits_rule import LogitsRule
from octavo.runner.loaded_model import LoadedModel
from octavo.sampling_params import SamplingParams


def activation_bytes(model: LoadedModel, rules: Sequence[LogitsRule] = ()) -> int:
    """Memory of a GPU that steps take beside weights and KV cache: measured, by making the largest."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    num_blocks = num_trial_blocks(model.limits)
    make_trial_steps(model, rules)
    torch.cuda.synchronize()
    cache_bytes = num_blocks * model.attention.kv_layout().bytes_per_block
    peak = torch.cuda.max_memory_allocated() - before - cache_bytes
    torch.cuda.empty_cache()
    return max(0, peak)


def make_trial_steps(model: LoadedModel, rules: Sequence[LogitsRule] = ()) -> None:
    """The largest steps of each kind, and again with what rules, logprobs and LoRA adapters add to them."""
    position = None if model.adapters is None else 0  # where no adapter is yet: it changes nothing, but is computed
    for asked, adapter_position in (
        (SamplingParams(), None),
        (SamplingParams(logit_bias={0: 0.0}, logprobs=1), position),
    ):
        runner = model.make_trial_runner(num_trial_blocks(model.limits), rules)
        for step in trial_steps(model.limits, asked, adapter_position):
            runner.execute(step)


def num_trial_blocks(limits: BatchLimits) -> int:
    """Blocks that the trial's requests need."""
    longest, short, num_short = _sizes(limits)
    return _blocks(longest + 2, limits) + num_short * _blocks(short + 1, limits)


def trial_steps(limits: BatchLimits, asked: SamplingParams, adapter_position: int | None = None) -> Iterator[Step]:
    """One request with as long a prompt as a step takes; as many more as fit beside its next token; a token of all.

    Then prompts of every power of two, for kernels may go by the length. Tokens are drawn in each of the ways that
    differ on the device, in the last steps greedily.

    Args:
        asked: what all requests ask for, but for how they are drawn.
        adapter_position: of all requests.
    """
    limited = replace(asked, top_p=0.9, top_k=50, min_p=0.01)
    longest, short, num_short = _sizes(limits)
    lengths = [longest] + [short] * num_short
    names = [f"trial-{index}" for index in range(len(lengths))]
    counts = [_blocks(longest + 2, limits)] + [_blocks(short + 1, limits)] * num_short
    firsts = [sum(counts[:index]) for index in range(len(counts))]
    rows = [
        ScheduledRow(
            request_id=name,
            num_computed_tokens=0,
            num_tokens=length,
            new_block_ids=list(range(first, first + count)),
            samples=True,
        )
        for name, length, first, count in zip(names, lengths, firsts, counts, strict=True)
    ]
    entering = [
        _new_row(name, length, limited if index else asked, adapter_position)
        for index, (name, length) in enumerate(zip(names, lengths, strict=True))
    ]
    yield Step(step_id=0, entering=entering[:1], rows=rows[:1])
    fits = longest < limits.max_model_len
    if num_short:
        yield Step(step_id=1, entering=entering[1:], rows=[_next(rows[0], 1)] * fits + rows[1:])
    decodes = [_next(rows[0], 2)] * (longest + 1 < limits.max_model_len)
    decodes += [_next(row, 1) for row in rows[1:] if row.num_tokens < limits.max_model_len]
    if decodes:
        yield Step(step_id=2, rows=decodes)
    greedy = replace(asked, temperature=0.0)
    leaving = names
    for exponent in range(longest.bit_length()):
        name, length = f"trial-of-{2**exponent}", 2**exponent
        blocks = list(range(_blocks(length, limits)))
        row = ScheduledRow(
            request_id=name, num_computed_tokens=0, num_tokens=length, new_block_ids=blocks, samples=True
        )
        yield Step(
            step_id=3 + exponent,
            leaving=leaving,
            entering=[_new_row(name, length, greedy, adapter_position)],
            rows=[row],
        )
        leaving = [name]


def _sizes(limits: BatchLimits) -> tuple[int, int, int]:
    """(tokens of the long prompt, of each short one, how many short ones there are)."""
    longest = min(limits.max_num_tokens, limits.max_model_len)
    num_short = min(limits.max_num_requests, limits.max_num_tokens) - 1
    short = min(limits.max_model_len, (limits.max_num_tokens - 1) // num_short) if num_short else 0
    return longest, short, num_short


def _blocks(num_tokens: int, limits: BatchLimits) -> int:
    return -(-min(num_tokens, limits.max_model_len) // limits.block_size)


def _new_row(name: str, num_tokens: int, params: SamplingParams, adapter_position: int | None) -> NewRow:
    return NewRow(
        request_id=name,
        token_ids=[0] * num_tokens,
        num_prompt_tokens=num_tokens,
        params=params,
        seed=0,
        sample_index=0,
        adapter_position=adapter_position,
    )


def _next(row: ScheduledRow, num_tokens_later: int) -> ScheduledRow:
    """The token that comes so many after a prompt's last."""
    return row._replace(
        num_computed_tokens=row.num_tokens + num_tokens_later - 1, num_tokens=1, new_block_ids=[], samples=True
    )
