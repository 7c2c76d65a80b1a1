# ruff: noqa: N803
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""The lowest score that min-p, top-k and top-p leave of each row, found without sorting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.errors import ShapeError
from octavo.interfaces import SamplingInputs
from octavo_kernels_triton.kernels.sample_draw import MIN_TEMPERATURE

_BLOCK = 4096
_CAPACITY = 8192
_NUM_WARPS = 16
_NUM_STAGES = tl.constexpr(3)


@triton.jit
def _to_key(value):
    """float32 to int64, in the same order; what lies between two keys is every float between."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _to_float(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_scores(logits_row, token_ids, mask, temperature):
    logits = tl.load(logits_row + token_ids, mask, other=float("-inf")).to(tl.float32)
    return tl.div_rn(logits, temperature)


@triton.jit
def _weigh(scores, top, by_mass):
    """What a token counts: for top-p its probability over that of the most probable one, for top-k 1."""
    return tl.where(by_mass, tl.exp(scores - top), 1.0)


@triton.jit
def _lowest(scores, weights, target, low, high):
    """The smallest key in (low, high] above which the weights sum to less than `target`; `high` if none does."""
    while high - low > 1:
        middle = (low + high) >> 1
        if tl.sum(tl.where(scores > _to_float(middle), weights, 0.0), axis=0) < target:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def _window(logits_row, vocab_size, temperature, top, target, by_mass, low, above_low, high, above_high,
            CAPACITY: tl.constexpr):  # fmt: skip
    """(bottom, ceiling): where in (low, high] the answer should be, among at most CAPACITY tokens.

    By a sample of CAPACITY / 2 tokens. As long as it is not known what weighs above `low`, the CAPACITY / 2 largest,
    which hold most answers; then where the sample has the answer, and four standard deviations to each side.
    """
    slots = tl.arange(0, CAPACITY // 2)
    sample_size = tl.minimum(vocab_size, CAPACITY // 2)
    one_of = vocab_size / sample_size  # tokens for which one of the sample stands
    # Runs of 16 neighbours, spread over the vocabulary; all of a small one.
    run_stride = tl.maximum((vocab_size.to(tl.int64) * 32 // CAPACITY).to(tl.int32), 16)
    token_ids = (slots // 16) * run_stride + slots % 16
    sample = _load_scores(logits_row, token_ids, slots < sample_size, temperature)
    inside = (slots < sample_size) & (sample > _to_float(low)) & (sample <= _to_float(high))
    num_inside = tl.sum(inside.to(tl.float32), axis=0)
    bottom, ceiling = low, high
    if num_inside * one_of > CAPACITY // 2:
        weights = tl.where(inside, _weigh(sample, top, by_mass & (above_low >= 0)), 0.0)
        if above_low < 0:
            bottom = _lowest(sample, weights, CAPACITY // 2 / one_of, low, high) - 1
        else:
            total = tl.sum(weights, axis=0)
            share = (target - above_high) / (above_low - above_high)
            margin = 2.0 / tl.sqrt(num_inside)
            bottom = _lowest(sample, weights, (share + margin) * total, low, high) - 1
            ceiling = _lowest(sample, weights, (share - margin) * total, low, high)
    return bottom, ceiling


@triton.jit
def _scan(logits_row, scratch_row, vocab_size, temperature, top, by_mass, bottom, ceiling, pivot,
          BLOCK: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """One pass over a row: what weighs above each of three keys, and how many tokens lie in (bottom, ceiling].

    The scores of these are gathered in scratch_row, by token id, the first CAPACITY of them.
    """
    above_bottom, above_ceiling, above_pivot, num_inside = 0.0, 0.0, 0.0, 0
    for start in tl.range(0, vocab_size, BLOCK, num_stages=_NUM_STAGES):
        token_ids = start + tl.arange(0, BLOCK)
        scores = _load_scores(logits_row, token_ids, token_ids < vocab_size, temperature)
        weights = _weigh(scores, top, by_mass)
        over_bottom, over_ceiling = scores > _to_float(bottom), scores > _to_float(ceiling)
        inside = (over_bottom & (scores <= _to_float(ceiling))).to(tl.int32)
        slots = num_inside + tl.cumsum(inside, axis=0) - 1
        tl.store(scratch_row + slots, scores, (inside > 0) & (slots < CAPACITY))
        over_pivot = scores > _to_float(pivot)
        # Four sums in one reduction.
        pairs = tl.join(
            tl.join(tl.where(over_bottom, weights, 0.0), tl.where(over_ceiling, weights, 0.0)),
            tl.join(tl.where(over_pivot, weights, 0.0), inside.to(tl.float32)),
        )
        window_weights, others = tl.split(tl.sum(pairs, axis=0))
        bottom_weight, ceiling_weight = tl.split(window_weights)
        pivot_weight, count = tl.split(others)
        above_bottom += bottom_weight
        above_ceiling += ceiling_weight
        above_pivot += pivot_weight
        num_inside += count.to(tl.int32)
    return above_bottom, above_ceiling, above_pivot, num_inside


@triton.jit
def _narrow(key, above, target, low, above_low, high, above_high):
    """The bracket (low, high] and what weighs above its ends, once `above` is known to weigh above `key`."""
    if above >= target:
        above_low = tl.where(key > low, above, above_low)
        low = tl.maximum(low, key)
    else:
        above_high = tl.where(key < high, above, above_high)
        high = tl.minimum(high, key)
    return low, above_low, high, above_high


@triton.jit
def _search(logits_row, scratch_row, vocab_size, temperature, top, floor, limit, by_mass,
            BLOCK: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """The smallest score t >= floor above which all scores weigh less than the target.

    The target is `limit` tokens, or by mass the share `limit` of what all scores >= floor weigh. The answer's key lies
    in (low, high], and each pass over the row narrows that: it gathers a window that should hold the answer. Once all
    tokens of a window that does are gathered, the rest happens in registers.
    """
    low = tl.maximum(_to_key(floor) - 1, _to_key(tl.full([], float("-inf"), tl.float32)))
    high = _to_key(top)
    above_low, above_high = -1.0, 0.0  # of `low` nothing is known before the first pass
    target = limit
    while high - low > 1:
        bottom, ceiling = _window(
            logits_row, vocab_size, temperature, top, target, by_mass, low, above_low, high, above_high, CAPACITY
        )
        # Half of what is left, so that every search ends, but first the floor.
        pivot = tl.where(above_low < 0, low, (low + high) >> 1)
        above_bottom, above_ceiling, above_pivot, num_inside = _scan(
            logits_row, scratch_row, vocab_size, temperature, top, by_mass, bottom, ceiling, pivot, BLOCK, CAPACITY
        )
        if above_low < 0:
            above_low = above_pivot
            # Not 0: the most probable token is always kept.
            target = tl.where(by_mass, tl.maximum(limit * above_low, 1e-30), limit)

        if above_low < target:
            high = low  # nothing above the floor is left out
        elif (num_inside <= CAPACITY) & (above_bottom >= target) & (above_ceiling < target):
            tl.debug_barrier()  # until each thread sees what the others gathered
            slots = tl.arange(0, CAPACITY)
            scores = tl.load(scratch_row + slots, slots < num_inside, other=float("-inf"))
            weights = tl.where(slots < num_inside, _weigh(scores, top, by_mass), 0.0)
            high = _lowest(scores, weights, target - above_ceiling, bottom, ceiling)
            low = high - 1
        else:
            low, above_low, high, above_high = _narrow(bottom, above_bottom, target, low, above_low, high, above_high)
            low, above_low, high, above_high = _narrow(ceiling, above_ceiling, target, low, above_low, high, above_high)
            low, above_low, high, above_high = _narrow(pivot, above_pivot, target, low, above_low, high, above_high)
    return tl.maximum(floor, _to_float(high))


@triton.jit(
    do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "log_min_p_ptr", "threshold_ptr"]
)
def top_threshold_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    log_min_p_ptr,
    scratch_ptr,
    threshold_ptr,
    stride_logits_row,
    vocab_size,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """threshold[r] = max(m, k, p), of scores = logits[r] / temperature[r]; tokens with scores >= threshold[r] are left.

    m = max(scores) + log(min_p);
    k = the smallest t >= m with |{v: scores[v] > t}| < top_k;
    p = the smallest t >= k with sum(e^scores[v] for scores[v] > t) < top_p * sum(e^scores[v] for scores[v] >= k).
    A limit that is off is left out; rows of temperature 0, and those where all are off, get -inf. One program owns one
    row; tokens past vocab_size are masked.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p, log_min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(log_min_p_ptr + row)
    wants_top_k = (top_k > 0) & (top_k < vocab_size)
    threshold = tl.full([], float("-inf"), tl.float32)
    if (temperature != 0) & (wants_top_k | (top_p < 1) | (log_min_p > float("-inf"))):
        temperature = tl.maximum(temperature, MIN_TEMPERATURE)
        logits_row = logits_ptr + row * stride_logits_row
        scratch_row = scratch_ptr + row * CAPACITY
        tokens = tl.arange(0, BLOCK)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in tl.range(0, vocab_size, BLOCK, num_stages=_NUM_STAGES):
            logits = tl.load(logits_row + start + tokens, start + tokens < vocab_size, other=float("-inf"))
            largest = tl.maximum(largest, logits.to(tl.float32))
        top = tl.div_rn(tl.max(largest, axis=0), temperature)
        if top > float("-inf"):
            threshold = top + log_min_p
            for by_mass in range(2):
                if tl.where(by_mass == 0, wants_top_k, top_p < 1):
                    limit = tl.where(by_mass == 0, top_k.to(tl.float32), top_p)
                    threshold = _search(
                        logits_row, scratch_row, vocab_size, temperature, top, threshold, limit, by_mass == 1,
                        BLOCK, CAPACITY,
                    )  # fmt: skip
    tl.store(threshold_ptr + row, threshold)


def top_threshold(
    logits: Tensor, inputs: SamplingInputs, block: int = _BLOCK, capacity: int = _CAPACITY
) -> Tensor:
    """Launch it: [num_samples] float32, the lowest score (logits / temperature) that each row keeps, on the device.
    """
    columns = (inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p)
    if logits.dim() != 2 or logits.stride(1) != 1 or any(len(x) != len(logits) for x in columns):
        raise ShapeError(
            f"A threshold wants logits [num_samples, vocab_size] of contiguous rows, and one entry for each sample of "
            f"temperature, top_k, top_p and min_p; found {list(logits.shape)} with strides {list(logits.stride())}, "
            f"and {[list(x.shape) for x in columns]}."
        )
    num_samples, vocab_size = logits.shape
    threshold = torch.empty(num_samples, dtype=torch.float32, device=logits.device)
    if num_samples == 0:
        return threshold
    covering = triton.next_power_of_2(vocab_size)
    block, capacity = min(block, covering), min(capacity, max(covering, 16))
    scratch = torch.empty(num_samples, capacity, dtype=torch.float32, device=logits.device)
    top_threshold_kernel[(num_samples,)](
        logits,
        inputs.temperature,
        inputs.top_k,
        inputs.top_p,
        inputs.min_p.log(),
        scratch,
        threshold,
        logits.stride(0),
        vocab_size,
        BLOCK=block,
        CAPACITY=capacity,
        num_warps=_NUM_WARPS,
    )
    return threshold
