"""The FlashAttention and FlashInfer libraries, where they are installed, over the KV layout that backends share."""

from octavo import AttentionSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[AttentionSpec]:
    return [
        AttentionSpec(
            name="flash-attn",
            summary="The flash-attn library, FlashAttention-3, -4 or -2: auto takes it for prefill before Triton",
            target="octavo_attention_flash.flash_attention:FlashAttention",
            # Any of three packages will do, which `requires` cannot say; the probe does.
            devices=("cuda",),
            dtypes=("bfloat16", "float16"),
            features=frozenset({"prefill", "decode", "sliding_window", "logit_softcap"}),
            kv_layout="torch-nhd",
            priority=20,
            decode_priority=4,  # below both Triton kernels, above plain torch
            probe="octavo_attention_flash.libraries:why_not_flash_attention",
        ),
        AttentionSpec(
            name="flashinfer",
            summary="The FlashInfer library, for prefill alone: auto takes it after flash-attn, before Triton",
            target="octavo_attention_flash.flashinfer_attention:FlashInferAttention",
            requires=("flashinfer",),
            install="pip install flashinfer-python",
            devices=("cuda",),
            dtypes=("bfloat16", "float16"),
            features=frozenset({"prefill", "sliding_window", "logit_softcap"}),
            head_sizes=(64, 128, 256),
            kv_layout="torch-nhd",
            priority=15,
            probe="octavo_attention_flash.libraries:why_not_flashinfer",
        ),
    ]
