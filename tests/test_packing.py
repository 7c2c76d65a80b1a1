"""octavo.packing against a decoder that takes every bit by itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.packing import pack_columns, pack_rows, unpack_columns, unpack_rows, whole_words, words_for

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Widths of the planes of a planar code, the lowest bits first; other bits have one plane."""

BITS = st.integers(1, 8)
ROWS = st.integers(0, 5)
COLUMNS = st.integers(1, 140)
SEEDS = st.integers(0, 2**31)


def bit(words: Sequence[int], index: int) -> int:
    """Of a little-endian stream of bits through 32-bit words."""
    return words[index // 32] >> (index % 32) & 1


def decode(words: Sequence[int], bits: int, index: int, planar: bool) -> int:
    """One code: its bits one by one."""
    if not planar or bits not in PLANES:
        return sum(bit(words, bits * index + place) << place for place in range(bits))
    block, place_in_block = divmod(index, 32)
    code = first_word = 0
    shift = 0
    for width in PLANES[bits]:  # in the block's words: first the lowest plane's, as many words as it has bits
        word, field = divmod(place_in_block, 32 // width)
        of_plane = words[block * bits + first_word + word] >> (width * field) & (2**width - 1)
        code |= of_plane << shift
        first_word, shift = first_word + width, shift + width
    return code


def random_words(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = random.Random(seed)
    drawn = [[generator.randrange(-(2**31), 2**31) for _ in range(columns)] for _ in range(rows)]
    return torch.tensor(drawn, dtype=torch.int32).reshape(rows, columns)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator)


@settings(deadline=None)
@given(bits=BITS, planar=st.booleans(), rows=ROWS, columns=COLUMNS, seed=SEEDS)
def test_codes_of_any_words_are_those_of_the_decoder_bit_by_bit(
    bits: int, planar: bool, rows: int, columns: int, seed: int
) -> None:
    words = random_words(rows, words_for(columns, bits, planar=planar), seed)
    found = unpack_columns(words, bits, columns, planar=planar)
    assert (found.dtype, found.shape) == (torch.uint8, (rows, columns))
    for row, codes in zip(words.tolist(), found.tolist(), strict=True):
        unsigned = [word % 2**32 for word in row]
        assert codes == [decode(unsigned, bits, index, planar) for index in range(columns)]


@settings(deadline=None)
@given(bits=BITS, planar=st.booleans(), rows=ROWS, columns=COLUMNS, seed=SEEDS)
def test_packed_columns_are_unpacked_as_they_were(bits: int, planar: bool, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    words = pack_columns(codes, bits, planar=planar)
    assert (words.dtype, words.shape) == (torch.int32, (rows, words_for(columns, bits, planar=planar)))
    assert torch.equal(unpack_columns(words, bits, columns, planar=planar), codes.to(torch.uint8))


@settings(deadline=None)
@given(bits=BITS, planar=st.booleans(), rows=COLUMNS, columns=ROWS, seed=SEEDS)
def test_packed_rows_are_packed_columns_turned(bits: int, planar: bool, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    words = pack_rows(codes, bits, planar=planar)
    assert torch.equal(words, pack_columns(codes.T, bits, planar=planar).T)
    assert torch.equal(unpack_rows(words, bits, rows, planar=planar), codes.to(torch.uint8))


@settings(deadline=None)
@given(bits=BITS, planar=st.booleans(), columns=COLUMNS)
def test_what_is_left_of_the_last_word_is_zero(bits: int, planar: bool, columns: int) -> None:
    words = pack_columns(torch.full((1, columns), 2**bits - 1), bits, planar=planar)
    assert sum(word.bit_count() for word in (words.long() % 2**32).flatten().tolist()) == bits * columns


@settings(deadline=None)
@given(bits=BITS, planar=st.booleans(), num_before=st.integers(0, 5), columns=COLUMNS, seed=SEEDS)
def test_whole_words_may_be_cut_off(bits: int, planar: bool, num_before: int, columns: int, seed: int) -> None:
    codes_of_block, words_of_block = whole_words(bits, planar=planar)
    codes = random_codes(2, num_before * codes_of_block + columns, bits, seed)
    words = pack_columns(codes, bits, planar=planar)[:, num_before * words_of_block :]
    found = unpack_columns(words, bits, columns, planar=planar)
    assert torch.equal(found, codes[:, num_before * codes_of_block :].to(torch.uint8))


@pytest.mark.parametrize(
    ("bits", "planar", "wanted"),
    [
        (2, True, (16, 1)),
        (3, False, (32, 3)),
        (4, True, (8, 1)),
        (6, False, (16, 3)),
        (6, True, (32, 6)),
    ],
)
def test_fewest_codes_that_fill_whole_words(bits: int, planar: bool, wanted: tuple[int, int]) -> None:
    assert whole_words(bits, planar=planar) == wanted


def test_three_bits_run_over_word_boundaries() -> None:
    codes = torch.zeros(1, 32, dtype=torch.int64)
    codes[0, 10], codes[0, 21] = 5, 3
    assert pack_columns(codes, 3).tolist() == [[1 << 30, 1 - 2**31, 1]]


def test_planar_three_bits_are_two_words_of_low_bits_and_one_of_high_bits() -> None:
    codes = torch.zeros(1, 32, dtype=torch.int64)
    codes[0, 1], codes[0, 17], codes[0, 31] = 0b011, 0b110, 0b100
    assert pack_columns(codes, 3, planar=True).tolist() == [[0b11 << 2, 0b10 << 2, (1 << 17) - 2**31]]


def test_words_that_are_negative_are_read_as_unsigned() -> None:
    assert unpack_columns(torch.tensor([[-1]], dtype=torch.int32), 8, 4).tolist() == [[255, 255, 255, 255]]
