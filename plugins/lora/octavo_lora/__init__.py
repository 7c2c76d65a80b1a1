"""LoRA adapters: read from PEFT folders, kept at device positions, each row's own added to a linear's product."""

from __future__ import annotations

from octavo import AdapterResolverSpec, LoraSpec, Spec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[Spec]:
    return [
        LoraSpec(
            name="torch",
            summary="Grouped matrix products of torch; any device",
            target="octavo_lora.torch_backend:TorchLora",
            requires=("peft",),
            install="pip install peft",
        ),
        LoraSpec(
            name="triton",
            summary="Triton kernels over rows grouped by adapter, in CUDA graphs too",
            target="octavo_lora.triton_backend:TritonLora",
            requires=("peft", "triton"),
            install="pip install peft triton",
            priority=100,
            probe="octavo.plugins.triton_probe:why_not",
        ),
        AdapterResolverSpec(
            name="filesystem",
            summary="Adapters by name, in the folders below a root",
            target="octavo_lora.resolvers:FilesystemResolver",
            options="octavo_lora.options:FilesystemOptions",
            serves_root=True,
        ),
        AdapterResolverSpec(
            name="hf",
            summary="Adapters by Hugging Face id, those that are allowed",
            target="octavo_lora.resolvers:HuggingFaceResolver",
            options="octavo_lora.options:HuggingFaceOptions",
        ),
    ]
