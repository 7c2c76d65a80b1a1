"""Perplexity of quantized models is transformers', when transformers computes with the same dequantised weights.

The weights are dequantised here by numpy, which shares nothing with the plugins. The models are the folders in
OCTAVO_QUANTIZED_DIR: the demo model as `octavo quantize` made it. And always, in float32, small ones that the formats'
own tools made: models of two layers, so lost in the text (17.8 nats a token) that what bfloat16 rounds anywhere is more
than 1 % of their perplexity. As a script, which prints a table:

    python tests/demo_model/test_perplexity_of_quantized.py FOLDER ...
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from octavo import LLM
from octavo.perplexity import Perplexity, perplexity

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "benchmarks" / "texts" / "perplexity.txt").read_text(encoding="utf-8")
WINDOW = 256
TOLERANCES = {"float32": 0.002, "bfloat16": 0.01}
"""Relative, from transformers in float32."""

Array = NDArray[Any]


def cases() -> list[tuple[Path, str]]:
    """(folder, dtype); one without a tokenizer, which is a piece of a model, reads no text."""

    def whole_models(parent: Path) -> list[Path]:
        return [folder for folder in sorted(parent.iterdir()) if (folder / "tokenizer.json").is_file()]

    golden = [(folder, "float32") for folder in whole_models(ROOT / "tests" / "golden" / "quantized")]
    made = os.environ.get("OCTAVO_QUANTIZED_DIR")
    return golden + [(folder, dtype) for folder in (whole_models(Path(made)) if made else ()) for dtype in TOLERANCES]


@pytest.mark.full
@pytest.mark.parametrize(("folder", "dtype"), cases(), ids=lambda value: Path(value).name)
def test_perplexity_is_that_of_transformers_with_the_same_weights(folder: Path, dtype: str) -> None:
    found = perplexity_of_octavo(folder, dtype).value
    assert found == pytest.approx(perplexity_of_transformers(folder), rel=TOLERANCES[dtype])


def perplexity_of_octavo(folder: Path, dtype: str) -> Perplexity:
    with LLM(str(folder), dtype=dtype, max_model_len=WINDOW + 1) as llm:
        return perplexity(llm, TEXT, WINDOW)


@cache
@torch.no_grad()
def perplexity_of_transformers(folder: Path) -> float:
    """In float32, over the windows of `octavo.perplexity`."""
    model = dequantized_model(folder)
    token_ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    windows = [torch.tensor([token_ids[start : start + WINDOW]]) for start in range(0, len(token_ids) - 1, WINDOW)]
    losses = [model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in windows]
    return math.exp(math.fsum(losses) / sum(ids.shape[1] - 1 for ids in windows))


def dequantized_model(folder: Path) -> PreTrainedModel:
    """transformers' plain Llama in float32, with the folder's weights."""
    config = json.loads((folder / "config.json").read_text())
    told = config.pop("quantization_config", {})
    tensors = read_tensors(folder)
    state = {}
    for name in tensors:
        prefix, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            parts = {
                key.removeprefix(f"{prefix}."): as_array(value)
                for key, value in tensors.items()
                if key.startswith(f"{prefix}.")
            }
            state[f"{prefix}.weight"] = torch.from_numpy(dequantize(parts, told).astype(np.float32))
        elif suffix in ("weight", "bias"):
            state[name] = tensors[name].float()
    model = LlamaForCausalLM(LlamaConfig(**config | {"dtype": "float32"})).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config["tie_word_embeddings"] else []
    assert (missing, unexpected) == (tied, [])
    model.tie_weights()
    return model


def read_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        (file,) = folder.glob("*.pt")
        found = torch.load(file, weights_only=True)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def as_array(tensor: Tensor) -> Array:
    """Words as unsigned ones, floats as float64."""
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy().view(np.uint32)


# ------------------------------------------------------------------------------------------------ three formats


def dequantize(parts: dict[str, Array], told: dict[str, Any]) -> Array:
    """W [out_features, in_features] float64."""
    if "lookup_table" in parts:
        return dequantize_squeezellm(parts)
    return dequantize_awq(parts) if told["quant_method"] == "awq" else dequantize_gptq(parts, told)


def unpack(words: Array, bits: int) -> Array:
    """[rows, words] -> [rows, codes] int64, a little-endian stream of bits through each row."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return stream.astype(np.int64) @ (1 << np.arange(bits))


def dequantize_gptq(parts: dict[str, Array], told: dict[str, Any]) -> Array:
    """scales[g(k), n] * (q[k, n] - z[g(k), n]): codes packed along k, zeros along n, less one in format v1."""
    group_of, scales, qzeros = parts["g_idx"].astype(np.int64), parts["scales"], parts["qzeros"]
    bits = len(parts["qweight"]) * 32 // len(group_of)
    if told["checkpoint_format"] == "gptq" and bits != 3:  # one is added to all of a word's fields at once
        qzeros = qzeros + np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    zeros = unpack(qzeros, bits)[:, : scales.shape[1]]
    if told["checkpoint_format"] == "gptq" and bits == 3:
        zeros = (zeros + 1) % 8
    codes = unpack(parts["qweight"].T, bits)
    return scales[group_of].T * (codes - zeros[group_of].T)


def dequantize_awq(parts: dict[str, Array]) -> Array:
    """scales[k // gs, n] * (q[k, n] - z[k // gs, n]): four bits, packed along n, eight columns of a word shuffled."""
    order = [0, 4, 1, 5, 2, 6, 3, 7]

    def columns(words: Array) -> Array:
        codes = unpack(words, 4)
        return codes.reshape(len(codes), -1, 8)[:, :, order].reshape(codes.shape)

    codes, zeros = columns(parts["qweight"]), columns(parts["qzeros"])
    group_of = np.arange(len(codes)) // (len(codes) // len(zeros))
    return (parts["scales"][group_of] * (codes - zeros[group_of])).T


def dequantize_squeezellm(parts: dict[str, Array]) -> Array:
    """lookup_table[n, q[k, n]] + S[n, k]: codes packed along k, S in compressed sparse rows."""
    table = parts["lookup_table"]
    weight = np.take_along_axis(table, unpack(parts["qweight"].T, int(math.log2(table.shape[1]))), axis=1)
    if "rows" in parts:
        outputs = np.repeat(np.arange(len(weight)), np.diff(parts["rows"].astype(np.int64)))
        np.add.at(weight, (outputs, parts["cols"].astype(np.int64)), parts["vals"])
    return weight


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of quantized Llamas, beside transformers'.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = parser.parse_args().folders
    print("| model | dtype | octavo | transformers, float32 | difference | allowed | seconds |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for folder in folders:
        reference = perplexity_of_transformers(folder)
        for dtype, tolerance in TOLERANCES.items():
            start = time.monotonic()
            found = perplexity_of_octavo(folder, dtype).value
            seconds = time.monotonic() - start
            print(
                f"| {folder.name} | {dtype} | {found:.5f} | {reference:.5f} | {found / reference - 1:+.4%} "
                f"| {tolerance:.1%} | {seconds:.0f} |",
                flush=True,
            )
            assert abs(found / reference - 1) <= tolerance


if __name__ == "__main__":
    main()
