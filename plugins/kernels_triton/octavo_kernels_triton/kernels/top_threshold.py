# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""The lowest score that min-p, top-k and top-p leave of each row, found without sorting."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.errors import ShapeError
from octavo.interfaces import SamplingInputs
from octavo_kernels_triton.kernels.sample_draw import MIN_TEMPERATURE

# Tokens that a program reads at a time; that it gathers at most; and of these, in one place of a block.
_BLOCK = 1024
_CAPACITY = 4096
_DEPTH = 16
_NUM_WARPS = 8
# So that a multiprocessor holds two programs: one computes while the other waits.
_MAX_REGISTERS = 128
_LOG2_E = tl.constexpr(1 / math.log(2))


@triton.jit
def _to_key(value):
    """float32 to int32, in the same order; what lies between two keys is every float between."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _to_float(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """Of two keys, rounded down; their sum may be no int32."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def _load(logits_row, token_ids, mask):
    return tl.load(logits_row + token_ids, mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _weigh(logits, top, scale, by_mass):
    """What a token counts: for top-p its probability over that of the most probable one, for top-k 1."""
    return tl.where(by_mass, tl.exp2((logits - top) * scale), 1.0)


@triton.jit
def _lowest(logits, weights, target, slack, low, high):
    """The smallest key in (low, high] above which the weights sum to less than `target`; `high` if none does.

    With a slack, perhaps another one above which they sum to the target, give or take less than the slack.
    """
    while low + 1 < high:
        middle = _middle(low, high)
        above = tl.sum(tl.where(logits > _to_float(middle), weights, 0.0), axis=0)
        if above < target:
            high = middle
        else:
            low = middle
        if tl.abs(above - target) < slack:
            low, high = middle - 1, middle
    return high


@triton.jit
def _before(floor, temperature, high):
    """The largest key below `high` whose float over the temperature is less than `floor`; the lowest is that of -inf.

    One with the key `high` is not.
    """
    low = _to_key(tl.full([], float("-inf"), tl.float32))
    while (low + 1 < high) & (floor > float("-inf")):
        middle = _middle(low, high)
        if tl.div_rn(_to_float(middle), temperature) < floor:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _window(logits_row, vocab_size, top, scale, target, by_mass, low, above_low, high, above_high,
            CAPACITY: tl.constexpr):  # fmt: skip
    """(bottom, ceiling): where in (low, high] the answer should be, among at most CAPACITY tokens.

    By a sample of CAPACITY / 2 tokens. As long as it is not known what weighs above `low`, the CAPACITY / 2 largest,
    which hold most answers; then where the sample has the answer, and three standard deviations to each side.
    """
    slots = tl.arange(0, CAPACITY // 2)
    sample_size = tl.minimum(vocab_size, CAPACITY // 2)
    one_of = vocab_size / sample_size  # tokens for which one of the sample stands
    # Runs of 16 neighbours, spread over the vocabulary; all of a small one.
    run_stride = tl.maximum((vocab_size.to(tl.int64) * 32 // CAPACITY).to(tl.int32), 16)
    token_ids = (slots // 16) * run_stride + slots % 16
    sample = _load(logits_row, token_ids, slots < sample_size)
    inside = (slots < sample_size) & (sample > _to_float(low)) & (sample <= _to_float(high))
    num_inside = tl.sum(inside.to(tl.float32), axis=0)
    bottom, ceiling = low, high
    if num_inside * one_of > CAPACITY // 2:
        weights = tl.where(inside, _weigh(sample, top, scale, by_mass & (above_low >= 0)), 0.0)
        if above_low < 0:
            num_wanted = CAPACITY // 2 / one_of
            bottom = _lowest(sample, weights, num_wanted, num_wanted / 8, low, high) - 1
        else:
            total = tl.sum(weights, axis=0)
            share = (target - above_high) / (above_low - above_high)
            # A share's variance in num_inside draws; the addend is for draws of unequal weights.
            margin = 3.0 * total * tl.sqrt((share * (1.0 - share) + 0.01) / num_inside)
            bottom = _lowest(sample, weights, share * total + margin, margin / 8, low, high) - 1
            ceiling = _lowest(sample, weights, share * total - margin, margin / 8, low, high)
    return bottom, ceiling


@triton.jit
def _scan(logits_row, scratch_row, vocab_size, top, scale, by_mass, bottom, ceiling, pivot,
          BLOCK: tl.constexpr, DEPTH: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """One pass over a row: what weighs above each of three keys, and how many tokens lie in (bottom, ceiling].

    Their logits are gathered at the start of scratch_row, unless they are more than CAPACITY. While tokens are read
    each of BLOCK lanes keeps its own, so that none waits for another; where one has more than DEPTH, CAPACITY + 1 is
    said.
    """
    # Scattered stores give neighbours to different threads. Loads shall do so too, or each tile would change threads
    # through shared memory: so the compiler is told of no contiguity.
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), 1)
    lane_rows = scratch_row + CAPACITY + lanes  # [DEPTH, BLOCK]
    bottom_sums, ceiling_sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    pivot_sums, counts = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    following = _load(logits_row, lanes, lanes < vocab_size)
    for start in range(BLOCK, vocab_size + BLOCK, BLOCK):
        # The next ones are under way while these are weighed.
        logits, following = following, _load(logits_row, start + lanes, start + lanes < vocab_size)
        weights = _weigh(logits, top, scale, by_mass)
        bottom_sums += tl.where(logits > _to_float(bottom), weights, 0.0)
        ceiling_sums += tl.where(logits > _to_float(ceiling), weights, 0.0)
        pivot_sums += tl.where(logits > _to_float(pivot), weights, 0.0)
        inside = (logits > _to_float(bottom)) & (logits <= _to_float(ceiling))
        tl.store(lane_rows + counts * BLOCK, logits, inside & (counts < DEPTH))
        counts += inside.to(tl.int32)
    above_bottom, above_ceiling = tl.sum(bottom_sums, axis=0), tl.sum(ceiling_sums, axis=0)
    above_pivot = tl.sum(pivot_sums, axis=0)
    num_inside = tl.where(tl.max(counts, axis=0) > DEPTH, CAPACITY + 1, tl.sum(counts, axis=0))
    if num_inside <= CAPACITY:
        tl.debug_barrier()  # until each thread sees what the others kept
        slots = tl.cumsum(counts, axis=0) - counts
        for depth in range(tl.max(counts, axis=0)):
            logits = tl.load(lane_rows + depth * BLOCK, depth < counts)
            tl.store(scratch_row + slots + depth, logits, depth < counts)
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
            BLOCK: tl.constexpr, DEPTH: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """The smallest score t >= floor above which all scores weigh less than the target.

    The target is `limit` tokens, or by mass the share `limit` of what all scores >= floor weigh. Scores are quotients
    of logits, in their order, so the search is among logits. The answer's key lies in (low, high], and each pass over
    the row narrows that: it gathers a window that should hold the answer. Once all tokens of a window that does are
    gathered, the rest happens in registers.
    """
    scale = _LOG2_E / temperature
    low, high = _before(floor, temperature, _to_key(top)), _to_key(top)
    above_low, above_high = -1.0, 0.0  # of `low` nothing is known before the first pass
    target = limit
    while low + 1 < high:
        bottom, ceiling = _window(
            logits_row, vocab_size, top, scale, target, by_mass, low, above_low, high, above_high, CAPACITY
        )
        # Half of what is left, so that every search ends, but first the floor.
        pivot = tl.where(above_low < 0, low, _middle(low, high))
        above_bottom, above_ceiling, above_pivot, num_inside = _scan(
            logits_row, scratch_row, vocab_size, top, scale, by_mass, bottom, ceiling, pivot, BLOCK, DEPTH, CAPACITY
        )
        if above_low < 0:
            above_low = above_pivot
            # Not 0, which no window could be seen to hold.
            target = tl.where(by_mass, tl.maximum(limit * above_low, 1e-30), limit)

        if above_low < target:
            high = low  # nothing above the floor is left out
        elif (num_inside <= CAPACITY) & (above_bottom >= target) & (above_ceiling < target):
            tl.debug_barrier()  # until each thread sees what the others gathered
            slots = tl.arange(0, CAPACITY)
            logits = _load(scratch_row, slots, slots < num_inside)
            high = _lowest(logits, _weigh(logits, top, scale, by_mass), target - above_ceiling, 0.0, bottom, ceiling)
            low = high - 1
        else:
            low, above_low, high, above_high = _narrow(bottom, above_bottom, target, low, above_low, high, above_high)
            low, above_low, high, above_high = _narrow(ceiling, above_ceiling, target, low, above_low, high, above_high)
            low, above_low, high, above_high = _narrow(pivot, above_pivot, target, low, above_low, high, above_high)
    return tl.maximum(floor, tl.div_rn(_to_float(high), temperature))


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
    DEPTH: tl.constexpr,
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
        scratch_row = scratch_ptr + row * (CAPACITY + DEPTH * BLOCK)
        tokens = tl.arange(0, CAPACITY)
        largest = tl.full([CAPACITY], float("-inf"), tl.float32)
        for start in range(0, vocab_size, CAPACITY):
            largest = tl.maximum(largest, _load(logits_row, start + tokens, start + tokens < vocab_size))
        top = tl.max(largest, axis=0)
        if top > float("-inf"):
            threshold = tl.div_rn(top, temperature) + log_min_p
            for by_mass in range(2):
                if tl.where(by_mass == 0, wants_top_k, top_p < 1):
                    limit = tl.where(by_mass == 0, top_k.to(tl.float32), top_p)
                    threshold = _search(
                        logits_row, scratch_row, vocab_size, temperature, top, threshold, limit, by_mass == 1,
                        BLOCK, DEPTH, CAPACITY,
                    )  # fmt: skip
    tl.store(threshold_ptr + row, threshold)


def top_threshold(logits: Tensor, inputs: SamplingInputs, block: int = _BLOCK, capacity: int = _CAPACITY) -> Tensor:
    """Launch it: [num_samples] float32, the lowest score that each row keeps, on the device; -inf keeps all.

    A threshold is a score of the row, or min-p's, and ties with it are kept. It is exact but for the probabilities
    that top-p adds up: float32, their sums within 1e-6 of the whole, so that among many tokens that improbable the
    border may be one off. They are added in an order that block, capacity and vocabulary fix: a row has the same
    threshold in any batch and in any run.

    Estimate, not measured, for 256 rows of 128,256 float32 logits on an H200: the pass for the maximum reads 131 MB,
    31 us; each pass of a search is 31 instructions a token, 35 us of the issue slots, and its steps in registers are
    7 us. A search takes one pass when the answer is among the 2,048 largest, three for the flattest rows: 75 us for
    top-k or top-p, 115 us for both, 160 us for flat rows. A row alone has one multiprocessor: 50 us for either.

    Source: a search by pivots instead of a sort, first among the tokens that are likely: Park et al. 2026, Qrita,
    arXiv:2602.01518; Ye et al. 2025, FlashInfer, arXiv:2501.01005.

    Args:
        logits: [num_samples, vocab_size], any float dtype, rows contiguous.
        block: tokens that a program reads at a time.
        capacity: tokens that it gathers for the last part of a search, and twice those of its sample; both powers of
            two, of at least 32.

    Raises:
        ShapeError: logits and inputs do not fit together.
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
    covering = max(triton.next_power_of_2(vocab_size), 32)
    block, capacity = min(block, covering), min(capacity, covering)
    scratch = torch.empty(num_samples, capacity + _DEPTH * block, dtype=torch.float32, device=logits.device)
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
        DEPTH=_DEPTH,
        CAPACITY=capacity,
        num_warps=_NUM_WARPS,
        maxnreg=_MAX_REGISTERS,
    )
    return threshold


def top_threshold_reference(logits: Tensor, inputs: SamplingInputs) -> Tensor:
    """By the formulas in float64, of the same float32 scores, sorted: [num_samples] float64."""
    scores = (logits.float() / inputs.temperature.clamp(min=MIN_TEMPERATURE.value).unsqueeze(1)).double()
    ordered = scores.sort(dim=-1, descending=True).values
    threshold = ordered[:, 0] + inputs.min_p.double().log()
    for row, (temperature, top_k, top_p) in enumerate(
        zip(inputs.temperature.tolist(), inputs.top_k.tolist(), inputs.top_p.tolist(), strict=True)
    ):
        left = ordered[row]
        if temperature == 0 or left[0] == float("-inf"):
            threshold[row] = float("-inf")
            continue
        if 0 < top_k <= len(left):
            threshold[row] = torch.maximum(threshold[row], left[top_k - 1])
        if top_p < 1:
            left = left[left >= threshold[row]]
            probabilities = left.softmax(dim=0)
            mass_above = probabilities.cumsum(dim=0) - probabilities
            num_kept = max(int((mass_above < top_p).sum()), 1)
            threshold[row] = torch.maximum(threshold[row], left[num_kept - 1])
    return threshold
