"""Logprobs: those of the raw logits, as transformers computes them, however a request is cut into steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import BOS, VOCAB_SIZE, token_ids_of, write_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from octavo import LLM, Logprob, RequestOutput, SamplingParams
from octavo.logprob_texts import LogprobTexts
from octavo.outputs import TokenLogprobs
from octavo.runner.logprobs import token_logprobs
from octavo.tokenizer import Tokenizer

BLOCK_SIZE = 8
BYTES_PER_BLOCK = 2 * 2 * BLOCK_SIZE * 2 * 12 * 4  # layers, keys and values, tokens, KV heads, head_dim, float32
PROMPT = [BOS, *token_ids_of("hello world, what is probable?")]

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def make_llm(folder: Path) -> Iterator[MakeLLM]:
    made = []

    def make(**settings: Any) -> LLM:
        defaults = {"dtype": "float32", "block_size": BLOCK_SIZE, "max_num_seqs": 8, "max_logprobs": -1}
        made.append(LLM(str(folder), **{**defaults, **settings}))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()


@pytest.fixture
def llm(make_llm: MakeLLM) -> LLM:
    return make_llm()


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "seed": 1, "ignore_eos": True, **fields})


def wanted_logprobs(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """[len(token_ids), vocab_size]: row i is after token i."""
    with torch.inference_mode():
        return model(torch.tensor([list(token_ids)])).logits[0].float().log_softmax(-1)


def assert_is(entry: dict[int, Logprob], token_id: int, wanted: Tensor, count: int) -> None:
    """The token itself first, then the `count` most probable, best first, all as `wanted` has them."""
    best = wanted.topk(count).indices.tolist()
    assert list(entry) == [token_id, *[other for other in best if other != token_id]]
    for other, logprob in entry.items():
        assert logprob.logprob == pytest.approx(wanted[other].item(), abs=2e-4)
        assert logprob.rank == int((wanted > wanted[other]).sum()) + 1


def check(output: RequestOutput, model: PreTrainedModel, count: int) -> None:
    """Every completion's logprobs are transformers'."""
    for completion in output.outputs:
        wanted = wanted_logprobs(model, output.prompt_token_ids + completion.token_ids)
        assert completion.logprobs is not None
        first = len(output.prompt_token_ids) - 1
        for step, (token_id, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            assert_is(entry, token_id, wanted[first + step], count)


def check_prompt(output: RequestOutput, model: PreTrainedModel, count: int) -> None:
    assert output.prompt_logprobs is not None
    none, *entries = output.prompt_logprobs
    assert none is None
    wanted = wanted_logprobs(model, output.prompt_token_ids)
    for position, (token_id, entry) in enumerate(zip(output.prompt_token_ids[1:], entries, strict=True)):
        assert entry is not None
        assert_is(entry, token_id, wanted[position], count)


# ------------------------------------------------------------------------------------------- of the output


@pytest.mark.parametrize("count", [0, 1, 5, VOCAB_SIZE])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_at_every_step_they_are_those_of_the_raw_logits(
    llm: LLM, reference: PreTrainedModel, count: int, temperature: float
) -> None:
    (output,) = llm.generate([PROMPT], params(logprobs=count, temperature=temperature, top_k=30))
    check(output, reference, count)


def test_minus_one_is_the_whole_vocabulary(llm: LLM, reference: PreTrainedModel) -> None:
    (output,) = llm.generate([PROMPT], params(logprobs=-1, prompt_logprobs=-1, max_tokens=3))
    check(output, reference, VOCAB_SIZE)
    check_prompt(output, reference, VOCAB_SIZE)


def test_rules_and_penalties_do_not_change_them(llm: LLM, reference: PreTrainedModel) -> None:
    (output,) = llm.generate([PROMPT], params(logprobs=4, min_tokens=12, ignore_eos=False, temperature=0.3))
    check(output, reference, 4)


def test_who_does_not_ask_gets_none_beside_those_who_do(llm: LLM, reference: PreTrainedModel) -> None:
    asked = [None, 3, 0, None, -1]
    outputs = llm.generate([PROMPT[: 5 + index] for index in range(5)], [params(logprobs=count) for count in asked])
    plain = llm.generate([PROMPT[: 5 + index] for index in range(5)], params())
    assert [output.outputs[0].token_ids for output in outputs] == [output.outputs[0].token_ids for output in plain]
    for output, count in zip(outputs, asked, strict=True):
        if count is None:
            assert (output.outputs[0].logprobs, output.outputs[0].cumulative_logprob) == (None, None)
        else:
            check(output, reference, VOCAB_SIZE if count < 0 else count)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 9},
        {"stop": ["~", "a", "e", "o", "P", "i"], "max_tokens": 60},
        {"ignore_eos": False, "max_tokens": 80},
    ],
    ids=["length", "stop string", "end-of-sequence"],
)
def test_each_token_has_one_and_they_sum_to_the_whole_however_it_ends(llm: LLM, fields: dict[str, Any]) -> None:
    (output,) = llm.generate([PROMPT], params(logprobs=2, **fields))
    completion = output.outputs[0]
    assert completion.logprobs is not None
    chosen = [
        entry[token_id].logprob for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 4},
        {"max_steps_in_flight": 2},
        {"kv_cache_memory_bytes": 12 * BYTES_PER_BLOCK, "enable_prefix_caching": False},
        {"kv_cache_memory_bytes": 12 * BYTES_PER_BLOCK, "max_steps_in_flight": 2, "max_num_batched_tokens": 7},
    ],
    ids=["in chunks", "depth 2", "preempted", "all of it"],
)
def test_however_requests_are_cut_into_steps(
    make_llm: MakeLLM, reference: PreTrainedModel, settings: dict[str, Any]
) -> None:
    llm = make_llm(**settings)
    outputs = llm.generate(
        [PROMPT, PROMPT[:9], PROMPT[3:20]], params(logprobs=2, prompt_logprobs=3, n=2, max_tokens=20)
    )
    if "kv_cache_memory_bytes" in settings:
        assert llm.stats().num_preemptions > 0
    for output in outputs:
        check(output, reference, 2)
        check_prompt(output, reference, 3)


# ------------------------------------------------------------------------------------------- of the prompt


@pytest.mark.parametrize("count", [0, 2])
def test_a_prompt_s_logprobs_are_those_of_its_tokens_but_the_first(
    llm: LLM, reference: PreTrainedModel, count: int
) -> None:
    (output,) = llm.generate([PROMPT], params(prompt_logprobs=count))
    check_prompt(output, reference, count)
    assert output.outputs[0].logprobs is None


def test_a_prompt_of_one_token_has_nothing_to_predict(llm: LLM) -> None:
    (output,) = llm.generate([[5]], params(prompt_logprobs=1))
    assert output.prompt_logprobs == [None]


def test_who_does_not_ask_for_the_prompt_s_gets_none(llm: LLM) -> None:
    assert llm.generate([PROMPT], params(logprobs=1))[0].prompt_logprobs is None


def test_a_prompt_in_the_cache_is_computed_all_the_same(llm: LLM, reference: PreTrainedModel) -> None:
    llm.generate([PROMPT], params())
    steps = list[int]()
    llm.engine.step_listeners.append(lambda step: steps.append(step.num_tokens))
    (output,) = llm.generate([PROMPT], params(prompt_logprobs=1))
    assert (output.num_cached_tokens, steps[0]) == (0, len(PROMPT))
    check_prompt(output, reference, 1)
    assert llm.generate([PROMPT], params())[0].num_cached_tokens > 0


def test_a_long_prompt_is_not_more_than_some_rows_of_logits_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_llama(tmp_path, max_position_embeddings=1024)
    num_rows = list[int]()

    def counting(logits: Tensor, *arguments: Any) -> list[TokenLogprobs]:
        num_rows.append(len(logits))
        return token_logprobs(logits, *arguments)

    monkeypatch.setattr("octavo.runner.model_runner.token_logprobs", counting)
    with LLM(str(folder), dtype="float32") as llm:
        prompt = [5 + index % 90 for index in range(700)]
        (output,) = llm.generate([prompt], params(prompt_logprobs=1, max_tokens=1))
    assert num_rows == [256, 256, 187]
    assert output.prompt_logprobs is not None
    check_prompt(output, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 1)


# ------------------------------------------------------------------------------------------- as they come


def test_a_stream_s_logprobs_grow_with_its_tokens(llm: LLM) -> None:
    sums, lengths = list[float](), list[int]()
    for output in llm.stream(PROMPT, params(logprobs=1, prompt_logprobs=0)):
        completion = output.outputs[0]
        assert completion.logprobs is not None
        assert completion.cumulative_logprob is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        assert output.prompt_logprobs is not None
        sums.append(completion.cumulative_logprob)
        lengths.append(len(completion.logprobs))
    assert lengths == list(range(1, 13))
    assert all(later < earlier for earlier, later in pairwise(sums))


# ----------------------------------------------------------------------------------------------- their texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level: a token for each byte, id = byte, and one for "é" as a whole."""
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers import decoders
    from tokenizers.models import BPE

    from octavo.builtin.hf_checkpoint import HuggingFaceCheckpoint
    from octavo.tokenizer import _byte_alphabet

    folder = tmp_path_factory.mktemp("bytes")
    pieces = _byte_alphabet()
    raw = RawTokenizer(BPE(vocab=pieces | {"Ã©": 256}, merges=[("Ã", "©")]))
    raw.decoder = decoders.ByteLevel()
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return Tokenizer(HuggingFaceCheckpoint(str(folder)).tokenizer())


def texts_of(texts: LogprobTexts, *token_ids: int) -> list[str | None]:
    logprobs = TokenLogprobs(token_ids=token_ids, logprobs=tuple(-1.0 for _ in token_ids), rank=1)
    return [entry.decoded_token for entry in texts.next(logprobs).values()]


def test_a_character_s_text_stands_with_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    texts = LogprobTexts(tokenizer, list(b"a"))
    first, second, third = "가".encode()
    assert texts_of(texts, first, ord("b"), 256) == ["", "b", "é"]
    assert texts_of(texts, second) == [""]
    assert texts_of(texts, third, ord("c"), third + 1) == ["가", "c", "각"]
    assert texts_of(texts, ord("d")) == ["d"]


def test_a_character_that_the_prompt_began_is_completed(tokenizer: Tokenizer) -> None:
    *begin, last = "가".encode()
    assert texts_of(LogprobTexts(tokenizer, begin), last) == ["가"]


def test_a_byte_that_belongs_to_nothing_has_no_text(tokenizer: Tokenizer) -> None:
    assert texts_of(LogprobTexts(tokenizer, []), 0x80, ord("x")) == ["", "x"]


def test_texts_joined_are_the_output(llm: LLM) -> None:
    (output,) = llm.generate([PROMPT], params(logprobs=0, skip_special_tokens=False))
    completion = output.outputs[0]
    assert completion.logprobs is not None
    texts = [
        entry[token_id].decoded_token for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    assert "".join(text or "" for text in texts) == completion.text


def test_without_detokenize_there_is_no_text(llm: LLM) -> None:
    (output,) = llm.generate([PROMPT], params(logprobs=1, prompt_logprobs=1, detokenize=False))
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert output.prompt_logprobs is not None
    entries = [*completion.logprobs, *output.prompt_logprobs[1:]]
    assert {logprob.decoded_token for entry in entries if entry for logprob in entry.values()} == {None}


# ---------------------------------------------------------------------------------------------- the function


def test_each_row_gets_as_many_as_it_asks_for() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]] * 4)
    found = token_logprobs(logits, torch.tensor([1, 0, 2, 1]), [0, 2, -1, 9]).read()
    wanted = logits[0].log_softmax(-1).tolist()
    ids = [(1,), (0, 1, 3), (2, 1, 3, 2, 0), (1, 1, 3, 2, 0)]
    assert [one.token_ids for one in found] == ids
    assert [one.rank for one in found] == [1, 4, 3, 1]
    for one in found:
        assert one.logprobs == pytest.approx([wanted[token_id] for token_id in one.token_ids])


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.linspace(-4, 4, 5000, dtype=torch.bfloat16).repeat(1, 1)
    (found,) = token_logprobs(logits, torch.tensor([4999]), [0]).read()
    assert found.logprobs[0] == pytest.approx(logits.double().log_softmax(-1)[0, 4999].item(), abs=1e-5)
