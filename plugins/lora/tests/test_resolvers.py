"""The resolvers: a name leads below the root or nowhere, and only to Hugging Face ids that are allowed."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import explain
from octavo.cli import main
from octavo.errors import AdapterError, ConfigError, OctavoError
from octavo.plugins.registry import default_registry
from octavo.plugins.specs import Need
from octavo_lora.hub import CONFIG_FILE, WEIGHTS_FILE, adapter_folder
from octavo_lora.options import FilesystemOptions, HuggingFaceOptions
from octavo_lora.resolvers import FilesystemResolver, HuggingFaceResolver


def write_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text("{}")
    (folder / WEIGHTS_FILE).touch()
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two adapters, folders that are none and links of every kind; beside it what is not to be served."""
    parent = tmp_path_factory.mktemp("tree")
    write_adapter(parent / "outside")
    write_adapter(parent / "root-of-others" / "theirs")
    root = parent / "root"
    write_adapter(root / "sql")
    write_adapter(root / "sq l")
    write_adapter(root / ".hidden")
    write_adapter(root / "team" / "law-v1.5")
    (root / "team" / "README.md").touch()
    (root / "empty").mkdir()
    (root / "inner-link").symlink_to("team/law-v1.5")
    (root / "outer-link").symlink_to(parent / "outside")
    (root / "up").symlink_to("..")
    (root / "circle").symlink_to("circle")
    half = write_adapter(root / "half")
    (half / WEIGHTS_FILE).unlink()
    (half / WEIGHTS_FILE).symlink_to(parent / "outside" / WEIGHTS_FILE)
    folder_for_config = root / "folder-for-config" / CONFIG_FILE
    folder_for_config.mkdir(parents=True)
    (parent / "link-to-root").symlink_to("root")
    return root


@pytest.fixture
def resolver(tree: Path) -> FilesystemResolver:
    return FilesystemResolver(FilesystemOptions(root=str(tree)))


class FakeHub:
    """Stands for `snapshot_download`: repositories as folders, or what goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, list[str]]] = []
        self.error: Exception | None = None

    def __call__(self, repository: str, *, allow_patterns: list[str]) -> str:
        self.asked.append((repository, allow_patterns))
        if self.error is not None:
            raise self.error
        return str(self.folder / repository)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def allowing(*patterns: str) -> HuggingFaceResolver:
    return HuggingFaceResolver(HuggingFaceOptions(allowed=patterns))


# ---------------------------------------------------------------------------------------------- below a root


@pytest.mark.parametrize("name", ["sql", "team/law-v1.5"])
def test_a_name_is_a_folder_below_the_root(resolver: FilesystemResolver, tree: Path, name: str) -> None:
    assert resolver.resolve("demo", name) == os.path.realpath(tree / name)


def test_a_link_that_stays_below_the_root_is_followed_to_its_end(resolver: FilesystemResolver, tree: Path) -> None:
    assert resolver.resolve("demo", "inner-link") == os.path.realpath(tree / "team" / "law-v1.5")


def test_the_root_itself_may_be_a_link(tree: Path) -> None:
    resolver = FilesystemResolver(FilesystemOptions(root=str(tree.parent / "link-to-root")))
    assert resolver.resolve("demo", "sql") == os.path.realpath(tree / "sql")


def test_an_adapter_that_comes_while_the_engine_runs_is_found(tmp_path: Path) -> None:
    resolver = FilesystemResolver(FilesystemOptions(root=str(tmp_path)))
    assert resolver.resolve("demo", "late") is None
    write_adapter(tmp_path / "late")
    assert resolver.resolve("demo", "late") == os.path.realpath(tmp_path / "late")


@pytest.mark.parametrize("name", ["gone", "empty", "team", "team/README.md", "sql/gone", "folder-for-config", "sq l"])
def test_what_is_no_adapter_is_not_known(resolver: FilesystemResolver, name: str) -> None:
    assert resolver.resolve("demo", name) is None


@pytest.mark.parametrize("name", ["a" * 256, "sql/" * 100, "\ud800", "sql\n", ".hidden", "-x", "~root", "xy:z"])
def test_what_can_be_no_name_here_is_not_known(resolver: FilesystemResolver, name: str) -> None:
    assert resolver.resolve("demo", name) is None


@pytest.mark.parametrize(
    "name",
    [
        *("", "/", "//", "/etc", "..", "../outside", "team/../../outside", "sql/..", "sql/../sql", "root/../.."),
        *(".", "./sql", "sql/.", "team//law-v1.5", "sql/", "..\\outside", "team\\law-v1.5", "sql\0", "\0"),
        *("C:", "c:/outside", "C:\\outside"),
    ],
)
def test_a_name_that_tries_to_leave_is_refused(resolver: FilesystemResolver, name: str) -> None:
    with pytest.raises(AdapterError, match="leads out of the folder of adapters"):
        resolver.resolve("demo", name)


@pytest.mark.parametrize("name", ["outer-link", "up/outside", "up/root-of-others/theirs", "up"])
def test_a_link_that_leaves_the_root_is_refused(resolver: FilesystemResolver, name: str) -> None:
    with pytest.raises(AdapterError, match="leads out of the folder of adapters"):
        resolver.resolve("demo", name)


def test_a_file_of_an_adapter_that_links_out_of_the_root_is_refused(resolver: FilesystemResolver) -> None:
    with pytest.raises(AdapterError, match="'half' cannot be an adapter's name: it leads out"):
        resolver.resolve("demo", "half")


@pytest.mark.parametrize("name", ["circle", "circle/sql", "é" * 200])
def test_what_the_system_cannot_look_up_is_refused(resolver: FilesystemResolver, name: str) -> None:
    with pytest.raises(AdapterError, match="cannot be read"):
        resolver.resolve("demo", name)


@pytest.mark.parametrize("name", ["../outside", "outer-link", "half", "circle", "/etc/passwd"])
def test_a_refusal_tells_nothing_of_this_machine_s_paths(resolver: FilesystemResolver, tree: Path, name: str) -> None:
    with pytest.raises(AdapterError) as caught:
        resolver.resolve("demo", name)
    told = str(caught.value).replace(repr(name), "")
    assert not any(part in told for part in (str(tree), tree.name + "/", "outside", "/etc"))


def test_a_root_that_is_no_folder_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone', where adapters are looked up by name, is no folder"):
        FilesystemResolver(FilesystemOptions(root=str(tmp_path / "gone")))


_PIECES = st.sampled_from(
    [
        *("..", ".", "", "/", "//", "\\", "\0", "~", "C:", "sql", "team", "law-v1.5", "up", "outer-link", "inner-link"),
        *("half", "circle", "outside", "root", "root-of-others", "theirs", "%2e%2e", "\u2025", "\uff0e\uff0e", " "),
    ]
)


@settings(max_examples=500)
@given(
    name=st.one_of(
        st.lists(_PIECES, max_size=6).map("/".join),
        st.lists(_PIECES, max_size=6).map("".join),
        st.lists(st.one_of(_PIECES, st.text(max_size=4)), max_size=6).map("/".join),
        st.text(max_size=300),
    )
)
def test_no_name_ever_leads_out_of_the_root(tree: Path, name: str) -> None:
    resolver = FilesystemResolver(FilesystemOptions(root=str(tree)))
    try:
        path = resolver.resolve("demo", name)
    except AdapterError:
        return
    assert path in (None, *(os.path.realpath(tree / known) for known in ("sql", "team/law-v1.5")))


# ---------------------------------------------------------------------------------------------- Hugging Face


def test_an_allowed_id_is_fetched_without_pickles_and_other_files(hub: FakeHub, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "org" / "adapter")
    assert allowing("org/*").resolve("demo", "org/adapter") == str(folder)
    assert hub.asked == [("org/adapter", ["adapter_config.json", "adapter_model.safetensors"])]


@pytest.mark.parametrize(
    ("patterns", "name"),
    [
        ((), "org/adapter"),
        (("other/*",), "org/adapter"),
        (("ORG/*",), "org/adapter"),
        (("*",), "adapter"),
        (("*",), "org/adapter/more"),
        (("*",), "../adapter"),
        (("*",), "org/.."),
        (("*",), "/org"),
        (("*",), ""),
        (("*",), "örg/adapter"),
    ],
)
def test_what_is_not_allowed_or_no_id_is_not_asked_for(hub: FakeHub, patterns: tuple[str, ...], name: str) -> None:
    assert allowing(*patterns).resolve("demo", name) is None
    assert hub.asked == []


def test_one_pattern_is_short_for_a_list_of_it() -> None:
    assert HuggingFaceOptions.model_validate({"allowed": "org/*"}).allowed == ("org/*",)


def test_offline_is_said_with_the_cache_that_was_looked_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(AdapterError, match="because HF_HUB_OFFLINE is set") as caught:
        allowing("org/*").resolve("demo", "org/adapter")
    assert str(tmp_path / "cache") in str(caught.value)


def hub_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """Without the response that the hub's errors want at construction: nothing here reads it."""
    return kind.__new__(kind, "the server's words")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (hub_error(errors.RepositoryNotFoundError), "does not exist, or is private: check the spelling"),
        (hub_error(errors.GatedRepoError), "is gated: accept its terms"),
        (errors.LocalEntryNotFoundError("no connection"), "cannot be fetched offline: connect to huggingface.co"),
        (OSError("disk full\nmore"), r"could not be fetched \(disk full\): connect"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_went_wrong_at_the_hub_is_told(hub: FakeHub, error: Exception, told: str) -> None:
    hub.error = error
    with pytest.raises(AdapterError, match=told):
        allowing("*").resolve("demo", "org/adapter")


def test_an_id_with_pickled_weights_alone_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "org" / "adapter")
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors\..*pickled weights.*are not read"):
        allowing("*").resolve("demo", "org/adapter")


# ---------------------------------------------------------------------------------------- what an operator gives


def test_a_folder_that_an_operator_gives_goes_before_an_id_of_its_name(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "org" / "adapter")
    assert adapter_folder("org/adapter") == "org/adapter"
    assert hub.asked == []


def test_an_id_that_an_operator_gives_needs_no_pattern(hub: FakeHub, tmp_path: Path) -> None:
    write_adapter(tmp_path / "org" / "adapter")
    assert adapter_folder("org/adapter") == str(tmp_path / "org" / "adapter")


@pytest.mark.parametrize(
    ("path", "told"),
    [("/gone", "is no folder on this machine"), ("", "is no folder on this machine"), (__file__, "is a file; give")],
)
def test_what_is_neither_folder_nor_id_is_refused(path: str, told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        adapter_folder(path)


# ---------------------------------------------------------------------------------------------- as components


def test_both_are_chosen_by_name_with_their_options(tree: Path) -> None:
    wishes: list[tuple[str, dict[str, object]]] = [
        ("filesystem", {"root": str(tree)}),
        ("hf", {"allowed": ["org/*"]}),
    ]
    choices = default_registry().choose_several("adapter_resolver", Need(), lambda _: False, wishes)
    filesystem, hugging_face = (component.build() for component in choices.get())
    assert isinstance(filesystem, FilesystemResolver)
    assert isinstance(hugging_face, HuggingFaceResolver)


def test_the_setting_lora_root_is_asked_first(tree: Path) -> None:
    hub = {"name": "hf", "allowed": ["org/*"]}
    explanation = explain("demo", device="cpu", enable_lora=True, lora_root=str(tree), adapter_resolvers=[hub])
    (setting,) = [one for one in explanation.settings if one.name == "adapter_resolvers"]
    assert setting.value == ["lora/filesystem", "lora/hf"]
    (socket,) = [one for one in explanation.sockets if one.name == "adapter_resolvers"]
    assert [one.name for one in socket.candidates if one.chosen] == ["filesystem", "hf"]


def test_options_of_a_resolver_can_be_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flag = '{name: hf, allowed: ["our-org/*"]}'
    assert main(["config", "check", "--enable-lora", "--adapter-resolvers", flag]) == 0
    assert main(["config", "check", "--enable-lora", "--adapter-resolvers", flag.replace("allowed", "allow")]) == 1
    assert "Did you mean 'allowed'?" in capsys.readouterr().err


def test_a_root_must_be_named() -> None:
    choices = default_registry().choose_several("adapter_resolver", Need(), lambda _: False, [("filesystem", {})])
    with pytest.raises(OctavoError, match="root: Field required"):
        choices.get()
