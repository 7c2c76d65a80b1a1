"""GGUF checkpoints: one file with weights, configuration and tokenizer, dequantised on load."""

from octavo import CheckpointSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[CheckpointSpec]:
    return [
        CheckpointSpec(
            name="gguf",
            summary="Llama-family GGUF files (llama.cpp), dequantised on load",
            target="octavo_checkpoint_gguf.checkpoint:GGUFCheckpoint",
            suffixes=(".gguf",),
            requires=("gguf",),
            install="pip install octavo-checkpoint-gguf",
        )
    ]
