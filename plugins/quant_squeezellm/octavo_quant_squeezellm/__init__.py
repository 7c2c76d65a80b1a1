"""SqueezeLLM checkpoints: 3 and 4-bit codes into a codebook of each output, and sparse outliers beside them."""

from octavo import CheckpointSpec, QuantizationSpec, Spec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[Spec]:
    return [
        QuantizationSpec(
            name="squeezellm",
            summary="SqueezeLLM 3 and 4-bit checkpoints, dense or with sparse outliers",
            target="octavo_quant_squeezellm.method:SqueezeLLMMethod",
            formats=("squeezellm",),
            bits=(3, 4),
            weight_form="lookup",
            recognise="octavo_quant_squeezellm.recognise:recognise",
        ),
        CheckpointSpec(
            name="squeezellm-pt",
            summary="Folders with config.json and SqueezeLLM's own .pt",
            target="octavo_quant_squeezellm.checkpoint:SqueezeLLMCheckpoint",
            folder_files=("config.json",),
            probe="octavo_quant_squeezellm.recognise:why_not",
            priority=10,  # before the folders whose weights are safetensors, which have a config.json too
        ),
    ]
