"""Architectures with nothing in common but transformers' interface: the logits and tokens that transformers gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_transformers import KINDS, logits_of, prompts, random_model, raw_config, saved_tensors
from torch import Tensor, nn
from transformers import PreTrainedModel

from octavo.builtin.llama import Llama
from octavo.testing.model_under_test import ModelUnderTest
from octavo_model_transformers.model import TransformersModel


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return random_model(KINDS[request.param])


def served(model: PreTrainedModel, dtype: torch.dtype = torch.float32, **changes: Any) -> ModelUnderTest:
    """By this plugin, with the tensors that transformers saves of the model."""
    return ModelUnderTest(TransformersModel, raw_config(model) | changes, saved_tensors(model), dtype)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_logits_equal_those_of_transformers(model: PreTrainedModel) -> None:
    (prompt,) = prompts(50)
    (found,) = served(model).logits([prompt])
    assert_close(found, logits_of(model, prompt))


def test_logits_of_a_batch_in_chunks_equal_those_of_each_alone(model: PreTrainedModel) -> None:
    requests = prompts(50, 9, 30)
    found = served(model).logits(requests, [[40, 9, 1], [7, 1, 1], [1, 28, 1]])
    for one, token_ids in zip(found, requests, strict=True):
        assert_close(one, logits_of(model, token_ids))


def test_bfloat16_logits_stay_close(model: PreTrainedModel) -> None:
    (prompt,) = prompts(30)
    wanted = logits_of(model, prompt)
    (found,) = served(model, torch.bfloat16).logits([prompt])
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.1


def test_every_linear_is_the_factorys(model: PreTrainedModel) -> None:
    built = served(model)
    built.logits([prompts(3)[0]])
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert {prefix for prefix, _ in built.asked.inputs} == linears - {"lm_head"}


def test_head_on_some_rows_equals_head_on_all(model: PreTrainedModel) -> None:
    built = served(model)
    hidden, residual = built.hidden(prompts(20)[0])
    rows = torch.tensor([19, 4])
    assert_close(built.model.head(hidden[rows], residual[rows]), built.model.head(hidden, residual)[rows])


def test_a_residual_that_is_handed_on_counts(model: PreTrainedModel) -> None:
    built, (prompt,) = served(model), prompts(20)
    wanted = built.hidden(prompt)[0]
    embedded = built.model.embed(torch.tensor(prompt))
    assert_close(built.hidden(prompt, slice(None), (0.25 * embedded, 0.75 * embedded))[0], wanted)


def test_a_scale_that_the_layer_asks_for_is_the_one_that_attention_uses() -> None:
    granite = random_model(KINDS["Granite, four multipliers"])
    (prompt,) = prompts(30)
    (found,) = served(granite, attention_multiplier=0.9).logits([prompt])
    assert not torch.allclose(found, logits_of(granite, prompt), atol=1e-2)


def test_a_llama_gives_the_same_tokens_as_the_component_written_for_it() -> None:
    llama = random_model(KINDS["Llama, YaRN"])
    native = ModelUnderTest(Llama, raw_config(llama), llama.state_dict())
    (prompt,) = prompts(20)
    assert greedy_tokens(served(llama), prompt) == greedy_tokens(native, prompt)


def greedy_tokens(built: ModelUnderTest, token_ids: list[int]) -> list[int]:
    """The prompt and 32 tokens behind it."""
    for _ in range(32):
        token_ids = [*token_ids, int(built.logits([token_ids])[0][-1].argmax())]
    return token_ids
