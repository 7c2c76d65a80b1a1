"""What a user sees first, on the real demo model: the quick start's text, a stream's, and the two commands'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from octavo import LLM, SamplingParams

ROOT = Path(__file__).resolve().parent.parent.parent
QUICKSTART = ROOT / "examples" / "quickstart.py"
PROMPTS = ["대한민국의 수도는 어디인가요?", "vLLM에 대해서 설명해주세요."]

RECORDER = """\
import json, runpy, sys
from octavo import LLM

_, program, record = sys.argv
generate = LLM.generate

def recording_generate(*arguments):
    outputs = generate(*arguments)
    with open(record, "w") as file:
        json.dump([output.outputs[0].token_ids for output in outputs], file)
    return outputs

LLM.generate = recording_generate
sys.argv = [program]
runpy.run_path(program, run_name="__main__")
"""
"""Runs a program as it stands and writes the token ids behind its text to a file."""

Decode = Callable[[Sequence[int]], str]


@pytest.fixture(scope="module")
def decode(demo_model: Path) -> Decode:
    """transformers' text of token ids, special tokens left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model.parent, gguf_file=demo_model.name)
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    # Without the prefix cache a prompt is computed in the same steps each time, to the same last bit.
    with LLM("demo", max_model_len=1024, enable_prefix_caching=False) as llm:
        yield llm


def python(*arguments: str, stdin: str = "") -> str:
    """Run Python and return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_prints_what_transformers_reads_in_its_tokens(tmp_path: Path, decode: Decode) -> None:
    record = tmp_path / "token_ids.json"
    printed = python("-c", RECORDER, str(QUICKSTART), str(record)).splitlines()
    wanted = [decode(token_ids) for token_ids in json.loads(record.read_text())]
    assert printed == [
        f"Prompt: {prompt!r}, Generated text: {text!r}" for prompt, text in zip(PROMPTS, wanted, strict=True)
    ]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["Korean", "mixed"])
def test_a_stream_grows_into_what_transformers_reads_in_its_tokens(prompt: str, llm: LLM, decode: Decode) -> None:
    params = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=160, seed=3)
    texts, token_ids = list[str](), list[int]()
    for output in llm.stream(prompt, params):
        texts.append(output.outputs[0].text)
        token_ids = output.outputs[0].token_ids
    assert len(texts) == len(token_ids)
    assert [text for before, text in pairwise(texts) if not text.startswith(before)] == []
    assert texts[-1] == decode(token_ids)
    assert texts[-1] == llm.generate(prompt, params)[0].outputs[0].text


def test_the_way_from_prompt_to_text_does_without_transformers() -> None:
    code = (
        "import sys; from octavo import LLM, SamplingParams\n"
        "with LLM('demo', max_model_len=64) as llm:\n"
        "    text = llm.generate('The capital of France is', SamplingParams(max_tokens=2))[0].outputs[0].text\n"
        "print(bool(text), 'transformers' in sys.modules)"
    )
    assert python("-c", code).strip() == "True False"


def test_octavo_generate_prints_the_rest_of_a_text() -> None:
    assert "Paris" in python("-m", "octavo", "generate", "The capital of France is", "--max-tokens", "8")


def test_octavo_chat_answers_each_line_of_standard_input() -> None:
    question = "What is the capital of France?\n"
    answers = python("-m", "octavo", "chat", "--max-tokens", "24", stdin=f"{question}/clear\n{question}").splitlines()
    assert len(answers) == 2
    assert "Paris" in answers[0]
    assert answers[0] == answers[1]
