"""GGUFCheckpoint: a Llama-family GGUF file under the names that config.json and Hugging Face's weights have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from octavo.errors import CheckpointError
from octavo.interfaces import Checkpoint, TokenizerData
from octavo.interfaces.checkpoint import TensorHeader
from octavo_checkpoint_gguf.gguf_file import GGUFFile
from octavo_checkpoint_gguf.tokenizer import end_token_ids, read_tokenizer

_T = TypeVar("_T")

ARCHITECTURES = {"llama": "LlamaForCausalLM"}  # Llama 1, 2, 3, Mistral, SmolLM: one tensor layout

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GGUFCheckpoint(Checkpoint):
    """One .gguf file. Weights are dequantised to float32, one tensor at a time.

    Raises:
        CheckpointError: damaged, of another architecture, split in parts, or with tensors a Llama model lacks.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._file = GGUFFile(path)
        self._refuse_what_is_not_read()
        self._names = self._hugging_face_names()

    def config(self) -> Mapping[str, Any]:
        num_heads = self._int("attention.head_count")
        hidden_size = self._int("embedding_length")
        metadata = self._file.metadata
        return {
            "architectures": [ARCHITECTURES[self._architecture]],
            "model_type": self._architecture,
            "hidden_act": "silu",
            "vocab_size": self._file.tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": self._int("feed_forward_length"),
            "num_hidden_layers": self._int("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._num_kv_heads(),
            "head_dim": self._head_dim(),
            "attention_bias": any(".attn_q.bias" in name for name in self._file.tensors),
            "rms_norm_eps": self._float("attention.layer_norm_rms_epsilon", 1e-5),
            "max_position_embeddings": self._int("context_length"),
            "rope_theta": self._float("rope.freq_base", 10000.0),
            "rope_parameters": self._rope_parameters(),
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "dtype": self._dtype(),
        }

    def generation_config(self) -> Mapping[str, Any]:
        metadata = self._file.metadata
        return {
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._of_tokenizer(end_token_ids),
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        }

    def tokenizer(self) -> TokenizerData:
        return self._of_tokenizer(read_tokenizer)

    def tensor_headers(self) -> Mapping[str, TensorHeader]:
        files = ((hugging_face_name, self._file.tensors[name]) for name, hugging_face_name in self._names.items())
        return {
            name: TensorHeader(shape=info.shape, dtype=info.type.name, num_bytes=info.num_bytes) for name, info in files
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        num_heads, num_kv_heads = self._int("attention.head_count"), self._num_kv_heads()
        for name, hugging_face_name in self._names.items():
            values = self._file.read(name)
            if ".attn_q." in name:
                values = half_rotary(values, num_heads)
            elif ".attn_k." in name:
                values = half_rotary(values, num_kv_heads)
            yield hugging_face_name, torch.from_numpy(values)

    # ------------------------------------------------------------------------------------------ metadata

    def _of_tokenizer(self, read: Callable[[Mapping[str, Any]], _T]) -> _T:
        """What `read` finds in the metadata; its errors name the file."""
        try:
            return read(self._file.metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    @property
    def _architecture(self) -> str:
        return str(self._file.metadata.get("general.architecture", "unknown"))

    def _int(self, key: str, default: int | None = None) -> int:
        value = self._file.metadata.get(f"{self._architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(
                f"{self.path}: metadata {self._architecture}.{key} should be one whole number and is {value!r}."
            )
        return value

    def _float(self, key: str, default: float) -> float:
        value = self._file.metadata.get(f"{self._architecture}.{key}", default)
        if not isinstance(value, (int, float)):
            raise CheckpointError(f"{self.path}: metadata {self._architecture}.{key} is {value!r}, not a number.")
        return float(value)

    def _num_kv_heads(self) -> int:
        return self._int("attention.head_count_kv", self._int("attention.head_count"))

    def _head_dim(self) -> int:
        """Rows of q divided by heads: what the weights are, whatever the metadata says of it."""
        rows = self._file.tensors["blk.0.attn_q.weight"].shape[0]
        head_dim = rows // self._int("attention.head_count")
        for key in ("attention.key_length", "rope.dimension_count"):
            if (said := self._int(key, head_dim)) != head_dim:
                raise CheckpointError(
                    f"{self.path}: {self._architecture}.{key} is {said}, but q has {head_dim} rows a head; "
                    "models that rotate only a part of each head are not read."
                )
        return head_dim

    def _dtype(self) -> str:
        matrix_types = {info.type.name for info in self._file.tensors.values() if len(info.shape) > 1}
        if not matrix_types <= set(_FLOAT_TYPES):
            return "bfloat16"  # quantised: no float type of its own
        # A mixed file is as exact as its bulk, which is the narrow type.
        return next(_FLOAT_TYPES[name] for name in ("F16", "BF16", "F32") if name in matrix_types)

    def _rope_parameters(self) -> dict[str, Any]:
        if _ROPE_FACTORS in self._file.tensors:
            return {"rope_type": "factors", "factors": self._file.read(_ROPE_FACTORS).tolist()}
        old_factor = self._float("rope.scale_linear", 1.0)  # before rope.scaling.* existed
        rope_type = self._file.metadata.get(
            f"{self._architecture}.rope.scaling.type", "none" if old_factor == 1.0 else "linear"
        )
        if rope_type == "none":
            return {"rope_type": "default"}
        parameters: dict[str, Any] = {"rope_type": rope_type, "factor": self._float("rope.scaling.factor", old_factor)}
        if original := self._int("rope.scaling.original_context_length", 0):
            parameters["original_max_position_embeddings"] = original
        return parameters

    # ------------------------------------------------------------------------------------------ what is read

    def _refuse_what_is_not_read(self) -> None:
        metadata = self._file.metadata
        if self._architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.path}: general.architecture is {self._architecture!r}; octavo-checkpoint-gguf reads "
                f"{', '.join(map(repr, ARCHITECTURES))} (Llama 1, 2 and 3, Mistral, SmolLM and others of that layout)."
            )
        if metadata.get("split.count", 1) not in (0, 1):
            raise CheckpointError(
                f"{self.path}: one of {metadata['split.count']} parts; join them with llama.cpp's "
                "`llama-gguf-split --merge` and load the result."
            )
        if num_experts := self._int("expert_count", 0):
            raise CheckpointError(f"{self.path}: a mixture of {num_experts} experts (Mixtral); dense models are read.")
        needed = ("token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight")
        if missing := [name for name in needed if name not in self._file.tensors]:
            raise CheckpointError(f"{self.path}: lacks {', '.join(missing)}; this is not a whole model.")
        num_heads, num_kv_heads = self._int("attention.head_count"), self._num_kv_heads()
        if not num_heads or not num_kv_heads or num_heads % num_kv_heads:
            raise CheckpointError(f"{self.path}: {num_heads} query heads cannot share {num_kv_heads} key-value heads.")
        self._check_rotary_rows(num_heads, num_kv_heads)

    def _check_rotary_rows(self, num_heads: int, num_kv_heads: int) -> None:
        for name, info in self._file.tensors.items():
            heads = num_heads if ".attn_q." in name else num_kv_heads if ".attn_k." in name else None
            if heads is not None and info.shape[0] % (2 * heads):
                raise CheckpointError(f"{self.path}: tensor {name} has {info.shape[0]} rows for {heads} heads.")

    def _hugging_face_names(self) -> dict[str, str]:
        names, unknown = {}, []
        for name in self._file.tensors:
            if name == _ROPE_FACTORS or name.endswith(".attn_rot_embd.weight"):
                continue  # the first is part of config(); the second, of old files, can be computed
            if name in _GLOBAL_NAMES:
                names[name] = _GLOBAL_NAMES[name]
            elif (match := _LAYER_TENSOR.fullmatch(name)) and match[2] in _LAYER_NAMES:
                names[name] = f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
            else:
                unknown.append(name)
        if unknown:
            shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            raise CheckpointError(f"{self.path}: {len(unknown)} tensors that no Llama model has: {shown}.")
        return names


def half_rotary(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k from llama.cpp's rotary order to Hugging Face's.

    llama.cpp rotates neighbours: its rows 2i and 2i + 1 of a head are Hugging Face's rows i and i + head_dim / 2.

    Args:
        weight: [num_heads * head_dim, hidden_size], or [num_heads * head_dim] for a bias.
    """
    pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])  # [num_heads, head_dim / 2, 2, ...]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
