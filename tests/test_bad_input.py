"""Whatever is wrong with what is asked: one clear error, nothing lost, and the requests in flight go on as if alone."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import MAX_POSITIONS, VOCAB_SIZE, write_tiny_llama

from octavo import LLM, AsyncLLM, RequestOutput, SamplingParams
from octavo.errors import CheckpointError, ConfigError, ModelNotFoundError, OctavoError, RequestError

Change = Callable[[Path], object]

BLOCK_SIZE = 8
NUM_BLOCKS = 12
BYTES_PER_BLOCK = 2 * 2 * BLOCK_SIZE * 2 * 12 * 4  # layers, key and value, tokens, heads, their size, float32
ROOM = NUM_BLOCKS * BLOCK_SIZE
"""Tokens the KV cache holds, fewer than the model's positions."""

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": BLOCK_SIZE,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": NUM_BLOCKS * BYTES_PER_BLOCK,
}
IN_FLIGHT = "hello world"


def greedy(max_tokens: int = 30) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


BAD_REQUESTS: dict[str, tuple[Any, Callable[[], Any], str]] = {
    # the prompt, its parameters, what is said
    "no tokens": ([[]], greedy, "The prompt is empty: at least one token is needed"),
    "token id past the vocabulary": ([[5, VOCAB_SIZE]], greedy, rf"in \[0, {VOCAB_SIZE}\); found \[{VOCAB_SIZE}\]"),
    "negative token id": ([[-1, 5]], greedy, rf"in \[0, {VOCAB_SIZE}\); found \[-1\]"),
    "prompt longer than the model": (
        ["x" * MAX_POSITIONS],
        greedy,
        f"The prompt has {MAX_POSITIONS + 1} tokens; max_model_len is",
    ),
    "prompt that fills the KV cache": ([[5] * ROOM], greedy, f"The prompt has {ROOM} tokens; max_model_len is {ROOM}"),
    "prompt of no known form": ([{"text": "x"}], greedy, r"A prompt is a text, .* found keys \['text'\]"),
    "half of a character": (["\ud800"], greedy, "text"),
    "more fewest than most tokens": (
        ["x"],
        lambda: SamplingParams(min_tokens=9, max_tokens=3),
        r"min_tokens \(9\) is above max_tokens \(3\)",
    ),
    "stop strings without text": (
        ["x"],
        lambda: SamplingParams(stop="end", detokenize=False),
        "stop strings need the text: set detokenize=True",
    ),
    "several faults at once": (
        ["x"],
        lambda: SamplingParams(temperature=-1.0, top_p=2.0),
        "temperature must be .*; top_p must be",
    ),
    "stop token past the vocabulary": (["x"], lambda: SamplingParams(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
    "no parameters": (["x"], lambda: {"temperature": 0.0}, r"SamplingParams\(...\); found dict"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shared_llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def answer(shared_llm: LLM) -> list[int]:
    """What the request in flight says when it is alone."""
    return shared_llm.generate(IN_FLIGHT, greedy())[0].outputs[0].token_ids


@pytest.fixture
def llm(shared_llm: LLM, answer: list[int]) -> Iterator[LLM]:
    """Holds ROOM tokens; after the test nothing is left in it."""
    yield shared_llm
    stats = shared_llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)
    assert shared_llm.engine.scheduler.block_pool.reset_prefix_cache(), "blocks were lost"


# --------------------------------------------------------------------------------------------------- of requests


@pytest.mark.parametrize(("prompts", "make_params", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_bad_request_is_refused_and_the_one_in_flight_goes_on(
    llm: LLM, answer: list[int], prompts: Any, make_params: Callable[[], Any], message: str
) -> None:
    stream = llm.stream(IN_FLIGHT, greedy())
    for _ in range(3):
        next(stream)
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate(["good", *prompts], make_params())
    assert llm.stats().num_running == 1, "the good prompt beside the bad one was started"
    assert 20 < len(str(caught.value)) < 400
    *_, output = stream
    assert output.outputs[0].token_ids == answer


async def test_bad_requests_are_refused_and_the_stream_in_flight_goes_on(folder: Path, answer: list[int]) -> None:
    async def last(prompt: Any, params: Any) -> RequestOutput:
        return [output async for output in llm.generate(prompt, params)][-1]

    with AsyncLLM(str(folder), **SETTINGS) as llm:
        in_flight = asyncio.create_task(last(IN_FLIGHT, greedy()))
        await asyncio.sleep(0)
        for (prompt,), make_params, message in BAD_REQUESTS.values():
            with pytest.raises(RequestError, match=message):
                await last(prompt, make_params())
        assert (await in_flight).outputs[0].token_ids == answer
        assert (await last(IN_FLIGHT, greedy())).outputs[0].token_ids == answer


def test_a_request_may_ask_for_more_than_there_is_room_for_and_ends_where_it_ends(llm: LLM) -> None:
    (output,) = llm.generate([[5] * (ROOM - 2)], greedy(50))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (2, "length")


# ------------------------------------------------------------------------------------------------------ of models


def change_config(**changes: object) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def overwrite(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


OWN_CODE = {
    "architectures": ["LlamoForCausalLM"],
    "model_type": "llamo",
    "auto_map": {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.LlamoForCausalLM"},
}

BAD_MODELS: dict[str, tuple[Change, type[OctavoError], str]] = {
    # what is done to the folder, what is raised
    "no folder": (shutil.rmtree, ModelNotFoundError, "There is no file or folder /"),
    "no configuration": (remove("config.json"), CheckpointError, r"has no config\.json"),
    "configuration that is no JSON": (overwrite("config.json", b"{"), CheckpointError, "cannot be read as JSON"),
    "configuration without sizes": (overwrite("config.json", b"{}"), CheckpointError, r"config\.json lacks"),
    "no weights": (remove("model.safetensors"), CheckpointError, "has no weights"),
    "weights cut short": (cut_short, CheckpointError, "is cut short or damaged"),
    "weights that are a web page": (overwrite("model.safetensors", b"<html>" * 99), CheckpointError, "or damaged"),
    "weights that can run code": (pickle_only, CheckpointError, "Python pickles .* which can run any code when opened"),
    "weights of another model": (
        change_config(intermediate_size=64, num_hidden_layers=3),
        CheckpointError,
        r"(?s)does not fit the model.*9 tensors are missing: model\.layers\.2.*wrong shape: .*mlp\.gate_proj",
    ),
    "weights with more layers": (
        change_config(num_hidden_layers=1),
        CheckpointError,
        r"9 tensors have no place in this model: model\.layers\.1",
    ),
    "no tokenizer": (remove("tokenizer.json"), CheckpointError, r"has no tokenizer\.json"),
    "damaged tokenizer": (overwrite("tokenizer.json", b"{}"), CheckpointError, "cannot be read as a tokenizer"),
    "unknown architecture": (
        change_config(architectures=["LlamaForCausalLn"]),
        ConfigError,
        r"(?s)Nearest architectures installed: LlamaForCausalLM.*ModelSpec\(architectures=\('LlamaForCausalLn',\)",
    ),
    "architecture by code of its own": (
        change_config(**OWN_CODE),
        ConfigError,
        r"(?s)Nearest architectures installed: LlamaForCausalLM.*code of its own .*auto_map.*is never run",
    ),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_bad_model_is_refused_and_the_next_one_loads(
    folder: Path, tmp_path: Path, answer: list[int], change: Change, kind: type[OctavoError], message: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    change(copy)
    with pytest.raises(kind, match=message):
        LLM(str(copy), **SETTINGS)
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    with LLM(str(copy), **SETTINGS) as llm:
        assert llm.generate(IN_FLIGHT, greedy())[0].outputs[0].token_ids == answer


@pytest.mark.parametrize("architecture", ["LlamoForCausalLM", "LlamaForCausalLM"])
def test_code_in_a_checkpoint_is_never_run(folder: Path, tmp_path: Path, architecture: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    change_config(**{**OWN_CODE, "architectures": [architecture]})(copy)
    ran = tmp_path / "ran"
    (copy / "own_code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    if architecture == "LlamaForCausalLM":
        with LLM(str(copy), **SETTINGS) as llm:  # one of ours: the code is not needed
            llm.generate("a", greedy(2))
    else:
        with pytest.raises(ConfigError, match="is never run"):
            LLM(str(copy), **SETTINGS)
    assert not ran.exists()


# ---------------------------------------------------------------------------------------------------- of settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kv_cache_memory_bytes": 100},
            rf"gets 100 bytes, which is 0 blocks .*{BYTES_PER_BLOCK:,} bytes each.* at least {BYTES_PER_BLOCK:,}",
        ),
        (
            {"max_model_len": MAX_POSITIONS},
            rf"{NUM_BLOCKS} blocks of 8 tokens .* {MAX_POSITIONS} tokens needs 16\. Raise kv_cache_memory_bytes to at "
            rf"least {16 * BYTES_PER_BLOCK:,} or lower max_model_len to at most {ROOM}",
        ),
        ({"max_model_len": MAX_POSITIONS + 1}, f"positions end at {MAX_POSITIONS}"),
        ({"max_num_seq": 3}, "max_num_seqs"),
        ({"scheduler": "fcsf"}, "fcfs"),
        ({"device": "tpu"}, "tpu"),
    ],
    ids=[
        "no block",
        "too few blocks",
        "longer than the model",
        "unknown setting",
        "unknown component",
        "unknown device",
    ],
)
def test_settings_that_cannot_work_are_refused_with_what_would(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LLM(str(folder), **{**SETTINGS, **settings})
    assert not re.search(r"Traceback|\{|\}", str(caught.value))


def test_a_missing_model_is_one_line_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from octavo.cli import main

    assert main(["generate", "Hello", "--model", str(tmp_path / "gone")]) == 1
    assert capsys.readouterr().err == f"error: There is no file or folder {tmp_path / 'gone'}.\n"
