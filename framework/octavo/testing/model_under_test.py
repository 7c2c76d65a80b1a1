"""ModelUnderTest: an architecture built with the engine's own layers and run in steps, what it asks for on record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.interfaces.attention import BatchLimits
from octavo.interfaces.executor import NewRow, ScheduledRow, Step
from octavo.interfaces.kernels import Activation
from octavo.interfaces.linear_kernel import LinearKernels
from octavo.interfaces.manifest import ChosenComponent
from octavo.interfaces.model import (
    AttentionLayer,
    ForwardContext,
    GatedActivation,
    LayerFactory,
    ModelArchitecture,
    Norm,
    Unary,
)
from octavo.interfaces.model import StackedLinear as StackedLinearLayer
from octavo.model_config import ModelConfig, RopeConfig
from octavo.nn.factory import DeviceLayerFactory
from octavo.nn.split_attention import build_attention
from octavo.nn.weights import WeightLoader
from octavo.plugins.specs import AttentionNeed, Need
from octavo.runner.batch import PersistentBatch
from octavo.runner.step_inputs import StepInputs
from octavo.sampling_params import SamplingParams
from octavo.testing.suite import installed_components

MakeModel = Callable[[ModelConfig, LayerFactory], ModelArchitecture]

_BLOCK_SIZE = 8
_MAX_MODEL_LEN = 128
_MAX_NUM_REQUESTS = 4


class ModelUnderTest:
    """A model on the CPU, with torch attention, unquantized linears and these weights.

    Attributes:
        asked: the factory, with what the model asked it for.
        model: as the architecture made it.
    """

    def __init__(
        self,
        make: MakeModel,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        num_ranks: int = 1,
        max_model_len: int = _MAX_MODEL_LEN,
    ) -> None:
        """Build and load it.

        Args:
            tensors: None builds it only, to see what it asks for; no memory is taken, so real sizes are welcome.
            num_ranks: of several tensor-parallel ranks it is the first, which has the first part of every projection.
            max_model_len: at most 128; some rotations and windows go by it.
        """
        self.config = ModelConfig.from_dict(config, {})
        attention = _builtin("attention", "torch")
        need = _attention_need(self.config, dtype, num_ranks, max_model_len)
        self._attention = build_attention(attention, attention, need)
        loader = WeightLoader()
        method = _builtin("quantization", "unquantized").build({}, dtype, "cpu", {}, LinearKernels({}))
        kernels = _builtin("kernels", "torch").build(Need(device="cpu", dtype=str(dtype).removeprefix("torch.")))
        factory = DeviceLayerFactory(method, self._attention, kernels, loader)
        self.asked = RecordingFactory(factory, loader, num_ranks)
        self.model = make(self.config, self.asked)
        self._rotary = factory.rotary_tables(max_model_len)
        if tensors is not None:
            loader.load(tensors.items(), self.model.ignored_names())

    @torch.no_grad()
    def logits(
        self,
        requests: Sequence[Sequence[int]],
        chunks: Sequence[Sequence[int]] | None = None,
        position_stride: int = 1,
    ) -> list[Tensor]:
        """The logits behind every token of each request, [num_tokens, vocab_size] each.

        Args:
            requests: token ids of each.
            chunks: of each, how many tokens it has in each step; all at once by default.
            position_stride: how many positions a token is behind the one before it.
        """
        parts: list[list[Tensor]] = [[] for _ in requests]
        for inputs, context in self._steps(requests, chunks or [[len(one)] for one in requests], position_stride):
            hidden, residual = self._through(self.model.embed(inputs.token_ids), None, context)
            logits = self.model.head(hidden, residual)
            ends = inputs.layout.query_start_loc[1:-1].tolist()
            assert inputs.samples is not None
            for request_id, rows in zip(inputs.samples.request_ids, logits.tensor_split(ends), strict=True):
                parts[int(request_id)].append(rows)
        return [torch.cat(part) for part in parts]

    @torch.no_grad()
    def hidden(
        self,
        token_ids: Sequence[int],
        layers: slice = slice(None),
        given: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(hidden, residual) behind some of the layers, [num_tokens, hidden_size] each.

        Args:
            given: what the layer before the first of them returned; None embeds the tokens.
        """
        ((inputs, context),) = self._steps([token_ids], [[len(token_ids)]])
        hidden, residual = given or (self.model.embed(inputs.token_ids), None)
        return self._through(hidden, residual, context, layers)

    def _through(
        self, hidden: Tensor, residual: Tensor | None, context: ForwardContext, layers: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        self.asked.inputs.clear()
        for layer in self.model.layers[layers]:
            hidden, residual = layer(hidden, residual, context)
        assert residual is not None, "a layer returned no residual"
        return hidden, residual

    def _steps(
        self, requests: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]], position_stride: int = 1
    ) -> Iterator[tuple[StepInputs, ForwardContext]]:
        """Each step's tensors, planned; the cache is new, and NaN where nothing was written yet."""
        limits = BatchLimits(
            max_num_requests=_MAX_NUM_REQUESTS,
            max_num_tokens=_MAX_NUM_REQUESTS * _MAX_MODEL_LEN,
            max_model_len=_MAX_MODEL_LEN,
            block_size=_BLOCK_SIZE,
            device="cpu",
        )
        batch, state = PersistentBatch(limits), self._attention.make_state(limits)
        num_blocks = _MAX_NUM_REQUESTS * _MAX_MODEL_LEN // _BLOCK_SIZE
        layout = self._attention.kv_layout()
        kv_caches = [layout.allocate(num_blocks, "cpu") for _ in range(self.config.num_layers)]
        for buffer in (buffer for kv_cache in kv_caches for buffer in kv_cache):
            buffer.fill_(torch.nan)
        for step in _plain_steps(requests, chunks):
            batch.update(step)
            inputs = batch.inputs(step)
            self._attention.plan(inputs.layout, state)
            positions = inputs.positions * position_stride
            yield (
                inputs,
                ForwardContext(
                    positions=positions,
                    rotary=[table(positions) for table in self._rotary],
                    kv_caches=kv_caches,
                    attention_state=state,
                ),
            )


class RecordingFactory(LayerFactory):
    """Hands on to the engine's factory, of a projection the first of `num_ranks` parts, and records what it was asked.

    Attributes:
        parted: by tensor name, the axis along which ranks part it, and the sizes of the linears stacked there.
        attentions: (layer_index, num_heads, num_kv_heads, head_dim) of each attention.
        qkv_heads: (num_heads, num_kv_heads, head_dim) of each qkv_linear.
        inputs: of the last pass, (prefix, input) of each projection in the order of their calls.
    """

    def __init__(self, factory: LayerFactory, loader: WeightLoader, num_ranks: int = 1) -> None:
        self._factory = factory
        self._loader = loader
        self._num_ranks = num_ranks
        self.parted: dict[str, tuple[int, list[int]]] = {}
        self.attentions: list[tuple[int, int, int, int]] = []
        self.qkv_heads: list[tuple[int, int, int]] = []
        self.inputs: list[tuple[str, Tensor]] = []
        self._plain_linears: set[str] = set()
        self._norms: dict[str, float] = {}  # what their weights lie around
        self._embeddings: set[str] = set()

    @property
    def shapes(self) -> dict[str, set[tuple[int, ...]]]:
        """By tensor name, every shape it was expected in."""
        return {name: {one.shape for one in several} for name, several in self._loader.expected.items()}

    def linear(self, prefix: str, in_features: int, out_features: int, *, bias: bool = False) -> Unary:
        self._plain_linears.add(prefix)
        self.parted[f"{prefix}.weight"] = 1, [in_features]
        linear = self._factory.linear(prefix, in_features // self._num_ranks, out_features, bias=bias)

        def call(x: Tensor) -> Tensor:
            self.inputs.append((prefix, x))
            return linear(x)

        return call

    def stacked_linear(
        self,
        prefix: str,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        stored_as: str | None = None,
    ) -> StackedLinearLayer:
        sizes = {name: size // self._num_ranks for name, size in parts.items()}
        linear = self._factory.stacked_linear(prefix, in_features, sizes, bias=bias, stored_as=stored_as)
        return self._recorded(prefix, parts, stored_as, linear)

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
        self.qkv_heads.append((num_heads, num_kv_heads, head_dim))
        linear = self._factory.qkv_linear(
            prefix,
            in_features,
            num_heads // self._num_ranks,
            num_kv_heads // self._num_ranks,
            head_dim,
            bias=bias,
            names=names,
            stored_as=stored_as,
        )
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        return self._recorded(prefix, dict(zip(names, sizes, strict=True)), stored_as, linear)

    def norm(self, prefix: str, hidden_size: int, eps: float, *, weight_offset: float = 0.0) -> Norm:
        self._norms[f"{prefix}.weight"] = 1.0 - weight_offset
        return self._factory.norm(prefix, hidden_size, eps, weight_offset=weight_offset)

    def gated_activation(self, activation: Activation) -> GatedActivation:
        return self._factory.gated_activation(activation)

    def embedding(self, prefix: str, vocab_size: int, hidden_size: int) -> Unary:
        self._embeddings.add(f"{prefix}.weight")
        return self._factory.embedding(prefix, vocab_size, hidden_size)

    def head(self, prefix: str, vocab_size: int, hidden_size: int, *, tied_to: str | None) -> Unary:
        return self._factory.head(prefix, vocab_size, hidden_size, tied_to=tied_to)

    def parameter(self, name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        return self._factory.parameter(name, shape)

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
        self.attentions.append((layer_index, num_heads, num_kv_heads, head_dim))
        return self._factory.attention(
            layer_index,
            num_heads // self._num_ranks,
            num_kv_heads // self._num_ranks,
            head_dim,
            scale,
            rope=rope,
            sliding_window=sliding_window,
            logit_softcap=logit_softcap,
        )

    def linears_that_share_their_input(self) -> list[str]:
        """The plain linears of the last pass whose input another projection read too."""
        readers: dict[object, list[str]] = {}
        for prefix, x in self.inputs:
            readers.setdefault((x.data_ptr(), x._version, x.shape), []).append(prefix)
        return [prefix for one in readers.values() if len(one) > 1 for prefix in one if prefix in self._plain_linears]

    def random_tensors(self) -> dict[str, Tensor]:
        """Float32 weights for every tensor asked for, of such sizes that no part of the model is drowned by another."""
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for name, (shape, *_) in self.shapes.items():
            noise = torch.randn(shape, generator=generator)
            if noise.ndim == 1:  # a norm's weights are around one, biases around zero
                tensors[name] = 0.2 * noise + self._norms.get(name, 0.0)
            else:
                tensors[name] = noise if name in self._embeddings else noise / noise.shape[1] ** 0.5
        return tensors

    def _recorded(
        self, prefix: str, parts: Mapping[str, int], stored_as: str | None, linear: StackedLinearLayer
    ) -> StackedLinearLayer:
        stored = {name: [size] for name, size in parts.items()} if stored_as is None else {stored_as: [*parts.values()]}
        for name, sizes in stored.items():
            self.parted |= {f"{prefix}.{name}.{parameter}": (0, sizes) for parameter in ("weight", "bias")}

        def call(x: Tensor) -> tuple[Tensor, ...]:
            self.inputs.append((prefix, x))
            return linear(x)

        return call


def _builtin(kind: str, name: str) -> ChosenComponent:
    registry = installed_components()
    return registry.component(registry.find(kind, f"builtin/{name}"), {})


def _attention_need(config: ModelConfig, dtype: torch.dtype, num_ranks: int, max_model_len: int) -> AttentionNeed:
    return AttentionNeed(
        device="cpu",
        dtype=str(dtype).removeprefix("torch."),
        num_heads=config.num_heads // num_ranks,
        num_kv_heads=config.num_kv_heads // num_ranks,
        head_dim=config.head_dim,
        block_size=_BLOCK_SIZE,
        features=config.attention_features(max_model_len),
        sliding_window=config.sliding_window,
        logit_softcap=config.attn_logit_softcapping,
    )


def _plain_steps(requests: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]]) -> Iterator[Step]:
    """Steps in which every request takes its next chunk, each request in blocks of its own."""
    num_blocks = _MAX_MODEL_LEN // _BLOCK_SIZE
    for step_id in range(max(map(len, chunks))):
        yield Step(
            step_id=step_id,
            entering=[] if step_id else [_new_row(str(index), ids) for index, ids in enumerate(requests)],
            rows=[
                ScheduledRow(
                    request_id=str(index),
                    num_computed_tokens=sum(of_request[:step_id]),
                    num_tokens=of_request[step_id],
                    new_block_ids=[] if step_id else list(range(index * num_blocks, (index + 1) * num_blocks)),
                    samples=True,
                )
                for index, of_request in enumerate(chunks)
                if step_id < len(of_request)
            ],
        )


def _new_row(request_id: str, token_ids: Sequence[int]) -> NewRow:
    return NewRow(
        request_id=request_id,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        params=SamplingParams(temperature=0.0),
        seed=0,
        sample_index=0,
    )
