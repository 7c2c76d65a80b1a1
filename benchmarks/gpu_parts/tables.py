"""The report: which tables there are, their columns, and what each says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from report import markdown_table

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One table. `columns`: (key of a row, heading, format)."""

    name: str
    title: str
    columns: Sequence[tuple[str, str, str]]
    note: str = ""
    rows_of: Callable[[list[Row]], list[Row]] = list

    def markdown(self, rows: Sequence[Row]) -> str:
        cells = [[_cell(row.get(key), form) for key, _, form in self.columns] for row in self.rows_of(list(rows))]
        table = markdown_table([heading for _, heading, _ in self.columns], cells)
        return "\n\n".join(filter(None, [f"## {self.title}", table, self.note]))


def by_kernel(rows: list[Row]) -> list[Row]:
    """Correctness in short: a row for each kernel and dtype with its worst case, and every case that failed."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kernel = row["kernel"] if row["kernel"].startswith("triton-") else f"{row['kernel']}: {row['case'].split()[0]}"
        groups.setdefault((kernel.rstrip(","), row["dtype"]), []).append(row)
    short: list[Row] = []
    for (kernel, dtype), cases in groups.items():
        worst = max(cases, key=lambda row: row["error"] / row["tolerance"])
        passed = [row for row in cases if row["ok"]]
        short.append({**worst, "kernel": kernel, "dtype": dtype, "passed": f"{len(passed)} of {len(cases)}"})
        short += [{**row, "passed": "FAILED"} for row in cases if not row["ok"]]
    return short


TABLES = (
    Table(
        name="correctness",
        title="Kernels against their formulas in float64",
        columns=(
            ("kernel", "kernel", ""),
            ("dtype", "dtype", ""),
            ("passed", "cases passed", ""),
            ("case", "worst case", ""),
            ("error", "its error", ".2g"),
            ("tolerance", "allowed", ".2g"),
            ("fault", "fault", ""),
        ),
        rows_of=by_kernel,
        note="Random data. Errors are absolute for attention, relative for norms and activations, and for sampling by "
        "how much the score of the token drawn falls short of the best that the rules leave.",
    ),
    Table(
        name="tokens",
        title="Greedy tokens against transformers, float32, margin rule",
        columns=(
            ("model", "model", ""),
            ("way", "engine", ""),
            ("attention", "attention", ""),
            ("kernels", "kernels", ""),
            ("requests", "requests", "d"),
            ("same", "all tokens the same", "d"),
            ("ok", "passed", ""),
            ("fault", "fault", ""),
        ),
        note="Random Llama and Qwen2. Tokens may part from the reference only where its two best logits are nearer "
        "than 1e-3, and are then checked one by one.",
    ),
    Table(
        name="logits",
        title="Teacher-forced logprobs of the Llama-3-8B shape, bfloat16",
        columns=(
            ("layers", "layers", "d"),
            ("tokens", "tokens", "d"),
            ("spread", "spread", ".3f"),
            ("error", "RMS error", ".2g"),
            ("largest", "largest", ".2g"),
            ("their_error", "RMS error of transformers", ".2g"),
            ("their_largest", "largest", ".2g"),
            ("allowed", "allowed", ".2g"),
            ("ok", "passed", ""),
        ),
        note="Of given tokens, against transformers in float32. Allowed is one and a half times the error that "
        "transformers has in bfloat16.",
    ),
    Table(
        name="kernels",
        title="Kernels: what they reach",
        columns=(
            ("kernel", "kernel", ""),
            ("shape", "shape", ""),
            ("us", "us", ".1f"),
            ("tb_s", "TB/s", ".2f"),
            ("copy_share", "of copy", ".0%"),
            ("tflops", "TFLOP/s", ".0f"),
            ("matmul_share", "of matmul", ".0%"),
            ("target", "target", ""),
            ("met", "met", ""),
            ("method", "timed in", ""),
        ),
        note='Bytes are those that must be read and written, operations those of visible pairs. "graph": many copies '
        "of the data, over 200 MiB in all, one after the other in a CUDA graph, so that the L2 cache is cold and no "
        "host is waited for; median of 5 replays.",
    ),
    Table(
        name="linears",
        title="Products with packed weights, bfloat16",
        columns=(
            ("method", "method", ""),
            ("bits", "bits", "d"),
            ("shape", "inputs x outputs", ""),
            ("tokens", "tokens", "d"),
            ("kernel", "kernel", ""),
            ("us", "us", ".1f"),
            ("roofline_share", "of packed-byte roofline", ".0%"),
            ("over_plain", "x plain bf16", ".2f"),
            ("over_dequantize", "x dequantise, then multiply", ".2f"),
            ("met", "targets met", ""),
            ("method_of_timing", "timed in", ""),
        ),
        note="The roofline is the time in which the prepared weight's bytes, x and y are copied. Plain is torch's "
        "linear with the weight in bfloat16. Each on many copies of its data, so that the L2 cache is cold. Targets: "
        "never slower than dequantising; up to 16 tokens with 50 M weights or more 60 % of the roofline; at one token "
        "2.5 times as fast as plain there, 1.5 times on smaller ones.",
    ),
    Table(
        name="start",
        title="Start",
        columns=(
            ("what", "what", ""),
            ("seconds", "s", ".1f"),
            ("target", "target", ".0f"),
            ("met", "met", ""),
            ("phases", "phases", ""),
            ("kv_gib", "KV GiB", ".1f"),
            ("weight_gib", "weights GiB", ".1f"),
            ("components", "components", ""),
        ),
    ),
    Table(
        name="engine",
        title="Engine",
        columns=(
            ("measure", "measure", ""),
            ("value", "value", ",.1f"),
            ("unit", "unit", ""),
            ("target", "target", ",.0f"),
            ("roofline", "roofline", ",.0f"),
            ("met", "met", ""),
            ("note", "of", ""),
        ),
    ),
    Table(
        name="waste",
        title="KV waste",
        columns=(
            ("batch", "at once", "d"),
            ("waste", "waste", ".1%"),
            ("target", "target", ".0%"),
            ("met", "met", ""),
            ("peak", "highest use of the cache so far", ".0%"),
            ("preemptions", "preemptions", "d"),
        ),
        note="1 - tokens stored / token slots of the blocks that running requests hold, mean over the steps.",
    ),
    Table(
        name="profile",
        title="Where the time of a decode step goes",
        columns=(
            ("batch", "batch", "d"),
            ("what", "what", ""),
            ("us_per_step", "us a step", ".1f"),
            ("share", "share", ".1%"),
            ("target", "target", ".0%"),
            ("met", "met", ""),
        ),
        note="torch.profiler over 20 steps. Idle is when no kernel and no copy runs; profiling slows launches down, so "
        "it is an upper bound.",
    ),
    Table(
        name="longest",
        title="Longest kernels",
        columns=(
            ("batch", "batch", "d"),
            ("kernel", "kernel", ""),
            ("us_per_step", "us a step", ".1f"),
            ("launches_per_step", "launches a step", ".1f"),
        ),
    ),
)


def markdown(rows: Mapping[str, Sequence[Row]]) -> str:
    """Every table that has rows."""
    return "\n\n".join(table.markdown(rows[table.name]) for table in TABLES if rows.get(table.name))


def is_wrong(rows: Mapping[str, Sequence[Row]]) -> bool:
    """Whether anything that was compared is not equal enough."""
    return any(row.get("ok") is False for of_table in rows.values() for row in of_table)


def _cell(value: object, form: str) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return format(value, form).replace("|", "/")
