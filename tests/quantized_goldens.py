"""Golden checkpoints: quantized by the tools that people use, with what those tools say of them.

In `tests/golden/quantized` lies a part of them; those of a folder that OCTAVO_GOLDEN_DIR names are checked as well. All
but `unit-layers` are folders as the tool saved them, of two layers and a vocabulary of 2048, with an `oracle` in each;
`manifest.json` names the tool and its command.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import margin_rule
import torch
from margin_rule import Reference
from safetensors.torch import load_file
from torch import Tensor

from octavo import LLM, SamplingParams
from octavo.interfaces import LinearShape, QuantizationMethod, StoredLinear
from octavo.nn.factory import build_linears

TOLERANCES: Mapping[str, float] = {"float32": 0.03, "float16": 0.1, "bfloat16": 1.0}
"""Largest error of a logprob by the model's dtype; logits reach 60. In float32 it is that most tools round dequantised
weights to 16 bits and we do not."""

MARGINS: Mapping[str, float] = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.25}
"""Where the best logit is above the second by as much, the greedy token is certain; two logits err together."""

COMMITTED = Path(__file__).parent / "golden" / "quantized"

_UNIT_LAYERS = "unit-layers"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightStats:
    """Of one dequantised weight, rounded to `dtype` as the tool did.

    Attributes:
        shape: [in_features, out_features], as the tool holds it.
        sum, abs_sum: of its numbers and their magnitudes, added in float64.
    """

    shape: LinearShape
    dtype: torch.dtype
    sum: float
    abs_sum: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Oracle:
    """What the tool says of its own checkpoint.

    Attributes:
        references: of each prompt, 32 greedy tokens, and at each step how far the best logit was above the second.
        logits: of each prompt, [vocab_size] float32 after its last token: activations in float32, weights as the tool
            dequantises them.
        weight_stats: by the name of the linear; {} for an adapter.
        weight_heads: by the name of some linears, [16, out_features]: of the first 16 inputs, as the tool rounds them.
        tensors: all that the oracle has.
    """

    references: list[Reference]
    logits: list[Tensor]
    weight_stats: Mapping[str, WeightStats]
    weight_heads: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]


def golden_dirs(prefix: str) -> list[Path]:
    """The checkpoints whose names begin with it, each name once, sorted."""
    roots = [COMMITTED, *map(Path, filter(None, [os.environ.get("OCTAVO_GOLDEN_DIR")]))]
    found: dict[str, Path] = {}
    for root in roots:
        for path in root.glob(f"{prefix}*"):
            if path.is_dir() and path.name != _UNIT_LAYERS:
                found.setdefault(path.name, path)
    assert found, f"no golden checkpoint is named {prefix}... in {' or '.join(map(str, roots))}"
    return [found[name] for name in sorted(found)]


def unit_layers(prefix: str) -> list[tuple[str, Mapping[str, Any], dict[str, Tensor]]]:
    """Single linears by real packers whose names begin with it: (name, entry of the index, tensors).

    Beside those of the checkpoint the tensors hold x [5, in_features] float32, W_f32_KN [in_features, out_features]
    float32, the weight in exact products, and y_f64 [5, out_features] float64, x @ W_f32_KN and the bias.
    """
    folder = COMMITTED / _UNIT_LAYERS
    index = json.loads((folder / "index.json").read_text())
    entries = [entry for entry in index if entry["name"].startswith(prefix)]
    assert entries, f"no unit layer is named {prefix}..."
    return [(entry["name"], entry, load_file(folder / f"{entry['name']}.safetensors")) for entry in entries]


def read_oracle(golden: Path, adapter: str | None = None) -> Oracle:
    """Of a golden checkpoint; of the adapter in `oracle/<adapter>` on it, when one is named."""
    folder = golden / "oracle" / (adapter or "")
    said, tensors = json.loads((folder / "golden.json").read_text()), load_file(folder / "golden.safetensors")
    prefix = "W_head16."
    heads = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
    return Oracle(
        references=[
            Reference(
                name=f"{golden.name}/{index}",
                prompt_token_ids=prompt["input_ids"],
                token_ids=prompt["greedy32"],
                margins=prompt["top1_top2_margin"],
            )
            for index, prompt in enumerate(said["prompts"])
        ],
        logits=[tensors[f"logits_last_{index}"] for index in range(len(said["prompts"]))],
        weight_stats={name: _weight_stats(stats, heads) for name, stats in said.get("W_stats", {}).items()},
        weight_heads=heads,
        tensors=tensors,
    )


def _weight_stats(stats: Mapping[str, Any], heads: Mapping[str, Tensor]) -> WeightStats:
    in_features, out_features = stats.get("shape") or stats["shape_KN"]
    [dtype] = {head.dtype for head in heads.values()}
    return WeightStats(
        shape=LinearShape(in_features=in_features, out_features=out_features),
        dtype=dtype,
        sum=stats["sum"],
        abs_sum=stats["abs_sum"],
    )


def make_llm(golden: Path, **settings: Any) -> LLM:
    """An engine of the checkpoint, in float32 and by plain torch unless settings say otherwise."""
    defaults = {"dtype": "float32", "attention": "torch", "kernels": "torch", "max_logprobs": -1, "max_model_len": 256}
    return LLM(str(golden), **{**defaults, **settings})


def check_engine_against(golden: Path, oracle: Oracle, **settings: Any) -> None:
    """Check weights, logits and tokens of an engine with these settings of LLM.

    Raises:
        AssertionError: names the linear or the prompt that differs.
    """
    with make_llm(golden, **settings) as llm:
        check_weights(llm, oracle)
        check_logits(llm, oracle)
        check_tokens(llm, oracle)


def check_weights(llm: LLM, oracle: Oracle) -> None:
    """Every dequantised weight is the tool's, bit by bit where it is recorded, else in its sums."""
    method, tensors = _method_and_tensors(llm)
    assert oracle.weight_stats
    for name, stats in oracle.weight_stats.items():
        assert method.quantizes(name), f"{name} is not taken as quantized"
        stored = _stored_linear(method, name, stats.shape, tensors)
        weight = method.dequantize(stored).to(stats.dtype).T
        if (head := oracle.weight_heads.get(name)) is not None:
            assert torch.equal(weight[: len(head)], head), f"{name}: other weights than the tool's"
        sums = torch.stack([weight.double().sum(), weight.double().abs().sum()])
        wanted = torch.tensor([stats.sum, stats.abs_sum], dtype=torch.float64)
        allowed = 1e-10 * stats.abs_sum  # less than if one weight of 16 bits were rounded otherwise
        assert (sums - wanted).abs().max() <= allowed, f"{name}: sums {sums.tolist()}, wanted {wanted.tolist()}"


def check_logits(llm: LLM, oracle: Oracle, adapter: str | None = None) -> None:
    """The logprobs of the whole vocabulary after each prompt are the recorded ones."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, logprobs=-1)
    prompts = [reference.prompt_token_ids for reference in oracle.references]
    outputs = llm.generate(prompts, params, adapter=adapter)
    tolerance = TOLERANCES[llm.manifest.dtype]
    for reference, output, logits in zip(oracle.references, outputs, oracle.logits, strict=True):
        assert output.outputs[0].logprobs is not None
        (entry,) = output.outputs[0].logprobs
        found = torch.tensor([entry[token_id].logprob for token_id in range(len(logits))])
        error = (found - logits.log_softmax(-1)).abs().max().item()
        assert error <= tolerance, f"{reference.name}: a logprob is off by {error:.4f}, allowed is {tolerance}"


def check_tokens(llm: LLM, oracle: Oracle, adapter: str | None = None) -> None:
    """The greedy tokens are the recorded ones, wherever the margin allows only one."""
    found = margin_rule.token_ids_of(margin_rule.generate(llm, oracle.references, adapter))
    next_tokens = margin_rule.next_tokens_of(llm, adapter)
    margin_rule.check(oracle.references, found, next_tokens, margin=MARGINS[llm.manifest.dtype])


def _method_and_tensors(llm: LLM) -> tuple[QuantizationMethod, Mapping[str, Tensor]]:
    """What the engine reads its checkpoint with, made once more; and what lies in the checkpoint."""
    manifest = llm.manifest
    checkpoint = manifest.components["checkpoint"].build(manifest.model_path)
    method, _ = build_linears(
        manifest.components,
        manifest.linear_kernels,
        manifest.quantization_config,
        getattr(torch, manifest.dtype),
        manifest.device,
        checkpoint.tensor_headers(),
    )
    return method, dict(checkpoint.tensors())


def _stored_linear(
    method: QuantizationMethod, prefix: str, shape: LinearShape, tensors: Mapping[str, Tensor]
) -> StoredLinear:
    names = [spec.name for spec in method.parameters(prefix, shape) if spec.name != "bias"]
    return StoredLinear(prefix=prefix, shape=shape, tensors={name: tensors[f"{prefix}.{name}"] for name in names})
