"""What cpu.py measured, from single measurements to the tables a reader sees."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from report import markdown_circumstances, markdown_table

PEERS = ("octavo", "transformers")

SPEEDS = (
    # attribute of Measurement, its name in the table, digits, whether more is better
    ("tokens_per_second", "tokens/s", 1, True),
    ("decode_tokens_per_second", "decode tokens/s", 1, True),
    ("ttft_seconds", "TTFT s", 3, False),
)

NOTE = """\
Medians over the rounds, with the range in brackets; one process for each measurement, the peers in turns. Tokens/s are
generated tokens that the workload asks for, over the whole run. A ratio above 1 is better for Octavo; below 1.2 either
way is a tie. CPU s are of all threads during the run, peak MiB of the whole process with its loading; KV waste is 1 -
tokens stored / token slots of the blocks that running requests hold, mean over steps; "others" is what other processes
took of the machine's CPU meanwhile: on a quiet machine it is near 0 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One peer, one workload, one process.

    Attributes:
        tokens_per_second: generated tokens that the workload asks for, over the whole run.
        ttft_seconds, decode_tokens_per_second: of a single stream: its first token, and the pace after it.
        load_seconds: imports and weights, until requests are taken.
        cpu_seconds: of the run, all threads.
        others_share: what other processes took of the machine's CPU time meanwhile; None where it is not known.
        peak_rss_bytes: of the process, loading included.
        kv_waste: share of the KV memory held by running requests that stored no token; None where it is not known.
        details: what of the peer ran.
        token_ids: of every completion; left out of result files.
    """

    peer: str
    workload: str
    num_output_tokens: int
    tokens_per_second: float
    wall_seconds: float
    ttft_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    load_seconds: float
    cpu_seconds: float
    others_share: float | None = None
    peak_rss_bytes: int
    kv_waste: float | None = None
    details: dict[str, str] = field(default_factory=dict)
    token_ids: list[list[int]] = field(default_factory=list, repr=False)


def result(measurements: Sequence[Measurement], circumstances: Mapping[str, object]) -> dict[str, object]:
    """The content of a result's JSON file."""
    rows = [asdict(measurement) for measurement in measurements]
    for row in rows:
        del row["token_ids"]
    return {**circumstances, "agreement": agreements(measurements), "measurements": rows}


def markdown(measurements: Sequence[Measurement], circumstances: Mapping[str, object]) -> str:
    """The content of a result's Markdown file."""
    details = {measurement.peer: measurement.details for measurement in measurements if measurement.details}
    parts = [
        f"# CPU, {circumstances['date']}",
        speed_table(measurements),
        NOTE,
        resource_table(measurements),
        agreement_table(measurements),
        "Greedy outputs of both compared. They part where two logits are nearly equal and rounding decides.",
        markdown_circumstances(circumstances)
        + "".join(
            f"\n- {peer}: {', '.join(f'{key} {value}' for key, value in of_peer.items())}"
            for peer, of_peer in details.items()
        ),
    ]
    return "\n\n".join(parts)


def speed_table(measurements: Sequence[Measurement]) -> str:
    """Both peers' medians and their ratio: a row for each workload and what is measured of it."""
    rows = []
    for workload in _workloads(measurements):
        for attribute, label, digits, more_is_better in SPEEDS:
            ours, theirs = (_values(measurements, peer, workload, attribute) for peer in PEERS)
            if ours or theirs:
                ratio = _ratio(ours, theirs) if more_is_better else _ratio(theirs, ours)
                rows.append([workload, label, spread(ours, digits), spread(theirs, digits), ratio])
    return markdown_table(["workload", "measure", *PEERS, "ratio"], rows)


def resource_table(measurements: Sequence[Measurement]) -> str:
    """What the runs took, medians: a row for each workload and peer."""
    columns = (
        ("wall s", "wall_seconds", 1, ".1f"),
        ("CPU s", "cpu_seconds", 1, ".1f"),
        ("load s", "load_seconds", 1, ".1f"),
        ("peak MiB", "peak_rss_bytes", 2**20, ".0f"),
        ("KV waste", "kv_waste", 1, ".1%"),
        ("others", "others_share", 1, ".0%"),
    )
    rows = []
    for workload in _workloads(measurements):
        for peer in PEERS:
            if _of(measurements, peer, workload):
                cells = [workload, peer]
                for _, attribute, unit, form in columns:
                    values = _values(measurements, peer, workload, attribute)
                    cells.append(format(statistics.median(values) / unit, form) if values else "")
                rows.append(cells)
    return markdown_table(["workload", "peer", *(label for label, *_ in columns)], rows)


def agreement_table(measurements: Sequence[Measurement]) -> str:
    """How alike the greedy outputs are."""
    rows = [
        [workload, *(f"{shares[share]:.0%}" for share in ("first_token", "common_prefix", "whole"))]
        for workload, shares in agreements(measurements).items()
    ]
    return markdown_table(["workload", "first token equal", "mean common prefix", "all tokens equal"], rows)


def agreements(measurements: Sequence[Measurement]) -> dict[str, dict[str, float]]:
    """`agreement` of each workload's first measurements; sampled outputs are not compared."""
    pairs = {
        workload: [measurement.token_ids for peer in PEERS for measurement in _of(measurements, peer, workload)[:1]]
        for workload in _workloads(measurements)
    }
    return {workload: agreement(*pair) for workload, pair in pairs.items() if len(pair) == 2 and all(pair)}


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, float]:
    """How alike two lists of outputs are.

    Returns:
        "first_token" and "whole": the share of outputs that are equal in their first token, in all of them.
        "common_prefix": tokens before the first difference as a share of the output, mean over the outputs.
    """
    prefixes = [
        next((index for index, (one, other) in enumerate(zip(a, b, strict=True)) if one != other), len(a))
        for a, b in zip(ours, theirs, strict=True)
    ]
    shares = [prefix / len(output) for prefix, output in zip(prefixes, ours, strict=True)]
    return {
        "first_token": statistics.fmean(prefix > 0 for prefix in prefixes),
        "common_prefix": statistics.fmean(shares),
        "whole": statistics.fmean(share == 1 for share in shares),
    }


def spread(values: Sequence[float], digits: int) -> str:
    """The median, with the range when there is one; empty without values."""
    if not values:
        return ""
    median = f"{statistics.median(values):.{digits}f}"
    return median if len(values) == 1 else f"{median} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _ratio(above: Sequence[float], below: Sequence[float]) -> str:
    return f"{statistics.median(above) / statistics.median(below):.2f}" if above and below else ""


def _workloads(measurements: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(measurement.workload for measurement in measurements))


def _of(measurements: Sequence[Measurement], peer: str, workload: str) -> list[Measurement]:
    return [measurement for measurement in measurements if (measurement.peer, measurement.workload) == (peer, workload)]


def _values(measurements: Sequence[Measurement], peer: str, workload: str, attribute: str) -> list[float]:
    values = [getattr(measurement, attribute) for measurement in _of(measurements, peer, workload)]
    return [value for value in values if value is not None]
