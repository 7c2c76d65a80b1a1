"""LoRA adapters through a whole engine, by a backend in plain loops: each request is answered as by a merged model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import capture_on_cpu
from plain_lora import PlainLora, install_plain_lora
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_llama, write_tokenizer

from octavo import LLM, AsyncLLM, BeamSearchParams, LoRARequest, RequestOutput, SamplingParams
from octavo.errors import AdapterError, ConfigError, RequestError
from octavo.interfaces import LoraBase, LoraModule
from octavo.runner.graphs import DecodeGraphs

PROMPTS = ["hello", "a longer prompt than the others", "x", "hello world"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LORA: dict[str, Any] = {"enable_lora": True, "lora": "plain", "max_loras": 2}
BLOCK_BYTES = 2 * 8 * 2 * 12 * 4 * 2  # key and value, tokens, KV heads, head_dim, float32, layers

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), attention_bias=True)


@pytest.fixture
def make_llm(folder: Path, site_packages: Any) -> Iterator[MakeLLM]:
    install_plain_lora(site_packages)
    made: list[LLM] = []

    def make(model: Path = folder, **settings: Any) -> LLM:
        made.append(LLM(str(model), **{"dtype": "float32", "block_size": 8, "max_num_seqs": 8, **LORA, **settings}))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()


class ModulesOf(LoraBase):
    """Of a folder's linears: names and sizes from its tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.modules = {
            name.removesuffix(".weight"): LoraModule(
                name=name.removesuffix(".weight"),
                in_features=tensor.shape[1],
                out_features=tensor.shape[0],
                kind="head" if "lm_head" in name else "linear",
            )
            for name, tensor in tensors.items()
            if tensor.ndim == 2 and "embed" not in name
        }

    def weights(self, names: Any) -> Any:
        raise NotImplementedError


def merged(folder: Path, adapter: str, target: Path) -> Path:
    """The model with an adapter's products added to its weights."""
    tensors = load_file(folder / "model.safetensors")
    low_ranks = PlainLora.load(object.__new__(PlainLora), adapter, ModulesOf(tensors)).low_ranks
    for name, low_rank in low_ranks.items():
        tensors[f"{name}.weight"] += low_rank.b @ low_rank.a
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, target / "model.safetensors")
    write_tokenizer(target)
    return target


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize("adapter", ["linears", "the head"])
def test_an_adapters_answers_are_those_of_the_merged_model(
    adapter: str, folder: Path, make_llm: MakeLLM, tmp_path: Path
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=2, prompt_logprobs=2)
    found = make_llm().generate(PROMPTS, params, lora_request=LoRARequest("one", 1, adapter))
    wanted = make_llm(merged(folder, adapter, tmp_path / "merged"), enable_lora=False).generate(PROMPTS, params)
    assert tokens(found) == tokens(wanted)
    for one, other in zip(found, wanted, strict=True):
        of_one, of_other = (
            [*(each.prompt_logprobs or [])[1:], *(each.outputs[0].logprobs or [])] for each in (one, other)
        )
        assert len(of_one) == len(of_other) > 8
        for logprobs, expected in zip(of_one, of_other, strict=True):
            assert logprobs is not None
            assert expected is not None
            assert {token: pytest.approx(one.logprob, abs=1e-4) for token, one in expected.items()} == {
                token: one.logprob for token, one in logprobs.items()
            }


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"max_num_batched_tokens": 7},
    "preemptions": {"kv_cache_memory_bytes": 11 * BLOCK_BYTES, "max_model_len": 64, "max_loras": 3},
    "two steps in flight": {"max_steps_in_flight": 2},
    "more adapters than positions": {"max_loras": 1},
    "one position and one place in memory": {"max_loras": 1, "max_cpu_loras": 1},
}
MIX = ["one", None, "two", "head"]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_each_request_of_a_mixed_batch_gets_what_it_gets_alone(settings: dict[str, Any], make_llm: MakeLLM) -> None:
    modules = {"lora_modules": {name: name for name in ("one", "two", "head")}}
    alone = make_llm(**modules, max_loras=3)
    wanted = [alone.generate(prompt, GREEDY, adapter=name)[0] for prompt, name in zip(PROMPTS, MIX, strict=True)]
    together = make_llm(**modules, **settings)
    assert tokens(together.generate(PROMPTS, GREEDY, adapter=MIX)) == tokens(wanted)
    if settings.get("kv_cache_memory_bytes"):
        assert together.stats().num_preemptions


def test_adapters_change_the_answers(make_llm: MakeLLM) -> None:
    llm = make_llm(lora_modules={name: name for name in ("one", "two", "head")}, max_loras=3)
    answers = llm.generate(["hello"] * 4, GREEDY, adapter=MIX)
    assert len({tuple(output.outputs[0].token_ids) for output in answers}) == 4


def test_captured_steps_with_adapters_and_without_give_the_tokens_of_plain_ones(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {"lora_modules": {"one": "one", "two": "two"}}
    mixes: list[list[str | None]] = [["one", None, "two", "one"], [None] * 4]
    plain = make_llm(**modules)
    wanted = [tokens(plain.generate(PROMPTS, GREEDY, adapter=mix)) for mix in mixes]
    variants: list[bool] = []
    replay = DecodeGraphs.replay

    def record(self: DecodeGraphs, size: int, with_adapters: bool) -> Any:
        variants.append(with_adapters)
        return replay(self, size, with_adapters)

    capture_on_cpu(monkeypatch, (1, 2, 4, 8))
    monkeypatch.setattr(DecodeGraphs, "replay", record)
    captured = make_llm(**modules)
    for mix, expected in zip(mixes, wanted, strict=True):
        variants.clear()
        assert tokens(captured.generate(PROMPTS, GREEDY, adapter=mix)) == expected
        assert set(variants) == {any(mix)}


def test_steps_with_adapters_of_a_backend_that_no_graph_can_hold_are_computed_anew(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tokens(make_llm(lora_modules={"one": "one"}).generate(PROMPTS, GREEDY, adapter="one"))
    monkeypatch.setattr(PlainLora, "can_be_captured", False)
    capture_on_cpu(monkeypatch, (1, 2, 4, 8))
    monkeypatch.setattr(DecodeGraphs, "replay", lambda *_: pytest.fail("there is no such graph"))
    assert tokens(make_llm(lora_modules={"one": "one"}).generate(PROMPTS, GREEDY, adapter="one")) == wanted


def test_a_batch_without_adapters_plans_nothing(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []
    monkeypatch.setattr(PlainLora, "plan", lambda self, positions, captured=False: plans.append(positions))
    make_llm(lora_modules={"one": "one"}).generate(PROMPTS, GREEDY)
    assert plans == []


def test_the_head_is_planned_only_where_an_adapter_changes_it(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[bool] = []
    apply = PlainLora.apply

    def record(self: PlainLora, slot: Any, x: Any, output: Any) -> Any:
        heads.append(slot.is_head)
        return apply(self, slot, x, output)

    monkeypatch.setattr(PlainLora, "apply", record)
    llm = make_llm(lora_modules={"one": "one", "head": "head"})
    llm.generate("hello", GREEDY, adapter="one")
    assert heads
    assert not any(heads)
    llm.generate("hello", GREEDY, adapter="head")
    assert any(heads)


def test_completions_of_one_prompt_share_their_adapter(make_llm: MakeLLM) -> None:
    llm = make_llm(lora_modules={"one": "one"})
    params = [SamplingParams(temperature=1.0, seed=5, max_tokens=8, n=n) for n in (3, 1)]
    several, first = llm.generate(["hello"] * 2, params, adapter="one")
    assert several.outputs[0].token_ids == first.outputs[0].token_ids
    assert len({tuple(completion.token_ids) for completion in several.outputs}) == 3


def test_a_beam_search_with_an_adapter_is_the_merged_models(folder: Path, make_llm: MakeLLM, tmp_path: Path) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    found = make_llm(lora_modules={"one": "one"}).beam_search("hello", params, adapter="one")
    plain = make_llm(merged(folder, "one", tmp_path / "merged"), enable_lora=False)
    wanted = plain.beam_search("hello", params)
    assert [one.tokens for one in found[0].sequences] == [one.tokens for one in wanted[0].sequences]


def test_equal_prompts_share_blocks_only_under_one_adapter(make_llm: MakeLLM) -> None:
    llm = make_llm(lora_modules={"one": "one", "two": "two"})
    prompt = "hello world, hello world"
    cached = [llm.generate(prompt, GREEDY, adapter=name)[0].num_cached_tokens for name in ("one", "two", None, "one")]
    assert cached == [0, 0, 0, 24]


def test_a_replaced_adapter_answers_at_once_and_takes_nothing_from_the_cache(make_llm: MakeLLM) -> None:
    llm = make_llm(lora_modules={"name": "one", "other": "two"})
    before, wanted = llm.generate(["hello world, hello"] * 2, GREEDY, adapter=["name", "other"])
    llm.load_adapter("name", "two", replace=True)
    (after,) = llm.generate("hello world, hello", GREEDY, adapter="name")
    assert after.outputs[0].token_ids == wanted.outputs[0].token_ids != before.outputs[0].token_ids


def test_what_runs_keeps_the_weights_it_began_with(make_llm: MakeLLM) -> None:
    llm = make_llm(lora_modules={"name": "one"})
    (wanted,) = llm.generate("hello", GREEDY, adapter="name")
    stream = llm.stream("hello", GREEDY, adapter="name")
    next(stream)
    llm.load_adapter("name", "two", replace=True)
    *_, last = stream
    assert last.outputs[0].token_ids == wanted.outputs[0].token_ids


def test_an_unloaded_adapter_is_not_known(make_llm: MakeLLM) -> None:
    llm = make_llm(lora_modules={"one": "one"})
    assert [status.name for status in llm.adapters()] == ["one"]
    llm.unload_adapter("one")
    assert llm.adapters() == []
    with pytest.raises(AdapterError, match="There is no adapter 'one'"):
        llm.generate("hello", GREEDY, adapter="one")


def test_the_reports_adapter_bytes_are_the_backends(make_llm: MakeLLM) -> None:
    assert make_llm().start_report.adapter_bytes == 2000


WRONG_WISHES: dict[str, tuple[dict[str, Any], str]] = {
    "both ways": ({"adapter": "one", "lora_request": LoRARequest("one", 1, "one")}, "not by both"),
    "another number": ({"adapter": ["one"]}, "4 prompts came with 1 adapters"),
    "a number": ({"adapter": 3}, "found 3"),
    "a name as a request": ({"lora_request": ["one"] * 4}, "lora_request is a LoRARequest"),
    "a request as a name": ({"adapter": [LoRARequest("one", 1, "one")] * 4}, "adapter is a name"),
}


@pytest.mark.parametrize(("wish", "message"), WRONG_WISHES.values(), ids=WRONG_WISHES)
def test_a_wish_that_says_nothing_clear_is_refused(wish: dict[str, Any], message: str, make_llm: MakeLLM) -> None:
    with pytest.raises(RequestError, match=message):
        make_llm().generate(PROMPTS, GREEDY, **wish)


def test_a_name_with_another_path_is_refused_and_the_first_stays(make_llm: MakeLLM) -> None:
    llm = make_llm(lora_modules={"name": "one"})
    with pytest.raises(AdapterError, match="is that of 'one'; 'two' was asked for"):
        llm.generate("hello", GREEDY, lora_request=LoRARequest("name", 1, "two"))
    assert llm.adapters()[0].path == "one"


def test_an_engine_without_adapters_says_how_to_serve_them(make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match="set enable_lora=True"):
        make_llm(enable_lora=False).generate("hello", GREEDY, adapter="one")


@pytest.mark.parametrize("number", [0, -1, True, "1"])
def test_a_lora_request_has_a_number_from_1(number: Any) -> None:
    with pytest.raises(RequestError, match="an integer of at least 1"):
        LoRARequest("one", number, "path")


def test_async_requests_load_their_adapters_beside_each_other(
    folder: Path, make_llm: MakeLLM, site_packages: Any
) -> None:
    wanted = tokens(
        make_llm(lora_modules={"one": "one", "two": "two"}).generate(["hello"] * 2, GREEDY, adapter=["one", "two"])
    )

    async def answer(llm: AsyncLLM, name: str) -> list[int]:
        async for output in llm.generate("hello", GREEDY, lora_request=LoRARequest(name, 1, name)):
            last = output
        return last.outputs[0].token_ids

    async def run() -> None:
        with AsyncLLM(str(folder), dtype="float32", block_size=8, **LORA) as llm:
            found = await asyncio.gather(*(answer(llm, name) for name in ("one", "two", "one", "two")))
            assert [[one] for one in found] == [*wanted, *wanted]
            assert {status.num_hits for status in await llm.adapters()} == {2}
            await llm.unload_adapter("one")
            assert [status.name for status in await llm.adapters()] == ["two"]
            with pytest.raises(AdapterError, match="no adapter 'one'"):
                await llm.unload_adapter("one")

    asyncio.run(run())


def test_who_is_cancelled_while_the_engine_is_asked_harms_nobody(folder: Path, site_packages: Any) -> None:
    install_plain_lora(site_packages)

    async def run() -> None:
        with AsyncLLM(str(folder), dtype="float32", block_size=8, **LORA) as llm:
            blocked, held = threading.Event(), threading.Event()
            llm._commands.put(blocked.set)
            llm._commands.put(lambda: held.wait(30) and None)
            await asyncio.to_thread(blocked.wait, 30)
            asking = asyncio.create_task(llm.adapters())
            await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            held.set()
            async for output in llm.generate("hello", GREEDY):
                last = output
            assert last.finished

    asyncio.run(run())
