"""How a checkpoint is quantized: by its configuration or what plugins recognise; what is said where nobody reads it."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.errors import PluginError, UnavailableComponentError
from octavo.interfaces import TensorHeader
from octavo.plugins.quantized_checkpoint import quantization_config, quantization_need
from octavo.plugins.registry import Registry, default_registry

PACKED = {"model.layers.0.mlp.up_proj.qweight": TensorHeader(shape=(8, 64), dtype="I32", num_bytes=2048)}
PLAIN = {"model.layers.0.mlp.up_proj.weight": TensorHeader(shape=(64, 64), dtype="F16", num_bytes=8192)}

RECOGNISER = """
    from octavo import QuantizationSpec, hookimpl
    OCTAVO_API = "1.0"

    @hookimpl
    def octavo_components():
        return [QuantizationSpec(name="five", target="m:M", formats=("five",), recognise="dummy_five:recognise")]

    def recognise(config, headers):
        if "broken" in config:
            raise KeyError("bits")
        return {"quant_method": "five", "bits": 5} if any("qweight" in name for name in headers) else None
"""


def only(*names: str) -> Registry:
    from octavo.plugins.host import PluginRules

    return default_registry(PluginRules(allow=names))


def refusal(config: dict[str, Any], registry: Registry) -> str:
    need = quantization_need(config, "cpu", "float32")
    with pytest.raises(UnavailableComponentError) as caught:
        registry.select("quantization", need)
    return str(caught.value)


@pytest.mark.parametrize("key", ["quant_method", "method"])
def test_named_method_is_taken_in_small_letters(key: str) -> None:
    assert quantization_config(only(), {key: "GPTQ", "bits": 4}, PACKED)["quant_method"] == "gptq"


def test_plain_weights_have_no_quantization() -> None:
    assert quantization_config(only(), {}, PLAIN) == {}


def test_plugin_recognises_what_names_no_method(site_packages: Any) -> None:
    site_packages.install("five", RECOGNISER)
    assert quantization_config(only("five"), {}, PACKED) == {"quant_method": "five", "bits": 5}
    assert quantization_config(only("five"), {}, PLAIN) == {}


def test_failing_recogniser_is_named_with_its_plugin(site_packages: Any) -> None:
    site_packages.install("five", RECOGNISER)
    with pytest.raises(PluginError, match=r"five/five .* failed to say whether it recognises the checkpoint: KeyError"):
        quantization_config(only("five"), {"broken": True}, PACKED)


def test_packed_tensors_that_nobody_recognises_are_no_plain_weights() -> None:
    assert quantization_config(only(), {}, PACKED) == {"quant_method": "unknown"}
    assert "names no quant_method and no installed plugin recognises its tensors" in refusal(
        {"quant_method": "unknown"}, only()
    )


@pytest.mark.parametrize(("name", "bits"), [("bits", 4), ("w_bit", 3), ("wbits", 2)])
def test_bits_are_found_by_any_of_their_names(name: str, bits: int) -> None:
    assert quantization_need({"quant_method": "x", name: bits}, "cpu", "float32").bits == bits


@pytest.mark.parametrize(
    ("method", "what"), [("exl2", "`octavo quantize` makes GPTQ"), ("gptq_marlin", "tiles of one GPU kernel")]
)
def test_format_of_another_engine_is_told_with_what_to_do(method: str, what: str) -> None:
    assert what in refusal({"quant_method": method}, only())


def test_unheard_of_format_is_told_how_a_plugin_adds_it() -> None:
    assert "QuantizationSpec(formats=('new',), target=...)" in refusal({"quant_method": "new"}, only())


def test_plugin_that_reads_the_format_has_the_last_word_on_why_not(site_packages: Any) -> None:
    site_packages.install("five", RECOGNISER.replace('formats=("five",)', 'formats=("five",), bits=(5,)'))
    message = refusal({"quant_method": "five", "bits": 4}, only("five"))
    assert "supports 5 bits; the checkpoint has 4" in message
    assert "A plugin adds this one" not in message
