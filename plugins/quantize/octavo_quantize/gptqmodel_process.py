"""gptqmodel, in an environment of its own and a process of its own: it cannot be installed beside Octavo's torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from octavo.errors import ConfigError, OctavoError
from octavo_quantize.progress import Progress

ENVIRONMENT = "OCTAVO_QUANTIZE_ENV"
_WORKER = Path(__file__).with_name("gptqmodel_worker.py")
_LAYER = re.compile(r"layer (\d+) of (\d+)")
_NUM_LAST_LINES = 12


class QuantizingError(OctavoError, RuntimeError):
    """The tool that quantises ended with an error; the message has its last lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What gptqmodel_worker.py reads.

    Attributes:
        folder: the plain model.
        output: a folder that is not there yet.
        method: "gptq" or "awq".
        settings: of gptqmodel's QuantizeConfig.
        samples: token ids to calibrate on.
    """

    folder: str
    output: str
    method: str
    settings: Mapping[str, object]
    samples: Sequence[Sequence[int]]


def environment_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where gptqmodel's environment is, or is to be: OCTAVO_QUANTIZE_ENV, else quantize-env in Octavo's cache."""
    if chosen := environ.get(ENVIRONMENT):
        return Path(chosen).expanduser()
    cache = environ.get("OCTAVO_CACHE") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "octavo"
    return Path(cache).expanduser() / "quantize-env"


def environment_python() -> Path:
    """The Python of gptqmodel's environment.

    Raises:
        ConfigError: it is not there, or was not made to its end.
    """
    folder = environment_folder()
    python = folder / "bin" / "python"
    if not python.exists() or not any(folder.glob("lib/python*/site-packages/gptqmodel/__init__.py")):
        raise ConfigError(
            f"GPTQ and AWQ checkpoints are made by gptqmodel, in an environment of its own, which {folder} is not. "
            f"Make it, once, with `python scripts/quantize_env {folder}` in a checkout of Octavo: 1.5 GB, a few "
            f"minutes. {ENVIRONMENT} names a folder elsewhere."
        )
    return python


def run_gptqmodel(job: Job, python: Path, scratch: Path, progress: Progress) -> None:
    """Quantise in the other environment and wait for it; Ctrl-C ends both.

    Args:
        python: of the environment.
        scratch: a folder, its path absolute, for the job and what gptqmodel prints and leaves behind.

    Raises:
        QuantizingError: it ended before it was done.
    """
    job_file, log = scratch / "job.json", scratch / "gptqmodel.log"
    job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [python.absolute(), _WORKER, job_file],
            cwd=scratch,  # where gptqmodel leaves logs of its own
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            done = _follow(process, job.method, progress)
        finally:
            process.kill()  # nothing where it has ended
            process.wait()
    if not done:
        raise QuantizingError(
            f"gptqmodel ended with status {process.returncode} before the model was quantised. Its last lines:\n"
            f"{_last_lines(log)}"
        )


def _follow(process: subprocess.Popen[str], what: str, progress: Progress) -> bool:
    """Tell how far it is until it ends; whether it got to its end."""
    assert process.stdout is not None
    done = False
    with process.stdout as lines:
        for line in lines:
            if match := _LAYER.match(line):
                progress(f"{what}: layers", int(match[1]), int(match[2]))
            done = line.strip() == "done"
    return process.wait() == 0 and done


def _last_lines(log: Path) -> str:
    """Bars are drawn over themselves with carriage returns: each drawing but its line's last was never to stay."""
    text = log.read_bytes().decode("utf-8", errors="replace")  # as text, carriage returns would end lines
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(f"  {line}" for line in [line for line in lines if line][-_NUM_LAST_LINES:])
