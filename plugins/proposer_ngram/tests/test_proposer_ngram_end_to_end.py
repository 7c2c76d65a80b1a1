"""Chosen by name behind the whole engine: no output changes, and a text that repeats itself takes fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import LLM, SamplingParams

PROMPTS = ["abcabcabc", "thequickbrownfoxthequick", "zz", "xyxyxyxyxy"]
SETTINGS: dict[str, Any] = {"dtype": "float32", "block_size": 4, "max_num_seqs": 4}
NGRAM = {"name": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights; its tokens are letters, and what it says runs in circles."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=26,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
    ).save_pretrained(path)
    tokenizer = Tokenizer(BPE(vocab={chr(ord("a") + index): index for index in range(26)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def llms(folder: Path) -> Iterator[tuple[LLM, LLM]]:
    """Without and with prompt lookup."""
    with LLM(str(folder), **SETTINGS) as without, LLM(str(folder), proposer=NGRAM, **SETTINGS) as speculating:
        yield without, speculating


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_output_is_the_same_token_for_token(llms: tuple[LLM, LLM], temperature: float) -> None:
    each = [SamplingParams(temperature=temperature, seed=seed, max_tokens=60, ignore_eos=True) for seed in range(4)]
    without, speculating = ([output.outputs for output in llm.generate(PROMPTS, each)] for llm in llms)
    assert speculating == without
    assert llms[1].stats().num_drafts


def test_a_text_that_repeats_itself_takes_fewer_steps(llms: tuple[LLM, LLM]) -> None:
    each = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    for llm in llms:
        llm.generate(PROMPTS, each)
    without, speculating = (llm.stats() for llm in llms)
    assert speculating.num_steps < 0.7 * without.num_steps
    assert speculating.num_accepted_drafts > 0.5 * speculating.num_drafts
