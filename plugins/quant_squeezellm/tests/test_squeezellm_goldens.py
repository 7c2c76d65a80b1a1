"""Checkpoints of the tool's own making: every weight, every product, and the tokens of whole models."""

from __future__ import annotations

from pathlib import Path

import margin_rule
import pytest
import torch
from quantized_goldens import make_llm
from squeezellm_goldens import Golden, GoldenLinear, read_goldens
from squeezellm_layers import method_of, stored_linear
from tiny_model import write_tokenizer

from octavo import LLM, SamplingParams
from octavo.errors import CheckpointError
from octavo.interfaces import StoredLinear
from octavo.plugins.registry import default_registry
from octavo.selection import choose_checkpoint
from octavo.testing.stored_weight import check_product
from octavo_quant_squeezellm.method import SqueezeLLMMethod

LOGPROB_TOLERANCE = 1e-4
"""Of float32 sums in another order; the weights are the oracle's to their last bit."""

PRODUCT_TOLERANCE = 2e-6
"""Likewise, as a share of |x| @ |W|.T."""

GOLDENS = read_goldens()


@pytest.fixture(params=GOLDENS, ids=lambda golden: golden.path.name)
def golden(request: pytest.FixtureRequest) -> Golden:
    found: Golden = request.param
    return found


def read(path: Path, linears: list[GoldenLinear]) -> tuple[SqueezeLLMMethod, list[StoredLinear]]:
    """The method of a checkpoint and these linears of it, as the loader hands them over."""
    checkpoint = choose_checkpoint(default_registry(), path).get().build(str(path))
    method, tensors = method_of(checkpoint.tensor_headers()), dict(checkpoint.tensors())
    return method, [
        stored_linear(
            {spec.name: tensors[f"{one.prefix}.{spec.name}"] for spec in method.parameters(one.prefix, one.shape)},
            one.shape,
            one.prefix,
        )
        for one in linears
    ]


def test_weights_are_the_oracle_s(golden: Golden) -> None:
    method, stored = read(golden.path, golden.linears)
    for linear, one in zip(golden.linears, stored, strict=True):
        weight = method.dequantize(one)
        assert torch.equal(weight.T[:16], linear.weight_head), f"{linear.prefix}: other weights"
        sums = torch.stack([weight.double().sum(), weight.double().abs().sum()])
        wanted = torch.tensor([linear.sum, linear.abs_sum], dtype=torch.float64)
        assert (sums - wanted).abs().max() <= 1e-8 * linear.abs_sum, f"{linear.prefix}: {sums}, wanted {wanted}"


def test_outliers_are_as_many_as_the_oracle_counted(golden: Golden) -> None:
    method, stored = read(golden.path, golden.linears)
    for linear, one in zip(golden.linears, stored, strict=True):
        outliers = method.weight(one).outliers
        assert (0 if outliers is None else len(outliers.values())) == linear.num_outliers, linear.prefix


def test_products_are_the_oracle_s(golden: Golden) -> None:
    method, stored = read(golden.path, golden.linears)
    for linear, one in zip(golden.linears, stored, strict=True):
        bound = linear.x.abs().double() @ method.dequantize(one).abs().double().T
        error = (method.apply(method.prepare([one]), linear.x, None) - linear.y).abs() / bound
        assert error.max() <= PRODUCT_TOLERANCE, f"{linear.prefix}: wrong by {error.max():.2g} of |x| @ |W|.T"


def test_projections_that_read_one_input_are_the_oracle_s_as_one(golden: Golden) -> None:
    in_features = golden.linears[-1].shape.in_features
    several = [linear for linear in golden.linears if linear.shape.in_features == in_features]
    method, stored = read(golden.path, several)
    y = method.apply(method.prepare(stored), several[0].x, None)
    weight = torch.cat([method.dequantize(one) for one in stored])
    check_product(y, several[0].x, weight, None, PRODUCT_TOLERANCE, golden.path.name)


def test_engine_answers_as_recorded_or_says_that_the_model_is_cut(golden: Golden, tmp_path: Path) -> None:
    if not golden.references:
        write_tokenizer(tmp_path)
        with pytest.raises(CheckpointError, match=r"tensors are missing: model\.embed_tokens\.weight"):
            make_llm(golden.path, tokenizer=str(tmp_path))
        return
    with make_llm(golden.path) as llm:
        check_logprobs(llm, golden)
        found = margin_rule.token_ids_of(margin_rule.generate(llm, golden.references))
        margin_rule.check(golden.references, found, margin_rule.next_tokens_of(llm))


def check_logprobs(llm: LLM, golden: Golden) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, logprobs=-1)
    outputs = llm.generate([reference.prompt_token_ids for reference in golden.references], params)
    for reference, output, logits in zip(golden.references, outputs, golden.logits, strict=True):
        assert output.outputs[0].logprobs is not None
        (entry,) = output.outputs[0].logprobs
        found = torch.tensor([entry[token_id].logprob for token_id in range(len(logits))])
        error = (found - logits.log_softmax(-1)).abs().max().item()
        assert error <= LOGPROB_TOLERANCE, f"{reference.name}: a logprob is off by {error:.2g}"
