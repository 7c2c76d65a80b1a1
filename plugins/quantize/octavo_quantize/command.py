"""`octavo quantize`: make a GPTQ, AWQ or SqueezeLLM checkpoint of a model, and say what it cost in perplexity."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo import open_checkpoint
from octavo.errors import ConfigError
from octavo_quantize.gptqmodel_process import Job, environment_python, run_gptqmodel
from octavo_quantize.perplexity_report import compare, report_lines
from octavo_quantize.plain_folder import plain_folder
from octavo_quantize.progress import Progress, progress_bars
from octavo_quantize.texts import calibration_text, cut_samples, evaluation_text, read_text

_GROUP_SIZE = 128
_TEXT_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What a method can be asked for: bits of a weight, and which options that not every method has."""

    bits: tuple[int, ...]
    options: tuple[str, ...]


METHODS = {
    "gptq": Method(bits=(2, 3, 4, 8), options=("group_size", "desc_act", "asymmetric")),
    "awq": Method(bits=(4,), options=("group_size",)),
    "squeezellm": Method(bits=(3, 4), options=("sparsity", "seed")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a plain model: folder, GGUF file, Hugging Face id, or demo")
    parser.add_argument(
        "--method", required=True, choices=METHODS, help="gptq and awq need `scripts/quantize_env` once"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="to make; must not be there yet")
    parser.add_argument("--bits", type=int, default=4, metavar="N", help=f"of a weight: {_bits_help()} (default 4)")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help=f"inputs that share a scale, -1 for all (gptq, awq; {_GROUP_SIZE})"
    )
    parser.add_argument(
        "--desc-act", action="store_true", default=None, help="quantise inputs in order of their activations (gptq)"
    )
    parser.add_argument(
        "--asymmetric",
        action="store_true",
        default=None,
        help="give each group a zero point (gptq; awq has one always)",
    )
    parser.add_argument(
        "--sparsity", type=float, metavar="X", help="share of the weights that are kept as they are (squeezellm; 0)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the k-means (squeezellm; 0)")
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text in UTF-8; Python's language reference without one"
    )
    calibration.add_argument("--num-samples", type=int, default=128, metavar="N", help="of the text (default 128)")
    calibration.add_argument("--sample-tokens", type=int, default=512, metavar="N", help="of a sample (default 512)")
    report = parser.add_argument_group("report")
    report.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="text whose perplexity is measured before and after; other chapters of Python's reference without one",
    )
    report.add_argument("--no-report", action="store_true", help="measure nothing")


def run(args: argparse.Namespace) -> int:
    check_options(args)
    output: Path = args.output.expanduser()
    python = None if args.method == "squeezellm" else environment_python()
    calibrated = calibration_text() if args.calibration is None else read_text(args.calibration, "--calibration")
    evaluated = evaluation_text() if args.evaluation is None else read_text(args.evaluation, "--evaluation")
    if calibrated == evaluated and not args.no_report:
        raise ConfigError(
            "--calibration and --evaluation are the same text: what is calibrated on it looks better there than it is."
        )
    # Beside its place, then moved: nobody ever sees half a model.
    with tempfile.TemporaryDirectory(dir=_parent(output), prefix=f".{output.name}-") as folder:
        scratch = Path(folder).absolute()
        _quantize(args, python, calibrated, scratch)
        os.rename(scratch / "result", output)
    print(f"{args.model} is quantised: {output}, {_num_bytes(output) / 1e6:,.0f} MB", flush=True)
    if not args.no_report:
        before, after = compare(args.model, output, evaluated)
        print("\n".join(report_lines(args.model, before, output, after)))
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Refuse what the method has not, before anything is read.

    Raises:
        ConfigError: says all that is wrong.
    """
    method = METHODS[args.method]
    faults = []
    if args.bits not in method.bits:
        faults.append(f"{args.method} has {_either(method.bits)} bits, not {args.bits}")
    for option in sorted({option for other in METHODS.values() for option in other.options}):
        if getattr(args, option) is not None and option not in method.options:
            having = [name for name, other in METHODS.items() if option in other.options]
            faults.append(f"--{option.replace('_', '-')} is an option of {_either(having)}, not of {args.method}")
    if args.group_size is not None and args.group_size != -1 and args.group_size < 1:
        faults.append(f"--group-size is a number of inputs or -1 for all of them, not {args.group_size}")
    if args.num_samples < 1 or args.sample_tokens < 2:
        faults.append(
            f"calibration needs one sample of two tokens or more, not {args.num_samples} of {args.sample_tokens}"
        )
    if args.output.expanduser().exists():
        faults.append(f"--output {args.output} is there already: remove it, or name another folder")
    if faults:
        raise ConfigError(f"{'; '.join(faults)}.")


def gptqmodel_settings(args: argparse.Namespace) -> dict[str, object]:
    """Of gptqmodel's QuantizeConfig, from the command's options."""
    group_size = _GROUP_SIZE if args.group_size is None else args.group_size
    settings: dict[str, object] = {"bits": args.bits, "group_size": group_size}
    if args.method == "awq":
        return {**settings, "sym": False, "format": "gemm"}
    settings |= {"sym": not args.asymmetric, "desc_act": bool(args.desc_act)}
    if args.desc_act or group_size == -1:
        settings["act_group_aware"] = False  # orders groups by their activations: there are none, or inputs are ordered
    return settings


def _quantize(args: argparse.Namespace, python: Path | None, calibrated: str, scratch: Path) -> None:
    """Write the quantized model to `scratch`/result."""
    checkpoint = open_checkpoint(args.model)
    longest = checkpoint.config().get("max_position_embeddings")
    if longest is not None and args.sample_tokens > longest:
        raise ConfigError(
            f"--sample-tokens {args.sample_tokens} is more than the model's longest text, {longest} tokens."
        )
    samples = cut_samples(checkpoint.tokenizer().tokenizer, calibrated, args.num_samples, args.sample_tokens)
    plain = plain_folder(checkpoint, scratch / "plain")
    with progress_bars() as progress:
        if python is None:
            _quantize_squeezellm(args, plain, scratch / "result", samples, progress)
            return
        job = Job(
            folder=str(plain),
            output=str(scratch / "result"),
            method=args.method,
            settings=gptqmodel_settings(args),
            samples=samples,
        )
        run_gptqmodel(job, python, scratch, progress)
    for pattern in _TEXT_FILES:  # transformers writes tokenizers anew, now and then not quite the same
        for file in plain.glob(pattern):
            shutil.copyfile(file, scratch / "result" / file.name)


def _quantize_squeezellm(
    args: argparse.Namespace, plain: Path, output: Path, samples: Sequence[Sequence[int]], progress: Progress
) -> None:
    try:
        from octavo_quantize.squeezellm import quantize_squeezellm
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--method squeezellm needs {error.name}: `pip install 'octavo-quantize[squeezellm]'`."
        ) from error

    quantize_squeezellm(
        plain,
        output,
        bits=args.bits,
        sparsity=args.sparsity or 0.0,
        samples=samples,
        seed=args.seed or 0,
        progress=progress,
    )


def _parent(output: Path) -> Path:
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be made: {error}") from error
    return parent


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _bits_help() -> str:
    return "; ".join(f"{name} {_either(method.bits)}" for name, method in METHODS.items())


def _either(values: Sequence[object]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
