"""TransformersModel: a causal language model of transformers with linears, attention and weights from the factory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from octavo.interfaces.model import AttentionLayer, ForwardContext, LayerFactory, ModelArchitecture, Unary
from octavo.model_config import ModelConfig
from octavo_model_transformers.attention import PagedAttention
from octavo_model_transformers.skeleton import Skeleton, build_skeleton

logger = logging.getLogger(__name__)

# Tensors that old versions of transformers saved and computed anew: frequencies of a rotation, a causal mask.
_SAVED_IN_VAIN = ("*.rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias", "*.attention.bias", "*.masked_bias")


class TransformersModel(ModelArchitecture):
    """The forward of transformers' own class, in its two halves: the decoder, the one layer here, and the head.

    What happens between two layers is the class's own matter, so the decoder is not taken apart further.

    Raises:
        CheckpointError: the architecture, or what config.json asks of it, cannot be served; every reason is named.
    """

    can_be_captured = False  # what a class of transformers does between its layers is not known

    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        skeleton = build_skeleton(config)
        logger.warning(
            "%s is computed by transformers' own modules, because no installed component was written for it: the same "
            "tokens, but projections, norms and rotations are not joined, which is slower. `octavo explain` shows "
            "which components were asked.",
            config.architecture,
        )
        self._model, self._decoder = skeleton.model, skeleton.decoder
        self._attentions = _attentions(skeleton, factory)
        self._embed = _embedding(skeleton, factory)
        for prefix, linear in skeleton.linears.items():
            linear.product = factory.linear(prefix, linear.in_features, linear.out_features, bias=linear.has_bias)
        skeleton.head.product = _head(skeleton, factory)
        self._is_placed = False
        self._loaded = [
            (module, name, factory.parameter(full_name, tuple(getattr(module, name).shape)))
            for full_name, (module, name) in skeleton.tensors.items()
        ]
        in_vain = (f"{skeleton.head_name}.weight", *_SAVED_IN_VAIN) if skeleton.tied else _SAVED_IN_VAIN
        self._ignored_names = tuple(
            pattern for pattern in in_vain if not any(fnmatchcase(name, pattern) for name in skeleton.tensors)
        )
        self.layers = [self._decode]

    def embed(self, token_ids: Tensor) -> Tensor:
        """[num_tokens] -> [num_tokens, hidden_size]."""
        if not self._is_placed:
            self._place(token_ids.device)
        return self._embed(token_ids)

    def head(self, hidden: Tensor, residual: Tensor) -> Tensor:
        logits: Tensor = self._model(inputs_embeds=(hidden + residual).unsqueeze(0), use_cache=False).logits
        return logits[0]

    def ignored_names(self) -> Sequence[str]:
        return self._ignored_names

    def _decode(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        output = self._decoder(
            inputs_embeds=(hidden if residual is None else hidden + residual).unsqueeze(0),
            position_ids=context.positions.unsqueeze(0),
            use_cache=False,
            octavo=PagedAttention(self._attentions, context),
        )
        hidden = output.last_hidden_state[0]
        return hidden, hidden.new_zeros(1).expand_as(hidden)

    def _place(self, device: torch.device) -> None:
        """Put the loaded tensors into their modules, and compute there what no checkpoint holds."""
        self._is_placed = True
        for module in {*self._model.modules(), *self._decoder.modules()}:
            computed = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
            for name, buffer in computed.items():
                setattr(module, name, torch.empty_like(buffer, device=device))
            if computed:
                self._model._init_weights(module)  # type: ignore[no-untyped-call]
        for module, name, value in self._loaded:
            is_parameter = isinstance(getattr(module, name), nn.Parameter)
            setattr(module, name, nn.Parameter(value(), requires_grad=False) if is_parameter else value())


def _attentions(skeleton: Skeleton, factory: LayerFactory) -> dict[nn.Module, AttentionLayer]:
    return {
        one.module: factory.attention(
            index,
            one.num_heads,
            one.num_kv_heads,
            one.head_dim,
            one.scale,
            rope=None,  # transformers rotates by itself
            sliding_window=one.sliding_window,
            logit_softcap=one.logit_softcap,
        )
        for index, one in enumerate(skeleton.attentions)
    }


def _embedding(skeleton: Skeleton, factory: LayerFactory) -> Unary:
    table = skeleton.embedding
    if type(table) is not nn.Embedding:  # one that does more, such as scaling
        return table
    return factory.embedding(skeleton.embedding_name, table.num_embeddings, table.embedding_dim)


def _head(skeleton: Skeleton, factory: LayerFactory) -> Unary:
    linear, name = skeleton.head, skeleton.head_name
    tied_to = skeleton.embedding_name if skeleton.tied else None
    product = factory.head(name, linear.out_features, linear.in_features, tied_to=tied_to)
    if not linear.has_bias:
        return product
    bias = factory.parameter(f"{name}.bias", (linear.out_features,))
    return lambda x: product(x) + bias()
