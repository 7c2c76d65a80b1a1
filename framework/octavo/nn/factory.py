"""The factory a model is built with: it knows the chosen plugins, the model does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from octavo.config import EngineConfig
from octavo.errors import ConfigError, PluginError
from octavo.interfaces.attention import AttentionBackend, AttentionParameters
from octavo.interfaces.checkpoint import TensorHeader
from octavo.interfaces.kernels import Activation, Kernels
from octavo.interfaces.linear_kernel import LinearKernels
from octavo.interfaces.lora import LoraBackend, LoraLimits, LoraModule, LoraPart
from octavo.interfaces.manifest import ChosenComponent
from octavo.interfaces.model import AttentionLayer, GatedActivation, LayerFactory, Norm, Unary
from octavo.interfaces.model import StackedLinear as StackedLinearLayer
from octavo.interfaces.quantization import QuantizationMethod
from octavo.model_config import RopeConfig
from octavo.nn.attention import Attention
from octavo.nn.embedding import Embedding
from octavo.nn.linear import Adapters, Linear, LinearPart, PackedPart, Stack, StackedLinear
from octavo.nn.norm import RMSNorm
from octavo.nn.parameter import Parameter
from octavo.nn.rotary import RotaryTable, rotary_bytes_per_position
from octavo.nn.weights import WeightLoader


def heads_of_one_rank(num_heads: int, num_kv_heads: int, num_ranks: int) -> tuple[int, int]:
    """(query heads, KV heads) that each of `num_ranks` devices has; fewer KV heads than devices are repeated.

    Raises:
        ConfigError: whole heads cannot be dealt out evenly.
    """
    if num_heads % num_ranks or (num_kv_heads % num_ranks and num_ranks % num_kv_heads):
        raise ConfigError(
            f"tensor_parallel_size={num_ranks} does not part {num_heads} query heads and {num_kv_heads} KV heads "
            "evenly: it must divide the query heads, and divide the KV heads or be a multiple of them."
        )
    return num_heads // num_ranks, max(1, num_kv_heads // num_ranks)


def build_linears(
    chosen: Mapping[str, ChosenComponent],
    kernels: Sequence[ChosenComponent],
    quantization_config: Mapping[str, object],
    dtype: torch.dtype,
    device: str,
    headers: Mapping[str, TensorHeader],
) -> tuple[QuantizationMethod, QuantizationMethod | None]:
    """(the method of a checkpoint's quantized linears, the one of its plain linears if another), for a factory."""
    linear_kernels = LinearKernels({kernel.full_name: kernel.build(dtype, device) for kernel in kernels})
    method: QuantizationMethod = chosen["quantization"].build(
        quantization_config, dtype, device, headers, linear_kernels
    )
    plain = chosen.get("quantization.plain")
    return method, None if plain is None else plain.build({}, dtype, device, headers, LinearKernels({}))


def lora_limits(config: EngineConfig, dtype: str, device: str) -> LoraLimits:
    """What a LoRA backend is constructed with."""
    return LoraLimits(
        max_loras=config.max_loras,
        max_lora_rank=config.max_lora_rank,
        max_num_rows=config.max_num_batched_tokens + config.max_num_seqs,  # forks sample and compute nothing
        dtype=getattr(torch, dtype),
        device=device,
        modules_to_save=config.lora_modules_to_save,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSource:
    """A module that LoRA adapters may change, and where its weight lies in the checkpoint.

    Attributes:
        prefix: its tensors' name without the parameter's suffix: the embedding's, for a tied head.
        method: that reads them.
    """

    module: LoraModule
    prefix: str
    method: QuantizationMethod


class DeviceLayerFactory(LayerFactory):
    """Layers of one device, their weights expected from `loader`; with several ranks, one rank's share of each.

    Args:
        method: of the linears that it quantizes. plain: of the others; None: there are none.
        lora: adds adapters to linears and embeddings; None: none are served.

    Attributes:
        linears: every linear made so far but the head.
        modules: what LoRA adapters may be trained for, by the name of each.
        rotations: the distinct (rope, head_dim) that attention layers named, in the order of ForwardContext.rotary.
        packed: those whose product linear kernels compute, the head's too.
        num_weights: numbers in the whole layers made so far, before quantization; a tied head's are counted again.
    """

    def __init__(
        self,
        method: QuantizationMethod,
        backend: AttentionBackend,
        kernels: Kernels,
        loader: WeightLoader,
        num_ranks: int = 1,
        plain: QuantizationMethod | None = None,
        lora: LoraBackend | None = None,
    ) -> None:
        self.linears: list[LinearPart] = []
        self.modules: dict[str, ModuleSource] = {}
        self._lora = lora
        self.packed: list[PackedPart] = []
        self.rotations: list[tuple[RopeConfig, int]] = []
        self.num_weights = 0
        self._method = method
        self._plain = plain or method
        self._backend = backend
        self._kernels = kernels
        self._loader = loader
        self._num_ranks = num_ranks

    def rotary_tables(self, max_model_len: int) -> list[RotaryTable]:
        """What ForwardContext.rotary is gathered from."""
        method = self._method
        return [RotaryTable(*rotation, max_model_len, method.dtype, method.device) for rotation in self.rotations]

    @property
    def weight_bytes(self) -> int:
        """Of all weights on one device once they are prepared; a sparse one has its number and where it stands."""
        kernels = self._method.kernels
        return self._loader.expected_bytes + sum(
            kernels.choose(part.facts).num_bytes(part.facts) + 8 * part.facts.outliers - part.stored_bytes
            for part in self.packed
        )

    @property
    def rotary_bytes_per_position(self) -> int:
        """Of all these tables."""
        return sum(rotary_bytes_per_position(*rotation, self._method.dtype) for rotation in self.rotations)

    def linear(self, prefix: str, in_features: int, out_features: int, *, bias: bool = False) -> Unary:
        part = LinearPart(
            prefix=prefix,
            in_features=in_features,
            out_features=out_features,
            parallel="row",
            num_shards=self._num_ranks,
        )
        self.linears.append(part)
        return self._linear([part], bias)

    def stacked_linear(
        self,
        prefix: str,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        stored_as: str | None = None,
    ) -> StackedLinearLayer:
        return self._stacked(prefix, in_features, parts, [self._num_ranks] * len(parts), bias, stored_as)

    def qkv_linear(
        self,
        prefix: str,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
        stored_as: str | None = None,
    ) -> StackedLinearLayer:
        _, kv_heads_of_one = heads_of_one_rank(num_heads, num_kv_heads, self._num_ranks)
        num_kv_shards = num_kv_heads // kv_heads_of_one
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        parts = dict(zip(names, sizes, strict=True))
        num_shards = [self._num_ranks, num_kv_shards, num_kv_shards]
        return self._stacked(prefix, in_features, parts, num_shards, bias, stored_as)

    def norm(self, prefix: str, hidden_size: int, eps: float, *, weight_offset: float = 0.0) -> Norm:
        self.num_weights += hidden_size
        method = self._method
        return RMSNorm(
            self._kernels, self._loader, prefix, hidden_size, eps, method.dtype, method.device, weight_offset
        )

    def gated_activation(self, activation: Activation) -> GatedActivation:
        return partial(self._kernels.gated_activation, activation)

    def embedding(self, prefix: str, vocab_size: int, hidden_size: int) -> Unary:
        self.num_weights += vocab_size * hidden_size
        method = self._method
        module = LoraModule(name=prefix, in_features=vocab_size, out_features=hidden_size, kind="embedding")
        self.modules[prefix] = ModuleSource(module=module, prefix=prefix, method=self._plain)
        adapters = None
        if self._lora is not None:
            part = LoraPart(module=prefix, in_features=vocab_size, out_features=hidden_size)
            adapters = Adapters(backend=self._lora, slot=self._lora.embedding(part))
        return Embedding(
            *(self._loader, prefix, vocab_size, hidden_size, method.dtype, method.device, self._num_ranks),
            adapters=adapters,
        )

    def head(self, prefix: str, vocab_size: int, hidden_size: int, *, tied_to: str | None) -> Unary:
        part = LinearPart(
            prefix=tied_to or prefix,
            in_features=hidden_size,
            out_features=vocab_size,
            num_shards=self._num_ranks,
            padded=True,
        )
        module = LoraModule(name=prefix, in_features=hidden_size, out_features=vocab_size, kind="head")
        self.modules[prefix] = ModuleSource(module=module, prefix=part.prefix, method=self._method_of(part))
        adapters = None
        if self._lora is not None:
            slot = self._lora.linear([replace(part.lora, module=prefix)], is_head=True)
            adapters = Adapters(backend=self._lora, slot=slot)
        return self._product([part], False, adapters)

    def parameter(self, name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        self.num_weights += prod(shape)
        return Parameter(self._loader, name, shape, self._method.dtype, self._method.device)

    def attention(
        self,
        layer_index: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        *,
        rope: RopeConfig | None,
        sliding_window: int | None = None,
        logit_softcap: float | None = None,
    ) -> AttentionLayer:
        need = self._backend.need
        for name, asked in (("sliding_window", sliding_window), ("logit_softcap", logit_softcap)):
            if asked not in (None, wanted := getattr(need, name)):
                raise PluginError(
                    f"Layer {layer_index} of the model asks for {name}={asked}, but the attention backend was chosen "
                    f"for {wanted}: a layer has what the ModelConfig says, or None."
                )
        parameters = AttentionParameters(
            scale=scale,
            # A window that no context outgrows hides nothing, and the backend was not asked whether it has windows.
            sliding_window=sliding_window if "sliding_window" in need.features else None,
            logit_softcap=logit_softcap,
        )
        return Attention(self._backend, layer_index, head_dim, parameters, self._rotary_index(rope, head_dim))

    def _rotary_index(self, rope: RopeConfig | None, head_dim: int) -> int | None:
        if rope is None:
            return None
        if (rope, head_dim) not in self.rotations:
            self.rotations.append((rope, head_dim))
        return self.rotations.index((rope, head_dim))

    def _stacked(
        self,
        prefix: str,
        in_features: int,
        parts: Mapping[str, int],
        num_shards: Sequence[int],
        bias: bool,
        stored_as: str | None,
    ) -> StackedLinear:
        sizes = list(parts.values())
        linears = [
            LinearPart(
                prefix=f"{prefix}.{name}",
                in_features=in_features,
                out_features=size,
                num_shards=shards,
                stack=None
                if stored_as is None
                else Stack(prefix=f"{prefix}.{stored_as}", offset=sum(sizes[:index]), out_features=sum(sizes)),
            )
            for index, ((name, size), shards) in enumerate(zip(parts.items(), num_shards, strict=True))
        ]
        self.linears += linears
        methods = {self._method_of(part) for part in linears}
        stacks = len(methods) == 1 and all(method.can_stack for method in methods)
        groups = [linears] if stacks else [[part] for part in linears]
        return StackedLinear([self._linear(group, bias) for group in groups], sizes)

    def _linear(self, parts: Sequence[LinearPart], bias: bool) -> Linear:
        for part in parts:
            module = LoraModule(
                name=part.stored_prefix,
                in_features=part.in_features,
                out_features=part.out_features if part.stack is None else part.stack.out_features,
                has_bias=bias,
            )
            self.modules[module.name] = ModuleSource(module=module, prefix=module.name, method=self._method_of(part))
        adapters = None
        if self._lora is not None:
            adapters = Adapters(backend=self._lora, slot=self._lora.linear([part.lora for part in parts]))
        return self._product(parts, bias, adapters)

    def _product(self, parts: Sequence[LinearPart], bias: bool, adapters: Adapters | None) -> Linear:
        self.num_weights += sum(part.out_features * (part.in_features + bias) for part in parts)
        linear = Linear(self._method_of(parts[0]), self._loader, parts, bias=bias, adapters=adapters)
        self.packed += linear.packed
        return linear

    def _method_of(self, part: LinearPart) -> QuantizationMethod:
        return self._method if self._method.quantizes(part.stored_prefix) else self._plain
