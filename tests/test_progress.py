"""Progress bars: on a terminal while weights load and prompts are completed, and nothing anywhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_llama

from octavo import LLM, SamplingParams
from octavo.errors import RequestError

PROGRAM = """\
import sys
from octavo import LLM, SamplingParams
with LLM(sys.argv[1], dtype="float32", max_num_seqs=4) as llm:
    llm.generate(["a", "b", "c"], SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=sys.argv[2] == "True")
    llm.generate([], SamplingParams(max_tokens=9))
"""


class FakeBar:
    """What is asked of a bar of the user's own."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.num_done = 0
        self.postfix = ""
        self.closed = False

    def update(self, n: int) -> None:
        self.num_done += n

    def set_postfix_str(self, s: str, refresh: bool) -> None:
        self.postfix = s

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def on_terminal(*arguments: str) -> str:
    """What a program prints to standard error when that is a terminal; its standard output is none."""
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
    termios = pytest.importorskip("termios", reason="there are no pseudo-terminals here")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    printed = b""
    try:
        while piece := os.read(ours, 4096):
            printed += piece
    except OSError:  # how Linux says that nobody writes to it any more
        pass
    finally:
        os.close(ours)
    assert process.communicate(timeout=60) == (b"", None)
    assert process.returncode == 0, printed
    return printed.decode()


def test_loading_and_generation_show_how_far_they_are_on_a_terminal(folder: Path) -> None:
    printed = on_terminal(str(folder), "True")
    num_bytes = (folder / "model.safetensors").stat().st_size
    last_of_loading = [line for line in printed.split("\r") if "Loading weights" in line][-1]
    assert "100%" in last_of_loading
    assert f"{num_bytes / 1024:.0f}"[:2] in last_of_loading  # headers apart, the file's size
    last_of_generating = [line for line in printed.split("\r") if "Generating" in line and "3/3" in line][-1]
    assert "100%" in last_of_generating
    assert "tokens/s" in last_of_generating


def test_generation_shows_nothing_when_it_is_told_so(folder: Path) -> None:
    printed = on_terminal(str(folder), "False")
    assert "Loading weights" in printed
    assert "3/3" not in printed


def test_without_a_terminal_nothing_is_printed(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), "True"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_a_bar_of_the_users_own_is_told_every_prompt_and_closed(folder: Path) -> None:
    made = []

    def make(**arguments: Any) -> FakeBar:
        made.append(FakeBar(**arguments))
        return made[-1]

    with LLM(str(folder), dtype="float32") as llm:
        llm.generate(["a", "b", "c"], SamplingParams(max_tokens=5), use_tqdm=make)
        llm.chat([{"role": "user", "content": "a"}], SamplingParams(max_tokens=5), use_tqdm=make)
        with pytest.raises(RequestError):
            llm.generate(["a", ""], [SamplingParams()], use_tqdm=make)
    assert [bar.arguments for bar in made] == [
        {"total": total, "desc": "Generating", "unit": "prompt"} for total in (3, 1, 2)
    ]
    assert [(bar.num_done, bar.closed) for bar in made] == [(3, True), (1, True), (0, True)]
    assert made[0].postfix.endswith("tokens/s")


def test_a_bar_that_fails_to_be_made_leaves_nothing_behind(folder: Path) -> None:
    def make(**arguments: Any) -> FakeBar:
        raise ZeroDivisionError

    with LLM(str(folder), dtype="float32") as llm:
        with pytest.raises(ZeroDivisionError):
            llm.generate("a", use_tqdm=make)
        assert llm.stats().num_waiting == 0
