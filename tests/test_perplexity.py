"""Perplexity: transformers' number over the same windows, and `octavo eval perplexity`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import MAX_POSITIONS, VOCAB_SIZE, token_ids_of, write_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo import LLM
from octavo.cli import main
from octavo.errors import ConfigError, RequestError
from octavo.perplexity import perplexity

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float32", attention="torch", kernels="torch") as llm:
        yield llm


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@torch.no_grad()
def perplexity_of_transformers(folder: Path, window: int) -> float:
    """As the docstring of `perplexity` says it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    windows = [torch.tensor([token_ids[start : start + window]]) for start in range(0, len(token_ids), window)]
    windows = [ids for ids in windows if ids.shape[1] >= 2]
    losses = [model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in windows]
    return math.exp(sum(losses) / sum(ids.shape[1] - 1 for ids in windows))


# ------------------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("window", [2, 7, 64, MAX_POSITIONS - 1])
def test_perplexity_is_that_of_transformers(llm: LLM, folder: Path, window: int) -> None:
    assert perplexity(llm, TEXT, window).value == pytest.approx(perplexity_of_transformers(folder, window), rel=1e-5)


def test_without_a_window_it_is_the_longest_there_is_room_for(llm: LLM) -> None:
    assert perplexity(llm, TEXT, None).window == MAX_POSITIONS - 1


def test_model_that_knows_nothing_hesitates_between_all_tokens(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path, initializer_range=1e-9)
    with LLM(str(folder), dtype="float32", attention="torch", kernels="torch") as llm:
        assert perplexity(llm, TEXT, 32).value == pytest.approx(VOCAB_SIZE, rel=1e-6)


def test_all_tokens_but_the_first_of_each_window_are_scored(llm: LLM) -> None:
    found = perplexity(llm, token_ids_of("a" * 25), 10)
    assert (found.num_tokens, found.num_windows, found.num_scored_tokens) == (25, 3, 22)


def test_last_token_that_is_left_alone_is_not_read(llm: LLM) -> None:
    token_ids = token_ids_of("The clocks, and one")
    alone = perplexity(llm, token_ids, len(token_ids) - 1)
    assert alone == perplexity(llm, token_ids[:-1], len(token_ids) - 1)
    assert alone.num_windows == 1


def test_max_tokens_reads_the_beginning(llm: LLM) -> None:
    token_ids = llm.get_tokenizer().encode(TEXT)
    assert perplexity(llm, TEXT, 16, max_tokens=40) == perplexity(llm, token_ids[:40], 16)


@pytest.mark.parametrize("window", [1, MAX_POSITIONS])
def test_window_without_a_scored_token_or_room_is_refused(llm: LLM, window: int) -> None:
    with pytest.raises(ConfigError, match=f"2 to {MAX_POSITIONS - 1} tokens.*found {window}"):
        perplexity(llm, TEXT, window)


def test_max_tokens_of_one_is_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="max_tokens must be 2 or more"):
        perplexity(llm, TEXT, 16, max_tokens=1)


def test_text_of_one_token_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="the text has 1"):
        perplexity(llm, token_ids_of("a"), 16)


def test_progress_counts_windows(llm: LLM) -> None:
    class Bar:
        def __init__(self, total: int, **named: object) -> None:
            self.total, self.done, self.closed = total, 0, False
            bars.append(self)

        def update(self, n: int) -> None:
            self.done += n

        def set_postfix_str(self, s: str, refresh: bool) -> None: ...

        def close(self) -> None:
            self.closed = True

    bars = list[Bar]()
    found = perplexity(llm, TEXT, 20, make_bar=Bar)
    assert [(bar.total, bar.done, bar.closed) for bar in bars] == [(found.num_windows, found.num_windows, True)]


# -------------------------------------------------------------------------------------- octavo eval perplexity


def evaluate(folder: Path, text: Path, *options: str) -> int:
    settings = ["--dtype", "float32", "--attention", "torch", "--kernels", "torch"]
    return main(["eval", "perplexity", str(folder), "--text", str(text), *settings, *options])


def test_command_prints_what_the_function_finds_as_json(
    folder: Path, llm: LLM, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, text_file, "--window", "32", "--max-tokens", "100", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    expected = perplexity(llm, TEXT, 32, max_tokens=100)
    assert found["value"] == pytest.approx(expected.value, rel=1e-6)
    assert (found["num_tokens"], found["window"], found["dtype"]) == (100, 32, "float32")


def test_command_prints_a_table_without_json(folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(folder, text_file, "--window", "max_model_len") == 0
    lines = dict(line.strip().rsplit(None, 1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["tokens a window"] == str(MAX_POSITIONS - 1)
    assert float(lines["perplexity"].replace(",", "")) > 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b" \n", "is empty"), (b"\xff\xfe", "cannot be read.*UTF-8")],
    ids=["missing", "empty", "no UTF-8"],
)
def test_command_refuses_a_file_that_is_no_text_before_a_model_is_loaded(
    tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert evaluate(tmp_path / "no model", path) == 1
    assert re.search(f"{re.escape(str(path))}.*{message}", capsys.readouterr().err)


def test_command_refuses_a_window_that_is_no_number(
    folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate(folder, text_file, "--window", "wide")
    assert "'wide' is no number of tokens" in capsys.readouterr().err
