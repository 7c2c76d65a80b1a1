"""Llama against transformers: the same logits and the same greedy tokens, for tiny random checkpoints of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from margin_rule import Reference, check, generate, next_tokens_of, token_ids_of
from safetensors.torch import load_file, save_file
from tiny_model import MAX_POSITIONS, VOCAB_SIZE, write_tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from octavo import LLM, SamplingParams
from octavo.builtin.hf_checkpoint import HuggingFaceCheckpoint
from octavo.builtin.llama import Llama
from octavo.builtin.torch_attention import TorchAttention
from octavo.builtin.unquantized import Unquantized
from octavo.errors import CheckpointError
from octavo.interfaces import BatchLimits, ForwardContext, NewRow, ScheduledRow, Step
from octavo.model_config import ModelConfig
from octavo.nn.factory import DeviceLayerFactory
from octavo.nn.weights import WeightLoader
from octavo.plugins.specs import AttentionNeed
from octavo.runner.batch import PersistentBatch

KINDS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "tied head": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "unusual sizes": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "rms_norm_eps": 1e-3},
}
BLOCK_SIZE = 8


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"), **KINDS[request.param])


@pytest.fixture(scope="module")
def reference_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def logits_of(folder: Path, token_ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
    """The logits behind every token, computed in steps of so many tokens."""
    checkpoint, loader = HuggingFaceCheckpoint(str(folder)), WeightLoader()
    config = ModelConfig.from_dict(checkpoint.config(), checkpoint.generation_config())
    need = AttentionNeed(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=BLOCK_SIZE,
    )
    backend = TorchAttention(need)
    factory = DeviceLayerFactory(Unquantized({}, torch.float32, "cpu"), backend, loader)
    model = Llama(config, factory)
    loader.load(checkpoint.tensors(), model.ignored_names())
    rotary = factory.rotary_tables(MAX_POSITIONS)
    blocks = list(range(-(-len(token_ids) // BLOCK_SIZE)))
    caches = [backend.kv_layout().allocate(len(blocks), "cpu") for _ in model.layers]
    limits = BatchLimits(
        max_num_requests=1, max_num_tokens=256, max_model_len=MAX_POSITIONS, block_size=BLOCK_SIZE, device="cpu"
    )
    batch, state = PersistentBatch(limits), backend.make_state(limits)
    logits, start = [], 0
    for step_id, num_tokens in enumerate(chunks):
        row = ScheduledRow(
            request_id="a",
            num_computed_tokens=start,
            num_tokens=num_tokens,
            new_block_ids=[] if step_id else blocks,
            samples=False,
        )
        step = Step(step_id=step_id, entering=[] if step_id else [entry(token_ids)], rows=[row])
        batch.update(step)
        inputs = batch.inputs(step)
        backend.plan(inputs.layout, state)
        context = ForwardContext(
            positions=inputs.positions,
            rotary=[table(inputs.positions) for table in rotary],
            kv_caches=caches,
            attention_state=state,
        )
        hidden, residual = model.embed(inputs.token_ids), None
        for layer in model.layers:
            hidden, residual = layer(hidden, residual, context)
        assert residual is not None
        logits.append(model.head(hidden, residual))
        start += num_tokens
    return torch.cat(logits)


def entry(token_ids: Sequence[int]) -> NewRow:
    return NewRow(
        request_id="a",
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        params=SamplingParams(temperature=0.0),
        seed=0,
        sample_index=0,
    )


@torch.inference_mode()
def greedy_reference(model: LlamaForCausalLM, prompt: Sequence[int], num_tokens: int) -> Reference:
    """What transformers answers, without a cache, and by how much each token won."""
    token_ids, margins = list(prompt), []
    for _ in range(num_tokens):
        best = model(torch.tensor([token_ids])).logits[0, -1].topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        token_ids.append(int(best.indices[0]))
    return Reference(
        name=f"{len(prompt)} tokens",
        prompt_token_ids=list(prompt),
        token_ids=token_ids[len(prompt) :],
        margins=margins,
    )


@pytest.mark.parametrize("chunks", [[60], [16, 16, 16, 12], [50, *[1] * 10]], ids=["whole", "chunks", "decode"])
def test_logits_equal_transformers(folder: Path, reference_model: LlamaForCausalLM, chunks: list[int]) -> None:
    (token_ids,) = prompts(60)
    with torch.inference_mode():
        wanted = reference_model(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(logits_of(folder, token_ids, chunks), wanted, rtol=1e-4, atol=1e-4)


def test_greedy_tokens_equal_transformers(folder: Path, reference_model: LlamaForCausalLM) -> None:
    references = [greedy_reference(reference_model, prompt, 32) for prompt in prompts(1, 50, 17)]
    for settings in ({}, {"max_num_batched_tokens": 16}, {"block_size": 4, "max_steps_in_flight": 2}):
        with LLM(str(folder), dtype="float32", max_num_seqs=4, **settings) as llm:
            check(references, token_ids_of(generate(llm, references)), next_tokens_of(llm))


def test_a_checkpoint_without_a_layers_tensor_is_refused_by_its_name(tmp_path: Path) -> None:

    write_tiny_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.down_proj\.weight"):
        LLM(str(tmp_path), dtype="float32")


def test_a_tied_checkpoint_may_also_hold_the_head(tmp_path: Path) -> None:

    write_tiny_llama(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    token_ids = prompts(9)[0]
    alone = logits_of(tmp_path, token_ids, [9])
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits_of(tmp_path, token_ids, [9]), alone)
