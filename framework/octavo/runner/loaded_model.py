"""A model with its weights on the device, and the runner that is made of it once its KV blocks are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from octavo.errors import ConfigError
from octavo.interfaces.attention import AttentionBackend, BatchLimits, KVCache
from octavo.interfaces.checkpoint import Checkpoint
from octavo.interfaces.kernels import Kernels
from octavo.interfaces.logits_rule import LogitsRule
from octavo.interfaces.lora import LoraBackend
from octavo.interfaces.manifest import Manifest
from octavo.interfaces.model import ModelArchitecture
from octavo.model_config import ModelConfig
from octavo.nn.factory import DeviceLayerFactory, build_linears, lora_limits
from octavo.nn.rotary import RotaryTable
from octavo.nn.split_attention import build_attention
from octavo.nn.weights import WeightLoader
from octavo.plugins.specs import Need
from octavo.runner.drafting import Drafter
from octavo.runner.graphs import GraphPlan
from octavo.runner.lora_base import CheckpointBase
from octavo.runner.model_runner import ModelRunner

Phase = Callable[[str], AbstractContextManager[None]]
"""What measures a start-up phase, by its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedAdapters:
    """Who adds LoRA adapters to the model's layers, and the base that they are checked against."""

    backend: LoraBackend
    base: CheckpointBase


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """`weight_bytes` are taken; a KV cache is not allocated before `make_runner`."""

    manifest: Manifest
    config: ModelConfig
    architecture: ModelArchitecture
    rotary: Sequence[RotaryTable]
    attention: AttentionBackend
    kernels: Kernels
    weight_bytes: int
    adapters: ServedAdapters | None = None

    @property
    def bytes_per_block(self) -> int:
        """Of the KV cache, over all layers."""
        return self.attention.kv_layout().bytes_per_block * self.config.num_layers

    @property
    def limits(self) -> BatchLimits:
        """Maximal sizes of its batches."""
        engine = self.manifest.config
        return BatchLimits(
            max_num_requests=engine.max_num_seqs,
            max_num_tokens=engine.max_num_batched_tokens,
            max_model_len=self.manifest.max_model_len,
            block_size=engine.block_size,
            device=self.manifest.device,
        )

    def make_runner(
        self,
        num_blocks: int,
        rules: Sequence[LogitsRule] = (),
        drafter: Drafter | None = None,
        graph_plan: GraphPlan | None = None,
    ) -> ModelRunner:
        """Allocate `num_blocks` for each layer."""
        layout, device = self.attention.kv_layout(), self.manifest.device
        kv_caches = [layout.allocate(num_blocks, device) for _ in range(self.config.num_layers)]
        return self._runner(kv_caches, rules, drafter, graph_plan)

    def make_trial_runner(self, num_blocks: int, rules: Sequence[LogitsRule] = ()) -> ModelRunner:
        """A runner that computes as the real one does, but in blocks that all layers share: its tokens mean nothing."""
        kv_cache = self.attention.kv_layout().allocate(num_blocks, self.manifest.device)
        return self._runner([kv_cache] * self.config.num_layers, rules)

    def _runner(
        self,
        kv_caches: Sequence[KVCache],
        rules: Sequence[LogitsRule] = (),
        drafter: Drafter | None = None,
        graph_plan: GraphPlan | None = None,
    ) -> ModelRunner:
        return ModelRunner(
            *(self.architecture, self.rotary, self.attention, self.kernels, kv_caches, self.limits),
            rules=rules,
            drafter=drafter,
            graph_plan=graph_plan,
            lora=None if self.adapters is None else self.adapters.backend,
        )


def load_model(manifest: Manifest, phase: Phase) -> LoadedModel:
    """Build what the manifest says and load its weights."""
    chosen = manifest.components
    checkpoint: Checkpoint = chosen["checkpoint"].build(manifest.model_path)
    config = ModelConfig.from_dict(checkpoint.config(), checkpoint.generation_config())
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    attention = build_attention(chosen["attention.prefill"], chosen["attention.decode"], manifest.attention_need)
    loader = WeightLoader()
    with phase("build model"):
        headers = checkpoint.tensor_headers()
        method, plain = build_linears(
            chosen, manifest.linear_kernels, manifest.quantization_config, dtype, manifest.device, headers
        )
        kernels: Kernels = chosen["kernels"].build(Need(device=manifest.device, dtype=manifest.dtype))
        lora = _lora(manifest)
        factory = DeviceLayerFactory(method, attention, kernels, loader, plain=plain, lora=lora)
        model: ModelArchitecture = chosen["model"].build(config, factory)
        rotary = factory.rotary_tables(manifest.max_model_len)
    with phase("load weights"):
        loader.load(checkpoint.tensors(), model.ignored_names())
    adapters = None
    if lora is not None:
        with phase("allocate adapters"):
            lora.allocate()
        names = (manifest.config.model, manifest.model_path)
        adapters = ServedAdapters(backend=lora, base=CheckpointBase(checkpoint, names, factory.modules))
    return LoadedModel(
        manifest=manifest,
        config=config,
        architecture=model,
        rotary=rotary,
        attention=attention,
        kernels=kernels,
        weight_bytes=factory.weight_bytes,
        adapters=adapters,
    )


def _lora(manifest: Manifest) -> LoraBackend | None:
    if (chosen := manifest.components.get("lora")) is None:
        return None
    backend: LoraBackend = chosen.build(lora_limits(manifest.config, manifest.dtype, manifest.device))
    return backend


def check_same_vocabulary(served: Manifest, draft: Manifest) -> None:
    """A guess is a token id, so it must mean the same to both models.

    Raises:
        ConfigError: it does not; says what differs.
    """
    opened: list[Checkpoint] = [one.components["checkpoint"].build(one.model_path) for one in (served, draft)]
    sizes = [ModelConfig.from_dict(one.config(), one.generation_config()).vocab_size for one in opened]
    advice = "Choose a draft model of the same family."
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"The draft model {draft.config.model} has a vocabulary of {sizes[1]} tokens and {served.config.model} one "
            f"of {sizes[0]}, but guesses are token ids, which must mean the same to both. {advice}"
        )
    if served.config.tokenizer is not None:  # the checkpoint need not have one
        return
    pieces = [one.tokenizer().tokenizer.get_vocab(with_added_tokens=True) for one in opened]
    different = sorted(set(pieces[0].items()) ^ set(pieces[1].items()), key=lambda item: (item[1], item[0]))
    if different:
        piece, token_id = different[0]
        raise ConfigError(
            f"The draft model {draft.config.model} has another tokenizer than {served.config.model}: of "
            f"{len(pieces[1])} and {len(pieces[0])} tokens, {len({one for _, one in different})} ids are not the same "
            f"token, the first of them {token_id} ({piece!r} in one). {advice}"
        )
