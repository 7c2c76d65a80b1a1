"""benchmarks/lora_churn.py in small: what it measures of an engine, and that it tells right answers from wrong ones."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_llama

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # they are scripts, not a package

lora_churn, drawn_adapters = map(importlib.import_module, ("lora_churn", "drawn_adapters"))


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Five adapters in a folder, three clients and two positions, on a model with the workloads' vocabulary."""
    model = write_tiny_llama(tmp_path / "model", vocab_size=49152)
    drawn_adapters.draw_adapters(tmp_path / "adapters", str(model), 5, 4)
    octavo = '{"max_model_len": 128, "max_cpu_loras": 2}'
    words = (
        f"--model {model} --threads 1 --adapters 5 --rank 4 --positions 2 --clients 3 --base-clients 1 --requests 9 "
    )
    words += f"--tokens 4 --base-tokens 8 --sample 6 --worker churn --folder {tmp_path / 'adapters'} --octavo"
    monkeypatch.setattr(sys, "argv", ["lora_churn.py", *words.split(), octavo])
    parsed: argparse.Namespace = lora_churn.parse_arguments()
    return parsed


def test_adapters_come_and_go_and_each_sampled_answer_is_right(args: argparse.Namespace) -> None:
    found = asyncio.run(lora_churn.measure(args))
    assert (found.variant, found.num_checked, found.num_wrong) == ("churn", 6, 0)
    assert found.num_loads > 2
    assert found.longest_gap_seconds >= found.p99_gap_seconds > 0


def test_where_all_are_resident_none_is_read_while_requests_run(args: argparse.Namespace) -> None:
    args.worker, args.octavo = "resident", {"max_model_len": 128}
    assert asyncio.run(lora_churn.measure(args)).num_loads == 0


def test_an_answer_with_another_adapter_is_wrong(args: argparse.Namespace) -> None:
    async def judged() -> list[bool]:
        from octavo import AsyncLLM

        lora: dict[str, Any] = {"enable_lora": True, "lora_root": args.folder, "max_model_len": 128}
        with AsyncLLM(args.model, dtype="float32", **lora) as llm:
            asked = await lora_churn.ask(llm, [5, 6, 7], "adapter-0", 16)
            swapped = [replace(asked, adapter=name) for name in ("adapter-0", "adapter-1", None)]
            return [await lora_churn.is_right(llm, each, 1e-3) for each in swapped]

    assert asyncio.run(judged()) == [True, False, False]


def test_the_table_puts_the_longest_gap_beside_that_of_resident_adapters() -> None:
    numbers = {"p99_gap_seconds": 0.1, "num_gaps": 9, "ttft_seconds": 1.0, "requests_per_second": 2.0, "num_loads": 4}
    numbers |= {"num_checked": 8, "num_wrong": 1, "wall_seconds": 3.0}
    runs = [
        lora_churn.Measurement(variant=variant, longest_gap_seconds=gap, **numbers)
        for variant, gap in (("churn", 0.3), ("resident", 0.2))
    ]
    assert "| churn | 0.300 | 1.50 | 0.100 | 1.00 | 2.00 | 4 | 1 of 8 |" in lora_churn.table(runs)
