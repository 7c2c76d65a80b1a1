"""The command `octavo quantize`: makes a GPTQ, AWQ or SqueezeLLM checkpoint of a plain model."""

from octavo import CommandSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="quantize",
            summary="Make a GPTQ, AWQ or SqueezeLLM checkpoint of a model",
            target="octavo_quantize.command",
        )
    ]
