"""The weights that SqueezeLLM stores beside the codes: a sparse matrix over outputs, and whole outputs of a hybrid."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.interfaces import LinearShape, StoredLinear, sparse_rows
from octavo_quant_squeezellm.headers import DAMAGED

_Entries = tuple[Tensor, Tensor, Tensor]
"""(outputs, inputs, values), each [num_entries]."""


def outliers_of(stored: StoredLinear, whole: LinearShape) -> Tensor | None:
    """What is added to the codebooks' values, as LookupWeight has it; None where the checkpoint has nothing.

    The tensors are the whole linear's, and what lies outside the device's share is left out.

    Args:
        whole: the linear's shape in the checkpoint.

    Raises:
        CheckpointError: the tensors contradict each other; names them and both facts.
    """
    entries = [*_sparse(stored, whole), *_full(stored, whole)]
    if not entries:
        return None
    outputs, inputs, values = (torch.cat(several) for several in zip(*entries, strict=True))
    shape = stored.shape
    outputs, inputs = outputs - stored.output_start, inputs - stored.input_start
    ours = (outputs >= 0) & (outputs < shape.out_features) & (inputs >= 0) & (inputs < shape.in_features)
    summed = torch.sparse_coo_tensor(
        torch.stack([outputs[ours], inputs[ours]]),
        values[ours],
        size=(shape.out_features, shape.in_features),
        check_invariants=False,
    ).coalesce()  # in order, and a weight that is there twice is one
    outputs, inputs = summed.indices()
    return sparse_rows(outputs.bincount(minlength=shape.out_features), inputs, summed.values(), shape.in_features)


def _sparse(stored: StoredLinear, whole: LinearShape) -> Iterator[_Entries]:
    """Compressed sparse rows, an output each."""
    tensors, prefix = stored.tensors, stored.prefix
    if "rows" not in tensors:
        return
    rows, cols, vals = tensors["rows"].long(), tensors["cols"].long(), tensors["vals"].float()
    num_in_rows = rows.diff()
    if int(rows[0]) != 0 or int(rows[-1]) != len(vals):
        raise CheckpointError(
            f"{prefix}.rows runs from {int(rows[0])} to {int(rows[-1])}; wanted is 0 to {len(vals)}, the values of "
            f"{prefix}.vals. {DAMAGED}"
        )
    if (num_in_rows < 0).any():
        output = int((num_in_rows < 0).nonzero()[0])
        raise CheckpointError(
            f"{prefix}.rows falls from {int(rows[output])} to {int(rows[output + 1])} at output {output}; where "
            f"the values of an output begin can only grow. {DAMAGED}"
        )
    _check_range(f"{prefix}.cols", cols, whole.in_features, "inputs")
    yield torch.arange(len(num_in_rows), device=rows.device).repeat_interleave(num_in_rows), cols, vals


def _full(stored: StoredLinear, whole: LinearShape) -> Iterator[_Entries]:
    """All weights of some outputs."""
    tensors = stored.tensors
    if "full_rows" not in tensors:
        return
    outputs, values = tensors["full_row_indices"].long(), tensors["full_rows"].float()
    _check_range(f"{stored.prefix}.full_row_indices", outputs, whole.out_features, "outputs")
    inputs = torch.arange(whole.in_features, device=values.device)
    yield outputs.repeat_interleave(len(inputs)), inputs.repeat(len(outputs)), values.T.flatten()


def _check_range(name: str, indices: Tensor, size: int, noun: str) -> None:
    if (wrong := indices[(indices < 0) | (indices >= size)]).numel():
        raise CheckpointError(
            f"{name} names {int(wrong[0])}, but the linear's {size} {noun} are 0 to {size - 1}. {DAMAGED}"
        )
