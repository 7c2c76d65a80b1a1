#!/usr/bin/env python3
"""Print the plugin API: every published signature, field, feature and KV layout, one fact a line.

    python scripts/plugin_api.py > tests/golden/plugin-api-1.0.txt

Read from the source, so it is the same with every Python and torch; only the KV layouts are asked of the backends.
tests/test_plugin_api.py compares it with the golden file of the version in `octavo.plugins.hookspecs.PLUGIN_API`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from octavo.builtin import octavo_components
from octavo.plugins.specs import SPEC_KINDS, AttentionNeed, AttentionSpec, load_target

FRAMEWORK = Path(__file__).resolve().parent.parent / "framework" / "octavo"

SIGNATURES = (
    "octavo.errors",
    "octavo.interfaces",
    "octavo.model_config",
    "octavo.packing",
    "octavo.plugins.specs",
    "octavo.plugins.triton_probe",
    "octavo.plugins.tuned_data",
    "octavo.request",
    "octavo.sampling_params",
)
NAMES_ONLY = ("octavo", "octavo.testing")
"""Published modules of which no more than the names is part of the plugin API."""

HOOKS = "octavo.plugins.hookspecs"


def main() -> None:
    print("\n".join(dump()))


def dump(framework: Path = FRAMEWORK) -> list[str]:
    """Every fact, sorted."""
    return sorted({*source_facts(framework), *kind_facts(), *layout_facts()})


def breaking_changes(older: Iterable[str], newer: Iterable[str]) -> list[str]:
    """Why `newer` is not `older` with optional things added: what went, and what is new and must be given."""
    before, after = set(older), set(newer)
    known = {part for line in before for part in _parts(_subject(line))}
    must = [line for line in after - before if line.endswith((", required", ", abstract")) and _owner(line) in known]
    return sorted([f"gone: {line}" for line in before - after] + [f"new, and not optional: {line}" for line in must])


def _subject(line: str) -> str:
    """What a fact is about: the dotted name it begins with."""
    return line.split(" ")[0].rstrip(":,")


def _parts(subject: str) -> list[str]:
    """The name and everything it is in: "a.b.c" is in "a.b", and that in "a"."""
    words = subject.split(".")
    return [".".join(words[: end + 1]) for end in range(len(words))]


def _owner(line: str) -> str:
    """What grows by a fact: a function by an argument, a class by a field or a method."""
    subject = _subject(line)
    return subject if " argument" in line.partition(":")[0] else subject.rpartition(".")[0]


# -------------------------------------------------------------------------------------------------- the source


def source_facts(framework: Path) -> Iterator[str]:
    """Names, signatures, fields and constants of the published modules."""
    for module in NAMES_ONLY:
        for name in _lazy_names(_tree(framework, module)):
            yield f"{module}.{name}"
    for module in SIGNATURES:
        tree = _tree(framework, module)
        for name in _lazy_names(tree):
            yield f"{module}.{name}"
        for inner in [module, *_submodules(framework, module)]:
            yield from _module_facts(inner, _tree(framework, inner))
    for node in _tree(framework, HOOKS).body:
        if isinstance(node, ast.ClassDef) and node.name == "Hooks":
            yield from _class_facts(f"{HOOKS}.Hooks", node)


def _tree(framework: Path, module: str) -> ast.Module:
    path = framework.joinpath(*module.split(".")[1:])
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def _submodules(framework: Path, module: str) -> list[str]:
    folder = framework.joinpath(*module.split(".")[1:])
    return [f"{module}.{file.stem}" for file in sorted(folder.glob("*.py")) if file.stem != "__init__"]


def _lazy_names(tree: ast.Module) -> list[str]:
    """The names a package gives by `_MODULES`; none of a module without it."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULES":
            modules: dict[str, tuple[str, ...]] = ast.literal_eval(node.value)
            return [name for names in modules.values() for name in names]
    return []


def _module_facts(module: str, tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        match node:
            case ast.ClassDef(name=name) if _is_public(name):
                yield from _class_facts(f"{module}.{name}", node)
            case ast.FunctionDef(name=name) if _is_public(name):
                yield from _function_facts(f"{module}.{name}", node, is_method=False)
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if _is_public(name):
                yield f"{module}.{name} = {ast.unparse(value)}"
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation) if _is_public(name):
                yield f"{module}.{name}: {ast.unparse(annotation)}"


def _class_facts(name: str, node: ast.ClassDef) -> Iterator[str]:
    bases = [ast.unparse(base) for base in node.bases]
    yield f"{name} is a class"
    yield from (f"{name} extends {base}" for base in bases)
    yield from (f"{name} is marked @{ast.unparse(decorator)}" for decorator in node.decorator_list)
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    for member in node.body:
        match member:
            case ast.AnnAssign(target=ast.Name(id=field), annotation=annotation, value=value) if _is_public(field):
                yield f"{name}.{field}: {_with_default(ast.unparse(annotation), value, is_dataclass)}"
            case ast.Assign(targets=[ast.Name(id=attribute)], value=value) if _is_public(attribute):
                yield f"{name}.{attribute} = {ast.unparse(value)}"
            case ast.FunctionDef(name=method) if _is_public(method) or method in ("__init__", "__call__"):
                yield from _function_facts(f"{name}.{method}", member, is_method=True, is_protocol="Protocol" in bases)


def _function_facts(name: str, node: ast.FunctionDef, *, is_method: bool, is_protocol: bool = False) -> Iterator[str]:
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    returns = ast.unparse(node.returns) if node.returns else "None"
    if "property" in decorators:
        yield f"{name} -> {returns}, a property"
        return
    yield f"{name} returns {returns}"
    if "abstractmethod" in decorators or is_protocol:
        yield f"{name}, abstract"
    if "classmethod" in decorators:
        yield f"{name}, a class method"
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    first = int(is_method)  # self or cls
    for position, (argument, default) in enumerate(zip(positional[first:], defaults[first:], strict=True), 1):
        yield f"{name} argument {position}: {_argument(argument, default)}"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield f"{name} keyword argument: {_argument(argument, default)}"
    for stars, rest in (("*", arguments.vararg), ("**", arguments.kwarg)):
        if rest is not None:
            yield f"{name} takes {stars}{rest.arg}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = ast.unparse(argument.annotation) if argument.annotation else "object"
    return f"{argument.arg}: {_with_default(annotation, default, True)}"


def _with_default(annotation: str, default: ast.expr | None, is_required_without: bool) -> str:
    if annotation.startswith("ClassVar"):  # its value may grow: the kinds' features are facts of their own
        return annotation
    if default is not None:
        return f"{annotation} = {ast.unparse(default)}"
    return f"{annotation}, required" if is_required_without else annotation


def _is_public(name: str) -> bool:
    return not name.startswith("_")


# ------------------------------------------------------------------------------------------- kinds and KV layouts


def kind_facts() -> Iterator[str]:
    """Every kind of component and the features a need may ask of it."""
    for kind, spec in SPEC_KINDS.items():
        yield f"kind {kind}: {spec.__name__}"
        yield from (f"kind {kind} feature: {feature}" for feature in spec.known_features)


def layout_facts() -> Iterator[str]:
    """Every buffer of the KV layouts that the built-in backends publish, its shape in the words of a need."""
    words = {5: "block_size", 7: "num_kv_heads", 11: "head_dim"}
    for spec in octavo_components():
        for dtype in ("float32", "bfloat16") if isinstance(spec, AttentionSpec) and spec.kv_layout else ():
            need = AttentionNeed(dtype=dtype, device="cpu", num_heads=14, num_kv_heads=7, head_dim=11, block_size=5)
            layout = load_target(spec.target)(need).kv_layout()
            for position, buffer in enumerate(layout.buffers):
                shape = ", ".join(["num_blocks", *(words.get(size, str(size)) for size in buffer.block_shape)])
                of_dtype = str(buffer.dtype).removeprefix("torch.")
                yield f"KV layout {layout.name} of {dtype}, buffer {position}: {buffer.name} [{shape}] {of_dtype}"


if __name__ == "__main__":
    main()
