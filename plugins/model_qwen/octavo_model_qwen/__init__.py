"""Qwen's dense language models: Qwen2, Qwen2.5 and Qwen3."""

from octavo import ModelSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[ModelSpec]:
    return [
        ModelSpec(
            name="qwen2",
            summary="Qwen2, Qwen2.5 and models of their layers",
            target="octavo_model_qwen.qwen:Qwen",
            architectures=("Qwen2ForCausalLM",),
        ),
        ModelSpec(
            name="qwen3",
            summary="Qwen3, the dense sizes",
            target="octavo_model_qwen.qwen:Qwen",
            architectures=("Qwen3ForCausalLM",),
        ),
    ]
