"""The golden checkpoints of SqueezeLLM: of the tool's own making, decoded in float64 by an independent program.

Their oracles are made otherwise than those of quantized_goldens.py: weights are sums in float64 rounded to float32
once, and there are vectors for every linear. A checkpoint without prompts is cut to some linears and no whole model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from margin_rule import Reference
from quantized_goldens import golden_dirs
from safetensors.torch import load_file
from torch import Tensor

from octavo.interfaces import LinearShape


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenLinear:
    """One linear.

    Attributes:
        weight_head: [16, out_features] float32, of its first 16 inputs.
        sum, abs_sum: of its weights and their magnitudes, in float64.
        x: [4, in_features] float32. y: [4, out_features] float64, x @ W.T.
    """

    prefix: str
    shape: LinearShape
    num_outliers: int
    sum: float
    abs_sum: float
    weight_head: Tensor
    x: Tensor
    y: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """One checkpoint; `references` and the logits after each prompt, [vocab_size] float32, are empty in a cut one."""

    path: Path
    linears: list[GoldenLinear]
    references: list[Reference]
    logits: list[Tensor]


def read_goldens() -> list[Golden]:
    """Every one that is here."""
    return [_read(path) for path in golden_dirs("squeezellm")]


def _read(path: Path) -> Golden:
    said = json.loads((path / "oracle" / "golden.json").read_text())
    tensors = load_file(path / "oracle" / "golden.safetensors")
    return Golden(
        path=path,
        linears=[_linear(prefix, stats, tensors) for prefix, stats in said["W_stats"].items()],
        references=[
            Reference(
                name=f"{path.name}/{index}",
                prompt_token_ids=prompt["input_ids"],
                token_ids=prompt["greedy32"],
                margins=prompt["top1_top2_margin"],
            )
            for index, prompt in enumerate(said["prompts"])
        ],
        logits=[tensors[f"logits_last_{index}"] for index in range(len(said["prompts"]))],
    )


def _linear(prefix: str, stats: dict[str, Any], tensors: dict[str, Tensor]) -> GoldenLinear:
    in_features, out_features = stats["shape_KN"]
    return GoldenLinear(
        prefix=prefix,
        shape=LinearShape(in_features=in_features, out_features=out_features),
        num_outliers=stats["nnz"],
        sum=stats["sum"],
        abs_sum=stats["abs_sum"],
        weight_head=tensors[f"W_head16.{prefix}"],
        x=tensors[f"x.{prefix}"],
        y=tensors[f"y_f64.{prefix}"],
    )
