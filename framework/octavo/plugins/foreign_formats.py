"""Quantization formats that no plugin of ours reads, and what to do with such a checkpoint. Data only."""

from __future__ import annotations

FOREIGN_FORMATS = {
    **dict.fromkeys(("exl2", "exl3"), "is ExLlama's own format; `octavo quantize` makes GPTQ of the plain model"),
    **dict.fromkeys(
        ("marlin", "gptq_marlin", "awq_marlin", "bitblas", "qqq"),
        "lies in the tiles of one GPU kernel; take the same model as GPTQ or AWQ",
    ),
    "bitsandbytes": "is made of the plain model while it is loaded; load that",
}
"""What checkpoints' quant_method may be that no plugin of ours reads, and what to do."""
