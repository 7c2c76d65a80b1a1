"""read_adapter: a PEFT folder, checked against the base, to the matrices that positions take.

Tied embeddings are as in peft's unmerged model: what an adapter does to the embedding it does not do to the head, and
the other way round, unless its files change both (as ensure_weight_tying has them do).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from octavo import AdapterInfo
from octavo.errors import AdapterError
from octavo.interfaces import AdapterWeights, BaseWeight, LoraBase, LoraLimits, LowRank
from octavo_lora.adapter_files import AdapterTensors, find_folder, open_tensors, read_config
from octavo_lora.adapter_layout import AdapterLayout, Role, whole_module_refused
from octavo_lora.peft_config import PeftAdapter

logger = logging.getLogger(__name__)


def read_adapter(path: str, base: LoraBase, limits: LoraLimits) -> AdapterWeights:
    """Read an adapter and check it against the base. Sizes are checked before any weight is read.

    Args:
        path: a folder as peft's save_pretrained writes it, or a Hugging Face id. Pickles are not read.
        base: its weights are read, once for all modules, where the adapter has DoRA magnitudes, biases, or embeddings
            that may be the base's own.
        limits: of rank, dtype and device: for "cuda" the result is in pinned memory.

    Returns:
        Matrices in limits.dtype, scale and shift in float32. The content hash is of the configuration's fields that
        outputs depend on and of all tensors, by name, dtype, shape and bytes.

    Raises:
        AdapterError: it cannot be served; says why, all faults of its sizes together.
    """
    folder = find_folder(path)
    adapter = PeftAdapter(read_config(folder), base)
    with open_tensors(folder) as opened:
        layout = AdapterLayout(opened.shapes, adapter, base, limits)
        tensors, content_hash = _read_all(opened, layout)
    reader = _Reader(layout, tensors, base, limits)
    reader.read_base_weights()
    for name in layout.changed:
        reader.put(name)
    if not reader.low_ranks and not reader.saved:
        raise AdapterError(f"{folder} changes nothing: all its weights are the base's own. Ask for the base itself.")
    warnings = (*adapter.warnings, *layout.warnings)
    for warning in warnings:
        logger.warning("Adapter %s: %s", path, warning)
    return reader.result(content_hash, warnings)


class _Reader:
    """Makes what positions take of the tensors of one adapter, module by module."""

    def __init__(
        self, layout: AdapterLayout, tensors: Mapping[str, Tensor], base: LoraBase, limits: LoraLimits
    ) -> None:
        self.low_ranks: dict[str, LowRank] = {}
        self.saved: dict[str, Tensor] = {}
        self._layout = layout
        self._tensors = tensors
        self._base = base
        self._limits = limits
        self._norms: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}
        self._unchanged: set[str] = set()

    def read_base_weights(self) -> None:
        """What is wanted of the base's weights, in one pass over its checkpoint."""
        layout = self._layout
        wanted = [
            name
            for name in layout.changed
            if layout.has(name, "magnitude") or layout.has(name, "bias") or layout.perhaps_unchanged(name)
        ]
        for name, base in self._base.weights(wanted) if wanted else ():
            self._take(name, base)

    def put(self, name: str) -> None:
        """What the adapter does to one module."""
        low_rank = self._low_rank(name)
        if low_rank is not None:
            self.low_ranks[name] = low_rank
        if not self._layout.has(name, "weight") or name in self._unchanged:
            return
        if not self._limits.modules_to_save:
            raise AdapterError(f"The adapter cannot be served: {whole_module_refused(name)}.")
        if self._layout.has(name, "a"):
            raise AdapterError(
                f"The adapter brings a whole {name} of its own and low-rank matrices for it, too. Merge the two, and "
                "save the module by modules_to_save alone."
            )
        self.saved[name] = self._kept(name, self._tensor(name, "weight"), self._limits.dtype)

    def result(self, content_hash: str, warnings: tuple[str, ...]) -> AdapterWeights:
        tensors = [t for low in self.low_ranks.values() for t in (low.a, low.b, low.scale, low.shift) if t is not None]
        info = AdapterInfo(
            content_hash=content_hash,
            rank=max((len(low.a) for low in self.low_ranks.values()), default=0),
            num_bytes=sum(tensor.nbytes for tensor in (*tensors, *self.saved.values())),
            modules=tuple(sorted({*self.low_ranks, *self.saved})),
            warnings=warnings,
        )
        return AdapterWeights(info=info, low_ranks=self.low_ranks, saved=self.saved)

    def _take(self, name: str, base: BaseWeight) -> None:
        if self._layout.has(name, "magnitude"):
            a, b = self._matrices(name)
            self._norms[name] = torch.linalg.norm(torch.addmm(base.weight, b, a), dim=1)
        if base.bias is not None:
            self._biases[name] = base.bias
        if self._layout.perhaps_unchanged(name):
            own = self._tensor(name, "weight")
            whole = base.weight.T if self._base.modules[name].kind == "embedding" else base.weight
            # Rounded as the adapter's file is: peft saves the base's weights in the dtype that they were trained in.
            if torch.equal(whole.to(own.dtype), own):
                self._unchanged.add(name)

    def _low_rank(self, name: str) -> LowRank | None:
        a, b = self._matrices(name)
        shift = self._shift(name)
        if not len(a) and shift is None:
            return None
        scale = self._tensor(name, "magnitude").float() / self._norms[name] if name in self._norms else None
        return LowRank(
            a=self._kept(name, a, self._limits.dtype),
            b=self._kept(name, b, self._limits.dtype),
            scale=None if scale is None else self._kept(name, scale, torch.float32),
            shift=None if shift is None else self._kept(name, shift, torch.float32),
        )

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B in float32, the scaling in B; of rank 0 where the adapter changes but the bias, or all."""
        module = self._base.modules[name]
        if not self._layout.has(name, "a"):
            return torch.zeros(0, module.in_features), torch.zeros(module.out_features, 0)
        a, b = self._tensor(name, "a").float(), self._tensor(name, "b").float()
        return a, b * self._layout.adapter.scaling(name)

    def _shift(self, name: str) -> Tensor | None:
        """Trained biases less the base's own; None where they are equal."""
        shift = torch.zeros(self._base.modules[name].out_features)
        if self._layout.has(name, "bias"):
            shift += self._tensor(name, "bias").float() - self._biases[name]
        if self._layout.has(name, "lora_bias"):
            shift += self._tensor(name, "lora_bias").float() * self._layout.adapter.scaling(name)
        return shift if shift.any() else None

    def _tensor(self, name: str, role: Role) -> Tensor:
        return self._tensors[self._layout.key(name, role)]

    def _kept(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """As it lies in the host's memory from now on."""
        kept = tensor.to(dtype).contiguous()
        if not kept.isfinite().all():
            raise AdapterError(
                f"The adapter has weights for {name} that are NaN or infinite, or not finite in {dtype}. "
                "Its training has diverged, or its file is damaged: take another."
            )
        return kept.pin_memory() if self._limits.device.startswith("cuda") else kept


def _read_all(opened: AdapterTensors, layout: AdapterLayout) -> tuple[dict[str, Tensor], str]:
    """The tensors that are used, and the content's hash, of all that there are."""
    content = hashlib.blake2b(layout.adapter.canonical.encode(), digest_size=32)
    tensors = opened.read()
    for key, tensor in tensors.items():
        content.update(f"\0{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {key: tensors[key] for key in layout.used_keys()}, content.hexdigest()
