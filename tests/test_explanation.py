"""Explain: every socket with every candidate, why each was taken or not, and where each setting is from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tiny_model import write_tiny_llama

from octavo import LLM, SamplingParams, explain
from octavo.cli import main
from octavo.config_schema import config_schema
from octavo.errors import ConfigError, UnknownNameError
from octavo.explanation import SOCKETS, ExplainedCandidate, Explanation
from octavo.plugins.registry import default_registry

LOTTERY = """
    from octavo import AttentionSpec, SchedulerSpec, hookimpl
    OCTAVO_API = "1.0"

    @hookimpl
    def octavo_components():
        return [
            SchedulerSpec(
                name="lottery",
                summary="Draws who goes next",
                target="dummy_lottery.policy:Lottery",
                options="dummy_lottery.options:LotteryOptions",
                priority=-1,
            ),
            AttentionSpec(
                name="glass",
                summary="Needs hardware nobody has",
                target="dummy_lottery.glass:Glass",
                devices=("crystal",),
                priority=50,
            ),
        ]
"""
OPTIONS = '''
from pydantic import BaseModel, ConfigDict, Field

class LotteryOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    num_tickets: int = Field(default=3, ge=1)
    """tickets of each request"""
'''
POLICY = """
from octavo.interfaces import SchedulerPolicy

class Lottery(SchedulerPolicy):
    def __init__(self, options):
        self.options = options
    def key(self, request, now):
        return 0
    def victim(self, running):
        return running[-1]
    def metrics(self):
        return {"num_tickets": float(self.options.num_tickets)}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "model")


@pytest.fixture
def weightless(folder: Path) -> Path:
    """The same folder without its weights."""
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def lottery(site_packages: Any) -> None:
    package = site_packages.install("lottery", LOTTERY).parent
    (package / "options.py").write_text(OPTIONS)
    (package / "policy.py").write_text(POLICY)


def accepts(schema: dict[str, Any], config: dict[str, Any]) -> bool:
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema).is_valid(config)


def candidate(explanation: Explanation, socket: str, name: str) -> ExplainedCandidate:
    (found,) = [one for one in _socket(explanation, socket).candidates if one.name == name]
    return found


def _socket(explanation: Explanation, name: str) -> Any:
    return next(one for one in explanation.sockets if one.name == name)


def setting(explanation: Explanation, name: str) -> tuple[object, str]:
    (found,) = [one for one in explanation.settings if one.name == name]
    return found.value, str(found.source)


TWO_PHASES = """
    from octavo import AttentionSpec, hookimpl
    OCTAVO_API = "1.0"

    @hookimpl
    def octavo_components():
        common = {
            "target": "octavo.builtin.torch_attention:TorchAttention",
            "features": frozenset({"prefill", "decode"}),
            "kv_layout": "torch-nhd",
        }
        return [
            AttentionSpec(name="flash", priority=100, decode_priority=50, **common),
            AttentionSpec(name="paged", priority=50, decode_priority=100, **common),
        ]
"""


# ------------------------------------------------------------------------------------------------------ the sockets


def test_every_socket_is_explained_before_a_weight_is_read(weightless: Path) -> None:
    explanation = explain(str(weightless))
    assert tuple(socket.name for socket in explanation.sockets) == tuple(
        one
        for one in SOCKETS
        if one not in ("proposer", "quantization.plain", "linear_kernel", "lora", "adapter_resolvers")
    )
    assert explanation.can_run
    assert all(any(one.chosen for one in socket.candidates) for socket in explanation.sockets)


def test_a_candidate_is_told_with_plugin_and_version_and_why_it_was_refused(folder: Path, lottery: None) -> None:
    glass = candidate(explain(str(folder), device="cpu"), "attention.decode", "glass")
    assert (glass.plugin, glass.distribution, glass.version) == ("lottery", "dummy-lottery", "1.2")
    assert not glass.chosen
    assert "runs on crystal; this engine runs on cpu" in glass.reasons


def test_the_best_for_each_phase_is_chosen_and_the_other_told_with_both_priorities(
    folder: Path, site_packages: Any
) -> None:
    site_packages.install("phases", TWO_PHASES)
    explanation = explain(str(folder), device="cpu")
    for socket, best, other in (("attention.prefill", "flash", "paged"), ("attention.decode", "paged", "flash")):
        assert candidate(explanation, socket, best).chosen
        assert [candidate(explanation, socket, name).priority for name in (best, other)] == [100, 50]
    printed = str(explanation).splitlines()
    lines = [line for line in printed if re.match(r"  [ *] phases/", line)]
    assert [line.split()[0] for line in lines] == ["*", "phases/paged", "phases/flash", "*"]
    for line in lines[1:3]:
        assert line.endswith("could serve; its priority is 50, the chosen one's 100")


def test_a_backend_that_cannot_read_an_fp8_cache_says_so_and_is_not_taken(folder: Path, site_packages: Any) -> None:
    site_packages.install("phases", TWO_PHASES)
    explanation = explain(str(folder), device="cpu", kv_cache_dtype="fp8")
    for socket in ("attention.prefill", "attention.decode"):
        for name in ("flash", "paged"):
            assert candidate(explanation, socket, name).reasons == ("does not support fp8_kv_cache",)
        assert candidate(explanation, socket, "torch").chosen
    with pytest.raises(ConfigError, match="'flash' cannot be used: does not support fp8_kv_cache"):
        LLM(str(folder), device="cpu", kv_cache_dtype="fp8", attention="flash")


def test_a_name_that_was_asked_for_is_not_compared_by_priority(folder: Path, site_packages: Any) -> None:
    site_packages.install("phases", TWO_PHASES)
    explanation = explain(str(folder), device="cpu", attention="torch")
    assert candidate(explanation, "attention.decode", "torch").chosen
    lines = [line for line in str(explanation).splitlines() if " phases/" in line]
    assert [line.endswith(" could serve") for line in lines] == [True] * 4


def test_an_explicit_name_that_cannot_serve_is_an_error_and_no_other_is_taken(folder: Path, lottery: None) -> None:
    explanation = explain(str(folder), device="cpu", attention="glass")
    socket = _socket(explanation, "attention.prefill")
    assert "attention backend 'glass' cannot be used: runs on crystal" in socket.error
    assert not any(one.chosen for one in socket.candidates)
    assert not explanation.can_run
    with pytest.raises(ConfigError, match="'glass' cannot be used"):
        LLM(str(folder), device="cpu", attention="glass")


def test_a_misspelt_name_is_explained_beside_everything_else(folder: Path) -> None:
    explanation = explain(str(folder), scheduler="fcfz")
    assert "Did you mean 'fcfs'?" in _socket(explanation, "scheduler").error
    assert _socket(explanation, "model").error is None


def test_too_many_devices_are_refused_by_the_executor_with_both_numbers(folder: Path) -> None:
    explanation = explain(str(folder), tensor_parallel_size=4)
    assert candidate(explanation, "executor", "inline").reasons == (
        "runs a model on 1 device(s); tensor_parallel_size is 4",
    )
    with pytest.raises(ConfigError, match="tensor_parallel_size is 4"):
        LLM(str(folder), tensor_parallel_size=4)


def test_a_plugin_that_did_not_load_is_told(folder: Path, site_packages: Any) -> None:
    site_packages.install("unlucky", "import no_such_library")
    explanation = explain(str(folder))
    assert "no_such_library" in explanation.failed_plugins["unlucky"]
    assert "unlucky: broken" in str(explanation)


def test_an_engine_explains_what_it_was_built_from(folder: Path) -> None:
    with LLM(str(folder), device="cpu", dtype="float32") as llm:
        assert llm.explain() == explain(str(folder), device="cpu", dtype="float32")
        chosen = {one.name: [c.name for c in one.candidates if c.chosen] for one in llm.explain().sockets}
        assert chosen.pop("logits_rules") == [component.name for component in llm.manifest.logits_rules]
        assert chosen == {socket: [component.name] for socket, component in llm.manifest.components.items()}


# ------------------------------------------------------------------------------------------------------ the settings


def test_each_setting_has_its_value_and_source(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "octavo.yaml").write_text("max_num_seqs: 7")
    monkeypatch.setenv("OCTAVO_BLOCK_SIZE", "32")
    explanation = explain(str(folder), config=tmp_path / "octavo.yaml", dtype="float32", device="cpu")
    assert setting(explanation, "max_num_seqs") == (7, f"file {tmp_path / 'octavo.yaml'}")
    assert setting(explanation, "block_size") == (32, "environment OCTAVO_BLOCK_SIZE")
    assert setting(explanation, "dtype") == ("float32", "argument")
    assert setting(explanation, "seed") == (0, "default")
    assert setting(explanation, "max_model_len") == (128, "auto")
    assert setting(explanation, "scheduler") == ("builtin/fcfs", "auto")


def test_options_are_told_with_defaults_filled_in_and_their_source(folder: Path, lottery: None) -> None:
    explanation = explain(str(folder), scheduler={"name": "lottery"})
    assert setting(explanation, "scheduler") == ("lottery/lottery", "argument")
    assert setting(explanation, "scheduler.num_tickets") == (3, "default")
    explanation = explain(str(folder), scheduler={"name": "lottery", "num_tickets": 5})
    assert setting(explanation, "scheduler.num_tickets") == (5, "argument")


def test_sides_of_attention_named_apart_are_told_apart(folder: Path) -> None:
    explanation = explain(str(folder), attention={"prefill": "torch"})
    names = [one.name for one in explanation.settings if one.name.startswith("attention")]
    assert names in (["attention"], ["attention.prefill", "attention.decode"])
    assert next(one for one in explanation.sockets if one.name == "attention.prefill").asked_name == "torch"


# ------------------------------------------------------------------------------- what was installed a minute ago


def test_a_component_installed_a_minute_ago_is_chosen_by_its_name_and_gets_its_options(
    folder: Path, lottery: None
) -> None:
    with LLM(str(folder), dtype="float32", scheduler={"name": "lottery", "num_tickets": 8}) as llm:
        (output,) = llm.generate(["ab"], SamplingParams(max_tokens=2, temperature=0))
        assert len(output.outputs[0].token_ids) == 2
        assert llm.engine.scheduler.policy.metrics() == {"num_tickets": 8.0}


def test_three_ways_lead_to_one_choice(
    folder: Path, lottery: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "octavo.yaml").write_text("scheduler: {name: lottery, num_tickets: 8}\nmax_model_len: 64\n")
    by_argument = explain(str(folder), scheduler={"name": "lottery", "num_tickets": 8}, max_model_len=64)
    by_file = explain(str(folder), config=tmp_path / "octavo.yaml")
    words = ["--scheduler", "lottery", "--scheduler.num-tickets", "8", "--max-model-len", "64", "--json"]
    assert main(["explain", str(folder), *words]) == 0
    by_flag = json.loads(capsys.readouterr().out)
    wanted = [(one.name, one.value) for one in by_argument.settings]
    assert [(one.name, one.value) for one in by_file.settings] == wanted
    assert [[one["name"], one["value"]] for one in by_flag["settings"]] == json.loads(json.dumps(wanted))
    assert by_argument.sockets == by_file.sockets
    assert by_flag["sockets"] == json.loads(json.dumps(by_argument.as_json()))["sockets"]


# ------------------------------------------------------------------------------------------------- at the command line


def test_explain_prints_a_table_and_0(folder: Path, lottery: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(folder), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:6] == ["*", "builtin/torch", "octavo", "0.1.0", "chosen:", "Paged"] for line in lines)
    assert any("lottery/glass" in line and "runs on crystal" in line for line in lines)
    assert any(line.split() == ["device", "cpu", "flag", "--device"] for line in lines)


def test_explain_is_1_when_no_engine_would_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(folder), "--attention", "torhc"]) == 1
    assert "Did you mean 'torch'?" in capsys.readouterr().out


def test_a_wrong_option_is_told_the_nearest_at_the_command_line_as_in_python(
    folder: Path, lottery: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(folder), "--scheduler", "lottery", "--scheduler.num-ticket", "8"]) == 1
    told = "scheduler policy 'lottery' has no option 'num_ticket'. It takes: num_tickets. Did you mean 'num_tickets'?"
    assert told in capsys.readouterr().out
    with pytest.raises(ConfigError) as caught:
        LLM(str(folder), scheduler={"name": "lottery", "num_ticket": 8})
    assert told in str(caught.value)


def test_help_lists_the_options_of_installed_components(lottery: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    assert "options of scheduler 'lottery'" in text
    assert "--scheduler.num-tickets VALUE" in text
    assert "tickets of each request (default 3)" in text


def test_a_plugin_denied_by_a_flag_is_not_imported(
    folder: Path, site_packages: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    site_packages.install("unlucky", "raise RuntimeError('was imported')")
    assert main(["explain", str(folder), "--plugins.deny", "unlucky"]) == 0
    assert "was imported" not in capsys.readouterr().out


def test_config_check_names_what_is_set_and_where(lottery: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "--scheduler", "lottery", "--max-num-seqs", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["max_num_seqs", "flag", "--max-num-seqs"],
        ["scheduler.name", "flag", "--scheduler"],
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scheduler", "lotery"], "Did you mean 'lottery'?"),
        (["--scheduler", "lottery", "--scheduler.num-tickets", "0"], "greater than or equal to 1"),
        (["--scheduler.num-ticket", "4"], "Did you mean 'num_tickets'?"),
        (["--max-num-seqs", "none"], "max_num_seqs='none' (flag --max-num-seqs)"),
    ],
)
def test_config_check_tells_what_is_wrong(
    lottery: None, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["config", "check", *words]) == 1
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- schema


CONFIGS: list[dict[str, Any]] = [
    {},
    {"model": "demo", "max_num_seqs": 4, "dtype": "float32"},
    {"scheduler": "lottery"},
    {"scheduler": {"name": "lottery/lottery", "num_tickets": 4}},
    {"scheduler": {"name": "lottery", "num_tickets": 0}},
    {"scheduler": {"name": "lottery", "num_ticket": 4}},
    {"scheduler": "lotery"},
    {"scheduler": {"name": "fcfs", "num_tickets": 4}},
    {"attention": {"prefill": "torch", "decode": {"name": "torch"}}},
    {"attention": {"prefill": "no_such"}},
    {"max_num_seq": 4},
    {"block_size": 0},
    {"plugins": {"deny": ["x"], "strict": True}},
    {"plugins": {"denied": ["x"]}},
    {"attention": {"name": "torch", "prefill": "torch"}},
    {"attention": {"name": "torch", "num_kv_splits": 8}},
    {"scheduler": {"num_tickets": 4}},
    {"scheduler": {"num_ticket": 4}},
    {"proposer": "none"},
    {"proposer": "no_such"},
    {"proposer": {"name": "none", "model": "demo"}},
    {"logits_rules": ["penalties"]},
    {"logits_rules": ["no_such"]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_schema_accepts_what_check_accepts(
    lottery: None, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    is_valid = main(["config", "check", "--config", str(file)]) == 0
    assert accepts(config_schema(default_registry()), config) is is_valid


def test_the_schema_describes_every_setting_and_option(lottery: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert all("description" in one or "$ref" in one for one in schema["properties"].values())
    options = schema["$defs"]["scheduler:lottery/lottery"]["properties"]
    assert options["num_tickets"]["description"] == "tickets of each request"


def test_an_options_model_that_does_not_import_leaves_the_rest_described(
    lottery: None, site_packages: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (site_packages.path / "dummy_lottery" / "options.py").write_text("import no_such_library")
    schema = config_schema(default_registry())
    assert "no_such_library" in schema["$defs"]["scheduler:lottery/lottery"]["description"]
    assert accepts(schema, {"scheduler": {"name": "lottery", "anything": 1}})


def test_unknown_name_is_the_same_error_in_python(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'fcfs'"):
        LLM(str(folder), scheduler="fcfz")
