"""Settings: a file, the environment, flags and arguments say the same in the same words, and each value's source."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from octavo.cli.engine_options import add_engine_options, engine_settings, split_component_options
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.settings import AUTO, Settings, Source, as_settings, read_settings

Tree = dict[str, Any]


def by_flags(tree: Tree, *more: str) -> Settings:
    """The tree as somebody would type it at the command line."""
    words = [*more]
    for name, value in tree.items():
        option = f"--{name.replace('_', '-')}"
        if name == "lora_modules":
            words += [option, *(f"{one}={path}" for one, path in value.items())]
        elif isinstance(value, dict):
            words += flags_of_component(option, value)
        elif isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-"))
        else:
            words.append(f"{option}={json.dumps(value) if isinstance(value, list) else value}")
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    rest, options = split_component_options(words)
    return engine_settings(parser.parse_args(rest, argparse.Namespace(component_options=options)))


def flags_of_component(option: str, value: Tree) -> list[str]:
    words = []
    for key, inner in value.items():
        if option == "--attention" and key in ("prefill", "decode") and isinstance(inner, dict):
            words += flags_of_component(f"{option}.{key}", inner)
        elif key == "name":
            words.append(f"{option}={inner}" if "." not in option else f"{option}.name={inner}")
        elif option == "--plugins" and not isinstance(inner, bool):
            words.append(f"{option}.{key}={','.join(inner)}")
        else:
            words.append(f"{option}.{key.replace('_', '-')}={json.dumps(inner)}")
    return words


def by_file(tree: Tree, folder: Path) -> Settings:
    file = folder / "octavo.yaml"
    file.write_text(yaml.safe_dump(tree))
    return read_settings({}, file, {})


def by_environment(tree: Tree) -> Settings:
    return read_settings({}, None, dict(variables("OCTAVO", tree)))


def variables(prefix: str, tree: Mapping[str, Any], separator: str = "_") -> list[tuple[str, str]]:
    found = []
    for key, value in tree.items():
        name = f"{prefix}{separator}{key.upper()}"
        nested = isinstance(value, dict) and key != "lora_modules"
        nested = nested and (separator == "_" or key in ("prefill", "decode"))
        if nested:
            found += variables(name, value, "__")
        elif prefix == "OCTAVO_PLUGINS" and not isinstance(value, bool):
            found.append((name, ",".join(value)))
        else:
            is_word = separator == "_" and not isinstance(value, (list, dict))
            found.append((name, str(value) if is_word else json.dumps(value)))
    return found


names = st.from_regex(r"[a-z]{1,6}/?[a-z]{1,6}", fullmatch=True).filter(
    lambda name: yaml.safe_load(name) == name  # not "no", "on", "null": in YAML these are no texts
)
values = st.one_of(
    st.booleans(),
    st.integers(-9, 9**9),
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3)),
    names,
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(names, st.integers(0, 9), max_size=2),
)
options = st.dictionaries(st.from_regex(r"num_[a-z]{1,5}", fullmatch=True), values, max_size=3)
components = st.builds(lambda name, options: {"name": name, **options}, names, options)
trees = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "max_model_len": st.integers(1, 10**6),
        "enable_prefix_caching": st.booleans(),
        "scheduler": components,
        "quantization": components,
        "attention": st.one_of(
            components, st.fixed_dictionaries({}, optional={"prefill": components, "decode": components})
        ),
        "plugins": st.fixed_dictionaries(
            {}, optional={"deny": st.lists(names, min_size=1, max_size=2), "strict": st.booleans()}
        ),
    },
)

paths = st.from_regex(r"/?[a-z]{1,3}[/= ,.-][a-z]{1,3}", fullmatch=True)
trees_with_adapters = st.fixed_dictionaries(
    {"enable_lora": st.just(True)},
    optional={
        "max_loras": st.integers(1, 99),
        "max_lora_rank": st.integers(1, 512),
        "max_cpu_loras": st.integers(99, 999),
        "lora_modules_to_save": st.booleans(),
        "lora_modules": st.dictionaries(names, paths, min_size=1, max_size=3),
        "lora_root": paths,
        "lora": components,
        "adapter_resolvers": st.lists(st.one_of(names, components), max_size=2),
        "logits_rules": st.lists(st.one_of(names, components), max_size=2),
    },
)


# ------------------------------------------------------------------------------------------------ three equal ways


@given(tree=st.one_of(trees, trees_with_adapters))
def test_arguments_flags_file_and_environment_make_one_configuration(
    tree: Tree, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wanted = read_settings(tree, None, {}).config
    assert by_flags(tree).config == wanted
    assert by_file(tree, tmp_path_factory.mktemp("file")).config == wanted
    assert by_environment(tree).config == wanted
    assert EngineConfig.create(**tree) == wanted


def test_a_name_alone_is_short_for_a_component_in_every_way(tmp_path: Path) -> None:
    wanted = EngineConfig.create(attention="torch", quantization="gptq")
    assert read_settings({"attention": "torch", "quantization": "gptq"}, None, {}).config == wanted
    assert by_flags({"attention": "torch", "quantization": "gptq"}).config == wanted
    assert by_file({"attention": "torch", "quantization": "gptq"}, tmp_path).config == wanted
    assert by_environment({"attention": "torch", "quantization": "gptq"}).config == wanted


def test_a_side_of_attention_may_be_a_name_alone(tmp_path: Path) -> None:
    tree = {"attention": {"prefill": "flash", "decode": "paged"}}
    configs = [read_settings(tree, None, {}), by_flags(tree), by_file(tree, tmp_path), by_environment(tree)]
    assert [[side.name for side in one.config.attention.wishes] for one in configs] == [["flash", "paged"]] * 4


def test_names_in_a_file_may_be_written_with_dashes(tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("max-model-len: 64\nattention: {name: triton, num-kv-splits: 8}\n")
    config = read_settings({}, file, {}).config
    assert (config.max_model_len, config.attention.options) == (64, {"num_kv_splits": 8})


def test_keys_of_an_option_that_is_itself_a_mapping_are_left_as_they_are() -> None:
    tree = {"scheduler": {"name": "fair", "tenant_weights": {"team-a": 2.0}}}
    assert read_settings(tree, None, {}).config.scheduler.options == {"tenant_weights": {"team-a": 2.0}}


def test_adapters_may_be_given_in_several_flags_and_as_vllm_s_json(tmp_path: Path) -> None:
    more = ["--lora-modules", "a=/x", '{"name": "b", "path": "org/y"}', "--lora-modules", "c=z=1"]
    config = by_flags({"enable_lora": True}, *more).config
    assert config.lora_modules == {"a": "/x", "b": "org/y", "c": "z=1"}


def test_adapters_in_a_variable_are_words_as_in_flags() -> None:
    settings = read_settings({}, None, {"OCTAVO_ENABLE_LORA": "1", "OCTAVO_LORA_MODULES": "a=/x  b=org/y"})
    assert settings.config.lora_modules == {"a": "/x", "b": "org/y"}
    assert str(settings.source("lora_modules")) == "environment OCTAVO_LORA_MODULES"


def test_adapters_in_a_file_may_be_listed(tmp_path: Path) -> None:
    modules = ["a=/x", {"name": "b", "path": "org/y"}]
    assert by_file({"enable_lora": True, "lora_modules": modules}, tmp_path).config.lora_modules == {
        "a": "/x",
        "b": "org/y",
    }


def test_a_variable_for_one_adapter_of_several_is_refused() -> None:
    with pytest.raises(ConfigError, match="OCTAVO_LORA_MODULES__A is no setting: give OCTAVO_LORA_MODULES as a whole"):
        read_settings({}, None, {"OCTAVO_ENABLE_LORA": "1", "OCTAVO_LORA_MODULES__A": "/x"})


def test_a_word_after_the_adapters_that_is_none_is_named_with_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"\(flag --lora-modules\): 'demo' names no adapter: write name=path"):
        by_flags({"enable_lora": True}, "--lora-modules", "a=/x", "demo")


def test_a_path_that_looks_like_a_list_is_a_path() -> None:
    assert by_flags({"enable_lora": True, "lora_root": "[mine]"}).config.lora_root == "[mine]"


# ------------------------------------------------------------------------------------------------------ precedence


def test_what_is_given_goes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("{dtype: float16, block_size: 32, max_num_seqs: 8}")
    environ = {"OCTAVO_DTYPE": "float32", "OCTAVO_BLOCK_SIZE": "64"}
    settings = read_settings({"dtype": "bfloat16"}, file, environ)
    assert (settings.config.dtype, settings.config.block_size, settings.config.max_num_seqs) == ("bfloat16", 64, 8)
    assert settings.source("dtype") == Source("argument")
    assert settings.source("block_size") == Source("environment", "OCTAVO_BLOCK_SIZE")
    assert settings.source("max_num_seqs") == Source("file", str(file))
    assert settings.source("seed") == Source("default")


def test_an_option_is_added_to_the_component_named_further_down(tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("attention: {name: triton, num_kv_splits: 4, num_stages: 2}")
    settings = read_settings({"attention": {"num_kv_splits": 8}}, file, {})
    assert settings.config.attention.name == "triton"
    assert settings.config.attention.options == {"num_kv_splits": 8, "num_stages": 2}
    assert str(settings.source("attention.num_stages")) == f"file {file}"


def test_another_component_starts_without_the_options_of_the_one_it_replaces(tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("attention: {name: triton, num_kv_splits: 4, prefill: flash}")
    settings = read_settings({"attention": "torch"}, file, {})
    assert settings.config == EngineConfig.create(attention="torch")
    assert "attention.num_kv_splits" not in settings.sources


def test_an_option_given_without_a_name_stays_when_a_name_is_given_over_it() -> None:
    settings = read_settings({"attention": "triton"}, None, {"OCTAVO_ATTENTION__NUM_KV_SPLITS": "8"})
    assert (settings.config.attention.name, settings.config.attention.options) == ("triton", {"num_kv_splits": 8})


def test_a_side_that_is_null_falls_to_the_name_beside_it(tmp_path: Path) -> None:
    (tmp_path / "octavo.yaml").write_text("attention: {name: torch, prefill: null}")
    wishes = read_settings({}, tmp_path / "octavo.yaml", {}).config.attention.wishes
    assert [wish.name for wish in wishes] == ["torch", "torch"]


def test_options_of_no_proposer_are_refused() -> None:
    with pytest.raises(ConfigError, match="model was given, but no proposer"):
        read_settings({"proposer": {"model": "demo"}}, None, {"OCTAVO_PROPOSER": "none"})


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("max_num_seqs: 3")
    assert read_settings({}, None, {"OCTAVO_CONFIG": str(file)}).config.max_num_seqs == 3


def test_flags_name_themselves_as_the_source() -> None:
    settings = by_flags({"max_num_seqs": 3, "attention": {"name": "triton", "num_kv_splits": 8}})
    assert str(settings.source("max_num_seqs")) == "flag --max-num-seqs"
    assert str(settings.source("attention.name")) == "flag --attention"
    assert str(settings.source("attention.num_kv_splits")) == "flag --attention.num-kv-splits"


def test_a_short_variable_sets_which_plugins_may_load() -> None:
    environ = {"OCTAVO_PLUGINS": "a,b", "OCTAVO_DISABLE_PLUGINS": "c-*", "OCTAVO_STRICT_PLUGINS": "1"}
    plugins = read_settings({}, None, environ).config.plugins
    assert (plugins.allow, plugins.deny, plugins.strict) == (("a", "b"), ("c-*",), True)


def test_settings_already_read_are_taken_as_they_are() -> None:
    settings = read_settings({"seed": 5}, None, {})
    assert as_settings(None, settings, {}) is settings
    with pytest.raises(ConfigError, match="config holds settings already read; model, dtype cannot be given beside it"):
        as_settings("demo", settings, {"dtype": "float32"})


def test_auto_is_a_source_of_its_own() -> None:
    assert AUTO.kind == "auto"


# ---------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_seq: 4", "There is no setting 'max_num_seq' (file {file}). Did you mean 'max_num_seqs'?"),
        ("block_size: 0", "block_size=0 (file {file}): Input should be greater than or equal to 1"),
        ("plugins: {denied: x}", "There is no setting 'plugins.denied' (file {file}). Did you mean 'plugins.deny'?"),
        ("attention: 5", "attention=5 (file {file})"),
        ("- a\n- b", "must hold settings by name, as in `max_model_len: 4096`; found a list"),
        ("a: [1", "The configuration file {file} is not YAML"),
    ],
)
def test_a_fault_in_a_file_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings({}, file, {})
    assert message.format(file=file) in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: .*No such file"):
        read_settings({}, tmp_path / "none.yaml", {})


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "octavo.yaml").write_text("# nothing yet\n")
    assert read_settings({}, tmp_path / "octavo.yaml", {}).config == EngineConfig.create()


def test_a_fault_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"block_size='many' \(environment OCTAVO_BLOCK_SIZE\)"):
        read_settings({}, None, {"OCTAVO_BLOCK_SIZE": "many"})


def test_a_misspelt_variable_is_warned_of_and_a_foreign_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_settings({}, None, {"OCTAVO_MAX_MODEL_LEM": "5", "OCTAVO_GOLDEN_DIR": "x", "MAX_MODEL_LEM": "5"})
    assert [record.getMessage() for record in caplog.records] == [
        "The environment variable OCTAVO_MAX_MODEL_LEM is no setting and is ignored; did you mean OCTAVO_MAX_MODEL_LEN?"
    ]


@pytest.mark.parametrize("words", [["--attention.num-kv-splits"], ["--attention.num-kv-splits", "--model=x"]])
def test_a_component_s_option_without_a_value_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--attention\.num-kv-splits needs a value"):
        split_component_options(words)


def test_what_follows_two_dashes_is_left_alone() -> None:
    assert split_component_options(["--", "--attention.x", "1"]) == (["--", "--attention.x", "1"], {})
