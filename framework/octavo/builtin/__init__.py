"""The built-ins: one reference of each kind, registered through the same hook as any other plugin."""

from __future__ import annotations

from octavo.plugins.hookspecs import hookimpl
from octavo.plugins.specs import (
    AttentionSpec,
    CheckpointSpec,
    CommandSpec,
    ExecutorSpec,
    KernelsSpec,
    LinearKernelSpec,
    LogitsRuleSpec,
    ModelSpec,
    QuantizationSpec,
    SchedulerSpec,
    Spec,
)

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[Spec]:
    return [
        AttentionSpec(
            name="torch",
            summary="Paged attention in plain torch, the reference of every kernel",
            target="octavo.builtin.torch_attention:TorchAttention",
            features=frozenset({"prefill", "decode", "sliding_window", "logit_softcap", "fp8_kv_cache"}),
            kv_layout="torch-nhd",
        ),
        QuantizationSpec(
            name="unquantized",
            summary="Plain weights, as the checkpoint stores them",
            target="octavo.builtin.unquantized:Unquantized",
            formats=("none",),
        ),
        LinearKernelSpec(
            name="torch-packed",
            summary="Dequantises at every call in plain torch: slow, any weight, the reference of every linear kernel",
            target="octavo.builtin.torch_linear:TorchPacked",
            forms=("affine", "lookup"),
        ),
        LinearKernelSpec(
            name="torch-dequantized",
            summary="Dequantises when the weights are loaded: as fast and as large as plain weights",
            target="octavo.builtin.torch_linear:TorchDequantized",
            forms=("affine", "lookup"),
            priority=-10,  # auto keeps memory near the packed size
        ),
        KernelsSpec(
            name="torch",
            summary="Norms, activations and sampling in plain torch, the reference of every kernel set",
            target="octavo.builtin.torch_kernels:TorchKernels",
        ),
        SchedulerSpec(
            name="fcfs",
            summary="First come, first served; the latest arrival is preempted first",
            target="octavo.builtin.fcfs:FCFSPolicy",
        ),
        ModelSpec(
            name="llama",
            summary="Llama and the models that share its layers",
            target="octavo.builtin.llama:Llama",
            architectures=("LlamaForCausalLM", "MistralForCausalLM", "SmolLM3ForCausalLM"),
        ),
        ExecutorSpec(
            name="inline",
            summary="Runs the model in this process, on one device",
            target="octavo.builtin.inline_executor:InlineExecutor",
            max_devices=1,
        ),
        LogitsRuleSpec(
            name="allowed-tokens",
            summary="Nothing but allowed_token_ids",
            target="octavo.builtin.logits_rules:AllowedTokens",
            always=True,
            priority=50,  # rules apply in the order of priority, vLLM's
        ),
        LogitsRuleSpec(
            name="bad-words",
            summary="No bad_words",
            target="octavo.builtin.logits_rules:BadWords",
            always=True,
            priority=40,
        ),
        LogitsRuleSpec(
            name="min-tokens",
            summary="No end before min_tokens outputs",
            target="octavo.builtin.logits_rules:MinTokens",
            always=True,
            priority=30,
        ),
        LogitsRuleSpec(
            name="logit-bias",
            summary="Adds logit_bias",
            target="octavo.builtin.logits_rules:LogitBias",
            always=True,
            priority=20,
        ),
        LogitsRuleSpec(
            name="penalties",
            summary="Presence, frequency and repetition penalties",
            target="octavo.builtin.logits_rules:Penalties",
            always=True,
            priority=10,
        ),
        CheckpointSpec(
            name="huggingface",
            summary="Folders with config.json and safetensors",
            target="octavo.builtin.hf_checkpoint:HuggingFaceCheckpoint",
            folder_files=("config.json",),
        ),
        CheckpointSpec(
            name="huggingface-tokenizer",
            summary="Folders with tokenizer.json alone, for a model of another folder or file",
            target="octavo.builtin.hf_checkpoint:HuggingFaceCheckpoint",
            folder_files=("tokenizer.json",),
            priority=-1,
        ),
        CommandSpec(
            name="generate", summary="Complete prompts and print the completions", target="octavo.cli.generate"
        ),
        CommandSpec(name="chat", summary="Talk with a model in the terminal", target="octavo.cli.chat"),
        CommandSpec(name="bench", summary="Measure throughput or latency of a model here", target="octavo.cli.bench"),
        CommandSpec(name="eval", summary="Measure a model's perplexity on a text", target="octavo.cli.eval"),
        CommandSpec(name="plan", summary="Count what a model takes of memory, and what fits", target="octavo.cli.plan"),
        CommandSpec(name="plugins", summary="List plugins, their states and components", target="octavo.cli.plugins"),
        CommandSpec(
            name="explain", summary="Show what would be chosen for a model, and why", target="octavo.cli.explain"
        ),
        CommandSpec(
            name="config", summary="Check a configuration, or print its JSON schema", target="octavo.cli.config"
        ),
        CommandSpec(name="env", summary="Describe this machine and what is installed", target="octavo.cli.env"),
    ]
