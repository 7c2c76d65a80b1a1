"""ModelConfig: the fields of config.json that the engine and the architectures read. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Attributes:
        theta: base of the frequencies.
        rope_type: "default", "llama3", or "factors" (each frequency divided by a given factor).
        parameters: the type's own numbers, as in config.json.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only transformer's sizes.

    `sliding_window` is how many tokens back a query sees, None for all; `raw` is the whole config.json, for what only
    one architecture reads.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    sliding_window: int | None
    dtype: str
    eos_token_ids: frozenset[int]
    quantization: Mapping[str, Any]
    raw: Mapping[str, Any]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], generation_config: Mapping[str, Any]) -> ModelConfig:
        """Read config.json's keys; end-of-sequence ids are those of both files.

        Raises:
            CheckpointError: keys are missing; all of them are named.
        """
        required = (
            "architectures",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        if missing := [key for key in required if not raw.get(key)]:
            raise CheckpointError(
                f"config.json lacks {', '.join(missing)}: this is not a decoder model's configuration."
            )
        num_heads = int(raw["num_attention_heads"])
        return cls(
            architecture=str(raw["architectures"][0]),
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // num_heads),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
            rope=_rope(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            sliding_window=_sliding_window(raw),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            eos_token_ids=_token_ids(raw.get("eos_token_id")) | _token_ids(generation_config.get("eos_token_id")),
            quantization=dict(raw.get("quantization_config") or {}),
            raw=raw,
        )


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: rope_parameters (transformers 5) and rope_theta with rope_scaling (before)."""
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    return RopeConfig(theta=float(theta), rope_type=str(rope_type), parameters=parameters)


def _sliding_window(raw: Mapping[str, Any]) -> int | None:
    """Tokens a query sees at most; None when it sees all. Qwen2 states a window and switches it off beside it."""
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    return None if window is None else int(window)


def _token_ids(value: object) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, (list, tuple)) else frozenset({int(str(value))})
