"""Microsoft's Phi language models of the Phi-3 architecture: Phi-3, Phi-3.5, Phi-4 and Phi-4-mini."""

from octavo import ModelSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[ModelSpec]:
    return [
        ModelSpec(
            name="phi3",
            summary="Phi-3, Phi-3.5, Phi-4 and Phi-4-mini",
            target="octavo_model_phi.phi:Phi",
            architectures=("Phi3ForCausalLM",),
        )
    ]
