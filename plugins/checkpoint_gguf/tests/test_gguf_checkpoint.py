"""GGUFCheckpoint: weights under Hugging Face's names and in its order, config.json's keys, refusals in one sentence."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from octavo.errors import CheckpointError
from octavo.model_config import ModelConfig
from octavo_checkpoint_gguf.checkpoint import GGUFCheckpoint

if TYPE_CHECKING:
    from conftest import TinyLlama


def open_(path: Path) -> GGUFCheckpoint:
    return GGUFCheckpoint(str(path))


# ------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("number_format", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_1, Type.Q4_0, Type.Q5_1])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back_under_their_hugging_face_names(tiny: TinyLlama, number_format: Type, tied: bool) -> None:
    weights = tiny.weights(tied=tied, bias=True)
    tensors = dict(open_(tiny.write(weights, number_format=number_format)).tensors())
    assert sorted(tensors) == sorted(weights)
    for name, tensor in tensors.items():
        stored = number_format if weights[name].ndim > 1 else Type.F32
        expected = dequantize(quantize(weights[name], stored), stored).astype(np.float32)
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), expected, err_msg=name)


def test_rotary_rows_give_the_scores_that_llama_cpp_s_rows_give(tiny: TinyLlama) -> None:
    """Rotating halves on our rows and neighbours on the file's rows: the same dot products of queries and keys."""
    weights = tiny.weights()
    tensors = dict(open_(tiny.write(weights)).tensors())
    hidden = torch.randn(2, tiny.hidden_size, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(tiny.head_dim // 2) * 0.3

    def score(
        rotate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        query, key = (
            (hidden[0] @ query.T).view(tiny.num_heads, tiny.head_dim),
            (hidden[1] @ key.T).view(tiny.num_kv_heads, tiny.head_dim),
        )
        query, key = rotate(query, angles * 5), rotate(key, angles * 2)
        return (query.view(tiny.num_kv_heads, -1, tiny.head_dim) * key[:, None]).sum(-1)

    def halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        return rotated(*x.chunk(2, dim=-1), angles, interleave=False)

    def neighbours(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        return rotated(x[..., 0::2], x[..., 1::2], angles, interleave=True)

    def rotated(real: torch.Tensor, imaginary: torch.Tensor, angles: torch.Tensor, *, interleave: bool) -> torch.Tensor:
        turned = torch.polar(torch.ones_like(angles), angles) * torch.complex(real, imaginary)
        return (
            torch.stack([turned.real, turned.imag], -1).flatten(-2)
            if interleave
            else torch.cat([turned.real, turned.imag], -1)
        )

    checkpoint = open_(tiny.write(weights))
    stored = {name: torch.from_numpy(checkpoint._file.read(f"blk.0.attn_{name}.weight")) for name in ("q", "k")}
    ours = [tensors[f"model.layers.0.self_attn.{name}_proj.weight"] for name in ("q", "k")]
    torch.testing.assert_close(score(halves, *ours), score(neighbours, stored["q"], stored["k"]))


def test_tensors_are_read_one_at_a_time_and_may_be_changed(tiny: TinyLlama) -> None:
    tensors = open_(tiny.write()).tensors()
    name, tensor = next(tensors)
    tensor.zero_()
    assert name == "model.embed_tokens.weight"


def test_headers_are_those_of_the_tensors_as_they_lie_in_the_file(tiny: TinyLlama) -> None:
    checkpoint = open_(tiny.write(number_format=Type.Q8_0))
    headers = checkpoint.tensor_headers()
    assert {name: one.shape for name, one in headers.items()} == {
        name: tuple(tensor.shape) for name, tensor in checkpoint.tensors()
    }
    query, norm = headers["model.layers.0.self_attn.q_proj.weight"], headers["model.norm.weight"]
    assert (query.dtype, query.num_bytes) == ("Q8_0", 64 * 64 // 32 * 34)  # 32 bytes and a float16 scale a block
    assert (norm.dtype, norm.num_bytes) == ("F32", 64 * 4)


# ------------------------------------------------------------------------------------------- configuration


def test_configuration_has_the_keys_of_config_json(tiny: TinyLlama) -> None:
    checkpoint = open_(tiny.write(metadata={"tokenizer.ggml.padding_token_id": 2}))
    config = ModelConfig.from_dict(checkpoint.config(), checkpoint.generation_config())
    assert (config.architecture, config.vocab_size, config.hidden_size) == (
        "LlamaForCausalLM",
        len(tiny.tokens),
        tiny.hidden_size,
    )
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (
        2,
        tiny.num_heads,
        tiny.num_kv_heads,
        tiny.head_dim,
    )
    assert (config.intermediate_size, config.max_position_embeddings) == (96, 512)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert (config.rope.theta, config.rope.rope_type) == (500000.0, "default")
    assert config.eos_token_ids == {0}
    assert not config.tie_word_embeddings
    assert not config.quantization
    assert checkpoint.config()["pad_token_id"] == 2
    assert checkpoint.generation_config()["bos_token_id"] == 1


def test_head_without_a_tensor_is_tied(tiny: TinyLlama) -> None:
    assert open_(tiny.write(tiny.weights(tied=True))).config()["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("number_format", "dtype"),
    [(Type.F32, "float32"), (Type.F16, "float16"), (Type.BF16, "bfloat16"), (Type.Q8_0, "bfloat16")],
)
def test_dtype_is_the_file_s_or_bfloat16_when_quantised(tiny: TinyLlama, number_format: Type, dtype: str) -> None:
    assert open_(tiny.write(number_format=number_format)).config()["dtype"] == dtype


def test_key_value_heads_default_to_the_query_heads(tiny: TinyLlama) -> None:
    weights = tiny.weights()
    for name in [name for name in weights if ".k_proj." in name or ".v_proj." in name]:
        weights[name] = np.zeros((tiny.num_heads * tiny.head_dim, tiny.hidden_size), np.float32)
    checkpoint = open_(tiny.write(weights, metadata={"llama.attention.head_count_kv": None}))
    assert checkpoint.config()["num_key_value_heads"] == tiny.num_heads


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.scaling.type": "none"}, {"rope_type": "default"}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 8.0,
                "llama.rope.scaling.original_context_length": 4096,
            },
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
        ),
    ],
)
def test_rotary_scaling_is_named_as_in_config_json(
    tiny: TinyLlama, metadata: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    assert open_(tiny.write(metadata=metadata)).config()["rope_parameters"] == expected


def test_rotary_factors_are_part_of_the_configuration_and_no_weight(tiny: TinyLlama) -> None:
    factors = np.linspace(1, 8, tiny.head_dim // 2, dtype=np.float32)
    checkpoint = open_(tiny.write(more_tensors={"rope_freqs.weight": factors}))
    assert checkpoint.config()["rope_parameters"] == {"rope_type": "factors", "factors": factors.tolist()}
    assert all("rope" not in name for name, _ in checkpoint.tensors())


def test_every_token_that_ends_a_turn_ends_the_answer(tiny: TinyLlama) -> None:
    tokens = [*tiny.tokens[:-2], "<|eot_id|>", "<|im_end|>"]
    types = [3, 3, 4, *[1] * (len(tokens) - 5), 3, 1]  # the last is plain text that looks like an end
    checkpoint = open_(
        tiny.write(
            metadata={
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": types,
                "tokenizer.ggml.eom_token_id": 2,
            }
        )
    )
    assert checkpoint.config()["eos_token_id"] == 0
    assert checkpoint.generation_config()["eos_token_id"] == [0, 2, len(tokens) - 2]


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"split.count": 3}, "one of 3 parts; join them"),
        ({"llama.expert_count": 8}, "a mixture of 8 experts"),
        ({"llama.attention.head_count": None}, "attention.head_count should be one whole number and is None"),
        ({"llama.attention.head_count": [4, 4]}, r"attention.head_count should be .* is \[4, 4\]"),
        ({"llama.attention.head_count_kv": 3}, "4 query heads cannot share 3 key-value heads"),
        ({"llama.attention.head_count": 40}, "attn_q.weight has 64 rows for 40 heads"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8, but q has 16 rows a head"),
        ({"llama.attention.key_length": 32}, "attention.key_length is 32, but q has 16 rows a head"),
        ({"llama.rope.freq_base": "fast"}, "rope.freq_base is 'fast', not a number"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000, outside the vocabulary"),
    ],
)
def test_what_is_not_read_is_refused_in_one_sentence(
    tiny: TinyLlama, metadata: Mapping[str, Any], sentence: str
) -> None:
    path = tiny.write(metadata=metadata)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read_all(path)
    assert str(path) in str(caught.value)


def test_other_architecture_is_told_what_is_read(tiny: TinyLlama) -> None:
    with pytest.raises(CheckpointError, match=r"architecture is 'qwen2'; .* reads 'llama' \(Llama 1, 2 and 3, Mistral"):
        open_(tiny.write(architecture="qwen2"))


def test_unknown_tensors_are_named(tiny: TinyLlama) -> None:
    more = {f"blk.0.ffn_gate_exps.{index}.weight": np.zeros(32, np.float32) for index in range(7)}
    with pytest.raises(
        CheckpointError, match=r"7 tensors that no Llama model has: blk\.0\.ffn_gate_exps\.0.*, \.\.\.\."
    ):
        open_(tiny.write(more_tensors=more))


def test_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for content, sentence in (
        (b"", "cannot be opened"),
        (b"PK\x03\x04", "not a GGUF file"),
        (b"GG", "not a GGUF file"),
    ):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=sentence):
            open_(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_(tmp_path / "gone.gguf")


@pytest.mark.parametrize(("version", "sentence"), [(1, "version 1;"), (3 << 24, "big-endian")])
def test_other_version_is_refused(tiny: TinyLlama, version: int, sentence: str) -> None:
    path = tiny.write()
    content = path.read_bytes()
    path.write_bytes(content[:4] + version.to_bytes(4, "little") + content[8:])
    with pytest.raises(CheckpointError, match=sentence):
        open_(path)


def read_all(path: Path) -> None:
    checkpoint = open_(path)
    checkpoint.config(), checkpoint.generation_config(), checkpoint.tokenizer(), list(checkpoint.tensors())


def test_file_that_was_cut_short_is_refused_wherever_it_was_cut(tiny: TinyLlama) -> None:
    path = tiny.write(tiny.weights(tied=True))
    content = path.read_bytes()
    num_bytes = sorted({0, 3, 4, 7, 8, 20, *range(24, len(content), 997), len(content) - 1})
    for cut in num_bytes:
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError):
            open_(path)


def test_damaged_file_is_read_or_refused_but_nothing_else(tiny: TinyLlama) -> None:
    path = tiny.write(tiny.weights(tied=True))
    content = path.read_bytes()
    header = content.index(b"output_norm") + 2000
    random_numbers = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(random_numbers.randint(1, 4)):
            damaged[random_numbers.randrange(4, header)] = random_numbers.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            read_all(path)
