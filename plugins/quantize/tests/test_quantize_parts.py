"""The parts of `octavo quantize` by themselves: plain folders, texts, progress, the environment's place."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel_stand_in import write_environment
from tiny_model import token_ids_of, write_tiny_llama
from torch import Tensor

import octavo
from octavo import LLM, HuggingFaceCheckpoint, SamplingParams
from octavo.errors import ConfigError
from octavo.interfaces import Checkpoint, TensorHeader, TokenizerData
from octavo_quantize.gptqmodel_process import Job, environment_folder, run_gptqmodel
from octavo_quantize.gptqmodel_worker import variables
from octavo_quantize.plain_folder import plain_folder, write_plain_folder
from octavo_quantize.texts import EVALUATED_TOPICS, calibration_text, cut_samples, evaluation_text


@dataclass(frozen=True)
class OtherFormat(Checkpoint):
    """A tiny Llama that is no folder: what a GGUF file is."""

    folder: HuggingFaceCheckpoint
    dtype: torch.dtype

    def config(self) -> Mapping[str, Any]:
        return self.folder.config()

    def generation_config(self) -> Mapping[str, Any]:
        return self.folder.generation_config()

    def tokenizer(self) -> TokenizerData:
        return self.folder.tokenizer()

    def tensor_headers(self) -> Mapping[str, TensorHeader]:
        return self.folder.tensor_headers()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.to(self.dtype)) for name, tensor in self.folder.tensors())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> OtherFormat:
    """Stored in bfloat16, read in float32, as dequantised weights are."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"), dtype="bfloat16")
    return OtherFormat(HuggingFaceCheckpoint(str(folder)), torch.float32)


# ----------------------------------------------------------------------------------------------- plain folders


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 4 << 30])
def test_plain_folder_loads_again_with_equal_tensors(source: OtherFormat, tmp_path: Path, shard_bytes: int) -> None:
    write_plain_folder(source, tmp_path / "plain", shard_bytes)
    written = dict(octavo.open_checkpoint(str(tmp_path / "plain")).tensors())
    stored = dict(source.folder.tensors())
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_plain_folder_of_one_shard_has_no_index(source: OtherFormat, tmp_path: Path) -> None:
    write_plain_folder(source, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]


def test_shards_are_named_by_their_index_in_their_order(source: OtherFormat, tmp_path: Path) -> None:
    write_plain_folder(source, tmp_path, shard_bytes=20_000)
    files = sorted(path.name for path in tmp_path.glob("model-*"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert list(dict.fromkeys(index["weight_map"].values())) == files


def test_plain_folder_answers_as_its_source(source: OtherFormat, tmp_path: Path) -> None:
    write_plain_folder(source, tmp_path)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    answers = []
    for folder in (source.folder.path, str(tmp_path)):
        with LLM(folder, dtype="float32", attention="torch", kernels="torch") as llm:
            answers.append(llm.chat([{"role": "user", "content": "hello"}], greedy)[0].outputs[0].token_ids)
    assert answers[0] == answers[1]


def test_folder_in_hugging_face_s_format_is_taken_as_it_is(source: OtherFormat, tmp_path: Path) -> None:
    assert plain_folder(source.folder, tmp_path / "scratch") == Path(source.folder.path)
    assert not (tmp_path / "scratch").exists()


# ------------------------------------------------------------------------------------------------------- texts


def test_calibration_and_evaluation_share_no_paragraph() -> None:
    calibrated, evaluated = (
        {one.strip() for one in text.split("\n\n")} for text in (calibration_text(), evaluation_text())
    )
    assert calibrated & evaluated == set()


def test_calibration_text_is_long_and_repeats_nothing() -> None:
    paragraphs = [one.strip() for one in calibration_text().split("\n\n") if one.strip()]
    assert sum(map(len, paragraphs)) > 300_000
    assert len(set(paragraphs)) == len(paragraphs)


def test_evaluation_text_is_the_committed_one_of_this_python() -> None:
    readme = Path(__file__).resolve().parents[3] / "benchmarks" / "texts" / "README.md"
    told = readme.read_text(encoding="utf-8")
    assert [name for name in EVALUATED_TOPICS if f"`{name}`" not in told] == []


def test_samples_are_evenly_apart_over_the_text(source: OtherFormat) -> None:
    text = "".join(chr(ord("a") + index % 26) for index in range(100))
    samples = cut_samples(source.tokenizer().tokenizer, text, num_samples=3, sample_tokens=10)
    assert samples == [token_ids_of(text)[start : start + 10] for start in (0, 33, 66)]


def test_text_that_is_just_long_enough_is_cut_whole(source: OtherFormat) -> None:
    samples = cut_samples(source.tokenizer().tokenizer, "abcdef", num_samples=2, sample_tokens=3)
    assert samples == [token_ids_of("abc"), token_ids_of("def")]


def test_text_that_is_too_short_says_how_many_tokens_it_has(source: OtherFormat) -> None:
    with pytest.raises(ConfigError, match="need 8 tokens, and the calibration text has 6"):
        cut_samples(source.tokenizer().tokenizer, "abcdef", num_samples=2, sample_tokens=4)


# ------------------------------------------------------------------------------------------------ the other process


def test_each_layer_is_told_once(source: OtherFormat, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    python = write_environment(tmp_path / "environment") / "bin" / "python"
    job = Job(
        folder=source.folder.path, output=str(tmp_path / "result"), method="awq", settings={}, samples=[[1, 2, 3]]
    )
    run_gptqmodel(job, python, tmp_path, lambda part, num_done, total: told.append((part, num_done, total)))
    assert told == [("awq: layers", 1, 2), ("awq: layers", 2, 2)]


def test_interrupt_ends_the_other_process(source: OtherFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "lingers")
    start = time.monotonic()

    def interrupt(part: str, num_done: int, total: int) -> None:
        raise KeyboardInterrupt

    python = write_environment(tmp_path / "environment") / "bin" / "python"
    job = Job(folder=source.folder.path, output=str(tmp_path / "result"), method="gptq", settings={}, samples=[[1]])
    with pytest.raises(KeyboardInterrupt):
        run_gptqmodel(job, python, tmp_path, interrupt)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(("num_cores", "workers"), [(1, "2"), (2, "2"), (3, None), (64, None)])
def test_pool_has_two_workers_where_half_of_the_cores_are_fewer(num_cores: int, workers: str | None) -> None:
    assert variables(num_cores).get("GPTQMODEL_CPU_WORKERS") == workers


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"OCTAVO_QUANTIZE_ENV": "/a", "OCTAVO_CACHE": "/b"}, "/a"),
        ({"OCTAVO_CACHE": "/b", "XDG_CACHE_HOME": "/c"}, "/b/quantize-env"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/octavo/quantize-env"),
        ({}, str(Path.home() / ".cache" / "octavo" / "quantize-env")),
    ],
)
def test_environment_is_where_it_is_said_to_be(environ: dict[str, str], folder: str) -> None:
    assert environment_folder(environ) == Path(folder)
