"""GPTQ checkpoints: weights of 2 to 8 bits as AutoGPTQ, GPTQModel and AutoRound store them."""

from octavo import QuantizationSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[QuantizationSpec]:
    return [
        QuantizationSpec(
            name="gptq",
            summary="GPTQ checkpoints of 2 to 8 bits: gptq, gptq_v2, gptq_p (AutoGPTQ, GPTQModel, AutoRound)",
            target="octavo_quant_gptq.method:GPTQMethod",
            formats=("gptq", "auto-round"),
            bits=(2, 3, 4, 5, 6, 7, 8),
            weight_form="affine",
            recognise="octavo_quant_gptq.config:recognise",
            probe="octavo_quant_gptq.config:reasons_against",
        )
    ]
