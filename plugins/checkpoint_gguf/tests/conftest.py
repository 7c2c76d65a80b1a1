"""Small GGUF files, written as llama.cpp's converter writes them; and the demo model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from octavo.demo_model import demo_model_path
from octavo.errors import ModelNotFoundError

Array = npt.NDArray[np.float32]

LLAMA_CPP_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


class TinyLlama:
    """A Llama of two layers, and GGUF files of it in `folder`."""

    num_layers, hidden_size, ffn_size, num_heads, num_kv_heads, head_dim = 2, 64, 96, 4, 2, 16
    tokens = ("<end>", "<start>", "<think>", *"abcdefghijklm")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def metadata(self) -> dict[str, Any]:
        return {
            "llama.block_count": self.num_layers,
            "llama.context_length": 512,
            "llama.embedding_length": self.hidden_size,
            "llama.feed_forward_length": self.ffn_size,
            "llama.attention.head_count": self.num_heads,
            "llama.attention.head_count_kv": self.num_kv_heads,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.dimension_count": self.head_dim,
            "llama.rope.freq_base": 500000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": [*self.tokens],
            "tokenizer.ggml.token_type": [3, 3, 4, *[1] * (len(self.tokens) - 3)],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 0,
        }

    def weights(self, *, tied: bool = False, bias: bool = False) -> dict[str, Array]:
        """Random weights by their Hugging Face names."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (len(self.tokens), self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not tied:
            shapes["lm_head.weight"] = (len(self.tokens), self.hidden_size)
        for at in (f"model.layers.{layer}." for layer in range(self.num_layers)):
            for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, self.hidden_size)
                if bias:
                    shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
            shapes[f"{at}self_attn.o_proj.weight"] = (self.hidden_size, heads)
            shapes[f"{at}mlp.gate_proj.weight"] = shapes[f"{at}mlp.up_proj.weight"] = (self.ffn_size, self.hidden_size)
            shapes[f"{at}mlp.down_proj.weight"] = (self.hidden_size, self.ffn_size)
            shapes[f"{at}input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"{at}post_attention_layernorm.weight"] = (self.hidden_size,)
        rng = np.random.default_rng(0)
        return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}

    def write(
        self,
        weights: Mapping[str, Array] | None = None,
        *,
        number_format: GGMLQuantizationType = GGMLQuantizationType.F32,
        metadata: Mapping[str, Any] | None = None,
        architecture: str = "llama",
        more_tensors: Mapping[str, Array] | None = None,
    ) -> Path:
        """A file with these weights, their matrices in `number_format`; a value of None removes a metadata key."""
        path = self.folder / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in {**self.metadata(), **(metadata or {})}.items():
            _add(writer, key, value)
        for name, values in (self.weights() if weights is None else weights).items():
            stored = number_format if values.ndim > 1 else GGMLQuantizationType.F32
            rows = quantize(self._neighbour_rotary(name, values), stored)
            writer.add_tensor(_llama_cpp_name(name), rows, raw_dtype=stored)
        for name, values in (more_tensors or {}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _neighbour_rotary(self, name: str, values: Array) -> Array:
        """Rows of q and k as the converter writes them: row i and row i + head_dim / 2 become neighbours."""
        if ".q_proj." not in name and ".k_proj." not in name:
            return values
        num_heads = self.num_heads if ".q_proj." in name else self.num_kv_heads
        rows = np.arange(len(values)).reshape(num_heads, 2, -1)
        return values[rows.transpose(0, 2, 1).ravel()]


def _llama_cpp_name(name: str) -> str:
    for theirs, ours in LLAMA_CPP_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, list):
        if value:
            writer.add_array(key, value)
        else:  # the library leaves empty arrays out, and files have them
            writer.add_key_value(key, ["x"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif value is not None:
        assert isinstance(value, float)
        writer.add_float32(key, value)


@pytest.fixture
def tiny(tmp_path: Path) -> TinyLlama:
    return TinyLlama(tmp_path)


@pytest.fixture(scope="session")
def demo_model() -> str:
    try:
        return str(demo_model_path(fetch=False))
    except ModelNotFoundError as error:
        pytest.fail(str(error))
