"""Rotation and cache writes in one launch, compared with the rotation in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from octavo.errors import ShapeError
from octavo.interfaces import PAD_SLOT, KVCache, nhd_layout, rotate
from octavo.plugins.specs import AttentionNeed
from octavo_attention_triton.cache import rotate_and_write_kv, write_kv

NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, NUM_BLOCKS = 6, 2, 16, 6
# Largest error of numbers from a normal distribution; the interpreter cuts off where a GPU rounds to bfloat16.
TOLERANCES = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 6e-2}
SIZES = [  # (head_dim, rotary_dim)
    (64, 64),
    (80, 80),
    (80, 32),
    (96, 48),
    (112, 112),
    (128, 128),
    (256, 64),
]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step's tensors, slices of one stacked linear's output, and where they go: the cache, but for its borders."""

    query: Tensor
    key: Tensor
    value: Tensor
    rotary: tuple[Tensor, Tensor]
    kv_cache: KVCache
    with_borders: KVCache
    slot_mapping: Tensor

    def run(self) -> Tensor:
        return rotate_and_write_kv(self.query, self.key, self.value, self.rotary, self.kv_cache, self.slot_mapping)

    def rotated(self, x: Tensor) -> Tensor:
        """The formula in float64."""
        return rotate(x.double(), (self.rotary[0].double(), self.rotary[1].double()))

    @property
    def written(self) -> Tensor:
        """Which tokens have a slot."""
        return self.slot_mapping != PAD_SLOT

    def cached(self) -> tuple[Tensor, Tensor]:
        """What the cache means by the keys and values of the tokens that have a slot, float64."""
        slots = self.slot_mapping[self.written]
        parts = [buffer.flatten(0, 1)[slots].double() for buffer in self.kv_cache]
        if len(parts) == 2:
            return parts[0], parts[1]
        return parts[0] * parts[2][..., None], parts[1] * parts[3][..., None]


def make_step(
    head_dim: int = 64,
    rotary_dim: int = 64,
    dtype: str = "float32",
    num_tokens: int = 37,
    kv_cache_dtype: str = "auto",
    padded: tuple[int, ...] = (),
) -> Step:
    """Its slots are in random order, and every other holds NaN."""
    need = AttentionNeed(
        dtype=dtype,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
        block_size=BLOCK_SIZE,
        kv_cache_dtype=kv_cache_dtype,
    )
    torch_dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(head_dim + num_tokens)
    heads = [NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS]
    stacked = torch.randn(num_tokens, sum(heads) * head_dim, generator=generator).to(torch_dtype)
    parts = torch.split(stacked, [count * head_dim for count in heads], dim=1)
    query, key, value = (part.view(num_tokens, -1, head_dim) for part in parts)
    angles = torch.rand(num_tokens, 1, rotary_dim // 2, generator=generator) * 2 * math.pi
    with_borders = nhd_layout(need).allocate(NUM_BLOCKS + 2, "cpu")  # PAD_SLOT taken for a slot leads before the first
    for buffer in with_borders:
        buffer.copy_(torch.full((), math.nan))
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:num_tokens]
    slots[list(padded)] = PAD_SLOT
    return Step(
        query=query,
        key=key,
        value=value,
        rotary=(
            torch.cat((angles.cos(), angles.cos()), dim=-1).to(torch_dtype),
            torch.cat((-angles.sin(), angles.sin()), dim=-1).to(torch_dtype),
        ),
        kv_cache=tuple(buffer[1:-1] for buffer in with_borders),
        with_borders=with_borders,
        slot_mapping=slots,
    )


def largest_error(found: Tensor, wanted: Tensor) -> float:
    """NaN counts as infinitely wrong."""
    return float((found.double() - wanted.double()).abs().nan_to_num(nan=math.inf).max())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), SIZES)
def test_query_is_rotated(head_dim: int, rotary_dim: int, dtype: str) -> None:
    step = make_step(head_dim, rotary_dim, dtype)
    rotated = step.run()
    assert rotated.dtype == step.query.dtype
    assert rotated.is_contiguous()
    assert largest_error(rotated, step.rotated(step.query)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), SIZES)
def test_key_is_written_rotated_and_value_as_it_is(head_dim: int, rotary_dim: int, dtype: str) -> None:
    step = make_step(head_dim, rotary_dim, dtype)
    step.run()
    key, value = step.cached()
    assert largest_error(key, step.rotated(step.key)) <= TOLERANCES[dtype]
    assert torch.equal(value, step.value.double())


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65])
def test_any_number_of_tokens(num_tokens: int) -> None:
    step = make_step(num_tokens=num_tokens)
    rotated = step.run()
    assert largest_error(rotated, step.rotated(step.query)) <= TOLERANCES["float32"]
    assert largest_error(step.cached()[0], step.rotated(step.key)) <= TOLERANCES["float32"]


def test_without_rotation_keys_are_written_as_they_are() -> None:
    step = make_step()
    write_kv(step.key, step.value, step.kv_cache, step.slot_mapping)
    key, value = step.cached()
    assert torch.equal(key, step.key.double())
    assert torch.equal(value, step.value.double())


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_slots_of_nobody_stay_as_they_are(kv_cache_dtype: str) -> None:
    step = make_step(num_tokens=9, padded=(0, 4, 8), kv_cache_dtype=kv_cache_dtype)
    step.run()
    for buffer in step.with_borders:
        untouched = buffer.flatten(0, 1).float().isnan().flatten(1).all(dim=1)
        assert int(untouched.sum()) == (NUM_BLOCKS + 2) * BLOCK_SIZE - 6
        assert not untouched[BLOCK_SIZE + step.slot_mapping[step.written]].any()


def test_token_that_is_not_written_is_rotated_all_the_same() -> None:
    step = make_step(num_tokens=9, padded=(0, 4, 8))
    assert largest_error(step.run(), step.rotated(step.query)) <= TOLERANCES["float32"]


def test_inputs_stay_as_they_are() -> None:
    step = make_step()
    before = [tensor.clone() for tensor in (step.query, step.key, step.value)]
    step.run()
    assert all(torch.equal(old, new) for old, new in zip(before, (step.query, step.key, step.value), strict=True))


def test_heads_need_not_lie_side_by_side() -> None:
    step = make_step()
    query, key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (step.query, step.key, step.value))
    rotated = rotate_and_write_kv(query, key, value, step.rotary, step.kv_cache, step.slot_mapping)
    assert largest_error(rotated, step.rotated(step.query)) <= TOLERANCES["float32"]
    assert largest_error(step.cached()[0], step.rotated(step.key)) <= TOLERANCES["float32"]


# --------------------------------------------------------------------------------------------------------------- fp8


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (112, 112)])
def test_fp8_cache_means_the_number_within_half_a_step(head_dim: int, rotary_dim: int, dtype: str) -> None:
    step = make_step(head_dim, rotary_dim, dtype, kv_cache_dtype="fp8")
    step.run()
    for found, wanted in zip(step.cached(), (step.rotated(step.key), step.value.double()), strict=True):
        # Three bits of mantissa: a sixteenth of the number, and of what is tiny beside its head's largest, a little.
        allowed = wanted.abs() / 16 + wanted.abs().amax(dim=-1, keepdim=True) / 2**16 + TOLERANCES["float32"]
        assert ((found - wanted).abs() <= allowed).all()


def test_fp8_scale_is_the_largest_magnitude_over_448() -> None:
    step = make_step(kv_cache_dtype="fp8")
    step.run()
    scale = step.kv_cache[3].flatten(0, 1)[step.slot_mapping]
    assert torch.allclose(scale, step.value.abs().amax(dim=-1) / 448, rtol=1e-6, atol=0)
    assert (step.kv_cache[1].flatten(0, 1)[step.slot_mapping].float().abs().amax(dim=-1) == 448).all()


def test_fp8_rounds_as_torch_does() -> None:
    step = make_step(num_tokens=64, kv_cache_dtype="fp8")
    write_kv(step.key, step.value, step.kv_cache, step.slot_mapping)
    stored, scale = (step.kv_cache[index].flatten(0, 1)[step.slot_mapping] for index in (1, 3))
    scaled = step.value / scale[..., None]
    normal = scaled.abs() >= 2**-6  # of the smaller ones the interpreter cuts off bits
    assert torch.equal(stored.float()[normal], scaled.to(torch.float8_e4m3fn).float()[normal])


def test_fp8_head_of_zeros_is_zeros() -> None:
    step = make_step(num_tokens=3, kv_cache_dtype="fp8")
    step.value.zero_()
    step.run()
    assert torch.equal(step.cached()[1], torch.zeros(3, NUM_KV_HEADS, 64, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------------ errors


def test_heads_of_another_size_are_refused() -> None:
    step, other = make_step(head_dim=64), make_step(head_dim=128)
    with pytest.raises(ShapeError, match=r"must be \[num_tokens, 2, 128\].* they are \[37, 2, 64\]"):
        write_kv(step.key, step.value, other.kv_cache, step.slot_mapping)
    with pytest.raises(ShapeError, match=r"\[37, 2, 64\] and \[37, 1, 64\]"):
        write_kv(step.key, step.value[:, :1], step.kv_cache, step.slot_mapping)
