"""The base model as LoRA adapters' readers see it: its modules, and their weights read anew from the checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor

from octavo.interfaces.checkpoint import Checkpoint
from octavo.interfaces.lora import BaseWeight, LoraBase
from octavo.interfaces.quantization import LinearShape, StoredLinear
from octavo.nn.factory import ModuleSource

_WEIGHT, _BIAS = "weight", "bias"


class CheckpointBase(LoraBase):
    """Reads what is asked for, each time: weights are not kept beside those on the device."""

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str], sources: Mapping[str, ModuleSource]) -> None:
        self.config = checkpoint.config()
        called = (self.config.get("_name_or_path"), *names)
        self.names = [name for name in called if isinstance(name, str) and name]
        self.modules = {name: source.module for name, source in sources.items()}
        self._checkpoint = checkpoint
        self._sources = sources

    def weights(self, names: Collection[str]) -> Iterator[tuple[str, BaseWeight]]:
        awaited = {name: self._tensor_names(self._sources[name]) for name in names}
        wanted = {tensor for tensors in awaited.values() for tensor in tensors}
        arrived: dict[str, Tensor] = {}
        for tensor_name, tensor in self._checkpoint.tensors():
            if tensor_name not in wanted:
                continue
            arrived[tensor_name] = tensor
            for name in [name for name, tensors in awaited.items() if arrived.keys() >= tensors]:
                source = self._sources[name]
                del awaited[name]
                yield name, _base_weight(source, {one: arrived[f"{source.prefix}.{one}"] for one in _suffixes(source)})
                wanted = {tensor for tensors in awaited.values() for tensor in tensors}
                arrived = {one: tensor for one, tensor in arrived.items() if one in wanted}

    def _tensor_names(self, source: ModuleSource) -> set[str]:
        return {f"{source.prefix}.{suffix}" for suffix in _suffixes(source)}


def _suffixes(source: ModuleSource) -> list[str]:
    if source.module.kind == "embedding":
        return [_WEIGHT]
    names = [spec.name for spec in source.method.parameters(source.prefix, _shape(source))]
    return [*names, _BIAS] if source.module.has_bias and _BIAS not in names else names


def _shape(source: ModuleSource) -> LinearShape:
    return LinearShape(in_features=source.module.in_features, out_features=source.module.out_features)


def _base_weight(source: ModuleSource, tensors: Mapping[str, Tensor]) -> BaseWeight:
    method, bias = source.method, tensors.get(_BIAS)
    if source.module.kind == "embedding":
        return BaseWeight(weight=tensors[_WEIGHT].to(method.dtype).float().T)
    specs = {spec.name: spec for spec in method.parameters(source.prefix, _shape(source))}
    stored = {name: tensor.to(specs[name].dtype or method.dtype) for name, tensor in tensors.items() if name in specs}
    weight = method.dequantize(StoredLinear(prefix=source.prefix, shape=_shape(source), tensors=stored))
    return BaseWeight(weight=weight.float(), bias=None if bias is None else bias.to(method.dtype).float())
