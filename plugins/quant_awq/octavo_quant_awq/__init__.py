"""AWQ checkpoints: 4-bit weights as AutoAWQ, GPTQModel and llm-awq's configurations store them."""

from octavo import QuantizationSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[QuantizationSpec]:
    return [
        QuantizationSpec(
            name="awq",
            summary="AWQ 4-bit checkpoints, versions gemm and gemv (AutoAWQ, GPTQModel)",
            target="octavo_quant_awq.method:AWQMethod",
            formats=("awq",),
            bits=(4,),
            weight_form="affine",
            recognise="octavo_quant_awq.config:recognise",
            probe="octavo_quant_awq.config:reasons_against",
        )
    ]
