"""Any other decoder-only architecture of Hugging Face transformers, computed by transformers' own modules."""

from octavo import ModelSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[ModelSpec]:
    return [
        ModelSpec(
            name="transformers",
            summary="Decoder-only architectures that only transformers knows; slower than one written for Octavo",
            target="octavo_model_transformers.model:TransformersModel",
            architectures=("*",),
            requires=("transformers",),
            install="pip install octavo-model-transformers",
            priority=-100,
            probe="octavo_model_transformers.probe:why_not",
        )
    ]
