"""LoraBackend socket: reads adapters, keeps them at device positions, adds each row's own to a linear's product.

An adapter changes a linear's weight W [out_features, in_features] by B @ A, of a low rank:
y = (W x + B (A x)) * scale + shift, where scale and shift are 1 and 0 but for DoRA and trained biases, and the base's
own bias comes after. An embedding is such a linear of one-hot rows: in_features is the vocabulary's size.

Source: Hu et al. 2021, LoRA, arXiv:2106.09685; Liu et al. 2024, DoRA, arXiv:2402.09353. Many adapters in one batch:
Chen et al. 2023, Punica, arXiv:2310.18547; Sheng et al. 2023, S-LoRA, arXiv:2311.03285.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.lora.adapter import AdapterInfo

NO_ADAPTER = -1
"""The position of a row without an adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraLimits:
    """Maximal sizes, known before any adapter is.

    Attributes:
        max_loras: device positions.
        max_lora_rank: of an adapter's modules.
        max_num_rows: of one call of `apply`.
        dtype: of activations, and of adapters at their positions.
        modules_to_save: whether an adapter may bring a whole embedding or head of its own.
    """

    max_loras: int
    max_lora_rank: int
    max_num_rows: int
    dtype: torch.dtype
    device: str
    modules_to_save: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraModule:
    """A module of the base model that adapters may change, by the name it has in transformers.

    Attributes:
        in_features, out_features: of the whole; of an embedding the vocabulary's and the hidden size.
        kind: "head" is the linear that makes logits.
        has_bias: whether the base adds one.
    """

    name: str
    in_features: int
    out_features: int
    kind: Literal["linear", "embedding", "head"] = "linear"
    has_bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseWeight:
    """A linear of the base as its checkpoint has it: weight [out_features, in_features] float32, dequantised.

    Attributes:
        bias: [out_features] float32, or None.
    """

    weight: Tensor
    bias: Tensor | None = None


class LoraBase(ABC):
    """The base model, as whoever reads an adapter sees it.

    Attributes:
        names: what it may be called: the path or id it was loaded by, and what its configuration says.
        config: the keys of its config.json.
        modules: by name, in the order of the model.
    """

    names: Sequence[str]
    config: Mapping[str, object]
    modules: Mapping[str, LoraModule]

    @abstractmethod
    def weights(self, names: Collection[str]) -> Iterator[tuple[str, BaseWeight]]:
        """Read modules' weights anew from the checkpoint, one at a time, in any order; slow. Any thread may call it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """What an adapter does to one module: y = (W x + b (a x)) * scale + shift.

    Attributes:
        a: [rank, in_features]; rank is 0 where there is but a scale or a shift. b: [out_features, rank], the adapter's
            scaling (alpha / rank, or alpha / sqrt(rank)) multiplied in. Of an embedding, a[:, token] is what the
            token's row is.
        scale: [out_features] float32: DoRA's magnitude over the norm of W + b a; None: 1.
        shift: [out_features] float32: trained biases less the base's own; None: 0.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterWeights:
    """An adapter in the host's memory, in the dtype of its positions.

    Attributes:
        low_ranks: by module.
        saved: by module, the whole weights of its own that replace the base's: [out_features, in_features] of the
            head, [vocab_size, hidden_size] of the embedding.
    """

    info: AdapterInfo
    low_ranks: Mapping[str, LowRank]
    saved: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraPart:
    """Some of a module's outputs and inputs: what one linear on this device computes of it.

    Where several linears share the model's layers, or one linear of the checkpoint is computed as several, a part has
    out_features rows of the module's B (of scale and shift, too) from output_start, and in_features columns of its A
    from input_start.
    """

    module: str
    in_features: int
    out_features: int
    input_start: int = 0
    output_start: int = 0


class LoraBackend(ABC):
    """Constructed once for a model. Layers ask for slots while it is built; then `allocate`, and steps.

    `load` may run in a thread of its own beside everything else; all other calls come from one thread.

    Attributes:
        active: whether layers are to call `apply`: set by `plan`.
        acts_on_head: whether any adapter at a position changes the head.
        can_be_captured: whether a CUDA graph can hold what `apply` launches; else steps with adapters are not captured.
    """

    can_be_captured: bool = True
    active: bool = False
    acts_on_head: bool = False

    def __init__(self, limits: LoraLimits) -> None:
        self.limits = limits

    @abstractmethod
    def linear(self, parts: Sequence[LoraPart], *, is_head: bool = False) -> object:
        """A slot for a linear whose outputs are those of the parts, one behind the other; all read one input."""

    @abstractmethod
    def embedding(self, part: LoraPart) -> object:
        """A slot for an embedding."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Device memory of all positions of the slots made so far, whether allocated or not."""

    @abstractmethod
    def allocate(self) -> None:
        """Take the memory of all positions; no slot is made after this."""

    @abstractmethod
    def load(self, path: str, base: LoraBase) -> AdapterWeights:
        """Read a PEFT folder and check it against the base; nothing but the result is changed.

        Raises:
            AdapterError: it cannot be served; says why.
        """

    @abstractmethod
    def place(self, position: int, adapter: AdapterWeights | None) -> None:
        """Put an adapter at a position, or nothing; takes effect for the steps planned from now on.

        Steps made before are computed first: on a GPU the work is queued behind theirs.
        """

    @abstractmethod
    def plan(self, positions: NDArray[np.int32] | None, *, captured: bool = False) -> None:
        """Say whose the rows of the next calls of `apply` are.

        Args:
            positions: [num_rows], each row's position or NO_ADAPTER; None: no row has an adapter, and `apply` is not
                called until there is another plan.
            captured: the calls are being recorded into a CUDA graph, or are not made because a graph that was recorded
                with so many rows repeats them: the launches may depend on the number of rows alone, and what they
                read lies where it lay.
        """

    @abstractmethod
    def apply(self, slot: object, x: Tensor, output: Tensor) -> Tensor:
        """x [num_rows, in_features], output [num_rows, sum of out_features], W x without the bias -> the same with
        each row's own adapter; it may write to `output`. Rows without an adapter keep their bits."""

    @abstractmethod
    def apply_embedding(self, slot: object, token_ids: Tensor, output: Tensor) -> Tensor:
        """token_ids [num_rows] int64, output [num_rows, out_features] -> as `apply`."""
