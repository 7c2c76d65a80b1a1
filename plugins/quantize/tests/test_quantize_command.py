"""`octavo quantize`: what it asks of gptqmodel, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gptqmodel_stand_in import write_environment
from tiny_model import MAX_POSITIONS, write_tiny_llama

from octavo.cli import main

SAMPLES = ("--num-samples", "3", "--sample-tokens", "16")
Quantize = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def quantize(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quantize:
    """Run the command on the tiny model, with a text of its own and without a report; returns its exit status."""
    monkeypatch.setenv("OCTAVO_QUANTIZE_ENV", str(write_environment(tmp_path / "environment")))
    text = tmp_path / "text"
    text.write_text("".join(chr(ord("a") + index % 26) for index in range(500)))

    def run(*arguments: str, output: Path = tmp_path / "out" / "quantized") -> int:
        always = ("--output", str(output), "--calibration", str(text), "--no-report", *SAMPLES)
        return main(["quantize", str(model), *always, *arguments])

    return run


@pytest.fixture
def told(quantize: Quantize, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """What gptqmodel was told when the command ran with these arguments."""

    def run(*arguments: str) -> dict[str, object]:
        assert quantize(*arguments) == 0
        found: dict[str, object] = json.loads((tmp_path / "out" / "quantized" / "told.json").read_text())
        return found

    return run


def left_behind(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "out").iterdir()] if (tmp_path / "out").exists() else []


# ------------------------------------------------------------------------------------------ what gptqmodel is asked


def test_gptq_is_symmetric_in_groups_of_128(told: Callable[..., dict[str, object]]) -> None:
    assert told("--method", "gptq")["settings"] == {
        "method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "offload_to_disk": False,
    }


def test_awq_has_zero_points(told: Callable[..., dict[str, object]]) -> None:
    assert told("--method", "awq", "--group-size", "16")["settings"] == {
        "method": "awq",
        "bits": 4,
        "group_size": 16,
        "sym": False,
        "format": "gemm",
        "offload_to_disk": False,
    }


@pytest.mark.parametrize("options", [("--group-size", "-1"), ("--desc-act",)], ids=" ".join)
def test_groups_are_not_ordered_by_activations_where_gptqmodel_cannot(
    told: Callable[..., dict[str, object]], options: tuple[str, ...]
) -> None:
    settings = told("--method", "gptq", *options)["settings"]
    assert isinstance(settings, dict)
    assert settings["act_group_aware"] is False


def test_asymmetric_groups_and_bits_are_passed_on(told: Callable[..., dict[str, object]]) -> None:
    settings = told("--method", "gptq", "--asymmetric", "--bits", "3")["settings"]
    assert isinstance(settings, dict)
    assert (settings["sym"], settings["bits"]) == (False, 3)


def test_samples_are_as_many_and_as_long_as_asked(told: Callable[..., dict[str, object]]) -> None:
    samples = told("--method", "gptq")["samples"]
    assert isinstance(samples, list)
    assert [len(sample["input_ids"]) for sample in samples] == [16, 16, 16]
    assert [sample["attention_mask"] for sample in samples] == [[1] * 16] * 3


def test_tokenizer_is_the_source_s_whatever_the_tool_wrote(quantize: Quantize, model: Path, tmp_path: Path) -> None:
    assert quantize("--method", "gptq") == 0
    written = (tmp_path / "out" / "quantized" / "tokenizer.json").read_bytes()
    assert written == (model / "tokenizer.json").read_bytes()


def test_what_gptqmodel_reads_from_the_environment_is_set(
    told: Callable[..., dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "7")  # the user's own
    assert told("--method", "gptq")["variables"] == {"TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "7"}


def test_nothing_but_the_model_is_left_behind(quantize: Quantize, tmp_path: Path) -> None:
    assert quantize("--method", "gptq") == 0
    assert left_behind(tmp_path) == ["quantized"]


def test_squeezellm_needs_no_environment(quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_QUANTIZE_ENV", str(tmp_path / "nowhere"))
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # starting processes takes longer than the work
    output = tmp_path / "out" / "quantized"
    words = write_tiny_llama(tmp_path / "words", hidden_size=32, intermediate_size=64)
    arguments = ("--method", "squeezellm", "--sparsity", "0.01", "--seed", "1", "--output", str(output), *SAMPLES)
    text = tmp_path / "text"
    assert main(["quantize", str(words), "--calibration", str(text), "--no-report", *arguments]) == 0
    assert json.loads((output / "quant_config.json").read_text()) == {"wbits": 4}


# --------------------------------------------------------------------------------------------------- the report


def test_report_compares_the_perplexity_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OCTAVO_QUANTIZE_ENV", str(write_environment(tmp_path / "environment")))
    model = write_tiny_llama(tmp_path / "tiny", max_position_embeddings=512)
    for name, text in (("calibration", "abcdefgh" * 20), ("evaluation", "hgfedcba" * 5)):
        (tmp_path / name).write_text(text)
    texts = ("--calibration", str(tmp_path / "calibration"), "--evaluation", str(tmp_path / "evaluation"))
    output = tmp_path / "quantized"
    assert main(["quantize", str(model), "--method", "gptq", "--output", str(output), *texts, *SAMPLES]) == 0
    head, before, after = capsys.readouterr().out.splitlines()[-3:]
    assert head == "perplexity of 40 tokens"  # 41 with the one that begins the text, which is not foretold
    assert before.split()[0] == str(model)
    assert after.split()[0] == str(output)
    assert after.split()[1:] == [before.split()[1], "+0.00%"]  # the stand-in changes nothing


def test_report_on_the_calibration_s_own_text_is_refused(
    quantize: Quantize, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(tmp_path / "text")
    arguments = ("--method", "gptq", "--output", str(tmp_path / "out"), "--calibration", text, "--evaluation", text)
    assert main(["quantize", str(model), *arguments]) == 1
    assert "are the same text" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- what is refused


def test_missing_environment_names_the_command_that_makes_it(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OCTAVO_QUANTIZE_ENV", str(tmp_path / "nowhere"))
    assert quantize("--method", "awq") == 1
    assert f"`python scripts/quantize_env {tmp_path / 'nowhere'}`" in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_environment_without_the_tool_is_none(
    quantize: Quantize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    next((tmp_path / "environment").rglob("__init__.py")).unlink()
    assert quantize("--method", "gptq") == 1
    assert "scripts/quantize_env" in capsys.readouterr().err


def test_unknown_method_is_told_the_known_ones(quantize: Quantize, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quantize("--method", "exl2")
    assert "gptq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--method", "awq", "--bits", "3"), "awq has 4 bits, not 3"),
        (("--method", "squeezellm", "--bits", "2"), "squeezellm has 3 or 4 bits, not 2"),
        (("--method", "gptq", "--bits", "5"), "gptq has 2, 3, 4 or 8 bits, not 5"),
        (
            ("--method", "squeezellm", "--group-size", "64"),
            "--group-size is an option of gptq or awq, not of squeezellm",
        ),
        (("--method", "awq", "--desc-act"), "--desc-act is an option of gptq, not of awq"),
        (("--method", "awq", "--asymmetric"), "--asymmetric is an option of gptq, not of awq"),
        (("--method", "gptq", "--sparsity", "0"), "--sparsity is an option of squeezellm, not of gptq"),
        (("--method", "gptq", "--group-size", "0"), "--group-size is a number of inputs or -1 for all of them, not 0"),
        (("--method", "gptq", "--num-samples", "0"), "calibration needs one sample of two tokens or more, not 0 of 16"),
        (("--method", "gptq", "--calibration", "no/such"), "--calibration no/such cannot be read"),
        (("--method", "gptq", "--num-samples", "40"), "40 samples of 16 tokens need 640 tokens, and the calibration"),
        (("--method", "gptq", "--sample-tokens", "129"), f"the model's longest text, {MAX_POSITIONS} tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals_say_what_was_wanted_and_what_was_found(
    quantize: Quantize,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    assert quantize(*arguments) == 1
    assert sentence in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_output_that_exists_is_left_alone(
    quantize: Quantize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "diary").write_text("dear diary")
    assert quantize("--method", "gptq", output=output) == 1
    assert f"--output {output} is there already" in capsys.readouterr().err
    assert [file.name for file in output.iterdir()] == ["diary"]


def test_quantized_source_is_refused(quantize: Quantize, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_llama(tmp_path / "quantized")
    (folder / "quantize_config.json").write_text('{"quant_method": "gptq", "bits": 4}')
    arguments = ("--method", "gptq", "--calibration", str(tmp_path / "text"), "--no-report", *SAMPLES)
    assert main(["quantize", str(folder), "--output", str(tmp_path / "out" / "x"), *arguments]) == 1
    assert "is quantized already, by gptq" in capsys.readouterr().err
    assert left_behind(tmp_path) == []


# --------------------------------------------------------------------------------------------------- what goes wrong


def test_failure_quotes_the_tool_s_last_lines_and_leaves_nothing(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN", "fails")
    assert quantize("--method", "gptq") == 1
    error = capsys.readouterr().err
    assert "gptqmodel ended with status 1" in error
    assert "RuntimeError: layer 1 is singular" in error
    assert "Loading   0 %" not in error  # drawn over by what came after it
    assert "Loading 100 %" in error
    assert left_behind(tmp_path) == []


def test_tool_that_ends_well_but_early_has_failed(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN", "dies")
    assert quantize("--method", "gptq") == 1
    assert "gptqmodel ended with status 0 before the model was quantised" in capsys.readouterr().err
    assert left_behind(tmp_path) == []
