"""Both policies behind the whole engine: chosen by name, with options, for requests with priorities and tenants."""

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
from octavo.errors import ConfigError, UnknownNameError
from octavo.interfaces import Step

PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights; its tokens are letters."""
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
            max_position_embeddings=64,
        )
    ).save_pretrained(path)
    tokenizer = Tokenizer(BPE(vocab={chr(ord("a") + index): index for index in range(26)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def make_llm(folder: Path) -> Iterator[Any]:
    made: list[LLM] = []

    def make(**scheduler: Any) -> LLM:
        made.append(LLM(str(folder), dtype="float32", block_size=4, max_num_seqs=1, scheduler=scheduler))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()


def order_of_entry(llm: LLM, prompts: list[str], **arguments: Any) -> list[str]:
    """The prompts in the order the engine began them."""
    entered: list[str] = []

    def listen(step: Step) -> None:
        entered.extend(new_row.request_id for new_row in step.entering)

    llm.engine.step_listeners.append(listen)
    outputs = {output.request_id: output.prompt for output in llm.generate(prompts, PARAMS, **arguments)}
    return [str(outputs[request_id]) for request_id in entered]


def test_tenants_take_turns_by_their_weights(make_llm: Any) -> None:
    llm = make_llm(name="fair", tenant_weights={"b": 2.0})
    prompts = ["aaa", "aab", "aac", "baa", "bab", "bac", "bad"]
    order = order_of_entry(llm, prompts, tenant=[prompt[0] for prompt in prompts])
    assert order == ["aaa", "baa", "bab", "aab", "bac", "bad", "aac"]


def test_lower_priorities_go_first(make_llm: Any) -> None:
    assert order_of_entry(make_llm(name="priority"), ["a", "b", "c"], priority=[2, 0, 1]) == ["b", "c", "a"]


def test_the_policy_tells_its_numbers_while_it_works(make_llm: Any) -> None:
    llm = make_llm(name="fair", output_weight=10)
    stream = llm.stream("abc", PARAMS, tenant="x")
    next(stream)
    assert llm.stats().policy_metrics["max_counter"] == 3 + 10
    stream.close()
    assert llm.stats().policy_metrics["num_active_tenants"] == 0


def test_an_option_that_is_misspelt_is_refused_with_the_nearest(make_llm: Any) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'tenant_weights'"):
        make_llm(name="fair", tenant_weight={"a": 2})


def test_installing_the_package_does_not_change_what_is_chosen(make_llm: Any) -> None:
    assert make_llm().manifest.components["scheduler"].full_name == "builtin/fcfs"


def test_a_misspelt_policy_is_refused_with_the_nearest(make_llm: Any) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'priority'"):
        make_llm(name="priorities")
