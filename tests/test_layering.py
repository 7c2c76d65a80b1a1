"""Imports point one way: which part of the core may know which other, and what a plugin may know of the core."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

import octavo

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "framework" / "octavo"
PLUGIN_PACKAGES = sorted(path.parent for path in ROOT.glob("plugins/*/octavo_*/__init__.py"))

LAYERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # layer: (its modules and packages, the layers below that it may import)
    "data": (
        ("errors", "_lazy", "sampling_params", "outputs", "request", "config", "model_config", "progress", "lora"),
        (),
    ),
    "packing": (("packing",), ()),
    "specs": (("plugins.specs", "plugins.foreign_formats", "plugins.hookspecs"), ("data",)),
    "interfaces": (("interfaces",), ("data", "specs")),
    "plugins": (("plugins",), ("data", "specs", "interfaces")),
    "settings": (("settings", "config_schema"), ("data", "specs", "plugins")),
    "text": (("chat_template", "tokenizer", "detokenizer", "logprob_texts"), ("data", "interfaces")),
    "sources": (("demo_model", "model_source"), ("data",)),
    "nn": (("nn",), ("data", "specs", "interfaces")),
    "runner": (("runner",), ("data", "specs", "interfaces", "nn")),
    "block_pool": (("engine.block_pool",), ("data",)),
    "adapters": (("engine.adapters", "engine.adapter_loader"), ("data", "interfaces")),
    "scheduler": (
        ("engine.scheduler", "engine.kv_waste", "engine.prefix_cache", "engine.waiting_queue"),
        ("data", "interfaces", "block_pool", "adapters"),
    ),
    # not the runner: the engine reaches it through an Executor
    "engine": (("engine",), ("data", "interfaces", "block_pool", "adapters", "scheduler")),
    "processors": (("input_processor", "output_processor"), ("data", "text", "engine")),
    "beam_search": (("beam_search",), ("data", "text", "engine", "processors")),
    "selection": (("selection",), ("data", "specs", "interfaces", "plugins", "sources", "runner")),
    "plan": (("plan",), ("data", "specs", "interfaces", "plugins", "sources", "nn", "runner", "selection")),
    "assembly": (
        ("assemble", "adapter_finder"),
        (
            *("data", "specs", "interfaces", "plugins", "text", "sources", "runner"),
            *("block_pool", "adapters", "scheduler", "engine", "processors", "selection"),
        ),
    ),
    "explanation": (
        ("explanation",),
        ("data", "specs", "interfaces", "plugins", "settings", "selection", "plan"),
    ),
    "entry": (
        ("llm", "async_llm"),
        ("data", "interfaces", "text", "engine", "processors", "beam_search", "settings", "assembly", "explanation"),
    ),
    "bench": (("bench",), ("data", "processors")),
    "perplexity": (("perplexity",), ("data", "entry")),
    "cli": (
        ("cli", "__main__"),
        (
            *("data", "specs", "plugins", "settings", "text", "sources", "plan", "explanation"),
            *("processors", "entry", "bench", "perplexity"),
        ),
    ),
    "builtin": (("builtin",), ("data", "packing", "specs", "interfaces", "nn", "runner")),
    "testing": (
        ("testing",),
        (
            *("data", "specs", "interfaces", "plugins", "nn", "runner", "block_pool", "scheduler", "engine"),
            *("selection", "assembly", "entry"),
        ),
    ),
}
"""A new module of the core has no layer until it is written here: that it needs one is a decision."""

PUBLISHED = (
    "octavo.errors",
    "octavo.interfaces",
    "octavo.model_config",
    "octavo.packing",
    "octavo.plugins.specs",
    "octavo.plugins.triton_probe",
    "octavo.plugins.tuned_data",
    "octavo.request",
    "octavo.sampling_params",
    "octavo.testing",
)
"""What a plugin may import, beside the names of `octavo` itself."""

WITHOUT_TORCH = ("engine.scheduler", "engine.block_pool", "engine.adapters", "request", "config")

HEAVY = ("numpy", "torch", "triton", "transformers", "peft", "fastapi", "pydantic")


# ---------------------------------------------------------------------------------------------- reading imports


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, those inside functions and `if TYPE_CHECKING` included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def defining_module(name: str) -> str:
    """Where a name that `octavo` exports is defined: "octavo.LLM" is "octavo.llm.LLM"."""
    exports = {export: module for module, names in octavo._MODULES.items() for export in names}
    package, _, export = name.partition(".")
    return f"octavo.{exports[export]}.{export}" if package == "octavo" and export in exports else name


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_of(name: str) -> str | None:
    """The layer of "octavo.engine.scheduler.Scheduler" is "scheduler": the longest module that fits says it."""
    fitting = [
        (len(module), layer)
        for layer, (modules, _) in LAYERS.items()
        for module in modules
        if is_in(name, f"octavo.{module}")
    ]
    return max(fitting)[1] if fitting else None


def module_name(file: Path) -> str:
    parts = file.relative_to(CORE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_published(name: str) -> bool:
    return name in ("octavo", "octavo.__version__") or any(is_in(name, published) for published in PUBLISHED)


def core_files() -> list[Path]:
    """Every file of the core but the front door, `octavo/__init__.py`, which leads everywhere and imports nothing."""
    return [file for file in sorted(CORE.rglob("*.py")) if file != CORE / "__init__.py"]


# --------------------------------------------------------------------------------------------------- the rules


def core_faults(module: str, source: str) -> list[str]:
    """Imports of a core module that point the wrong way."""
    layer = layer_of(module)
    if layer is None:
        return [f"{module} has no layer: give it one in tests/test_layering.py"]
    faults = []
    for line, name in imported_names(source):
        target = defining_module(name)
        if target.startswith("."):
            faults.append(f"{module}:{line} imports {name}; write the whole name")
        elif target.startswith("octavo_"):
            faults.append(f"{module}:{line} imports {name}, which is a plugin's")
        elif is_in(target, "octavo") and target != "octavo.__version__":
            below = layer_of(target)
            if below != layer and below not in LAYERS[layer][1]:
                faults.append(f"{module}:{line} ({layer}) imports {name} ({below})")
    return faults


def plugin_faults(package: str, source: str) -> list[str]:
    """Imports of a plugin that reach past the published names, or into another plugin."""
    faults = []
    for line, name in imported_names(source):
        if name.startswith("octavo_") and not is_in(name, package):
            faults.append(f"{package}:{line} imports {name}, another plugin's")
        elif is_in(name, "octavo") and defining_module(name) == name and not is_published(name):
            faults.append(f"{package}:{line} imports {name}, which is not published")
    return faults


# --------------------------------------------------------------------------------------------------- the tests


def test_imports_of_the_core_point_one_way() -> None:
    assert [fault for file in core_files() for fault in core_faults(module_name(file), file.read_text())] == []


def test_layers_have_no_circle() -> None:
    order: list[str] = []
    for layer, (_, below) in LAYERS.items():
        assert set(below) <= set(order), f"{layer} may import a layer that is written after it"
        order.append(layer)


def test_no_layer_but_the_builtins_knows_the_builtins() -> None:
    assert [layer for layer, (_, below) in LAYERS.items() if "builtin" in below] == []


def test_modules_in_the_table_of_layers_exist() -> None:
    modules = [module for modules, _ in LAYERS.values() for module in modules]
    paths = [CORE / module.replace(".", "/") for module in modules]
    assert [path.name for path in paths if not path.is_dir() and not path.with_suffix(".py").exists()] == []


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_module_says_nothing_of_torch(module: str) -> None:
    source = (CORE / f"{module.replace('.', '/')}.py").read_text()
    assert [name for _, name in imported_names(source) if is_in(name, "torch")] == []


def test_scheduler_and_block_pool_import_no_torch_through_others() -> None:
    names = ", ".join(f"octavo.{module}" for module in WITHOUT_TORCH)
    assert heavy_modules_after(f"import {names}", ("torch", "transformers")) == "[]"


def test_plugins_import_published_names_only() -> None:
    faults = [
        fault
        for package in PLUGIN_PACKAGES
        for file in package.rglob("*.py")
        for fault in plugin_faults(package.name, file.read_text())
    ]
    assert faults == []


@pytest.mark.parametrize("package", PLUGIN_PACKAGES, ids=lambda package: package.name)
def test_plugin_s_door_imports_nothing_heavy(package: Path) -> None:
    assert heavy_modules_after(f"import {package.name}", HEAVY, package.parent) == "[]"


def heavy_modules_after(statement: str, heavy: tuple[str, ...], folder: Path | None = None) -> str:
    """Which of `heavy` a fresh process has imported after this statement, printed as a list."""
    code = f"import sys; {statement}; print([name for name in {heavy!r} if name in sys.modules])"
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [folder, CORE.parent] if folder else [CORE.parent])),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    return done.stdout.strip()


# ------------------------------------------------------------------------------------- the rules catch planted faults


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("octavo.request", "import octavo.engine.scheduler"),
        ("octavo.engine.block_pool", "from octavo.engine.scheduler import Scheduler"),
        ("octavo.engine.scheduler", "from octavo.engine import engine"),
        ("octavo.engine.scheduler", "def f():\n    from octavo.runner.batch import PersistentBatch"),
        ("octavo.engine.engine", "if TYPE_CHECKING:\n    from octavo.runner.worker import Worker"),
        ("octavo.interfaces.model", "from octavo.plugins.registry import Registry"),
        ("octavo.assemble", "from octavo.builtin.fcfs import FCFSPolicy"),
        ("octavo.runner.worker", "import octavo_attention_triton.kernel"),
        ("octavo.nn.linear", "from octavo import LLM"),
        ("octavo.nn.linear", "from . import norm"),
        ("octavo.brand_new", ""),
    ],
)
def test_import_that_points_the_wrong_way_is_caught(module: str, source: str) -> None:
    assert len(core_faults(module, source)) == 1


def test_import_that_points_the_right_way_is_left_alone() -> None:
    source = """
        import torch
        from octavo import EngineConfig, __version__
        from octavo.errors import ConfigError
        from octavo.nn.factory import DeviceLayerFactory
        from octavo.runner import batch
    """
    assert core_faults("octavo.runner.worker", dedent(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import octavo_other",
        "from octavo_other.method import Method",
        "from octavo.runner.worker import Worker",
        "from octavo.builtin.llama import Llama",
        "from octavo import plugins",
        "import octavo.plugins.registry",
    ],
)
def test_plugin_that_reaches_past_the_published_names_is_caught(source: str) -> None:
    assert len(plugin_faults("octavo_mine", source)) == 1


def test_plugin_that_keeps_to_the_published_names_is_left_alone() -> None:
    source = """
        import octavo
        import torch
        from octavo import AttentionSpec, __version__, hookimpl
        from octavo.errors import ShapeError
        from octavo.interfaces import AttentionBackend
        from octavo_mine.kernel import launch
    """
    assert plugin_faults("octavo_mine", dedent(source)) == []
