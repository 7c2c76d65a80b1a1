"""A causal language model of transformers without weights, taken apart; or why it cannot be served."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from octavo.errors import CheckpointError
from octavo.model_config import ModelConfig
from octavo_model_transformers.attention import PAGED, TRACED, AttentionTrace, TracedAttention
from octavo_model_transformers.modules import FactoryLinear, GivenHidden, replace_linears

_NUM_TRACED_TOKENS = 3
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ROPE_TYPES_BY_BATCH = {"dynamic", "longrope"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Skeleton:
    """All of it on the meta device, every linear a FactoryLinear without a product.

    Attributes:
        model: the whole, with GivenHidden in the place of its decoder: its forward is the head's.
        decoder: from embedded tokens to the last hidden state.
        embedding: the table of the tokens. A plain one is no longer in `decoder`; one that does more stays there.
        embedding_name, head_name: their checkpoint names without the parameter's suffix.
        tied: whether the head's weight is the embedding's.
        linears: of the decoder, by checkpoint name.
        attentions: in the order of the layers.
        tensors: every other parameter and buffer of the checkpoint: by name, its module and its name there.
    """

    model: PreTrainedModel
    decoder: nn.Module
    embedding: nn.Embedding
    embedding_name: str
    head: FactoryLinear
    head_name: str
    tied: bool
    linears: Mapping[str, FactoryLinear]
    attentions: tuple[TracedAttention, ...]
    tensors: Mapping[str, tuple[nn.Module, str]]


def build_skeleton(config: ModelConfig) -> Skeleton:
    """Build the class that transformers has for an architecture, and run it once to see what its attention asks.

    Raises:
        CheckpointError: it cannot be served; every reason found is named.
    """
    model = _without_weights(config)
    stored_as = _checkpoint_names(model)
    if faults := [*_faults_of_config(model.config), *_faults_of_modules(model), *_faults_of_weights(model, stored_as)]:
        raise _refusal(config, faults)
    decoder, embedding, head = model.base_model, model.get_input_embeddings(), _head(model)
    assert isinstance(embedding, nn.Embedding)
    assert head is not None
    tied = head.weight is embedding.weight
    names = {module: name for name, module in model.named_modules()}
    if type(embedding) is nn.Embedding:
        model.set_input_embeddings(nn.Identity())
    linears = replace_linears(model)
    tensors = {
        stored_as[name]: (module, own_name)
        for prefix, module in model.named_modules()
        for own_name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if (name := f"{prefix}.{own_name}".lstrip(".")) in stored_as
    }

    def prefix_of(name: str) -> str:
        return stored_as[f"{name}.weight"].removesuffix(".weight")

    setattr(model, model.base_model_prefix, GivenHidden())
    return Skeleton(
        model=model,
        decoder=decoder,
        embedding=embedding,
        embedding_name=prefix_of(names[embedding]),
        head=linears.pop(names[head]),
        head_name=prefix_of(names[head]),
        tied=tied,
        linears={prefix_of(name): linear for name, linear in linears.items()},
        attentions=_traced(config, model, decoder),
        tensors=tensors,
    )


def _without_weights(config: ModelConfig) -> PreTrainedModel:
    """The model on the meta device. Code that comes with a checkpoint is not looked at."""
    own_class: type[PreTrainedModel] | None = getattr(transformers, config.architecture, None)
    if own_class is None or own_class.config_class is None:
        raise CheckpointError(f"transformers {transformers.__version__} has no {config.architecture}.")
    # The factory's layers are quantized, not transformers' modules.
    raw = {key: copy.deepcopy(value) for key, value in config.raw.items() if key != "quantization_config"}
    try:
        own_config: PreTrainedConfig = own_class.config_class.from_dict(raw)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                own_config, attn_implementation=TRACED, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # each class has checks of its own
        raise _refusal(config, [f"its class does not take this config.json: {_told(error)}"]) from error
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _refusal(config: ModelConfig, faults: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{config.architecture} cannot be served through transformers {transformers.__version__}: "
        f"{'; '.join(dict.fromkeys(faults))}."
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _faults_of_config(config: PreTrainedConfig) -> Iterator[str]:
    """What config.json states and one pass over a batch of many requests cannot compute."""
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        yield "it attends to an encoder too"
    if config.sub_configs:
        yield f"it is several models in one ({', '.join(config.sub_configs)})"
    if unknown := sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES):
        yield f"layer_types has {', '.join(map(repr, unknown))}; layers of full and sliding attention are served"
    if by_batch := sorted(_rope_types(getattr(config, "rope_parameters", None)) & _ROPE_TYPES_BY_BATCH):
        yield f"its rotation ({', '.join(by_batch)}) would change with the longest request of the batch"


def _rope_types(parameters: object) -> set[str]:
    """Of one rotation or of one for each type of layer."""
    if not isinstance(parameters, Mapping):
        return set()
    own = parameters.get("rope_type")
    return ({own} if isinstance(own, str) else set()).union(*map(_rope_types, parameters.values()))


def _faults_of_modules(model: PreTrainedModel) -> Iterator[str]:
    """What the modules show before they run."""
    decoder = model.base_model
    if not model._supports_attention_backend:
        yield "it does not take its attention from transformers' attention interface"
    if decoder is model or not isinstance(model.get_input_embeddings(), nn.Embedding):
        yield "it is not a decoder behind a table of embeddings"
    elif "position_ids" not in inspect.signature(decoder.forward).parameters:
        yield "its decoder cannot be told the positions of its tokens"
    if _head(model) is None:
        yield "its logits are not made by a linear"
    if mixing := {
        type(one).__name__ for one in model.modules() if isinstance(one, (nn.modules.conv._ConvNd, nn.RNNBase))
    }:
        yield f"tokens reach each other past its attention, through {', '.join(sorted(mixing))}"


def _checkpoint_names(model: PreTrainedModel) -> dict[str, str]:
    """What the model's tensors are called in checkpoints; those are left out that are no tensor of it as they are."""
    own = model.state_dict()
    stored = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(own)).items()}
    return {name: stored[id(tensor)] for name, tensor in own.items() if id(tensor) in stored}


def _faults_of_weights(model: PreTrainedModel, stored_as: Mapping[str, str]) -> Iterator[str]:
    strange = [name for name, tensor in model.state_dict().items() if name not in stored_as or tensor.ndim > 2]
    if strange:
        yield (
            f"{strange[0]} is not a vector or a matrix of checkpoints"
            f"{f', nor are {len(strange) - 1} others' if len(strange) > 1 else ''}, as in mixtures of experts"
        )


def _head(model: PreTrainedModel) -> nn.Linear | None:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head if type(head) is nn.Linear else None


@torch.no_grad()
def _traced(config: ModelConfig, model: PreTrainedModel, decoder: nn.Module) -> tuple[TracedAttention, ...]:
    """Run decoder and head on a few tokens of nothing, and leave `model` with the implementation that serves."""
    trace = AttentionTrace()
    tokens: dict[str, Tensor] = {
        "inputs_embeds": torch.empty(1, _NUM_TRACED_TOKENS, config.hidden_size, device="meta"),
        "position_ids": torch.empty(1, _NUM_TRACED_TOKENS, dtype=torch.int64, device="meta"),
        # Otherwise transformers reads the positions for the borders of packed texts.
        "attention_mask": torch.empty(1, _NUM_TRACED_TOKENS, dtype=torch.int64, device="meta"),
    }
    try:
        hidden = decoder(**tokens, use_cache=False, octavo=trace).last_hidden_state
        logits = model(inputs_embeds=hidden, use_cache=False).logits
    except Exception as error:  # whatever a model's code stumbles over: it cannot be run in this way
        raise _refusal(config, [*trace.faults, f"run once without weights, it raised {_told(error)}"]) from error
    if faults := [*trace.faults, *_faults_of_trace(config, trace.attentions, logits)]:
        raise _refusal(config, faults)
    model.config._attn_implementation = PAGED
    return tuple(trace.attentions)


def _faults_of_trace(config: ModelConfig, attentions: list[TracedAttention], logits: Tensor) -> Iterator[str]:
    """Where what was run is not what the engine makes room for, from the same config.json."""
    if len(attentions) != config.num_layers:
        yield f"{len(attentions)} of its {config.num_layers} layers attend"
    wanted = (config.num_heads, config.num_kv_heads, config.head_dim)
    for index, one in enumerate(attentions):
        if (found := (one.num_heads, one.num_kv_heads, one.head_dim)) != wanted:
            yield f"layer {index} has (heads, KV heads, head size) {found}, the KV cache is made for {wanted}"
            break
    for name, setting, used in (
        ("sliding_window", config.sliding_window, {one.sliding_window for one in attentions}),
        ("attn_logit_softcapping", config.attn_logit_softcapping, {one.logit_softcap for one in attentions}),
    ):
        if others := used - {None, setting}:
            yield f"attention has a {name} of {', '.join(map(str, others))}, config.json says {setting}"
    if logits.shape != (1, _NUM_TRACED_TOKENS, config.vocab_size):
        yield f"its logits are {list(logits.shape)}, not {config.vocab_size} a token"
