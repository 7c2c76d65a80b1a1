"""Small adapters as peft saves them, over tiny random Llamas, and the same models as a reader's base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.interfaces import AdapterWeights, BaseWeight, LoraBase, LoraLimits, LoraModule
from octavo_lora.hub import CONFIG_FILE, WEIGHTS_FILE
from octavo_lora.reader import read_adapter

VOCABULARY, HIDDEN = 40, 16
LIMITS = LoraLimits(max_loras=2, max_lora_rank=16, max_num_rows=8, dtype=torch.float32, device="cpu")
SAVING = LoraLimits(
    max_loras=2, max_lora_rank=16, max_num_rows=8, dtype=torch.float32, device="cpu", modules_to_save=True
)
TOKENS = torch.tensor([[1, 7, 3, 39, 0, 12]])


def tiny_llama(*, bias: bool = False, tied: bool = False, layers: int = 2, vocabulary: int = VOCABULARY) -> nn.Module:
    """A Llama of random weights, float32, the same each time."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


class ModelBase(LoraBase):
    """A model of transformers in memory."""

    def __init__(self, model: nn.Module, names: tuple[str, ...] = ("tiny-llama",)) -> None:
        self.names = names
        self.config = model.config.to_dict()
        self.model = model
        self.asked: list[list[str]] = []
        self.modules = dict(_modules(model))

    def weights(self, names: Collection[str]) -> Iterator[tuple[str, BaseWeight]]:
        self.asked.append(sorted(names))
        for name in sorted(names):
            module = self.model.get_submodule(name)
            weight, bias = module.weight.detach().float(), getattr(module, "bias", None)
            yield (
                name,
                BaseWeight(
                    weight=weight.T if isinstance(module, nn.Embedding) else weight,
                    bias=None if bias is None else bias.detach().float(),
                ),
            )


def _modules(model: nn.Module) -> Iterator[tuple[str, LoraModule]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            sizes = module.num_embeddings, module.embedding_dim
            yield name, LoraModule(name=name, in_features=sizes[0], out_features=sizes[1], kind="embedding")
        elif isinstance(module, nn.Linear):
            yield (
                name,
                LoraModule(
                    name=name,
                    in_features=module.in_features,
                    out_features=module.out_features,
                    kind="head" if name == "lm_head" else "linear",
                    has_bias=module.bias is not None,
                ),
            )


def save_adapter(
    folder: Path,
    *,
    model: nn.Module | None = None,
    seed: int = 5,
    trained: Callable[[nn.Module], None] | None = None,
    **config: object,
) -> PeftModel:
    """Write an adapter with random weights; what peft has of it, in float32 and evaluation mode, is given back."""
    base = tiny_llama() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice for training
        adapter = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                elif parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
            if trained is not None:
                trained(adapter)
        adapter.save_pretrained(folder)
    return adapter.eval()


def peft_logits(folder: Path, model: nn.Module) -> Tensor:
    """What peft computes from the folder over a base, without merging, in float64."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, folder).eval().double()(TOKENS).logits


def octavo_logits(adapter: AdapterWeights, model: nn.Module) -> Tensor:
    """What the socket's formula, y = (W x + b (a x)) * scale + shift, makes of a model, in float64."""
    assert not model.config.tie_word_embeddings or model.lm_head.weight is model.model.embed_tokens.weight
    model = model.double()
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied: each has its own adapter
        for name, weight in adapter.saved.items():
            model.get_submodule(name).weight.copy_(weight)
        for name, low_rank in adapter.low_ranks.items():
            module = model.get_submodule(name)
            embeds = isinstance(module, nn.Embedding)
            weight = module.weight.T if embeds else module.weight
            weight = weight + low_rank.b.double() @ low_rank.a.double()
            if low_rank.scale is not None:
                weight = weight * low_rank.scale.double()[:, None]
            module.weight.copy_(weight.T if embeds else weight)
            if low_rank.shift is not None:
                old = getattr(module, "bias", None)
                module.bias = nn.Parameter(low_rank.shift.double() + (0 if old is None else old.detach()))
        return model(TOKENS).logits


def assert_as_peft(
    folder: Path, make: Callable[[], nn.Module] = tiny_llama, limits: LoraLimits = LIMITS
) -> AdapterWeights:
    """Reading the folder gives peft's own logits, and other ones than the base's."""
    adapter = read_adapter(str(folder), ModelBase(make()), limits)
    theirs = peft_logits(folder, make())
    ours = octavo_logits(adapter, make())
    with torch.no_grad():
        plain = make().double()(TOKENS).logits
    assert (theirs - plain).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    return adapter


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of a saved configuration; Ellipsis removes one."""
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change saved tensors, in place or, where a dictionary is given back, into others."""
    file = folder / WEIGHTS_FILE
    tensors = load_file(file)
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)
