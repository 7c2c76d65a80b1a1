"""Adapters as peft saves them, through a whole engine on a tiny model: it answers as peft's merged models do."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from greedy_reference import prompts, reference_of
from margin_rule import Reference, check, generate, greedy, next_tokens_of, token_ids_of
from tiny_model import EOS, write_tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from octavo import LLM, BeamSearchParams, LoRARequest, RequestOutput, SamplingParams
from octavo.errors import AdapterError
from octavo.interfaces import AdapterWeights
from octavo_lora.placement import PlacedLora

NUM_TOKENS = 16
BLOCK_BYTES = 2 * 2 * 16 * 2 * 12 * 4  # layers, keys and values, tokens, KV heads, head_dim, float32

ADAPTERS: dict[str, dict[str, Any]] = {
    "rank4": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "rank8": {"r": 8, "target_modules": "all-linear"},
    "rank64": {"r": 64, "target_modules": ["gate_proj", "up_proj", "down_proj"], "lora_alpha": 16},
    "rslora": {"r": 3, "use_rslora": True, "target_modules": r".*\.(k_proj|o_proj)"},
    "dora": {"r": 5, "use_dora": True, "target_modules": ["v_proj", "o_proj", "up_proj"]},
    "ends": {"r": 2, "target_modules": ["embed_tokens", "lm_head"]},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "no prefix cache": {"enable_prefix_caching": False},
    "chunks": {"max_num_batched_tokens": 7},
    "preemptions": {"kv_cache_memory_bytes": 14 * BLOCK_BYTES},
    "two steps in flight": {"max_steps_in_flight": 2},
    "two positions": {"max_loras": 2, "max_cpu_loras": 3},
    "all of it": {
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 7,
        "kv_cache_memory_bytes": 8 * BLOCK_BYTES,
        "max_steps_in_flight": 2,
        "max_loras": 2,
        "max_cpu_loras": 2,
    },
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A model, its adapters, and the model merged with each of them; None is the model as it is."""

    model: Path
    paths: dict[str, str]
    merged: dict[str | None, PreTrainedModel]
    references: dict[str | None, list[Reference]]

    def load(self, **settings: Any) -> LLM:
        defaults = {"max_loras": len(ADAPTERS), "max_lora_rank": 64, "lora_modules": self.paths, "dtype": "float32"}
        return LLM(str(self.model), enable_lora=True, **defaults | settings)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("adapters-in-engine")
    model = write_tiny_llama(folder / "model")

    def base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    merged: dict[str | None, PreTrainedModel] = {None: base()}
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        adapter = save_adapter(folder / name, model=base(), seed=seed, **fields)
        merged[name] = adapter.merge_and_unload()
    return Scene(
        model=model,
        paths={name: str(folder / name) for name in ADAPTERS},
        merged=merged,
        references={
            name: [reference_of(each, prompt, NUM_TOKENS) for prompt in prompts(5, 40)] for name, each in merged.items()
        },
    )


@pytest.fixture
def llm(scene: Scene) -> Iterator[LLM]:
    with scene.load() as llm:
        yield llm


def tokens(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_mixed_batch_gives_each_request_the_merged_models_tokens(scene: Scene, settings: dict[str, Any]) -> None:
    names = [name for _ in range(2) for name in scene.references]
    references = [scene.references[name][index // len(scene.references)] for index, name in enumerate(names)]
    with scene.load(**settings) as llm:
        found = token_ids_of(generate(llm, references, names))
        assert bool(llm.stats().num_preemptions) == ("kv_cache_memory_bytes" in settings)
        for name in scene.references:
            chosen = [index for index, each in enumerate(names) if each == name]
            check([references[i] for i in chosen], [found[i] for i in chosen], next_tokens_of(llm, name))


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_at_every_token_of_a_prompt_are_the_merged_models(scene: Scene, name: str) -> None:
    [_, prompt] = prompts(5, 40)
    with scene.load(max_logprobs=-1) as llm, torch.inference_mode():
        params = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
        (output,) = llm.generate([prompt], params, adapter=name)
        wanted = scene.merged[name](torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    assert output.prompt_logprobs is not None
    entries = [entry for entry in output.prompt_logprobs if entry is not None]
    found = torch.tensor([[entry[token_id].logprob for token_id in range(wanted.shape[1])] for entry in entries])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_a_request_gets_in_a_mixed_batch_what_it_gets_alone(scene: Scene, llm: LLM) -> None:
    """To the token: in these models the best logit is never near the second."""
    names = [*scene.references]
    prompt = scene.references[None][0].prompt_token_ids
    alone = [token_ids_of(llm.generate([prompt], greedy(NUM_TOKENS), adapter=name))[0] for name in names]
    assert token_ids_of(llm.generate([prompt] * len(names), greedy(NUM_TOKENS), adapter=names)) == alone
    assert len(set(map(tuple, alone))) == len(names)


def test_siblings_have_their_prompts_adapter(scene: Scene, llm: LLM) -> None:
    params = SamplingParams(n=2, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    names: list[str | None] = ["rank8", None, "dora"]
    wanted = [scene.references[name][1] for name in names]
    outputs = llm.generate([each.prompt_token_ids for each in wanted], params, adapter=names)
    assert tokens(outputs) == [[each.token_ids] * 2 for each in wanted]


@pytest.mark.parametrize("name", ["rank8", "dora", "ends"])
def test_beams_with_an_adapter_are_those_of_the_merged_model(scene: Scene, llm: LLM, name: str) -> None:
    [prompt] = prompts(9)
    found = llm.beam_search([prompt], BeamSearchParams(beam_width=3, max_tokens=6), adapter=name)[0]
    wanted = scene.merged[name].generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    cut = [[*row[:9], *(token for token in row[9:] if token != EOS)] for row in wanted.tolist()]
    assert [sequence.tokens for sequence in found.sequences] == cut


def test_equal_prompts_share_what_is_cached_under_equal_weights_only(scene: Scene, llm: LLM) -> None:
    prompt = scene.references[None][1].prompt_token_ids
    llm.load_adapter("another name", scene.paths["rank4"])

    def num_cached(name: str | None) -> int | None:
        return llm.generate([prompt], greedy(1), adapter=name)[0].num_cached_tokens

    assert [num_cached(name) for name in ("rank4", "rank8", None)] == [0, 0, 0]
    assert [num_cached(name) for name in ("rank4", "rank8", None, "another name")] == [32, 32, 32, 32]


def test_other_weights_under_one_name_give_their_own_answer(scene: Scene, llm: LLM) -> None:
    references = {name: scene.references[name][1:] for name in ("rank8", "dora")}
    for name in ("rank8", "dora", "rank8"):
        llm.load_adapter("name", scene.paths[name], replace=True)
        check(references[name], token_ids_of(generate(llm, references[name], "name")), next_tokens_of(llm, "name"))
    llm.unload_adapter("name")
    request = LoRARequest("name", 1, scene.paths["dora"])
    prompt = references["dora"][0].prompt_token_ids
    (output,) = llm.generate([prompt], greedy(NUM_TOKENS), lora_request=request)
    assert output.outputs[0].token_ids == references["dora"][0].token_ids


def test_unloading_frees_every_tensor(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    held = weakref.WeakSet[torch.Tensor]()
    load = PlacedLora.load

    def watched(self: PlacedLora, *arguments: Any) -> AdapterWeights:
        adapter = load(self, *arguments)
        held.update(tensor for each in adapter.low_ranks.values() for tensor in (each.a, each.b))
        return adapter

    monkeypatch.setattr(PlacedLora, "load", watched)
    with scene.load(lora_modules={}) as llm:
        for _ in range(2):
            for name, path in scene.paths.items():
                llm.load_adapter(name, path)
                generate(llm, scene.references[name], name)
            assert llm.stats().num_adapters_in_memory == len(scene.paths)
            assert len(held) > len(scene.paths)
            for name in scene.paths:
                llm.unload_adapter(name)
            stats = llm.stats()
            assert (llm.adapters(), stats.num_adapters_in_memory, stats.num_adapters_placed) == ([], 0, 0)
            assert len(held) == 0


def test_what_cannot_be_read_leaves_the_others_as_they_were(scene: Scene, llm: LLM, tmp_path: Path) -> None:
    before = llm.adapters()
    save_adapter(tmp_path / "other", target_modules=["q_proj"])  # of a model of other sizes
    with pytest.raises(AdapterError, match="q_proj"):
        llm.load_adapter("other", str(tmp_path / "other"))
    assert llm.adapters() == before
    references = scene.references["rank4"]
    check(references, token_ids_of(generate(llm, references, "rank4")), next_tokens_of(llm, "rank4"))
