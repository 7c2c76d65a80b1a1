"""Loading takes the weights' memory about once, measured on a process that loads a checkpoint of many shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import SIZES, VOCAB_SIZE, write_tiny_llama, write_tokenizer

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 24, 768, 2048, 12, 4
MOST_OVER = 0.15
"""Of the weights: room for what a layer's linears need while they are packed, the tensors read, stacked and packed."""

MEASURE = """\
import json, re, sys
from pathlib import Path
from octavo import LLM, SamplingParams

def bytes_of(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

tiny, model, dtype = sys.argv[1:]
settings = {"dtype": dtype, "max_model_len": 16, "max_num_seqs": 1, "kv_cache_memory_bytes": 2**21}
with LLM(tiny, **settings) as llm:  # libraries, thread pools, oneDNN's own
    llm.generate("a", SamplingParams(max_tokens=2))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = bytes_of("VmRSS")
with LLM(model, **settings) as llm:
    print(json.dumps({
        "weights": llm._assembly.report.weight_bytes,
        "peak": bytes_of("VmHWM") - before,
        "kept": bytes_of("VmRSS") - before,
    }))
"""
"""VmHWM is the most memory that was resident at once, pages of mapped files included; the kernel keeps it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 MB of bfloat16 in nine shards, none of whose values matters."""
    folder = tmp_path_factory.mktemp("sharded")
    changes = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(SIZES | changes))
    write_tokenizer(folder)
    kv_size = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv_size, HIDDEN),
        "self_attn.v_proj": (kv_size, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    shards: dict[str, dict[str, tuple[int, ...]]] = {
        "model-0.safetensors": {
            "model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN),
            "lm_head.weight": (VOCAB_SIZE, HIDDEN),
            "model.norm.weight": (HIDDEN,),
        }
    }
    for layer in range(LAYERS):
        shard = shards.setdefault(f"model-{1 + layer // 3}.safetensors", {})
        shard |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    for file, held in shards.items():
        save_file({name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in held.items()}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_needs_the_weights_memory_about_once(folder: Path, tmp_path: Path, dtype: str) -> None:
    tiny = write_tiny_llama(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tiny), str(folder), dtype], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] > (250 if dtype == "bfloat16" else 500) * 2**20
    assert 0.9 * found["weights"] < found["kept"] <= found["peak"] <= (1 + MOST_OVER) * found["weights"], found
