"""resolve_model: what the user typed, to a path on this machine. The first thing that happens to a model's name."""

from __future__ import annotations

import re
from pathlib import Path

from octavo.demo_model import demo_model_path
from octavo.errors import ModelNotFoundError

DEMO = "demo"

_WANTED_FILES = ["*.json", "*.jinja"]
_WEIGHT_FILES = ["*.safetensors"]
_UNWANTED_FILES = ["*/*", "consolidated*"]
"""Other formats' copies of the same weights, which no index names."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")


def resolve_model(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder or file of a model.

    Args:
        model: "demo"; a folder; a .gguf file; a Hugging Face id, "org/name"; or a file in one, "org/name/file.gguf".
        revision: branch, tag or commit of a Hugging Face id.
        weights: False fetches only what tells a model's sizes and text, where its weights are in files of their own.

    Raises:
        ModelNotFoundError: there is no such thing, or no network to fetch it; says what was tried.
    """
    if model == DEMO:
        return demo_model_path()
    path = Path(model).expanduser()
    if model and path.exists():
        return path
    if _looks_local(model):
        raise ModelNotFoundError(f"There is no file or folder {path.absolute()}.")
    if match := _HUB_FILE.fullmatch(model):
        return _from_hub(model, match[1], match[2], revision, [match[2]])
    if _HUB_ID.fullmatch(model):
        return _from_hub(model, model, None, revision, _WANTED_FILES + (_WEIGHT_FILES if weights else []))
    raise ModelNotFoundError(
        f'{model!r} is no file or folder here ({path.absolute()}) and no Hugging Face id (those are "org/name"). '
        f"Give one of them, or {DEMO!r} for the demo model."
    )


def _looks_local(model: str) -> bool:
    """Whether it can only be meant as a path: "./x", "~/x", "/x", or "x.gguf" without a folder."""
    return model.startswith(("/", ".", "~")) or ("/" not in model and model.endswith(".gguf"))


def _from_hub(model: str, repository: str, file: str | None, revision: str | None, wanted: list[str]) -> Path:
    # Here, not above: most starts need no hub.
    from huggingface_hub import constants, snapshot_download

    try:
        # Also for one file: hf_hub_download retries for half a minute when there is no network.
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=_UNWANTED_FILES if file is None else None,
            )
        )
    except Exception as error:  # HTTP, proxy, file system, validation: the errors have no common root
        raise ModelNotFoundError(
            f"There is no file or folder {Path(model).absolute()}, and the Hugging Face id {repository!r}"
            f"{'' if revision is None else f' at revision {revision!r}'} {_why(error)} "
            f"(looked in its cache {constants.HF_HUB_CACHE} too)."
        ) from error
    if file is not None and not (folder / file).is_file():
        raise ModelNotFoundError(f"The Hugging Face id {repository!r} has no file {file!r}.")
    return folder if file is None else folder / file


def _why(error: Exception) -> str:
    """What went wrong and what to do, to follow "the Hugging Face id X"."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "is gated: accept its terms on huggingface.co, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such branch, tag or commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "does not exist, or is private: check the spelling, or log in with `hf auth login`"
    if isinstance(error, errors.HFValidationError):
        return f"is not a valid id ({error})"
    if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return "cannot be fetched because HF_HUB_OFFLINE is set: unset it, or give a folder or file on this machine"
    first_line = str(error).partition("\n")[0]
    return f"could not be fetched ({first_line}): connect to huggingface.co, or give a folder or file on this machine"
