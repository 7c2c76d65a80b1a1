"""Products with packed weights as Triton kernels: one component for scaled codes, one for codebooks."""

from octavo import hookimpl
from octavo.plugins.specs import LinearKernelSpec

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[LinearKernelSpec]:
    return [
        LinearKernelSpec(
            name="triton-affine",
            summary="1- to 8-bit codes with scales and zeros (GPTQ, AWQ), dequantised in registers",
            target="octavo_linear_triton.affine:TritonAffine",
            requires=("triton",),
            install="pip install triton",
            devices=("cuda", "cpu"),
            dtypes=("bfloat16", "float16", "float32"),
            forms=("affine",),
            priority=10,
            probe="octavo.plugins.triton_probe:why_not",
        ),
        LinearKernelSpec(
            name="triton-lookup",
            summary="Codes of up to 4 bits into codebooks, outliers beside them (SqueezeLLM)",
            target="octavo_linear_triton.lookup:TritonLookup",
            requires=("triton",),
            install="pip install triton",
            devices=("cuda", "cpu"),
            dtypes=("bfloat16", "float16", "float32"),
            forms=("lookup",),
            priority=10,
            probe="octavo.plugins.triton_probe:why_not",
        ),
    ]
