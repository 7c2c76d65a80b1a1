"""What an operator gave for an adapter, a folder or a Hugging Face id, to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from octavo.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether it has the form of a Hugging Face id, "org/name"."""
    return _HUB_ID.fullmatch(name) is not None


def adapter_folder(path: str) -> str:
    """The folder of an adapter; a Hugging Face id is fetched.

    Args:
        path: a PEFT folder, or a Hugging Face id where no such folder is.

    Raises:
        AdapterError: it is neither, or cannot be fetched; says why.
    """
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return str(folder)
    if path and folder.exists():
        raise AdapterError(f"{path} is a file; give the PEFT folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}.")
    if is_hub_id(path):
        return download_adapter(path)
    raise AdapterError(f'{path!r} is no folder on this machine and no Hugging Face id (those are "org/name").')


def download_adapter(repository: str) -> str:
    """The folder in Hugging Face's cache with an adapter's two files, fetched unless they are there.

    Args:
        repository: a Hugging Face id; its main branch is taken.

    Raises:
        AdapterError: it cannot be fetched, or is no adapter with weights in safetensors; says why.
    """
    # Here, not above: most adapters lie on this machine.
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(snapshot_download(repository, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # HTTP, proxy, file system, validation: the errors have no common root
        raise AdapterError(
            f"The Hugging Face adapter {repository!r} {_why(error)} (looked in the cache {constants.HF_HUB_CACHE} too)."
        ) from error
    if missing := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]:
        raise AdapterError(
            f"The Hugging Face id {repository!r} has no {' and no '.join(missing)}. An adapter is a PEFT folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}; pickled weights (adapter_model.bin) are not read: convert them."
        )
    return str(folder)


def _why(error: Exception) -> str:
    """What went wrong and what to do, to follow "the adapter X"."""
    from huggingface_hub import errors

    if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return "cannot be fetched because HF_HUB_OFFLINE is set: unset it, or give a folder on this machine"
    if isinstance(error, errors.GatedRepoError):
        return "is gated: accept its terms on huggingface.co, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "does not exist, or is private: check the spelling, or log in with `hf auth login`"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "cannot be fetched offline: connect to huggingface.co, or give a folder on this machine"
    first_line = str(error).partition("\n")[0]
    return f"could not be fetched ({first_line}): connect to huggingface.co, or give a folder on this machine"
