"""What explain says of adapters: what serves and finds them, where it is enabled; and what their settings may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tiny_model import write_tiny_llama

from octavo import explain
from octavo.cli import main
from octavo.config_schema import config_schema
from octavo.explanation import ExplainedSocket, Explanation
from octavo.plugins.registry import default_registry

ADAPTERS = """
    from octavo import AdapterResolverSpec, LoraSpec, hookimpl
    OCTAVO_API = "1.0"

    @hookimpl
    def octavo_components():
        return [
            LoraSpec(name="abacus", summary="Adds beads", target="dummy_adapters.abacus:Abacus", priority=1000),
            LoraSpec(name="prism", target="dummy_adapters.prism:Prism", devices=("crystal",)),
            AdapterResolverSpec(
                name="shelf",
                summary="Looks on the shelf",
                target="dummy_adapters.shelf:Shelf",
                options="dummy_adapters.options:ShelfOptions",
            ),
        ]
"""
SHELF_OPTIONS = """
from pydantic import BaseModel, ConfigDict, Field

class ShelfOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    height: int = Field(default=3, ge=1)
"""


@pytest.fixture
def adapters(site_packages: Any) -> None:
    package = site_packages.install("adapters", ADAPTERS).parent
    (package / "options.py").write_text(SHELF_OPTIONS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder without its weights."""
    folder = write_tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return folder


def socket(explanation: Explanation, name: str) -> ExplainedSocket:
    return next(one for one in explanation.sockets if one.name == name)


def chosen(explanation: Explanation, name: str) -> list[str]:
    return [one.name for one in socket(explanation, name).candidates if one.chosen]


def setting(explanation: Explanation, name: str) -> tuple[object, str]:
    (found,) = [one for one in explanation.settings if one.name == name]
    return found.value, str(found.source)


def test_without_lora_nothing_is_said_of_what_serves_adapters(model: Path, adapters: None) -> None:
    explanation = explain(str(model), device="cpu")
    assert not {socket.name for socket in explanation.sockets} & {"lora", "adapter_resolvers"}
    assert setting(explanation, "lora") == (None, "default")
    assert setting(explanation, "adapter_resolvers") == ([], "default")


def test_what_serves_adapters_is_explained_where_it_is_enabled(model: Path, adapters: None) -> None:
    explanation = explain(str(model), device="cpu", enable_lora=True)
    assert chosen(explanation, "lora") == ["abacus"]
    (prism,) = [one for one in socket(explanation, "lora").candidates if one.name == "prism"]
    assert prism.reasons == ("runs on crystal; this engine runs on cpu",)
    assert chosen(explanation, "adapter_resolvers") == []
    text = str(explanation)
    assert "\nLoRA backend (lora)\n" in text
    assert "\nadapter resolver (adapter_resolvers)\n" in text
    assert setting(explanation, "lora") == ("adapters/abacus", "auto")
    assert setting(explanation, "max_cpu_loras") == (32, "auto")


def test_resolvers_are_explained_with_what_asked_for_them(model: Path, adapters: None) -> None:
    explanation = explain(str(model), enable_lora=True, adapter_resolvers=["shelf"], lora_modules={"sql": "/x"})
    assert chosen(explanation, "adapter_resolvers") == ["shelf"]
    assert socket(explanation, "adapter_resolvers").asked_name == "shelf"
    assert setting(explanation, "adapter_resolvers") == (["adapters/shelf"], "argument")
    assert any(line.split() == ["lora_modules", "sql=/x", "argument"] for line in str(explanation).splitlines())
    assert json.loads(json.dumps(explanation.as_json()))["settings"]


def test_a_resolver_that_is_not_there_is_explained(model: Path, adapters: None) -> None:
    explanation = explain(str(model), enable_lora=True, adapter_resolvers=["shell"])
    assert "Did you mean 'shelf'?" in str(socket(explanation, "adapter_resolvers").error)
    assert not explanation.can_run


CONFIGS: list[dict[str, Any]] = [
    {"lora": "abacus"},
    {"lora": {"name": "adapters/abacus"}},
    {"lora": {"name": "abacus", "beads": 10}},
    {"lora": "no_such"},
    {"enable_lora": True, "lora_modules": {"sql": "path"}, "max_loras": 2},
    {"enable_lora": True, "lora_modules": {"sql": 5}},
    {"enable_lora": True, "lora_modules": ["sql=path", {"name": "law", "path": "org/law"}]},
    {"enable_lora": True, "lora_modules": [{"name": "law"}]},
    {"enable_lora": True, "lora_modules": ["sql"]},
    {"enable_lora": True, "adapter_resolvers": ["shelf", {"name": "adapters/shelf", "height": 5}]},
    {"enable_lora": True, "adapter_resolvers": [{"name": "shelf", "height": 0}]},
    {"enable_lora": True, "adapter_resolvers": ["no_such"]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_schema_accepts_what_check_accepts(adapters: None, config: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    is_valid = main(["config", "check", "--config", str(file)]) == 0
    assert Draft202012Validator(config_schema(default_registry())).is_valid(config) is is_valid
