"""Attention on torch's scaled_dot_product_attention, for head size 64. Imports neither torch nor the backend."""

from octavo import AttentionSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[AttentionSpec]:
    return [
        AttentionSpec(
            name="sdpa",
            summary="torch's scaled_dot_product_attention, one request at a time, for head size 64",
            target="octavo_example_attention_sdpa.backend:SDPAAttention",
            options="octavo_example_attention_sdpa.options:SDPAOptions",
            probe="octavo_example_attention_sdpa.probe:why_not",
            devices=("cpu",),
            dtypes=("float32", "bfloat16", "float16"),
            features=frozenset({"prefill", "decode"}),
            head_sizes=(64,),
            kv_layout="torch-nhd",
            priority=-10,  # slower than the built-in one: `auto` should not take it
        )
    ]
