"""Paged attention as Triton kernels: one component for prefill, one for decode, either for both."""

from octavo import AttentionSpec, hookimpl

OCTAVO_API = "1.0"

_FEATURES = frozenset({"prefill", "decode", "sliding_window", "logit_softcap", "fp8_kv_cache"})


@hookimpl
def octavo_components() -> list[AttentionSpec]:
    return [
        AttentionSpec(
            name="triton-flash",
            summary="FlashAttention over paged keys and values in Triton, made for prefill",
            target="octavo_attention_triton.flash:TritonFlash",
            requires=("triton",),
            install="pip install triton",
            devices=("cuda", "cpu"),
            dtypes=("bfloat16", "float16", "float32"),
            features=_FEATURES,
            kv_layout="torch-nhd",
            priority=10,
            decode_priority=5,
            probe="octavo_attention_triton.probe:why_not",
        ),
        AttentionSpec(
            name="triton-paged",
            summary="PagedAttention with split contexts in Triton, made for decode",
            target="octavo_attention_triton.paged:TritonPaged",
            requires=("triton",),
            install="pip install triton",
            devices=("cuda", "cpu"),
            dtypes=("bfloat16", "float16", "float32"),
            features=_FEATURES,
            kv_layout="torch-nhd",
            priority=5,
            decode_priority=10,
            probe="octavo_attention_triton.probe:why_not",
            options="octavo_attention_triton.options:PagedOptions",
        ),
    ]
