"""Google's Gemma language models: Gemma 2 and Gemma 3 for text."""

from octavo import ModelSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[ModelSpec]:
    return [
        ModelSpec(
            name="gemma2",
            summary="Gemma 2: soft-capped scores, every other layer behind a window",
            target="octavo_model_gemma.gemma:Gemma",
            architectures=("Gemma2ForCausalLM",),
        ),
        ModelSpec(
            name="gemma3",
            summary="Gemma 3 for text: five layers behind a window to one without",
            target="octavo_model_gemma.gemma:Gemma",
            architectures=("Gemma3ForCausalLM",),
        ),
    ]
