"""Ctrl-C in the middle of a generation, on the real demo model: a clean end, and the next run as if nothing was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from octavo import LLM, SamplingParams

PROMPT = "Once upon a time"
GENERATE = [sys.executable, "-m", "octavo", "generate", PROMPT]


def test_ctrl_c_ends_octavo_generate_with_status_130_and_no_traceback() -> None:
    command = [*GENERATE, "and another", "--max-tokens", "900"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        printed = b""
        while len(printed) < 60:
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece, "it ended before it was interrupted"
            printed += piece
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    printed += rest
    assert (process.returncode, errors) == (130, b"")
    assert printed.endswith(b" [stopped]\n")
    assert b"and another" not in printed

    again = subprocess.run([*GENERATE, "--max-tokens", "4"], capture_output=True, check=True)
    assert len(again.stdout) > 5
    assert printed.removeprefix(f">>> {PROMPT}\n".encode()).startswith(again.stdout.rstrip(b"\n"))


def test_ctrl_c_in_generate_leaves_the_model_ready_and_no_block_behind() -> None:
    prompts = [PROMPT, "The capital of France is", "1, 2, 3,"]
    short, long = SamplingParams(temperature=0.0, max_tokens=8), SamplingParams(temperature=0.0, max_tokens=900)
    with LLM("demo", max_model_len=1024) as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(prompts, short)]
        for _ in range(2):
            timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            try:
                with pytest.raises(KeyboardInterrupt):
                    llm.generate(prompts, long)
            finally:
                timer.cancel()
            stats = llm.stats()
            assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)
            assert llm.engine.scheduler.block_pool.reset_prefix_cache(), "blocks were lost"
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, short)] == wanted
