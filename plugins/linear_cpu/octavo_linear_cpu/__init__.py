"""Products with int4 and int8 weights by torch's own CPU operators."""

from octavo import hookimpl
from octavo.plugins.specs import LinearKernelSpec

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[LinearKernelSpec]:
    return [
        LinearKernelSpec(
            name="cpu-int4",
            summary="torch's int4 product: weights of up to 4 bits, others as two products",
            target="octavo_linear_cpu.int4:CpuInt4",
            forms=("affine",),
            devices=("cpu",),
            dtypes=("bfloat16",),  # in others the operator is slow
            priority=10,
            probe="octavo_linear_cpu.probe:why_not_int4",
        ),
        LinearKernelSpec(
            name="cpu-int8",
            summary="torch's int8 product: symmetric 8-bit weights without groups",
            target="octavo_linear_cpu.int8:CpuInt8",
            forms=("affine",),
            devices=("cpu",),
            dtypes=("bfloat16",),
            priority=20,
            probe="octavo_linear_cpu.probe:why_not_int8",
        ),
    ]
