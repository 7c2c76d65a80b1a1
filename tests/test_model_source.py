"""resolve_model: what a user may type for a model, and what it says when there is no such thing."""

from __future__ import annotations

import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from tiny_model import token_ids_of, write_tiny_llama

from octavo import LLM, EngineConfig, explain, model_source
from octavo.errors import CheckpointError, ModelNotFoundError
from octavo.model_source import resolve_model
from octavo.plan import make_plan


class FakeHub:
    """Stands for `snapshot_download`: one repository with a config, weights in several formats and a GGUF file."""

    files = (
        *("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "model.gguf", "notes.md"),
        *("consolidated.safetensors", "original/params.json", "onnx/model.safetensors"),
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, str | None]] = []
        self.contents: dict[str, bytes] = {}

    def __call__(
        self, repository: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        self.calls.append((repository, revision))
        for name in (*self.files, *self.contents):
            if _matches(name, allow_patterns) and not _matches(name, ignore_patterns or []):
                (self.folder / name).parent.mkdir(exist_ok=True)
                (self.folder / name).write_bytes(self.contents.get(name, b""))
        return str(self.folder)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """Without the response that the hub's errors want at construction: nothing here reads it."""
    return kind.__new__(kind, "the server's words")


# ------------------------------------------------------------------------------------------- on this machine


def test_folder_and_file_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("x.gguf") == Path("x.gguf")


def test_home_is_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"


def test_demo_is_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "demo_model_path", lambda: tmp_path / "demo.gguf")
    assert resolve_model("demo") == tmp_path / "demo.gguf"


@pytest.mark.parametrize("model", ["./gone", "/gone/away", "~/gone", "../gone.gguf", "gone.gguf"])
def test_path_that_is_gone_is_not_looked_for_on_the_hub(model: str, hub: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match=r"There is no file or folder /.*gone"):
        resolve_model(model)
    assert not hub.calls


@pytest.mark.parametrize("model", ["", "gone", "a/b/c", "org/na me", "org/model/weights.bin"])
def test_name_that_can_be_nothing_says_what_can_be_given(
    model: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelNotFoundError, match=r'no Hugging Face id \(those are "org/name"\).*\'demo\''):
        resolve_model(model)
    assert not hub.calls


# ------------------------------------------------------------------------------------------- on the hub


def test_hugging_face_id_is_fetched_without_pickles(hub: FakeHub) -> None:
    assert resolve_model("org/model", "v2") == hub.folder
    assert sorted(path.name for path in hub.folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert hub.calls == [("org/model", "v2")]


def test_without_weights_only_what_tells_sizes_and_text_is_fetched(hub: FakeHub) -> None:
    assert resolve_model("org/model", weights=False) == hub.folder
    assert sorted(path.name for path in hub.folder.iterdir()) == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    "ask",
    [lambda name: explain(name, dtype="float32"), lambda name: make_plan(EngineConfig(model=name, dtype="float32"))],
)
def test_plan_and_explain_fetch_no_weights(
    ask: Callable[[str], object], hub: FakeHub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tiny = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    hub.contents = {path.name: path.read_bytes() for path in tiny.iterdir()}
    ask("org/model")
    assert hub.calls == [("org/model", None)]
    assert sorted(path.name for path in hub.folder.iterdir()) == sorted(
        path.name for path in tiny.iterdir() if path.suffix == ".json"
    )


def test_a_tokenizer_is_fetched_from_another_model_without_its_weights(
    hub: FakeHub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tiny = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    hub.contents = {path.name: path.read_bytes() for path in tiny.iterdir()}
    with LLM(str(tiny), tokenizer="org/model", dtype="float32") as llm:
        assert llm.get_tokenizer().encode("a") == [0, *token_ids_of("a")]
    assert not (hub.folder / "model.safetensors").exists()


def test_a_folder_with_a_tokenizer_alone_can_be_the_tokenizer(tmp_path: Path) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny / name).rename(tokenizer / name)
    with LLM(str(tiny), tokenizer=str(tokenizer), dtype="float32") as llm:
        assert llm.get_tokenizer().encode("a") == [0, *token_ids_of("a")]
    with pytest.raises(CheckpointError, match=r"has no config\.json; without it the model's sizes are unknown"):
        LLM(str(tokenizer))


def test_file_in_a_repository_is_fetched_alone(hub: FakeHub) -> None:
    assert resolve_model("org/model/model.gguf") == hub.folder / "model.gguf"
    assert [path.name for path in hub.folder.iterdir()] == ["model.gguf"]


def test_file_that_a_repository_lacks_is_named(hub: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match=r"'org/model' has no file 'other\.gguf'"):
        resolve_model("org/model/other.gguf")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (http_error(errors.RepositoryNotFoundError), "does not exist, or is private.*hf auth login"),
        (http_error(errors.GatedRepoError), "is gated: accept its terms"),
        (http_error(errors.RevisionNotFoundError), "at revision 'v9' has no such branch, tag or commit"),
        (errors.HFValidationError("too long"), r"is not a valid id \(too long\)"),
        (errors.LocalEntryNotFoundError("No route\nto host"), r"could not be fetched \(No route\): connect to"),
        (RuntimeError("proxy"), r"could not be fetched \(proxy\)"),
    ],
)
def test_reason_of_the_hub_is_told(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(
        ModelNotFoundError, match=rf"no file or folder /.*org/model, and .*'org/model'.*{reason}"
    ) as caught:
        resolve_model("org/model", "v9")
    assert caught.value.__cause__ is error


def test_offline_mode_is_told_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match=f"HF_HUB_OFFLINE is set.*{tmp_path}"):
        resolve_model("org/model")
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        resolve_model("org/model/model.gguf")
    assert time.monotonic() - start < 5


def test_what_offline_mode_finds_in_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    repository = tmp_path / "models--org--model"
    snapshot = repository / "snapshots" / commit
    (snapshot).mkdir(parents=True)
    (snapshot / "config.json").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve_model("org/model") == snapshot
