"""Adapters that peft saved over bases quantized by GPTQModel and AutoAWQ, with peft's own outputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import quantized_goldens as goldens
from margin_rule import check, generate, next_tokens_of, token_ids_of

# Without the plugin that reads a format, what remains is tested.
FORMATS = {"gptq": "octavo_quant_gptq", "awq": "octavo_quant_awq", "squeezellm": "octavo_quant_squeezellm"}
ADAPTER = "lora-r8"
BASES = [
    path
    for prefix, package in FORMATS.items()
    if importlib.util.find_spec(package)
    for path in goldens.golden_dirs(prefix)
    if (path / "oracle" / ADAPTER).is_dir()
]


@pytest.mark.parametrize("linear_kernel", ["torch-packed", "torch-dequantized"])
@pytest.mark.parametrize("path", BASES, ids=lambda path: path.name)
def test_logits_and_tokens_are_those_of_peft(path: Path, linear_kernel: str) -> None:
    oracle = goldens.read_oracle(path, ADAPTER)
    with goldens.make_llm(path, linear_kernel=linear_kernel, enable_lora=True, max_loras=1) as llm:
        llm.load_adapter(ADAPTER, str(path / "oracle" / ADAPTER))
        goldens.check_logits(llm, oracle, ADAPTER)
        goldens.check_tokens(llm, oracle, ADAPTER)


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.name)
def test_requests_without_the_adapter_get_the_base_beside_those_with_it(path: Path) -> None:
    with_adapter, plain = goldens.read_oracle(path, ADAPTER).references, goldens.read_oracle(path).references
    in_turns = [reference for pair in zip(with_adapter, plain, strict=True) for reference in pair]
    with goldens.make_llm(path, enable_lora=True, max_loras=1) as llm:
        llm.load_adapter(ADAPTER, str(path / "oracle" / ADAPTER))
        found = token_ids_of(generate(llm, in_turns, [ADAPTER, None] * len(plain)))
        check(with_adapter, found[::2], next_tokens_of(llm, ADAPTER), goldens.MARGINS["float32"])
        check(plain, found[1::2], next_tokens_of(llm), goldens.MARGINS["float32"])
