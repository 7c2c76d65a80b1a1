"""`octavo plan`: sizes as people write them, a table or one JSON object, and a status that scripts can read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from llama_configs import LLAMA_3_8B, write_config
from lora_plugin import install_lora_plugin

from octavo.cli import main
from octavo.cli.plan import parse_bytes

LORA = ("--enable-lora", "--lora", "counted", "--max-loras")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_config(tmp_path / "llama", LLAMA_3_8B)


def octavo(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["plan", *arguments])
    return status, capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found = json.loads(octavo(capsys, *arguments, "--json")[1])
    assert isinstance(found, dict)
    return found


# ------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1234567", 1234567),
        ("80GiB", 80 * 2**30),
        ("80 gib", 80 * 2**30),
        ("1.5TiB", 3 * 2**39),
        ("512MiB", 2**29),
        ("4KiB", 4096),
        ("80GB", 80 * 10**9),
        ("0.1MB", 100_000),
        ("2kB", 2000),
        ("1TB", 10**12),
        ("7B", 7),
    ],
)
def test_sizes_are_read_exactly(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "80 gigs", "-1GiB", "8G iB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size; write bytes, or a number with KiB"):
        parse_bytes(text)


# -------------------------------------------------------------------------------------------------- what is printed


def test_table_of_a_model_that_fits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = octavo(capsys, model, "--device", "cuda", "--memory", "24GiB", "--tokens-per-request", "1000")
    assert status == 0
    assert out.splitlines() == [
        f"{model}: LlamaForCausalLM in bfloat16 on one cuda device",
        "",
        "  memory         25,769,803,776  24.00 GiB  as given",
        "  weights        16,060,522,496  14.96 GiB  16.00 bits a weight",
        "  rotary tables       4,194,304   0.00 GiB  8,192 positions",
        "  activations     1,050,673,152   0.98 GiB  estimated; an engine measures them",
        "  KV budget       6,077,433,446   5.66 GiB  the rest of gpu_memory_utilization=0.9",
        "  KV cache        6,075,449,344   5.66 GiB  2,097,152 bytes a block",
        "  left over       2,578,964,480   2.40 GiB",
        "",
        "  KV bytes a token  131,072",
        "  blocks              2,897  of 16 tokens",
        "  room               46,352  tokens",
        "  longest context     8,192  tokens, of 8,192",
        "  requests at once        5  of 8,192 tokens; at most max_num_seqs=256",
        "                         45  of 1,000 tokens; at most max_num_seqs=256",
        "",
        "It fits.",
    ]


def test_bytes_of_all_devices_stand_beside_those_of_each(
    model: str, site_packages: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    install_lora_plugin(site_packages)
    _, out = octavo(capsys, model, "--device", "cuda", "--memory", "24GiB", "--tensor-parallel-size", "8", *LORA, "2")
    assert "on 8 cuda devices" in out
    rows = {line.split("  ")[1]: line.split() for line in out.splitlines() if line.startswith("  ")}
    for label, name in (("weights", "weight_bytes"), ("adapters", "adapter_bytes"), ("KV cache", "kv_cache_bytes")):
        numbers = [int(word.replace(",", "")) for word in rows[label] if word.replace(",", "").isdecimal()]
        assert numbers[1] == 8 * numbers[0], name


def test_what_does_not_fit_is_status_1_with_advice(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = octavo(capsys, model, "--device", "cuda", "--memory", "16GB")
    assert status == 1
    assert "missing         1,115,389,952" in out
    assert "requests at once        0  of 8,192 tokens" in out
    verdict = out[out.index("It does not fit.") :].splitlines()
    assert verdict[1].startswith("Weights, rotary tables and activations take 17,115,389,952 bytes of each")
    assert verdict[2] == "Any of these does:"
    assert verdict[3].startswith("  - Raise tensor_parallel_size to 2 devices")


def test_a_cpu_s_activations_are_not_counted_and_come_out_of_what_is_left(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = octavo(capsys, model, "--device", "cpu", "--memory", "24GiB")
    assert "\n  activations" not in out
    assert out.splitlines()[7].endswith("GiB  for activations")


def test_fp8_is_a_byte_an_element_and_a_scale_for_each_head(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--device", "cuda", "--memory", "24GiB")
    plain, fp8 = as_json(capsys, model, *flags), as_json(capsys, model, *flags, "--kv-cache-dtype", "fp8")
    assert (plain["kv_bytes_per_token"], fp8["kv_bytes_per_token"]) == (131072, 131072 // 2 + 2 * 32 * 8 * 4)
    assert fp8["num_blocks"] > 1.9 * plain["num_blocks"]


def test_share_of_a_gpu_is_a_flag_of_the_plan(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--device", "cuda", "--memory", "24GiB")
    found = as_json(capsys, model, *flags, "--gpu-memory-utilization", "0.95")
    assert found["kv_cache_rule"] == "the rest of gpu_memory_utilization=0.95"
    assert found["kv_cache_budget"] - as_json(capsys, model, *flags)["kv_cache_budget"] == round(0.05 * 24 * 2**30)


def test_a_length_that_is_cut_short_is_status_0_with_what_would_serve_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_config(tmp_path, LLAMA_3_8B, max_position_embeddings=131072)
    status, out = octavo(capsys, model, "--device", "cuda", "--memory", "24GiB")
    assert status == 0
    assert "It fits.\nFor requests of up to 131,072 tokens, any of these does:\n  - Raise tensor_parallel_size" in out


def test_json_is_one_object_with_every_number(
    model: str, site_packages: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    install_lora_plugin(site_packages)
    found = as_json(capsys, model, "--device", "cuda", "--memory", "24GiB", "--tensor-parallel-size", "2", *LORA, "1")
    assert found["weight_bytes_of_all_ranks"] == 2 * found["weight_bytes"]
    assert (found["fits"], found["faults"], found["advice"]) == (True, [], [])
    assert found["memory"] == {"free_bytes": 24 * 2**30, "total_bytes": 24 * 2**30}
    assert (found["kv_bytes_per_token"], found["longest_context"]) == (65536, 8192)
    assert found["adapter_bytes"] > 0
    assert "cannot run it" in found["notes"][0]


def test_json_has_the_advice_as_data(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    advice = as_json(capsys, model, "--device", "cuda", "--memory", "16GB")["advice"]
    assert (advice[0]["setting"], advice[0]["value"]) == ("tensor_parallel_size", 2)


def test_the_model_may_be_named_with_or_without_its_flag(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--device", "cuda", "--memory", "24GiB")
    assert octavo(capsys, model, *flags) == octavo(capsys, "--model", model, *flags)


def test_without_a_size_this_machine_s_memory_is_planned_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "free on this machine" in octavo(capsys, model, "--device", "cpu")[1]


def test_a_wrong_size_is_status_2(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", model, "--memory", "lots"])
    assert caught.value.code == 2
    assert "'lots' is no size" in capsys.readouterr().err
