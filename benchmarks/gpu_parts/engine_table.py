"""The engine on the Llama-3-8B shape: start, decode at several batches, prefill, conversations, and where time goes."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import partial

from gpu_parts.lengths import Conversation, conversations
from gpu_parts.models import LLAMA_3_8B, TINY_SHAPE, write_shape
from gpu_parts.part import Part
from gpu_parts.profile import profile_decode
from gpu_parts.start import report_start
from gpu_parts.step_times import step_times
from octavo import LLM, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """A batch of equal requests, with its target and roofline in tokens a second on an H200."""

    batch: int
    prompt: int
    output: int
    target: float | None = None
    roofline: float | None = None


DECODES = (
    Decode(batch=1, prompt=128, output=256, target=240, roofline=284),
    Decode(batch=64, prompt=1000, output=100, target=9300, roofline=11661),
    Decode(batch=256, prompt=1000, output=64, target=14000, roofline=19896),
)
QUICK_DECODES = (Decode(batch=1, prompt=128, output=96), Decode(batch=64, prompt=500, output=48))
TINY_DECODES = (Decode(batch=1, prompt=3, output=4), Decode(batch=2, prompt=4, output=4))
PREFILL_TARGET, PREFILL_ROOFLINE = 40_000, 55_000
CONVERSATION_TARGET = 12_500
READY_TARGET_SECONDS = 30.0
WASTE_TARGET = 0.04


def run(part: Part) -> None:
    folder = write_shape(part, part.num_layers)
    begin = time.monotonic()
    with LLM(str(folder), device=part.device, dtype="bfloat16", **settings(part)) as llm:
        target = READY_TARGET_SECONDS if is_shape(part) else None
        report_start(part, llm, f"{part.num_layers} layers, kernels compiled before", begin, target)
        warm_up(part, llm)
        decodes = part.choose(DECODES, QUICK_DECODES, TINY_DECODES)
        for decode in decodes:
            part.attempt(f"decode at batch {decode.batch}", partial(measure_decode, part, llm, decode), seconds=5)
        part.attempt("prefill", partial(measure_prefill, part, llm), seconds=5)
        part.attempt("conversations", partial(measure_conversations, part, llm), seconds=part.choose(25, 8, 0))
        for decode in decodes[: part.choose(3, 2, 1)]:
            prompts = random_prompts(part, decode.batch, decode.prompt)
            part.attempt(f"profile at batch {decode.batch}", partial(profile_decode, part, llm, prompts), seconds=5)


def settings(part: Part) -> dict[str, object]:
    """Of EngineConfig; what is not here is left at its default."""
    if part.tiny:
        triton = {"prefill": "triton-flash", "decode": "triton-paged"}
        return {"kv_cache_memory_bytes": 2**25, "max_model_len": 64, "attention": triton, "kernels": "triton"}
    return {"max_model_len": 4096, "max_num_seqs": 256, "max_num_batched_tokens": 8192}


def vocab_size(part: Part) -> int:
    return int((TINY_SHAPE if part.tiny else LLAMA_3_8B)["vocab_size"])


def random_prompts(part: Part, count: int, length: int) -> list[list[int]]:
    """Prompts that share no beginning."""
    rng = random.Random(f"{count} {length} {time.time_ns()}")
    return [[rng.randrange(vocab_size(part)) for _ in range(length)] for _ in range(count)]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def warm_up(part: Part, llm: LLM) -> None:
    """Whatever the first steps of each kind still have to do."""
    for count, length in part.choose(((1, 40), (40, 300)), ((1, 40), (40, 300)), ((1, 3),)):
        llm.generate(random_prompts(part, count, length), greedy(2 if part.tiny else 8))


def is_shape(part: Part) -> bool:
    """Whether the targets apply: the whole of Llama-3-8B, on a GPU."""
    return part.on_gpu and part.num_layers == 32


def add(
    part: Part,
    measure: str,
    value: float,
    unit: str,
    note: str,
    target: float | None = None,
    roofline: float | None = None,
) -> None:
    """A row of the engine's table; target and roofline are of the whole shape on a GPU, and left out elsewhere."""
    applies = target is not None and is_shape(part)
    part.add(
        "engine",
        measure=measure,
        value=value,
        unit=unit,
        target=target if applies else None,
        roofline=roofline if applies else None,
        met=value >= target if applies and target is not None else None,
        note=note,
    )


def measure_decode(part: Part, llm: LLM, decode: Decode) -> None:
    """Tokens a second once all requests decode, and the KV waste of the whole run."""
    before = llm.stats()
    with step_times(llm) as times:
        llm.generate(random_prompts(part, decode.batch, decode.prompt), greedy(decode.output))
    speed, num_steps = times.decode_speed(decode.batch)
    note = f"{num_steps} steps at contexts {decode.prompt}-{decode.prompt + decode.output}"
    add(part, f"decode, {decode.batch} at once", speed, "tok/s", note, decode.target, decode.roofline)
    after = llm.stats()
    num_steps = after.num_steps - before.num_steps
    waste = (after.kv_waste * after.num_steps - before.kv_waste * before.num_steps) / max(num_steps, 1)
    part.add(
        "waste",
        batch=decode.batch,
        waste=waste,
        target=WASTE_TARGET if decode.batch == 256 else None,
        met=waste < WASTE_TARGET if decode.batch == 256 else None,
        peak=after.kv_usage_peak,
        preemptions=after.num_preemptions - before.num_preemptions,
    )


def measure_prefill(part: Part, llm: LLM) -> None:
    """Prompt tokens a second when each request wants one token only."""
    count, length = part.choose((64, 1024), (24, 1024), (2, 6))
    prompts = random_prompts(part, count, length)
    begin = time.perf_counter()
    llm.generate(prompts, greedy(1))
    seconds = time.perf_counter() - begin
    note = f"{count} prompts of {length}"
    add(part, "prefill", count * length / seconds, "tok/s", note, PREFILL_TARGET, PREFILL_ROOFLINE)


def sample_of_conversations(part: Part, count: int) -> list[Conversation]:
    """The first `count` of those that the engine is given."""
    total = part.choose(1000, 200, 3)
    return conversations(total, vocab_size(part), longest=4 if part.tiny else 1024)[:count]


def measure_conversations(part: Part, llm: LLM) -> None:
    """All at once, offline: output tokens a second from the first request to the last token."""
    given = sample_of_conversations(part, 1000)
    params = [greedy(one.num_output_tokens) for one in given]
    begin = time.perf_counter()
    outputs = llm.generate([one.prompt_token_ids for one in given], params)
    seconds = time.perf_counter() - begin
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert num_tokens == sum(one.num_output_tokens for one in given)
    num_prompt_tokens = sum(len(one.prompt_token_ids) for one in given)
    note = f"{len(given)} requests, {num_prompt_tokens} tokens in, {num_tokens} out, {seconds:.1f} s"
    add(part, "ShareGPT-like, offline", num_tokens / seconds, "output tok/s", note, CONVERSATION_TARGET)
