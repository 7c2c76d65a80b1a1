"""Through LLM, from folders as transformers saves them: greedy tokens, which component is chosen, and what is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy_reference import reference_of
from margin_rule import Reference, check, generate, greedy, next_tokens_of, token_ids_of
from tiny_model import SIZES, write_tiny_llama
from tiny_transformers import KINDS, prompts, random_model, write_model
from transformers import AutoModelForCausalLM, Qwen2Config

from octavo import LLM, explain
from octavo.explanation import ExplainedCandidate

FOREIGN = [name for name in KINDS if not name.startswith(("Llama", "Gemma"))]


@pytest.fixture(scope="module", params=FOREIGN)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("foreign"), random_model(KINDS[request.param]))


@pytest.fixture(scope="module")
def references(folder: Path) -> list[Reference]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return [reference_of(model, prompt, 32) for prompt in prompts(1, 50, 17)]


# --------------------------------------------------------------------------------------------------- greedy tokens


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 16}, {"block_size": 4, "max_num_seqs": 2}],
    ids=["batched", "prompts in chunks", "small blocks"],
)
def test_greedy_tokens_equal_transformers(folder: Path, references: list[Reference], settings: dict[str, Any]) -> None:
    with LLM(str(folder), dtype="float32", **settings) as llm:
        check(references, token_ids_of(generate(llm, references)), next_tokens_of(llm))


def test_greedy_tokens_of_each_request_alone_and_behind_a_cached_prefix_equal_transformers(
    folder: Path, references: list[Reference]
) -> None:
    with LLM(str(folder), dtype="float32", block_size=8) as llm:
        for reference in references:
            check([reference], token_ids_of(generate(llm, [reference])), next_tokens_of(llm))
        longest = [one for one in references if len(one.prompt_token_ids) == 50]
        again = generate(llm, longest)
        assert again[0].num_cached_tokens == 48
        check(longest, token_ids_of(again), next_tokens_of(llm))


# ------------------------------------------------------------------------------------------------------- the choice


def model_candidates(folder: Path, **settings: Any) -> dict[str, ExplainedCandidate]:
    explanation = explain(str(folder), **settings)
    (socket,) = (socket for socket in explanation.sockets if socket.name == "model")
    return {f"{one.plugin}/{one.name}": one for one in socket.candidates}


def test_a_component_written_for_the_architecture_is_preferred_and_explain_shows_it(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    candidates = model_candidates(folder)
    assert [name for name, one in candidates.items() if one.chosen] == ["builtin/llama"]
    assert candidates["model-transformers/transformers"].reasons == ()
    line = next(line for line in str(explain(str(folder))).splitlines() if "model-transformers/transformers" in line)
    assert line.endswith("could serve; its priority is -100, the chosen one's 0")


def test_where_nothing_is_written_for_it_the_model_is_served_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_model(tmp_path, random_model(Qwen2Config(**SIZES)))
    without = {"plugins": {"deny": ["model-qwen"]}}
    assert model_candidates(folder, **without)["model-transformers/transformers"].chosen
    with LLM(str(folder), dtype="float32", **without) as llm:
        assert len(llm.generate([[5, 6, 7]], greedy(3))[0].outputs[0].token_ids) == 3
    assert "Qwen2ForCausalLM is computed by transformers' own modules" in caplog.text
    assert "which is slower" in caplog.text


def test_a_refused_architecture_is_told_why(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["StableLmForCausalLM"]}))
    explanation = explain(str(folder))
    assert not explanation.can_run
    assert "StableLmForCausalLM does not take its attention from the attention interface" in str(explanation)


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = write_model(tmp_path, random_model(KINDS["OLMo 2, norms behind each half"]))
    marker = tmp_path / "was-run"
    (folder / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    with LLM(str(folder), dtype="float32") as llm:
        tokens: Sequence[int] = llm.generate([[5, 6, 7]], greedy(3))[0].outputs[0].token_ids
    assert len(tokens) == 3
    assert not marker.exists()
