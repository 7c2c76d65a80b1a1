# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""The draw of one token for each row: the arg-max of tempered logits and noise that is hashed where it is added."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.errors import ShapeError
from octavo.interfaces import SamplingInputs

_BLOCK = 1024
_NUM_WARPS = 4

# Constants of MurmurHash3's 32-bit finaliser (Appleby, public domain) and the golden ratio's fraction.
_MIX_1 = tl.constexpr(0x85EBCA6B)
_MIX_2 = tl.constexpr(0xC2B2AE35)
_GOLDEN = tl.constexpr(0x9E3779B9)

_TWO_THIRDS = tl.constexpr(0x3F2AAAAB)  # bits of float32
_ONE = tl.constexpr(0x3F800000)
_LOG_2_BITS = tl.constexpr(math.log(2) * 2.0**-23)
_BELOW_1 = tl.constexpr(1 - 2.0**-24)
# The smallest that divides: below it quotients overflow, and infinities are all alike.
MIN_TEMPERATURE = tl.constexpr(1e-5)


@triton.jit
def _mix(x):
    """MurmurHash3's finaliser of uint32."""
    x = x ^ (x >> 16)
    x = x * _MIX_1
    x = x ^ (x >> 13)
    x = x * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def _power_near(x):
    """(2^23 e, 2^-e) with x / 2^e in [2/3, 4/3), of a positive x that is neither subnormal nor infinite."""
    exponent = (x.to(tl.int32, bitcast=True) - _TWO_THIRDS) & -0x800000
    return exponent.to(tl.float32), (-exponent + _ONE).to(tl.float32, bitcast=True)


@triton.jit
def _log(f, exponent):
    """log((1 + f) 2^e) of f in [-1/3, 1/3] and 2^23 e, to 1.1e-7 of itself: half the instructions of tl.log.

    The polynomial is log(1 + f)'s best of its degree, in the largest relative error.
    """
    q = 0.140263612
    q = q * f - 0.15388539
    q = q * f + 0.139958066
    q = q * f - 0.164159609
    q = q * f + 0.200111687
    q = q * f - 0.250078189
    q = q * f + 0.333331981
    q = q * f - 0.499999361
    return exponent * _LOG_2_BITS + (f + f * f * q)


@triton.jit
def gumbel(uniform):
    """-log(-log(1 - u)) of u in [2^-33, 1 - 2^-24], to 1e-6."""
    # u is not subtracted before it is scaled: a small one keeps all its bits.
    exponent, scale = _power_near(1.0 - uniform)
    exponential = -_log((scale - 1.0) - uniform * scale, exponent)
    exponent, scale = _power_near(exponential)
    return -_log(exponential * scale - 1.0, exponent)


@triton.jit
def hashed_uniform(seed, sample_index, position, token_ids):
    """Numbers in [2^-33, 1 - 2^-24] hashed from the row's key and each token id: float32, of token_ids' shape."""
    key = _mix(seed.to(tl.uint32) ^ _mix((seed >> 32).to(tl.uint32) + _GOLDEN))
    key = _mix(key ^ _mix(sample_index.to(tl.uint32) * _GOLDEN + 1))
    key = _mix(key ^ _mix(position.to(tl.uint32) * _GOLDEN + 2))
    second_key = _mix(key + _GOLDEN)
    bits = _mix(_mix((token_ids.to(tl.uint32) * _GOLDEN) ^ key) + second_key)
    # The noise is finest where it is largest: as float32 a small hash keeps all its bits, a large one loses some.
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, _BELOW_1)


@triton.jit(
    do_not_specialize_on_alignment=["temperature_ptr", "threshold_ptr", "seed_ptr", "sample_index_ptr", "position_ptr"]
)
def sample_draw_kernel(
    logits_ptr,
    temperature_ptr,
    threshold_ptr,  # None: every token may be drawn
    seed_ptr,
    sample_index_ptr,
    position_ptr,
    best_score_ptr,
    best_id_ptr,
    stride_logits_row,
    vocab_size,
    ALL_GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """best[r, c] = the largest score of chunk c of row r, and the first token that has it.

    score[r, v] = logits[r, v] / temperature[r] + gumbel(hashed_uniform(row's key, v)), and -inf where the quotient is
    below threshold[r]; logits[r, v] itself where the temperature is 0. One program owns one chunk of BLOCK tokens of
    one row; tokens past vocab_size are masked. A chunk without a token that may be drawn hashes no noise.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    token_ids = chunk * BLOCK + tl.arange(0, BLOCK)
    logits_row = logits_ptr + row.to(tl.int64) * stride_logits_row
    scores = tl.load(logits_row + token_ids, token_ids < vocab_size, other=float("-inf")).to(tl.float32)
    if not ALL_GREEDY:
        temperature = tl.load(temperature_ptr + row)
        if temperature != 0:
            scores = tl.div_rn(scores, tl.maximum(temperature, MIN_TEMPERATURE))
            if threshold_ptr is not None:
                scores = tl.where(scores < tl.load(threshold_ptr + row), float("-inf"), scores)
            if tl.max(scores, axis=0) > float("-inf"):
                seed = tl.load(seed_ptr + row)
                sample_index, position = tl.load(sample_index_ptr + row), tl.load(position_ptr + row)
                scores += gumbel(hashed_uniform(seed, sample_index, position, token_ids))
    best, offset = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_score_ptr + row * tl.num_programs(1) + chunk, best)
    tl.store(best_id_ptr + row * tl.num_programs(1) + chunk, chunk * BLOCK + offset)


@triton.jit
def sample_merge_kernel(best_score_ptr, best_id_ptr, out_ptr, num_chunks, BLOCK_CHUNKS: tl.constexpr):
    """out[r] = id[r, c] for the first c whose score[r, c] is the largest of row r.

    One program owns one row; chunks past num_chunks are masked.
    """
    row = tl.program_id(0)
    chunks = tl.arange(0, BLOCK_CHUNKS)
    scores = tl.load(best_score_ptr + row * num_chunks + chunks, chunks < num_chunks, other=float("-inf"))
    chunk = tl.argmax(scores, axis=0, tie_break_left=True)
    tl.store(out_ptr + row, tl.load(best_id_ptr + row * num_chunks + chunk).to(tl.int64))


def sample_draw(logits: Tensor, inputs: SamplingInputs, threshold: Tensor | None, block: int = _BLOCK) -> Tensor:
    """Launch both: [num_samples] int64, on the device.

    The bits of the noise are those of `octavo.builtin.torch_kernels`; its logarithms may differ in their last ones.

    Estimate, not measured, for 256 rows of 128,256 bfloat16 logits on an H200: they are 66 MB, 15 us, which is what
    greedy rows take; hash and logarithms are 95 instructions a token, 105 us of the issue slots, and far less where
    the threshold leaves out most chunks.

    Args:
        logits: [num_samples, vocab_size], any float dtype, rows contiguous.
        threshold: [num_samples] float32, of logits / temperature; None where no row asks for one.
        block: tokens of one program.

    Raises:
        ShapeError: logits, inputs and threshold do not fit together.
    """
    columns = (inputs.temperature, inputs.seed, inputs.sample_index, inputs.position, threshold)
    if logits.dim() != 2 or logits.stride(1) != 1 or any(x is not None and len(x) != len(logits) for x in columns):
        found = [None if x is None else list(x.shape) for x in columns]
        raise ShapeError(
            f"A draw wants logits [num_samples, vocab_size] of contiguous rows, and one entry for each sample of "
            f"temperature, seed, sample_index, position and threshold; found {list(logits.shape)} with strides "
            f"{list(logits.stride())}, and {found}."
        )
    num_samples, vocab_size = logits.shape
    out = torch.empty(num_samples, dtype=torch.int64, device=logits.device)
    if num_samples == 0:
        return out
    num_chunks = triton.cdiv(vocab_size, block)
    best_score = torch.empty(num_samples, num_chunks, dtype=torch.float32, device=logits.device)
    best_id = torch.empty(num_samples, num_chunks, dtype=torch.int32, device=logits.device)
    sample_draw_kernel[(num_samples, num_chunks)](
        logits,
        inputs.temperature,
        threshold,
        inputs.seed,
        inputs.sample_index,
        inputs.position,
        best_score,
        best_id,
        logits.stride(0),
        vocab_size,
        ALL_GREEDY=inputs.all_greedy,
        BLOCK=block,
        num_warps=_NUM_WARPS,
    )
    block_chunks = triton.next_power_of_2(num_chunks)
    sample_merge_kernel[(num_samples,)](best_score, best_id, out, num_chunks, BLOCK_CHUNKS=block_chunks, num_warps=1)
    return out


def perturbed_scores_reference(logits: Tensor, inputs: SamplingInputs, threshold: Tensor | None) -> Tensor:
    """What the draw takes the arg-max of, by the formulas in float64: [num_samples, vocab_size]."""
    temperature = inputs.temperature.unsqueeze(1)
    scores = logits.float() / temperature.clamp(min=MIN_TEMPERATURE.value)
    if threshold is not None:
        scores = scores.masked_fill(scores < threshold.unsqueeze(1), float("-inf"))
    key = _mix_reference((inputs.seed & _MASK) ^ _mix_reference((inputs.seed >> 32 & _MASK) + _GOLDEN.value))
    key = _mix_reference(key ^ _mix_reference(inputs.sample_index.long() * _GOLDEN.value + 1))
    key = _mix_reference(key ^ _mix_reference(inputs.position.long() * _GOLDEN.value + 2))
    second_key = _mix_reference(key + _GOLDEN.value).unsqueeze(1)
    token_ids = torch.arange(logits.shape[1], device=logits.device)
    bits = _mix_reference(_mix_reference((token_ids * _GOLDEN.value & _MASK) ^ key.unsqueeze(1)) + second_key)
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=_BELOW_1.value).double()
    noise = -torch.log(-torch.log1p(-uniform))
    return torch.where(temperature == 0, logits.double(), scores.double() + noise)


_MASK = 0xFFFFFFFF


def _mix_reference(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser in int64, of x modulo 2^32; products wrap modulo 2^64, a multiple of it."""
    x = x & _MASK
    x = x ^ (x >> 16)
    x = x * _MIX_1.value & _MASK
    x = x ^ (x >> 13)
    x = x * _MIX_2.value & _MASK
    return x ^ (x >> 16)
