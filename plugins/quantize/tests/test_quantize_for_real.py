"""The demo model is quantised by gptqmodel itself and answers. Needs what scripts/quantize_env makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo import LLM, SamplingParams
from octavo.cli import main


@pytest.mark.full
def test_demo_model_quantised_by_gptq_still_knows_the_capital_of_france(tmp_path: Path) -> None:
    few = ("--num-samples", "8", "--sample-tokens", "128", "--group-size", "64", "--no-report")
    assert main(["quantize", "demo", "--method", "gptq", "--output", str(tmp_path / "gptq"), *few]) == 0
    with LLM(str(tmp_path / "gptq"), max_model_len=64) as llm:
        assert llm.manifest.components["quantization"].name == "gptq"
        params = SamplingParams(temperature=0.0, max_tokens=8)
        assert "Paris" in llm.generate("The capital of France is", params)[0].outputs[0].text
