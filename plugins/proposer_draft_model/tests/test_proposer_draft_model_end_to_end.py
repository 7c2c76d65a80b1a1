"""Chosen by name behind the whole engine: no output changes, and a draft model that agrees saves most steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import LLM, CompletionOutput, SamplingParams
from octavo.errors import ConfigError, ModelNotFoundError

VOCAB_SIZE = 26
PROMPTS = ["abcabcabc", "thequickbrownfoxjumpsoverthelazydog", "zz", "xyxyxyxyxy"]
NUM_TOKENS = 40
BLOCK_SIZE = 4
BYTES_PER_BLOCK = 4 * BLOCK_SIZE * (2 * 8)  # float32: one layer, keys and values, one head of 8
SETTINGS: dict[str, Any] = {"dtype": "float32", "block_size": BLOCK_SIZE, "max_num_seqs": 4}

MakeLLM = Callable[..., LLM]


def write_model(path: Path, *, seed: int, letters: str = "abcdefghijklmnopqrstuvwxyz", **changes: Any) -> Path:
    """A tiny Llama of random weights; its tokens are letters."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(letters),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    LlamaForCausalLM(LlamaConfig(**(sizes | changes))).save_pretrained(path)
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served model."""
    return write_model(tmp_path_factory.mktemp("served"), seed=0)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights, fewer positions: it seldom agrees, and has nothing to say on long texts."""
    return write_model(tmp_path_factory.mktemp("stranger"), seed=1, max_position_embeddings=60)


@pytest.fixture
def make_llm(folder: Path) -> Iterator[MakeLLM]:
    made = []

    def make(model: Path | None = None, options: dict[str, Any] | None = None, **settings: Any) -> LLM:
        if model is not None:
            settings["proposer"] = {"name": "draft_model", "model": str(model), **(options or {})}
        made.append(LLM(str(folder), **(SETTINGS | settings)))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()


def params(temperature: float = 0.0, **fields: Any) -> list[SamplingParams]:
    return [
        SamplingParams(
            **{"temperature": temperature, "seed": seed, "max_tokens": NUM_TOKENS, "ignore_eos": True, **fields}
        )
        for seed in range(len(PROMPTS))
    ]


def generate(llm: LLM, each: list[SamplingParams]) -> list[CompletionOutput]:
    return [output.outputs[0] for output in llm.generate(PROMPTS, each)]


# ---------------------------------------------------------------------------------------------------- same output


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        pytest.param({}, {}, id="batched"),
        pytest.param({"max_num_seqs": 1}, {}, id="alone"),
        pytest.param({"max_num_batched_tokens": 6}, {}, id="chunked"),
        pytest.param({"kv_cache_memory_bytes": 32 * BYTES_PER_BLOCK}, {}, id="preempted"),
        pytest.param({"max_steps_in_flight": 2}, {}, id="two steps in flight"),
        pytest.param({"num_speculative_tokens": 9}, {}, id="guesses over several blocks"),
        pytest.param({}, {"kv_cache_memory_bytes": 20 * BYTES_PER_BLOCK}, id="draft model short of blocks"),
    ],
)
@pytest.mark.parametrize("agrees", [True, False], ids=["agrees", "seldom agrees"])
def test_guesses_change_no_output(
    make_llm: MakeLLM,
    folder: Path,
    stranger: Path,
    agrees: bool,
    settings: dict[str, Any],
    options: dict[str, Any],
    temperature: float,
) -> None:
    wanted = generate(make_llm(), params(temperature))
    llm = make_llm(folder if agrees else stranger, options, **settings)
    for _ in range(2):
        assert generate(llm, params(temperature)) == wanted
    assert llm.stats().kv_usage == 0


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_model_that_drafts_for_itself_is_always_right(make_llm: MakeLLM, folder: Path, temperature: float) -> None:
    """Sampled as well, for both draw with the same noise."""
    llm = make_llm(folder, num_speculative_tokens=4)
    generate(llm, params(temperature))
    stats = llm.stats()
    assert stats.num_accepted_drafts == stats.num_drafts
    assert stats.num_steps == 1 + -(-(NUM_TOKENS - 1) // 5)


def test_a_stranger_is_seldom_right(make_llm: MakeLLM, stranger: Path) -> None:
    llm = make_llm(stranger)
    generate(llm, params())
    stats = llm.stats()
    assert stats.num_drafts > 0
    assert stats.num_accepted_drafts < stats.num_drafts / 2


def test_it_guesses_nothing_past_its_own_positions(make_llm: MakeLLM, stranger: Path) -> None:
    llm = make_llm(stranger)
    long = "ab" * 35
    llm.generate(long, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    assert llm.stats().num_drafts == 0


def test_with_too_few_blocks_of_its_own_it_guesses_for_some_only(make_llm: MakeLLM, folder: Path) -> None:
    many, few = make_llm(folder), make_llm(folder, {"kv_cache_memory_bytes": 14 * BYTES_PER_BLOCK})
    for llm in (many, few):
        generate(llm, params())
    assert 0 < few.stats().num_drafts < many.stats().num_drafts


def test_what_ended_requests_held_is_free_again(make_llm: MakeLLM, folder: Path) -> None:
    """One request fills the draft model's cache; twenty one after the other are guessed equally well."""
    llm = make_llm(folder, {"kv_cache_memory_bytes": 14 * BYTES_PER_BLOCK})
    drafts = []
    for _ in range(20):
        before = llm.stats().num_drafts
        llm.generate("abcabcabc", params()[0])
        drafts.append(llm.stats().num_drafts - before)
    assert len(set(drafts)) == 1


# ---------------------------------------------------------------------------------------------------------- start


def test_its_memory_is_counted_and_said(make_llm: MakeLLM, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo")
    without, both = make_llm(), make_llm(folder)
    assert f"Draft model {folder} takes" in caplog.text
    assert "128 blocks" in caplog.text  # as many as the served model has: 4 requests of 128 tokens
    reports = [llm._assembly.report for llm in (without, both)]
    assert reports[1].weight_bytes == 2 * reports[0].weight_bytes
    assert reports[1].kv_cache_bytes == 2 * reports[0].kv_cache_bytes
    assert reports[1].num_blocks == reports[0].num_blocks


def test_another_vocabulary_size_is_refused_with_both_numbers(make_llm: MakeLLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocabulary of 20 tokens and .* one of 26"):
        make_llm(write_model(tmp_path, seed=0, letters="abcdefghijklmnopqrst"))


def test_another_tokenizer_is_refused_with_the_first_difference(make_llm: MakeLLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"another tokenizer .* 2 ids are not the same token, the first of them 0"):
        make_llm(write_model(tmp_path, seed=0, letters="bacdefghijklmnopqrstuvwxyz"))


def test_a_draft_model_that_is_not_there_is_an_error_at_start(make_llm: MakeLLM, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        make_llm(tmp_path / "nowhere")


def test_a_draft_model_that_cannot_be_loaded_is_an_error_at_start(make_llm: MakeLLM, tmp_path: Path) -> None:
    path = write_model(tmp_path, seed=0)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(Exception, match="gate_proj"):
        make_llm(path)


def test_without_a_model_it_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="model: Field required"):
        LLM(str(folder), proposer="draft_model", **SETTINGS)


def test_explain_shows_its_options(make_llm: MakeLLM, folder: Path) -> None:
    settings = {one.name: one.value for one in make_llm(folder).explain().settings}
    assert settings["proposer"] == "proposer-draft-model/draft_model"
    assert settings["proposer.model"] == str(folder)
