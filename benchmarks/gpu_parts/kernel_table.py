"""What each kernel reaches, beside what a copy and a matrix product reach on the same GPU in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from gpu_parts.attention_check import PLAIN, TINY_PLAIN
from gpu_parts.kernels_check import RULES, make_kernels, sampling_inputs
from gpu_parts.part import Part
from gpu_parts.scene import Lengths, batch_layout, make_backend, make_state, num_blocks_of, registry, rotary_of
from gpu_parts.timing import Launch, num_copies, seconds_of
from octavo.interfaces.attention import AttentionBackend, AttentionParameters, BatchLayout
from octavo.interfaces.kernels import Kernels, SamplingInputs
from octavo.plugins.specs import AttentionNeed


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceiling:
    """What the machine does at most: bytes read and written a second by a copy, operations a second by a product."""

    bytes_per_second: float
    flops_per_second: float


def run(part: Part) -> None:
    ceiling = measure_ceiling(part)
    seconds = 0 if part.tiny else 3
    for name, lengths, changes, target in attention_cases(part):
        work = partial(time_attention, part, ceiling, name, lengths, changes, target)
        part.attempt(f"{name} {shape_text(lengths)}", work, seconds=seconds)
    part.attempt("torch's own attention", partial(time_sdpa, part, ceiling), seconds=seconds)
    for num_tokens, target in part.choose(((256, "10 us"), (8192, "")), ((256, "10 us"),), ((4, ""),)):
        work = partial(time_write, part, ceiling, num_tokens, target)
        part.attempt(f"rotate and write K/V of {num_tokens} tokens", work, seconds=seconds)
    chosen, _ = make_kernels(part.device, "bfloat16")
    for name in dict.fromkeys((chosen, "torch")):
        part.attempt(f"norms and activations of {name}", partial(time_norms, part, ceiling, name), seconds=seconds)
        part.attempt(f"sampling of {name}", partial(time_sampling, part, ceiling, name), seconds=seconds)


# ----------------------------------------------------------------------------------------------------- ceilings


def measure_ceiling(part: Part) -> Ceiling:
    """A copy of a gigabyte, and a product of 8192 x 8192 random bfloat16 matrices."""
    size, seconds, method = time_copy(part)
    bytes_per_second = 2 * size / seconds
    part.add("kernels", kernel="torch copy", shape=f"{size / 2**20:.0f} MiB", us=seconds * 1e6, method=method,
             tb_s=bytes_per_second / 1e12)  # fmt: skip
    side = part.choose(8192, 8192, 64)
    one, other = (torch.randn(side, side, device=part.device).bfloat16() for _ in range(2))
    seconds, method = seconds_of([lambda: one @ other] * 4, part.on_gpu)
    flops_per_second = 2 * side**3 / seconds
    part.add("kernels", kernel="torch matmul", shape=f"{side}^3 bf16", us=seconds * 1e6, method=method,
             tflops=flops_per_second / 1e12)  # fmt: skip
    return Ceiling(bytes_per_second=bytes_per_second, flops_per_second=flops_per_second)


def time_copy(part: Part) -> tuple[int, float, str]:
    """(bytes that are read and written again, seconds, how it was measured)."""
    size = part.choose(2**30, 2**30, 2**16)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    return size, *seconds_of([lambda: target.copy_(source)] * 2, part.on_gpu)


def report(
    part: Part,
    ceiling: Ceiling,
    kernel: str,
    shape: str,
    launches: list[Launch],
    *,
    num_bytes: float = 0,
    num_flops: float = 0,
    target: str = "",
) -> None:
    """Time it and add its row; `target` is "80 % copy", "400 TFLOP/s", "10 us" or nothing."""
    seconds, method = seconds_of(launches, part.on_gpu)
    tb_s, tflops = num_bytes / seconds / 1e12, num_flops / seconds / 1e12
    copy_share = num_bytes / seconds / ceiling.bytes_per_second
    number = float(target.split()[0]) if target else 0.0
    met = {
        "copy": copy_share >= number / 100,
        "TFLOP/s": tflops >= number,
        "us": seconds * 1e6 <= number,
        "": None,
    }[target.split()[-1] if target else ""]
    part.add(
        "kernels",
        kernel=kernel,
        shape=shape,
        us=seconds * 1e6,
        tb_s=tb_s or None,
        copy_share=copy_share or None,
        tflops=tflops or None,
        matmul_share=num_flops / seconds / ceiling.flops_per_second or None,
        target=target,
        met=met if part.on_gpu else None,
        method=method,
    )


# ---------------------------------------------------------------------------------------------------- attention


def attention_cases(part: Part) -> Iterator[tuple[str, Lengths, dict[str, str], str]]:
    """(backend, lengths, changes of the need, target); what has a target first."""
    if part.tiny:
        yield "triton-paged", [(20, 1)], {}, ""
        yield "triton-flash", [(0, 5)], {}, ""
        return
    yield "triton-paged", [(1024, 1)] * 64, {}, "80 % copy"
    yield "triton-paged", [(8191, 1)], {}, "50 % copy"
    yield "triton-flash", [(0, 4096)] * 2, {}, "400 TFLOP/s"
    yield "triton-flash", [(0, 8192)], {}, "400 TFLOP/s"
    yield "triton-paged", [(1024, 1)] * 64, {"kv_cache_dtype": "fp8"}, ""
    if part.quick:
        return
    for batch, context in ((256, 1024), (32, 1024), (32, 4095)):
        yield "triton-paged", [(context, 1)] * batch, {}, "80 % copy"
    yield "triton-paged", [(1024, 1)], {}, ""
    yield "triton-paged", [(50 + 31 * n % 2000, 1) for n in range(128)], {}, ""
    yield "triton-flash", [(0, 1024)] * 8, {}, ""
    yield "triton-flash", [(6144, 2048)], {}, ""
    yield "triton-flash", [*[(1024, 1)] * 64, (0, 2048), (2048, 2048)], {}, ""
    for name in other_backends(part):
        yield name, [(1024, 1)] * 64, {}, ""
        yield name, [(0, 4096)] * 2, {}, ""
    yield "triton-flash", [(1024, 1)] * 64, {}, ""


def other_backends(part: Part) -> list[str]:
    """What else is installed and could serve here: torch's, and libraries of attention."""
    need = AttentionNeed(device=part.device, features=frozenset({"prefill", "decode"}), **PLAIN)
    able = [one.full_name for one in registry().ask("attention", need) if not one.reasons]
    return [name for name in able if not name.endswith(("/triton-paged", "/triton-flash"))]


def shape_text(lengths: Lengths) -> str:
    decodes = [context + new for context, new in lengths if new == 1]
    prefills = [(context, new) for context, new in lengths if new > 1]
    parts = []
    if decodes:
        span = f"{min(decodes)}" if len(set(decodes)) == 1 else f"{min(decodes)}-{max(decodes)}"
        parts.append(f"{len(decodes)} x 1 of {span}")
    for one in dict.fromkeys(prefills):
        parts.append(f"{prefills.count(one)} x {one[1]}" + (f" behind {one[0]}" if one[0] else ""))
    return " + ".join(parts)


def time_attention(
    part: Part, ceiling: Ceiling, name: str, lengths: Lengths, changes: dict[str, str], target: str
) -> None:
    """`forward` of one layer: writing the step's keys and values, and attention. Llama-3-8B's heads."""
    plain = {**(TINY_PLAIN if part.tiny else PLAIN), **changes}
    features = {"prefill", "decode"} | ({"fp8_kv_cache"} if changes else set())
    need = AttentionNeed(device=part.device, features=frozenset(features), **plain)
    backend = make_backend(name, need)
    layout = batch_layout(lengths, need.block_size, part.device)
    num_bytes, num_flops = attention_work(backend, lengths)
    launches = attention_launches(part, backend, layout, lengths, num_copies(num_bytes, part.tiny))
    is_prefill = any(new > 1 for _, new in lengths)
    report(
        part,
        ceiling,
        f"{name}, {'prefill' if is_prefill else 'decode'}{', fp8 cache' if changes else ''}",
        shape_text(lengths),
        launches,
        num_bytes=0 if is_prefill else num_bytes,
        num_flops=num_flops if is_prefill else 0,
        target=target,
    )


def attention_work(backend: AttentionBackend, lengths: Lengths) -> tuple[int, int]:
    """(bytes that must be read and written, floating-point operations): each visible pair costs 4 x head_dim a head."""
    need = backend.need
    bytes_per_token = backend.kv_layout().bytes_per_block // need.block_size
    num_new = sum(new for _, new in lengths)
    num_bytes = sum(context + new for context, new in lengths) * bytes_per_token
    num_bytes += 2 * num_new * need.head_dim * 2 * (need.num_heads + need.num_kv_heads)
    num_pairs = sum(context * new + new * (new + 1) // 2 for context, new in lengths)
    return num_bytes, 4 * num_pairs * need.head_dim * need.num_heads


def attention_launches(
    part: Part, backend: AttentionBackend, layout: BatchLayout, lengths: Lengths, copies: int
) -> list[Launch]:
    """The same planned step over as many caches, each with its own tensors: what a model's layers are."""
    need = backend.need
    state = make_state(backend, layout)
    backend.plan(layout, state)
    parameters = AttentionParameters(scale=need.head_dim**-0.5)

    def launch_on_new_data() -> Launch:
        cache = backend.kv_layout().allocate(num_blocks_of(lengths, need.block_size), part.device)
        for buffer in cache:
            if buffer.dtype == torch.float8_e4m3fn:  # every byte but NaN's
                buffer.view(torch.uint8).random_(0, 127)
            else:
                buffer.normal_()
        tensors = random_qkv(part, need, layout.num_tokens)
        return lambda: backend.forward(*tensors, cache, state, parameters)

    return [launch_on_new_data() for _ in range(copies)]


def time_sdpa(part: Part, ceiling: Ceiling) -> None:
    """torch's scaled_dot_product_attention over contiguous tensors, without pages: what there was already."""
    batch, length, heads, size = part.choose((2, 4096, 32, 128), (2, 4096, 32, 128), (1, 8, 2, 64))
    query, key, value = (
        torch.randn(batch, heads, length, size, device=part.device, dtype=torch.bfloat16) for _ in range(3)
    )
    num_flops = 4 * batch * heads * size * length * (length + 1) // 2
    launch = lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True)  # noqa: E731
    report(part, ceiling, "torch sdpa, prefill", f"{batch} x {length}", [launch] * 4, num_flops=num_flops)


def time_write(part: Part, ceiling: Ceiling, num_tokens: int, target: str) -> None:
    """Rotation and the writing of keys and values into pages, one launch; each token the last of a block of its own."""
    from octavo_attention_triton.cache import rotate_and_write_kv  # here: a report of the rest does not need it

    plain = TINY_PLAIN if part.tiny else PLAIN
    need = AttentionNeed(device=part.device, features=frozenset({"decode"}), **plain)
    backend = make_backend("triton-paged", need)
    lengths = [(need.block_size - 1, 1)] * num_tokens
    layout = batch_layout(lengths, need.block_size, part.device)
    rotary = rotary_of(layout, need.head_dim, torch.bfloat16)

    def launch_on_new_data() -> Launch:
        cache = backend.kv_layout().allocate(num_blocks_of(lengths, need.block_size), part.device)
        tensors = random_qkv(part, need, num_tokens)
        return lambda: rotate_and_write_kv(*tensors, rotary, cache, layout.slot_mapping)

    # Query read and written, key and value read, key and value written.
    num_bytes = num_tokens * need.head_dim * 2 * (2 * need.num_heads + 4 * need.num_kv_heads)
    launches = [launch_on_new_data() for _ in range(num_copies(num_bytes, part.tiny))]
    shape = f"{num_tokens} tokens"
    report(part, ceiling, "rotate and write K/V", shape, launches, num_bytes=num_bytes, target=target)


def random_qkv(part: Part, need: AttentionNeed, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a step."""
    query, key, value = (
        torch.randn(num_tokens, heads, need.head_dim, device=part.device).bfloat16()
        for heads in (need.num_heads, need.num_kv_heads, need.num_kv_heads)
    )
    return query, key, value


# ---------------------------------------------------------------------------------------------------- the others


def time_norms(part: Part, ceiling: Ceiling, name: str) -> None:
    """Norms and gated activations of Llama-3-8B's sizes."""
    _, kernels = make_kernels(part.device, "bfloat16", name)
    hidden_size, inner_size = part.choose((4096, 14336), (4096, 14336), (64, 96))

    def norm(x: Tensor) -> object:
        return kernels.add_rms_norm(x[0], x[1], x[0, 0], 1e-5)

    def activation(x: Tensor) -> object:
        return kernels.gated_activation("silu", *x.chunk(2, dim=-1))

    for rows in part.choose((256, 8192), (256,), (2,)):
        shape, num_bytes = (2, rows, hidden_size), rows * hidden_size * 2 * 4
        launches = _on_copies(part, num_bytes, shape, norm)
        report(part, ceiling, f"{name}: add_rms_norm", f"{rows} x {hidden_size}", launches, num_bytes=num_bytes)
        num_bytes = rows * inner_size * 2 * 3
        launches = _on_copies(part, num_bytes, (rows, 2 * inner_size), activation)
        report(part, ceiling, f"{name}: silu * up", f"{rows} x {inner_size}", launches, num_bytes=num_bytes)


def time_sampling(part: Part, ceiling: Ceiling, name: str) -> None:
    """A token for each of 256 rows over 128,256 logits; bytes are those of reading the logits once."""
    _, kernels = make_kernels(part.device, "bfloat16", name)
    rows, vocab_size = part.choose((256, 128256), (256, 128256), (2, 300))
    for rule in part.choose(RULES, ("greedy", "plain", "all"), ("plain",)):
        inputs = sampling_inputs(rows, rule, part.device)
        num_bytes, target = rows * vocab_size * 2, "" if name == "torch" or part.tiny else "300 us"
        launches = _on_copies(part, num_bytes, (rows, vocab_size), partial(_sample, kernels, inputs))
        shape = f"{rows} x {vocab_size}"
        report(part, ceiling, f"{name}: sample, {rule}", shape, launches, num_bytes=num_bytes, target=target)


def _sample(kernels: Kernels, inputs: SamplingInputs, logits: Tensor) -> object:
    return kernels.sample(logits, inputs)


def _on_copies(part: Part, num_bytes: int, shape: tuple[int, ...], work: Callable[[Tensor], object]) -> list[Launch]:
    """`work` on tensors of normal numbers, spread as a model's logits are."""
    count = num_copies(num_bytes, part.tiny)
    return [partial(work, torch.randn(shape, device=part.device).mul_(4).bfloat16()) for _ in range(count)]
