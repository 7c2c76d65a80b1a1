"""ModelConfig: the fields of config.json that the engine and the architectures read. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import CheckpointError

_MAX_POSITIONS = 2048  # transformers' own default
_OTHER_NAMES = {"su": "longrope"}  # that older files use


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864). Compared by value, and a key of dictionaries.

    Attributes:
        theta: base of the frequencies.
        rope_type: "default", "linear", "dynamic", "llama3", "yarn", "longrope", or "factors" (each frequency divided
            by a given factor).
        partial_rotary_factor: how much of each head is rotated, from its beginning.
        parameters: the type's own numbers, as in config.json.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_dict(cls, parameters: Mapping[str, Any], raw: Mapping[str, Any]) -> RopeConfig:
        """Read one rotation's entry of config.json.

        Args:
            parameters: config.json's rope_parameters or rope_scaling, or one layer type's entry of it.
            raw: the whole config.json, which holds beside it what the entry leaves out.
        """
        own = {key: value for key, value in parameters.items() if value is not None}
        theta = own.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
        rope_type = str(own.pop("rope_type", None) or own.pop("type", None) or "default")
        own.pop("type", None)
        partial = own.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
        if rope_type != "default":  # the lengths that a scaling goes by
            longest = int(raw.get("max_position_embeddings") or _MAX_POSITIONS)
            own["original_max_position_embeddings"] = (
                raw.get("original_max_position_embeddings") or own.get("original_max_position_embeddings") or longest
            )
            own["max_position_embeddings"] = longest
        return cls(
            theta=float(theta),
            rope_type=_OTHER_NAMES.get(rope_type, rope_type),
            partial_rotary_factor=float(partial),
            parameters=own,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only transformer's sizes.

    Attributes:
        rope: the rotation; of a model with one for each type of layer, that of its full attention.
        sliding_window: tokens a query sees, itself included, in the layers that have a window; None: no layer has.
        attn_logit_softcapping: of attention's scores; None: none.
        raw: the whole config.json, for what only one architecture reads.
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
    attn_logit_softcapping: float | None
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
            more = " It has a text_config: models for more than text are not served." if "text_config" in raw else ""
            raise CheckpointError(
                f"config.json lacks {', '.join(missing)}: this is not a decoder model's configuration.{more}"
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
            rms_norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
            max_position_embeddings=int(raw.get("max_position_embeddings", _MAX_POSITIONS)),
            rope=_rope(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            sliding_window=_sliding_window(raw),
            attn_logit_softcapping=raw.get("attn_logit_softcapping"),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            eos_token_ids=_token_ids(raw.get("eos_token_id")) | _token_ids(generation_config.get("eos_token_id")),
            quantization=dict(raw.get("quantization_config") or {}),
            raw=raw,
        )

    @property
    def longest_context(self) -> int:
        """Tokens of the longest context that the rotation is made for; max_position_embeddings may be less of it.

        "linear", "dynamic" and "yarn" multiply the length that the model was trained with, and many files state that.
        """
        parameters = self.rope.parameters
        if self.rope.rope_type not in ("linear", "dynamic", "yarn") or not parameters.get("factor"):
            return self.max_position_embeddings
        trained = parameters["original_max_position_embeddings"]
        return max(self.max_position_embeddings, int(trained * float(parameters["factor"])))

    def attention_features(self, max_model_len: int) -> frozenset[str]:
        """What some layers ask of an attention backend, in contexts of at most `max_model_len` tokens."""
        features = set()
        if self.sliding_window is not None and self.sliding_window < max_model_len:
            features.add("sliding_window")
        if self.attn_logit_softcapping is not None:
            features.add("logit_softcap")
        return frozenset(features)


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: rope_parameters (transformers 5) and rope_theta with rope_scaling (before)."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if isinstance(by_layer_type := parameters.get("full_attention"), Mapping):
        parameters = by_layer_type
    return RopeConfig.from_dict(parameters, raw)


def _sliding_window(raw: Mapping[str, Any]) -> int | None:
    """A window may be stated and yet be of no layer: switched off, or no layer's type, or of layers past the last."""
    window, layer_types = raw.get("sliding_window"), raw.get("layer_types")
    if window is None or not raw.get("use_sliding_window", True):
        return None
    if layer_types and "sliding_attention" not in layer_types:
        return None
    if not layer_types and raw.get("max_window_layers", 0) >= raw["num_hidden_layers"]:
        return None
    return int(window)


def _token_ids(value: object) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, (list, tuple)) else frozenset({int(str(value))})
