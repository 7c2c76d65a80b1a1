"""Norms, gated activations and sampling as Triton kernels."""

from octavo import hookimpl
from octavo.plugins.specs import KernelsSpec

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[KernelsSpec]:
    return [
        KernelsSpec(
            name="triton",
            summary="Norms, activations and sampling in Triton",
            target="octavo_kernels_triton.kernel_set:TritonKernels",
            requires=("triton",),
            install="pip install triton",
            devices=("cuda", "cpu"),
            dtypes=("bfloat16", "float16", "float32"),
            priority=10,
            probe="octavo.plugins.triton_probe:why_not",
        )
    ]
