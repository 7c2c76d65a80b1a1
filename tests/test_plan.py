"""A plan's numbers, to the byte: against arithmetic by hand for published models, and against running engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from affine_plugin import install_affine_plugin
from llama_configs import LLAMA_3_8B, LLAMA_3_70B, write_config
from lora_plugin import install_lora_plugin
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.assemble import Assembly, assemble
from octavo.builtin.hf_checkpoint import HuggingFaceCheckpoint
from octavo.config import EngineConfig
from octavo.errors import CheckpointError, ConfigError
from octavo.model_config import RopeConfig
from octavo.nn.rotary import RotaryTable
from octavo.plan import Plan, make, make_plan
from octavo.runner import worker
from octavo.runner.kv_cache import DeviceMemory

GIB = 2**30


def plan_of(folder: Path, config: Mapping[str, Any], memory: int = 24 * GIB, **settings: Any) -> Plan:
    """Of a config.json alone, on a CUDA device of this size that need not be here."""
    model = write_config(folder / "model", config)
    return make_plan(EngineConfig.create(model=model, **{"device": "cuda", **settings}), memory_bytes=memory)


# ---------------------------------------------------------------------------------------------- published models

# (config.json, tensor_parallel_size, memory, weights of one device, KV bytes of a token on one device)
BY_HAND = {
    "8B on 1": (
        LLAMA_3_8B,
        1,
        24 * GIB,
        #    q,     k,     v                o          gate and up      down             two norms
        2 * (32 * ((4096 + 1024 + 1024) * 4096 + 4096 * 4096 + 2 * 14336 * 4096 + 4096 * 14336 + 2 * 4096))
        + 2 * (128256 * 4096 + 4096 + 128256 * 4096),  # embedding, last norm, head
        2 * 32 * 8 * 128 * 2,  # key and value, layers, KV heads, head_dim, bytes
    ),
    "8B on 2": (
        LLAMA_3_8B,
        2,
        24 * GIB,
        2 * (32 * ((2048 + 512 + 512) * 4096 + 4096 * 2048 + 2 * 7168 * 4096 + 4096 * 7168 + 2 * 4096))
        + 2 * (64128 * 4096 + 4096 + 64128 * 4096),
        2 * 32 * 4 * 128 * 2,
    ),
    "8B on 8": (
        LLAMA_3_8B,
        8,
        24 * GIB,
        2 * (32 * ((512 + 128 + 128) * 4096 + 4096 * 512 + 2 * 1792 * 4096 + 4096 * 1792 + 2 * 4096))
        + 2 * (16032 * 4096 + 4096 + 16032 * 4096),
        2 * 32 * 1 * 128 * 2,
    ),
    "8B on 16, each KV head on two": (
        LLAMA_3_8B,
        16,
        24 * GIB,
        2 * (32 * ((256 + 128 + 128) * 4096 + 4096 * 256 + 2 * 896 * 4096 + 4096 * 896 + 2 * 4096))
        + 2 * (8016 * 4096 + 4096 + 8016 * 4096),
        2 * 32 * 1 * 128 * 2,
    ),
    "70B on 1": (
        LLAMA_3_70B,
        1,
        192 * GIB,
        2 * (80 * ((8192 + 1024 + 1024) * 8192 + 8192 * 8192 + 2 * 28672 * 8192 + 8192 * 28672 + 2 * 8192))
        + 2 * (128256 * 8192 + 8192 + 128256 * 8192),
        2 * 80 * 8 * 128 * 2,
    ),
    "70B on 2": (
        LLAMA_3_70B,
        2,
        96 * GIB,
        2 * (80 * ((4096 + 512 + 512) * 8192 + 8192 * 4096 + 2 * 14336 * 8192 + 8192 * 14336 + 2 * 8192))
        + 2 * (64128 * 8192 + 8192 + 64128 * 8192),
        2 * 80 * 4 * 128 * 2,
    ),
    "70B on 8": (
        LLAMA_3_70B,
        8,
        80 * GIB,
        2 * (80 * ((1024 + 128 + 128) * 8192 + 8192 * 1024 + 2 * 3584 * 8192 + 8192 * 3584 + 2 * 8192))
        + 2 * (16032 * 8192 + 8192 + 16032 * 8192),
        2 * 80 * 1 * 128 * 2,
    ),
    "70B on 16, each KV head on two": (
        LLAMA_3_70B,
        16,
        24 * GIB,
        2 * (80 * ((512 + 128 + 128) * 8192 + 8192 * 512 + 2 * 1792 * 8192 + 8192 * 1792 + 2 * 8192))
        + 2 * (8016 * 8192 + 8192 + 8016 * 8192),
        2 * 80 * 1 * 128 * 2,
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_numbers_equal_those_by_hand(case: str, tmp_path: Path) -> None:
    config, num_ranks, memory, weight_bytes, kv_bytes_per_token = BY_HAND[case]
    plan = plan_of(tmp_path, config, memory, tensor_parallel_size=num_ranks)
    rotary_bytes = 2 * 8192 * 128 * 2  # cosines and sines, positions, head_dim, bytes
    activation_bytes = 256 * 128256 * 32  # requests that draw a token, vocabulary, bytes: more than a layer takes
    left = memory * 9 // 10 - weight_bytes - rotary_bytes - activation_bytes
    num_blocks = left // (16 * kv_bytes_per_token)
    assert plan.fits
    assert plan.weight_bytes == weight_bytes
    assert plan.rotary_bytes == rotary_bytes
    assert plan.activation_bytes == activation_bytes
    assert plan.kv_bytes_per_token == kv_bytes_per_token
    assert plan.num_blocks == num_blocks
    assert plan.kv_cache_bytes == num_blocks * 16 * kv_bytes_per_token
    assert plan.num_tokens == num_blocks * 16
    assert plan.longest_context == 8192
    assert plan.max_concurrent_requests == min(num_blocks // (8192 // 16), 256)


@pytest.mark.parametrize(
    ("config", "memory", "num_weights", "num_blocks", "num_requests"),
    [(LLAMA_3_8B, 24 * GIB, 8_030_261_248, 2_897, 5), (LLAMA_3_70B, 192 * GIB, 70_553_706_496, 8_274, 16)],
    ids=["8B", "70B"],
)
def test_published_parameter_counts_and_what_follows(
    config: Mapping[str, Any], memory: int, num_weights: int, num_blocks: int, num_requests: int, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, config, memory)
    assert (plan.weight_bytes, plan.sizes.bits_per_weight) == (2 * num_weights, 16.0)
    assert (plan.num_blocks, plan.max_concurrent_requests) == (num_blocks, num_requests)


def test_a_tied_head_counts_beside_the_embedding(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {**LLAMA_3_8B, "tie_word_embeddings": True})
    assert plan.weight_bytes == BY_HAND["8B on 1"][3]


def test_a_biased_linear_counts_its_bias(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {**LLAMA_3_8B, "attention_bias": True, "mlp_bias": True}, tensor_parallel_size=2)
    cut, whole = 2048 + 512 + 512 + 2 * 7168, 2 * 4096  # those of linears cut along their inputs stay whole
    assert plan.weight_bytes == BY_HAND["8B on 2"][3] + 2 * 32 * (cut + whole)


def test_a_vocabulary_that_does_not_divide_is_padded_and_said_so(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {**LLAMA_3_8B, "vocab_size": 128257}, tensor_parallel_size=8)
    assert plan.weight_bytes == BY_HAND["8B on 8"][3] + 2 * 2 * 4096
    assert "The vocabulary of 128,257 is padded to 128,264, to be shared evenly." in plan.notes


def test_repeated_kv_heads_are_said(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LLAMA_3_8B, tensor_parallel_size=32)
    assert "Each of the 8 KV heads is held by 4 devices." in plan.notes


def test_concurrent_requests_are_capped_by_max_num_seqs(tmp_path: Path) -> None:
    assert plan_of(tmp_path, LLAMA_3_8B, max_num_seqs=5).max_concurrent_requests == 5


def test_requests_of_a_typical_length_are_counted(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LLAMA_3_8B)
    assert plan.num_blocks == 2897
    assert plan.concurrent_requests(1000) == 2897 // 63  # 63 blocks of 16 tokens
    assert plan.concurrent_requests(10) == 256
    assert plan.concurrent_requests(8193) == 0


@pytest.mark.parametrize(("num_ranks", "widest"), [(1, 14336), (2, 7168), (8, 4096)])
def test_few_requests_leave_the_activations_to_the_widest_layer(num_ranks: int, widest: int, tmp_path: Path) -> None:
    settings = {"max_num_seqs": 1, "max_num_batched_tokens": 500, "tensor_parallel_size": num_ranks}
    plan = plan_of(tmp_path, LLAMA_3_8B, **settings)
    assert plan.activation_bytes == 500 * (2 * 4096 + 3 * widest) * 2


def test_an_engine_s_share_of_a_gpu_counts_what_others_have_taken_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = DeviceMemory(free_bytes=70 * GIB, total_bytes=80 * GIB)
    monkeypatch.setattr(make, "device_memory", lambda device: memory)
    config = EngineConfig(model=write_config(tmp_path, LLAMA_3_8B), device="cuda", gpu_memory_utilization=0.5)
    plan = make_plan(config)
    assert plan.kv_cache_budget == 40 * GIB - 10 * GIB - plan.static_bytes


def test_blocks_are_no_more_than_requests_could_use(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LLAMA_3_8B, max_num_seqs=3, max_model_len=100)
    assert plan.num_blocks == 3 * 7


# ------------------------------------------------------------------------------------------- nothing is read or kept


def test_no_weight_is_read_or_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.num_bytes = max(self.num_bytes, result.nbytes)
            return result

    def read(self: HuggingFaceCheckpoint) -> Any:
        raise AssertionError("weights are read")

    model = str(write_tiny_llama(tmp_path))
    monkeypatch.setattr(HuggingFaceCheckpoint, "tensors", read)
    with Largest() as largest:
        plan = make_plan(EngineConfig(model=model))
    assert plan.weight_bytes > 100_000
    assert largest.num_bytes < 96 * 48 * 4  # the largest weight


def test_a_config_alone_is_enough_and_has_no_bytes_on_disk(tmp_path: Path) -> None:
    assert plan_of(tmp_path, LLAMA_3_8B).checkpoint_bytes is None


def test_bytes_on_disk_are_those_of_the_files(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    plan = make_plan(EngineConfig(model=str(folder)))
    assert plan.checkpoint_bytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


def test_weights_of_another_model_are_refused_as_loading_refuses_them(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["stranger"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors")
    messages = []
    for judge in (make_plan, assemble):
        with pytest.raises(CheckpointError) as caught:
            judge(EngineConfig(model=str(folder)))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "missing: model.norm.weight" in messages[0]
    assert "no place in this model: stranger" in messages[0]
    assert "lm_head.weight is [3, 3]" in messages[0]


# ------------------------------------------------------------------------------------------------ running engines


def running(config: EngineConfig) -> Assembly:
    assembly = assemble(config)
    assembly.engine.stop()
    return assembly


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=str
)
def test_plan_equals_what_a_running_engine_reports(changes: dict[str, Any], tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path, **changes))
    config = EngineConfig(model=model, kv_cache_memory_bytes=100_000, block_size=8)
    plan, report = make_plan(config), running(config).report
    assert plan.fits
    assert (plan.weight_bytes, plan.kv_cache_bytes, plan.num_blocks) == (
        report.weight_bytes,
        report.kv_cache_bytes,
        report.num_blocks,
    )


def test_plan_and_engine_size_the_cache_alike_from_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model=str(write_tiny_llama(tmp_path)))
    free_before, total = 1_000_000, 10_000_000
    taken = make_plan(config).static_bytes
    monkeypatch.setattr(make, "device_memory", lambda device: DeviceMemory(free_bytes=free_before, total_bytes=total))
    monkeypatch.setattr(
        worker, "device_memory", lambda device: DeviceMemory(free_bytes=free_before - taken, total_bytes=total)
    )
    plan = make_plan(config)
    assert 0 < plan.num_blocks == running(config).report.num_blocks


def test_a_plan_does_not_fit_where_an_engine_refuses_to_start(tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path))
    config = EngineConfig(model=model, kv_cache_memory_bytes=10_000, max_model_len=100)
    (fault,) = make_plan(config).faults
    with pytest.raises(ConfigError) as caught:
        assemble(config)
    assert str(caught.value).startswith(fault)


def test_rotary_tables_weigh_what_they_do_in_memory(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LLAMA_3_8B, max_model_len=1000)
    table = RotaryTable(RopeConfig(), 128, 1000, torch.bfloat16, "cpu")
    assert plan.rotary_bytes == table._cos.nbytes + table._sin.nbytes


# ------------------------------------------------------------------------------------- quantization and adapters

FOUR_BITS = """
    from octavo import QuantizationSpec, hookimpl
    OCTAVO_API = "1.0"

    @hookimpl
    def octavo_components():
        return [QuantizationSpec(name="four", target="dummy_four.method:FourBits", formats=("four",), bits=(4,))]
"""
METHOD = """
    import torch
    from octavo.builtin.unquantized import Unquantized
    from octavo.interfaces import ParameterSpec

    class FourBits(Unquantized):
        def parameters(self, prefix, shape):
            out, inputs = shape.out_features, shape.in_features
            if prefix == "lm_head":
                return super().parameters(prefix, shape)
            axes = {"input_axis": 0, "output_axis": 1}
            return (
                ParameterSpec(name="qweight", shape=(inputs // 8, out), dtype=torch.int32, pack_factor=8, **axes),
                ParameterSpec(name="scales", shape=(inputs // 128, out), dtype=torch.float16, **axes),
            )
"""
QUANTIZED = {**LLAMA_3_8B, "quantization_config": {"quant_method": "four", "bits": 4}}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_packed_weights_and_their_scales_are_counted(num_ranks: int, site_packages: Any, tmp_path: Path) -> None:
    folder = site_packages.install("four", FOUR_BITS).parent
    (folder / "method.py").write_text(dedent(METHOD))
    plan = plan_of(tmp_path, QUANTIZED, tensor_parallel_size=num_ranks)
    num_linear = 32 * ((4096 + 1024 + 1024) * 4096 + 4096 * 4096 + 3 * 14336 * 4096)
    linear_bytes = num_linear // 2 + 2 * num_linear // 128
    table_bytes, norm_bytes = 2 * 2 * 128256 * 4096, 2 * (32 * 2 * 4096 + 4096)
    assert plan.weight_bytes == (linear_bytes + table_bytes) // num_ranks + norm_bytes
    assert plan.sizes.bits_per_weight == 8 * (linear_bytes + table_bytes + norm_bytes) / 8_030_261_248


EIGHT = {**LLAMA_3_8B, "quantization_config": {"quant_method": "eight"}}


@pytest.mark.parametrize(("kernel", "num_bytes"), [("auto", 3), ("torch-dequantized", 2)])
def test_packed_weights_count_as_their_linear_kernel_keeps_them(
    kernel: str, num_bytes: int, site_packages: Any, tmp_path: Path
) -> None:
    install_affine_plugin(site_packages)
    plan = plan_of(tmp_path, EIGHT, linear_kernel=kernel, plugins={"allow": ["eight"]})
    plain = plan_of(tmp_path, LLAMA_3_8B)
    # The kernel "wide" does not serve down, which the built-in keeps in bytes beside a scale for each output.
    widening = 32 * ((4096 + 1024 + 1024) * 4096 + 4096 * 4096 + 2 * 14336 * 4096)
    narrowing = 32 * 14336 * 4096
    packed = narrowing + 32 * 2 * 4096 if kernel == "auto" else num_bytes * narrowing
    assert plan.weight_bytes == plain.weight_bytes - 2 * (widening + narrowing) + num_bytes * widening + packed


@pytest.mark.parametrize(
    ("num_ranks", "features"),
    [
        # q,                           k and v,          o,            gate and up,          down
        (1, (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 2 * (4096 + 14336) + (14336 + 4096)),
        (2, (4096 + 2048) + 2 * (4096 + 512) + (2048 + 4096) + 2 * (4096 + 7168) + (7168 + 4096)),
        (16, (4096 + 256) + 2 * (4096 + 128) + (256 + 4096) + 2 * (4096 + 896) + (896 + 4096)),
    ],
)
def test_adapters_take_what_their_backend_says(
    num_ranks: int, features: int, site_packages: Any, tmp_path: Path
) -> None:
    install_lora_plugin(site_packages)
    settings: dict[str, Any] = {
        "model": write_config(tmp_path, LLAMA_3_8B),
        "device": "cuda",
        "tensor_parallel_size": num_ranks,
        "max_loras": 3,
        "max_lora_rank": 64,
        "lora": "counted",
    }
    plain = make_plan(EngineConfig(**settings), memory_bytes=24 * GIB)
    plan = make_plan(EngineConfig(**settings, enable_lora=True), memory_bytes=24 * GIB)
    assert plain.adapter_bytes == 0
    assert plan.adapter_bytes == 3 * 32 * 64 * features * 2
    assert plan.kv_cache_budget == plain.kv_cache_budget - plan.adapter_bytes


# --------------------------------------------------------------------------------------- what cannot be planned or run


def test_a_number_of_devices_that_cannot_share_the_model_is_refused_with_all_that_can(tmp_path: Path) -> None:
    config = {**LLAMA_3_8B, "hidden_size": 576, "intermediate_size": 1536, "head_dim": 64}
    config |= {"num_attention_heads": 24, "num_key_value_heads": 3}

    def plan(num_ranks: int) -> Plan:
        return plan_of(tmp_path, config, tensor_parallel_size=num_ranks)

    with pytest.raises(ConfigError, match=r"24 query heads and 3 KV heads.* up to 64 that work: 1, 3, 6, 12, 24\.$"):
        plan(2)
    assert [plan(num_ranks).num_ranks for num_ranks in (1, 3, 6, 12, 24)] == [1, 3, 6, 12, 24]
    for num_ranks in set(range(1, 65)) - {1, 3, 6, 12, 24}:
        with pytest.raises(ConfigError):
            plan(num_ranks)


def test_what_no_executor_can_run_is_planned_with_a_note(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LLAMA_3_8B, tensor_parallel_size=2, executor="inline")
    assert any(note.startswith("This installation cannot run it: executor 'inline'") for note in plan.notes)


def test_what_nothing_installed_can_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No installed quantization method can serve this"):
        plan_of(tmp_path, {**LLAMA_3_8B, "quantization_config": {"quant_method": "unheard-of"}})


def test_cuda_is_planned_without_one_only_when_its_memory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = EngineConfig(model=write_config(tmp_path, LLAMA_3_8B), device="cuda")
    assert make_plan(config, memory_bytes=24 * GIB).device == "cuda"
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        make_plan(config)


@pytest.mark.parametrize("name", ["memory_bytes", "tokens_per_request"])
def test_sizes_of_nothing_are_refused(name: str, tmp_path: Path) -> None:
    config = EngineConfig(model=write_config(tmp_path, LLAMA_3_8B))
    arguments: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"{name}=0 is too little; give at least 1"):
        make_plan(config, **arguments)
