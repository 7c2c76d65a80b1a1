"""What one device holds of a model: counted by building the model's layers, which only declare their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from octavo.errors import ConfigError
from octavo.interfaces.checkpoint import TensorHeader
from octavo.interfaces.kernels import Kernels
from octavo.interfaces.lora import LoraBackend
from octavo.interfaces.model import ModelArchitecture
from octavo.nn.factory import DeviceLayerFactory, build_linears, heads_of_one_rank, lora_limits
from octavo.nn.linear import PackedPart
from octavo.nn.split_attention import build_attention
from octavo.nn.weights import WeightLoader
from octavo.plugins.specs import Need
from octavo.selection import Selection

MOST_RANKS = 64
"""How many devices are tried when one is not enough."""

# Of plain torch with top-k and top-p: scores, sorted ones and their order, noise and its hash, and some to spare.
_SAMPLING_BYTES_PER_LOGIT = 32


_SOCKETS = ("model", "quantization", "quantization.plain", "kernels", "attention.prefill", "attention.decode", "lora")
"""What is built to be counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSizes:
    """Bytes of one of `num_ranks` devices; all devices hold the same amount.

    Attributes:
        weight_bytes: in the dtype they are kept in. A tied head counts beside the embedding, because each keeps a
            tensor of its own.
        bits_per_weight: of the whole model as it is kept, scales and zeros included.
        rotary_bytes_per_position: of the tables of cosines and sines.
        adapter_bytes: of one position for a LoRA adapter; 0 where none are served.
        kv_bytes_per_block: of all layers.
        activation_bytes_per_token: an estimate of what a layer holds at its widest: residual and hidden state, and
            three times its widest projection, as gate, up and their product are.
        activation_bytes_per_sample: an estimate of what the draw of a token holds at its widest.
        remarks: what sharing the model among so many devices costs, in sentences.
    """

    num_ranks: int
    weight_bytes: int
    bits_per_weight: float
    rotary_bytes_per_position: int
    adapter_bytes: int
    kv_bytes_per_block: int
    activation_bytes_per_token: int
    activation_bytes_per_sample: int
    remarks: tuple[str, ...]


class Sizer:
    """Counts a selection's model for any number of devices. Nothing is allocated.

    Raises:
        ConfigError: no model architecture, quantization method or attention backend can serve as asked.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._dtype: torch.dtype = getattr(torch, selection.dtype)
        chosen = {socket: selection.choices[socket].get() for socket in _SOCKETS if socket in selection.choices}
        self._model = chosen["model"]
        self._attention = chosen["attention.prefill"], chosen["attention.decode"]
        self._method, self._plain = build_linears(
            chosen,
            selection.linear_kernels.get(),
            selection.quantization_config,
            self._dtype,
            selection.device,
            selection.files.checkpoint.tensor_headers(),
        )
        self._lora = chosen.get("lora")
        self._kernels: Kernels = chosen["kernels"].build(Need(device=selection.device, dtype=selection.dtype))
        self.sizes_of = cache(self._sizes_of)

    def sizes(self, num_ranks: int) -> RankSizes:
        """Of one of `num_ranks` devices.

        Raises:
            ConfigError: the model cannot be shared by so many; names every number up to MOST_RANKS that works.
        """
        try:
            return self.sizes_of(num_ranks)
        except ConfigError as error:
            working = [str(number) for number in range(1, MOST_RANKS + 1) if self.can_share(number)]
            raise ConfigError(
                f"{error} Values of tensor_parallel_size up to {MOST_RANKS} that work: {', '.join(working)}."
            ) from error

    def can_share(self, num_ranks: int) -> bool:
        """Whether so many devices can share the model."""
        try:
            self.sizes_of(num_ranks)
        except ConfigError:
            return False
        return True

    def check(self, headers: Mapping[str, TensorHeader]) -> None:
        """Compare a checkpoint's tensors with those that the model expects.

        Raises:
            CheckpointError: as loading would; every missing, unexpected and misshapen tensor is named.
        """
        model, _, loader, _ = self._build(1)
        loader.check({name: header.shape for name, header in headers.items()}, model.ignored_names())

    def linears(self) -> Iterator[tuple[PackedPart, Mapping[str, Sequence[str]]]]:
        """Every linear that kernels multiply, on one device, with each kernel's reasons against it."""
        _, factory, _, _ = self._build(1)
        for part in factory.packed:
            yield part, self._method.kernels.ask(part.facts)

    def _sizes_of(self, num_ranks: int) -> RankSizes:
        model_config = self._selection.files.model_config
        _, factory, _, lora = self._build(num_ranks)
        heads, kv_heads = heads_of_one_rank(model_config.num_heads, model_config.num_kv_heads, num_ranks)
        need = replace(self._selection.attention_need, num_heads=heads, num_kv_heads=kv_heads)
        layout = build_attention(*self._attention, need).kv_layout()
        shapes = [part.shape_of_one for part in factory.linears]
        widest = max((max(shape.in_features, shape.out_features) for shape in shapes), default=0)
        return RankSizes(
            num_ranks=num_ranks,
            weight_bytes=factory.weight_bytes,
            bits_per_weight=(
                8 * factory.weight_bytes / factory.num_weights if num_ranks == 1 else self.sizes_of(1).bits_per_weight
            ),
            rotary_bytes_per_position=factory.rotary_bytes_per_position,
            adapter_bytes=0 if lora is None else lora.num_bytes // lora.limits.max_loras,
            kv_bytes_per_block=layout.bytes_per_block * model_config.num_layers,
            activation_bytes_per_token=(2 * model_config.hidden_size + 3 * widest) * self._dtype.itemsize,
            activation_bytes_per_sample=_SAMPLING_BYTES_PER_LOGIT * model_config.vocab_size,
            remarks=tuple(self._remarks(num_ranks)),
        )

    def _build(self, num_ranks: int) -> tuple[ModelArchitecture, DeviceLayerFactory, WeightLoader, LoraBackend | None]:
        selection, loader = self._selection, WeightLoader()
        limits = lora_limits(selection.config, selection.dtype, selection.device)
        lora: LoraBackend | None = None if self._lora is None else self._lora.build(limits)
        attention = build_attention(*self._attention, selection.attention_need)
        factory = DeviceLayerFactory(self._method, attention, self._kernels, loader, num_ranks, self._plain, lora)
        model: ModelArchitecture = self._model.build(selection.files.model_config, factory)
        return model, factory, loader, lora

    def _remarks(self, num_ranks: int) -> list[str]:
        config = self._selection.files.model_config
        remarks = []
        if config.num_kv_heads < num_ranks:
            remarks.append(
                f"Each of the {config.num_kv_heads} KV heads is held by {num_ranks // config.num_kv_heads} devices."
            )
        if rest := config.vocab_size % num_ranks:
            padded = config.vocab_size + num_ranks - rest
            remarks.append(f"The vocabulary of {config.vocab_size:,} is padded to {padded:,}, to be shared evenly.")
        return remarks
