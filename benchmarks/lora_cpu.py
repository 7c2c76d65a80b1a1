#!/usr/bin/env python3
"""What LoRA adapters cost: a workload with an adapter for each request, beside the base model.

    python benchmarks/lora_cpu.py                               # w2, 8 adapters of rank 16 over all linears
    python benchmarks/lora_cpu.py --requests 16 --rounds 1      # a quick look

Three engines in one process answer in turns: one without LoRA; one that serves adapters, of which no request asks for
one; the same with requests that take turns among the adapters. The result is benchmarks/results/<date>-lora-cpu.md and
.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import report
from comparison import spread
from drawn_adapters import draw_adapters
from workload import Workload, load_workload, warm_up_workload

from octavo import LLM, SamplingParams

KV_CACHE_BYTES = 512 * 2**20
VARIANTS = ("without LoRA", "served, none asked for", "an adapter for each request")
NOTE = """\
Medians over the rounds, with the range in brackets; engines in turns, in one process. Tokens/s are generated tokens,
over the whole workload, prompts included in the time. "x base" is the share of the first row's speed."""


def main() -> None:
    args = parse_arguments()
    import torch

    torch.set_num_threads(args.threads)
    workload = load_workload(args.workload, args.requests)
    circumstances = report.circumstances(args.threads)
    settings = {"dtype": args.dtype, "kv_cache_memory_bytes": KV_CACHE_BYTES, **args.octavo}
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_adapters(Path(folder), args.model, args.adapters, args.rank)
        lora = {"enable_lora": True, "max_loras": args.adapters, "max_lora_rank": args.rank, "lora_modules": paths}
        engines = [LLM(args.model, **settings), LLM(args.model, **settings, **lora)]
        names = list(paths)
        wishes: dict[str, tuple[LLM, list[str | None]]] = {
            VARIANTS[0]: (engines[0], [None]),
            VARIANTS[1]: (engines[1], [None]),
            VARIANTS[2]: (engines[1], [*names]),
        }
        speeds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for llm, adapters in wishes.values():
            answer(llm, warm_up_workload(), adapters)
        for number in range(1, args.rounds + 1):
            for variant, (llm, adapters) in wishes.items():
                speeds[variant].append(answer(llm, workload, adapters))
                print(f"round {number}  {variant:30} {speeds[variant][-1]:8.1f} tokens/s", flush=True)
        for llm in engines:
            llm.shutdown()
    text = markdown(speeds, args, circumstances)
    path = args.output or report.result_path("lora-cpu")
    report.write_result(path, {**circumstances, "workload": workload.name, "tokens_per_second": speeds}, text)
    print(text, f"\nWritten to {path}.md and {path}.json")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    report.add_common_arguments(parser)
    parser.add_argument("--workload", default="w2", help="default: %(default)s")
    parser.add_argument("--requests", type=int, help="only the first so many, for a quick look")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--adapters", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=16, help="default: %(default)s")
    return parser.parse_args()


def answer(llm: LLM, workload: Workload, adapters: Sequence[str | None]) -> float:
    """Generated tokens a second; what was cached before is forgotten first."""
    llm.engine.scheduler.block_pool.reset_prefix_cache()
    requests = workload.requests
    params = [
        SamplingParams(
            temperature=request.temperature, max_tokens=request.num_output_tokens, n=request.n, ignore_eos=True, seed=0
        )
        for request in requests
    ]
    wishes = [adapters[index % len(adapters)] for index in range(len(requests))]
    prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, adapter=wishes, use_tqdm=False)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    found = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    if found != workload.num_output_tokens:
        raise RuntimeError(f"{workload.name} asks for {workload.num_output_tokens} tokens; {found} came.")
    return found / seconds


def markdown(speeds: dict[str, list[float]], args: argparse.Namespace, circumstances: dict[str, object]) -> str:
    """The content of a result's Markdown file."""
    base = statistics.median(speeds[VARIANTS[0]])
    rows = [[variant, spread(each, 1), f"{statistics.median(each) / base:.2f}"] for variant, each in speeds.items()]
    return "\n\n".join(
        [
            f"# LoRA adapters on a CPU, {circumstances['date']}",
            f"{args.workload}, {args.adapters} adapters of rank {args.rank} over all linears, {args.dtype}:",
            report.markdown_table(["requests", "tokens/s", "x base"], rows),
            NOTE,
            report.markdown_circumstances(circumstances),
        ]
    )


if __name__ == "__main__":
    main()
