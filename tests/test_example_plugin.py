"""The example plugin, as a third party has it: built to a wheel, installed apart, chosen by name in a fresh process.

It uses nothing but the published contract, so when a change of the core breaks it, that change breaks every plugin.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "plugins" / "attention_sdpa"
PACKAGE = EXAMPLE / "octavo_example_attention_sdpa"
MAX_LINES = 150

GENERATE = """
import json, sys
from octavo import LLM, SamplingParams

PROMPTS = ["hello world", "x", "what is this? " * 3]

def tokens(folder, attention, **settings):
    with LLM(folder, dtype="float32", block_size=8, max_num_seqs=4, attention=attention, **settings) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
        return [output.outputs[0].token_ids for output in outputs]

def refusal(folder, attention):
    try:
        tokens(folder, attention)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

fitting, other = sys.argv[1:]
print(json.dumps({
    "torch": tokens(fitting, "torch"),
    "sdpa": tokens(fitting, "sdpa"),
    "sdpa in chunks and slices": tokens(
        fitting, {"name": "attention-sdpa/sdpa", "max_query_tokens": 3}, max_num_batched_tokens=16
    ),
    "sdpa for decode": tokens(fitting, {"prefill": "torch", "decode": "sdpa"}),
    "head size 16": refusal(other, "sdpa"),
    "auto with head size 16": tokens(other, "auto"),
    "unknown option": refusal(fitting, {"name": "sdpa", "max_query_token": 3}),
    "wrong option": refusal(fitting, {"name": "sdpa", "max_query_tokens": 0}),
}))
"""


@dataclass(frozen=True)
class Installed:
    """A folder with the plugin in it, and processes that find it there."""

    folder: Path

    def python(self, *arguments: str, cwd: Path | None = None) -> str:
        """What a fresh Python printed; its fault fails the test."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OCTAVO_", "PYTEST_"))}
        environment["PYTHONPATH"] = os.pathsep.join([str(self.folder), environment.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        )
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd or self.folder,
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of the example, installed in a folder that no other test sees."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site-packages")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(wheels), str(EXAMPLE))
    (wheel,) = wheels.iterdir()
    pip("install", "--target", str(folder), str(wheel))
    return Installed(folder)


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--no-deps", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def generated(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    fitting = write_tiny_llama(tmp_path_factory.mktemp("fitting"), head_dim=64)
    other = write_tiny_llama(tmp_path_factory.mktemp("other"), head_dim=16)
    answers: dict[str, Any] = json.loads(installed.python("-c", GENERATE, str(fitting), str(other)))
    return answers


def test_wheel_is_found_with_its_component(installed: Installed) -> None:
    plugins = json.loads(installed.python("-m", "octavo", "plugins", "--json"))
    (plugin,) = [plugin for plugin in plugins if plugin["name"] == "attention-sdpa"]
    assert (plugin["state"], plugin["reason"]) == ("ok", "")
    assert (plugin["distribution"], plugin["version"]) == ("octavo-example-attention-sdpa", "0.1.0")
    assert [(component["kind"], component["name"]) for component in plugin["components"]] == [("attention", "sdpa")]


@pytest.mark.parametrize("how", ["sdpa", "sdpa in chunks and slices", "sdpa for decode"])
def test_model_says_the_same_with_it(generated: dict[str, Any], how: str) -> None:
    assert generated[how] == generated["torch"]


def test_model_of_another_head_size_is_refused_in_its_words(generated: dict[str, Any]) -> None:
    assert generated["head size 16"].startswith("UnavailableComponentError: ")
    assert "supports head sizes 64; the model has 16" in generated["head size 16"]


def test_auto_takes_another_for_that_model(generated: dict[str, Any]) -> None:
    assert [len(tokens) for tokens in generated["auto with head size 16"]] == [12, 12, 12]


def test_its_options_are_checked_before_anything_is_loaded(generated: dict[str, Any]) -> None:
    assert "Did you mean 'max_query_tokens'?" in generated["unknown option"]
    assert "max_query_tokens: Input should be greater than or equal to 1" in generated["wrong option"]


def test_it_passes_the_conformance_suite(installed: Installed, tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "tests" / "test_sdpa_conformance.py", tmp_path)
    printed = installed.python("-m", "pytest", "-W", "error", "--disable-plugin-autoload", cwd=tmp_path)
    assert "skipped" not in printed
    assert "failed" not in printed


def test_its_probe_explains_what_this_torch_cannot_do(installed: Installed) -> None:
    code = """
from octavo.plugins.specs import AttentionNeed
from octavo_example_attention_sdpa.probe import why_not
print(why_not(AttentionNeed(dtype="int8", num_heads=4, num_kv_heads=2, head_dim=64, block_size=16)))
"""
    assert installed.python("-c", code).startswith("['cannot attend in int8 with torch ")


def test_it_imports_published_names_only() -> None:
    from test_layering import plugin_faults

    files = sorted(PACKAGE.rglob("*.py"))
    assert [fault for file in files for fault in plugin_faults(PACKAGE.name, file.read_text())] == []


def test_it_is_short_enough_to_read_at_once() -> None:
    assert sum(len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")) < MAX_LINES
