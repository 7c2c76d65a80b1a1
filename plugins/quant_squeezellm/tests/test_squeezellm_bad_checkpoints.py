"""Checkpoints that contradict themselves: a sentence that names the tensor and both facts, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from squeezellm_layers import method_of, random_tensors, stored_linear
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.interfaces import LinearShape, QuantizationMethod
from octavo.testing.stored_weight import PREFIX, headers_of

DAMAGED = "The file is damaged, or not this model's: fetch it again."
SHAPE = LinearShape(in_features=64, out_features=6)
Tensors = dict[str, Tensor]


def good() -> Tensors:
    tensors = random_tensors(SHAPE, 4, torch.Generator().manual_seed(0), density=0.2, num_full=1)
    assert len(tensors["vals"]) > 6
    return tensors


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


BAD_HEADERS: dict[str, tuple[Callable[[Tensors], Tensors], list[str]]] = {
    "no codebooks": (without("lookup_table"), ["lookup_table is missing", "qweight, rows, cols"]),
    "no codes": (without("qweight"), ["qweight is missing", "lookup_table, rows, cols"]),
    "no row starts": (without("rows"), ["rows is missing", "cols, vals"]),
    "no columns": (without("cols"), ["cols is missing", "rows, vals"]),
    "no values": (without("vals"), ["vals is missing", "rows, cols"]),
    "whole outputs that are nobody's": (without("full_row_indices"), ["full_row_indices is missing", "full_rows"]),
    "truncated codes": (changed("qweight", lambda t: t[:7]), ["qweight has 7 rows", "64 inputs of 4 bits fill 8"]),
    "codes of 3 bits with codebooks of 4": (
        changed("qweight", lambda t: t[:6]),
        ["qweight has 6 rows", "64 inputs of 4 bits fill 8"],
    ),
    "codebooks of 5 bits": (
        changed("lookup_table", lambda t: t.repeat(1, 2)),
        ["lookup_table has 32 values", "3 bits have 8 and 4 bits have 16"],
    ),
    "codebooks for fewer outputs": (
        changed("lookup_table", lambda t: t[:5]),
        ["lookup_table is for 5 outputs", "qweight has 6"],
    ),
    "row starts of fewer outputs": (changed("rows", lambda t: t[:-1]), ["rows has 6 entries", "6 outputs"]),
    "more columns than values": (changed("vals", lambda t: t[:5]), ["cols has", "vals has 5"]),
    "whole outputs of other inputs": (
        changed("full_rows", lambda t: t[:32]),
        ["full_rows has the shape [32, 1]", "[64, 1]"],
    ),
    "codes in 64-bit words": (changed("qweight", lambda t: t.long()), ["qweight is stored as I64", "I32"]),
    "codebooks of integers": (
        changed("lookup_table", lambda t: t.int()),
        ["lookup_table is stored as I32", "F32 or F16 or BF16"],
    ),
    "columns of floats": (changed("cols", lambda t: t.float()), ["cols is stored as F32", "I32"]),
    "flat codes": (changed("qweight", lambda t: t.flatten()), ["qweight has the shape [48]", "2 dimension"]),
}


@pytest.mark.parametrize(("change", "said"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_tensors_that_contradict_each_other_are_named(change: Callable[[Tensors], Tensors], said: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        method_of(headers_of(change(good()))).parameters(PREFIX, SHAPE)
    message = str(caught.value)
    assert message.startswith(PREFIX)
    assert [fact for fact in said if fact not in message] == []
    assert message.endswith(f". {DAMAGED}")
    assert message.count(". ") == 1, "one sentence and what to do"


def test_what_to_do_is_said_once_for_several_faults() -> None:
    tensors = changed("rows", lambda t: t[:-1])(changed("qweight", lambda t: t[:7])(good()))
    with pytest.raises(CheckpointError) as caught:
        method_of(headers_of(tensors)).parameters(PREFIX, SHAPE)
    message = str(caught.value)
    assert "qweight has 7 rows" in message
    assert "rows has 6 entries" in message
    assert message.count(DAMAGED) == 1


BAD_VALUES: dict[str, tuple[Callable[[Tensors], Tensors], list[str]]] = {
    "columns past the inputs": (
        changed("cols", lambda t: t.index_fill(0, torch.tensor([3]), 64)),
        ["cols names 64", "64 inputs are 0 to 63"],
    ),
    "negative columns": (changed("cols", lambda t: t.index_fill(0, torch.tensor([3]), -1)), ["cols names -1"]),
    "row starts that fall": (
        changed("rows", lambda t: torch.cat([t[:1], t[2:3], t[1:2], t[3:]])),
        ["rows falls from", "at output 1"],
    ),
    "row starts that end too soon": (
        changed("rows", lambda t: t.clamp(max=int(t[-1]) - 1)),
        ["rows runs from 0 to", "vals"],
    ),
    "row starts that begin late": (changed("rows", lambda t: t.clamp(min=1)), ["rows runs from 1 to", "vals"]),
    "whole outputs past the outputs": (
        changed("full_row_indices", lambda t: t + 6),
        ["full_row_indices names", "6 outputs are 0 to 5"],
    ),
}


@pytest.mark.parametrize(("change", "said"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_numbers_that_contradict_each_other_are_named(change: Callable[[Tensors], Tensors], said: list[str]) -> None:
    tensors = change(good())
    method = method_of(headers_of(tensors))
    method.parameters(PREFIX, SHAPE)
    with pytest.raises(CheckpointError) as caught:
        method.weight(stored_linear(tensors, SHAPE))
    assert [fact for fact in said if fact not in str(caught.value)] == []
    assert str(caught.value).startswith(PREFIX)
    assert str(caught.value).endswith(f". {DAMAGED}")


def test_bits_of_the_configuration_that_are_not_the_tensors_are_an_error_with_both() -> None:
    method = method_of(headers_of(good()), {"quant_method": "squeezellm", "wbits": 3})
    with pytest.raises(CheckpointError, match=r"up_proj\.lookup_table has 16 values .* 4 bits, .* says 3\. Correct it"):
        method.parameters(PREFIX, SHAPE)


def test_inputs_that_do_not_fill_blocks_are_refused() -> None:
    method = method_of(headers_of(good()))
    with pytest.raises(
        CheckpointError, match=r"up_proj has 60 inputs, .* packs them 32 at a time.*: leave it unquantized"
    ):
        method.parameters(PREFIX, LinearShape(in_features=60, out_features=6))


def test_bits_that_nothing_says_are_asked_for() -> None:
    method: QuantizationMethod = method_of({})
    with pytest.raises(CheckpointError, match="does not say how many bits"):
        method.parameters(PREFIX, SHAPE)
