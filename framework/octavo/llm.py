"""LLM: the Python user's door. Prompts in, finished outputs back."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from types import FrameType, TracebackType
from typing import Any, TypeVar

from octavo.assemble import assemble
from octavo.beam_search.data import BeamSearchOutput, BeamSearchParams
from octavo.beam_search.search import BeamSearch, run_beam_searches
from octavo.engine.engine import EngineOutput
from octavo.engine.stats import EngineStats
from octavo.errors import RequestError
from octavo.explanation import Explanation, explain_selection
from octavo.input_processor import Prompt, default_sampling_params
from octavo.interfaces.executor import ExecutorReport
from octavo.interfaces.manifest import Manifest
from octavo.lora.adapter import Adapter, AdapterStatus
from octavo.lora.request import AdapterWish, LoRARequest, adapter_wishes
from octavo.outputs import RequestOutput
from octavo.progress import MakeBar, generation_bar
from octavo.sampling_params import SamplingParams
from octavo.settings import Settings, as_settings
from octavo.tokenizer import Tokenizer

Message = Mapping[str, Any]

_T = TypeVar("_T")


class LLM:
    """A model, loaded and ready. `LLM("demo")`, every field of EngineConfig by name, or a YAML file with the same.

    Usable as a context manager; `shutdown()` frees the model's memory.
    """

    def __init__(
        self, model: str | None = None, *, config: str | os.PathLike[str] | Settings | None = None, **settings: Any
    ) -> None:
        """Load `model` with `settings`, the fields of EngineConfig.

        Args:
            model: the field of that name; the demo model when nothing says another.
            config: a YAML file with the same names, or settings already read; what is given here goes before it.

        Raises:
            ConfigError: a setting is wrong, or a named component cannot serve.
            ModelNotFoundError, CheckpointError: the model is not there or not readable.
        """
        self.settings = as_settings(model, config, settings)
        self.config = self.settings.config
        self._assembly = assemble(self.config)
        self.engine = self._assembly.engine
        self._request_ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | MakeBar = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        priority: int | Sequence[int] | None = None,
        tenant: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts.

        Args:
            prompts: one or many; each a text, a list of token ids, or a dict with "prompt" or "prompt_token_ids".
            sampling_params: one for all, or one for each prompt; default `get_default_sampling_params()`.
            use_tqdm: a progress bar, where standard error is a terminal; or what makes it, called as tqdm is.
            lora_request: the LoRA adapter to answer with, one for all, or one (or None) for each prompt; read when its
                name is not known yet.
            adapter: the same by name alone: of one that is loaded, or that lora_root or a resolver finds.
            priority: one for all, or one for each prompt; lower is served earlier, default 0.
            tenant: who asks: one for all, or one (or None) for each prompt. Priority and tenant are for the scheduler
                policy; one that does not go by them, such as the built-in "fcfs", passes over them.

        Raises:
            RequestError: a prompt or its parameters cannot be served; then none of them was started.
            AdapterError: an adapter is not known or cannot be served; then none of them was started.
            EngineDeadError: the engine stopped; the cause is chained.
        """
        wanted = _as_list(prompts)
        with generation_bar(len(wanted), use_tqdm) as show:
            outputs = self._add(
                wanted,
                self._params_for_each(sampling_params, len(wanted)),
                _for_each(0 if priority is None else priority, len(wanted), "priorities"),
                _for_each(tenant, len(wanted), "tenants"),
                adapter_wishes(lora_request, adapter, len(wanted)),
            )
            for _ in self._run(outputs):
                show(outputs)
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | MakeBar = True,
        add_generation_prompt: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        priority: int | Sequence[int] | None = None,
        tenant: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of {"role", "content"}, through the model's template.

        What else is given is as in `generate`, for each conversation.
        """
        is_one = any(isinstance(message, Mapping) for message in messages)
        conversations: Sequence[Any] = [messages] if is_one else messages
        prompts = [self._chat_prompt(conversation, add_generation_prompt) for conversation in conversations]
        return self.generate(
            *(prompts, sampling_params),
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            adapter=adapter,
            priority=priority,
            tenant=tenant,
        )

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
        adapter: str | None = None,
        priority: int = 0,
        tenant: str | None = None,
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding its growing output after each step that changed it; the last is finished.

        Leaving the loop early aborts the request. Other prompts may be run meanwhile: they share the steps.
        What else is given is as in `generate`.
        """
        wishes = adapter_wishes(lora_request, adapter, 1)
        outputs = self._add([prompt], self._params_for_each(sampling_params, 1), [priority], [tenant], wishes)
        shown = _progress(outputs[0])
        for _ in self._run(outputs):
            if shown != (shown := _progress(outputs[0])):
                yield outputs[0]
        if shown != _progress(outputs[0]):  # it ended in a step that was made for another prompt
            yield outputs[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
        adapter: str | None = None,
        priority: int = 0,
        tenant: str | None = None,
    ) -> Iterator[RequestOutput]:
        """Like `stream`, for one conversation."""
        return self.stream(
            *(self._chat_prompt(messages, True), sampling_params),
            lora_request=lora_request,
            adapter=adapter,
            priority=priority,
            tenant=tenant,
        )

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[BeamSearchOutput]:
        """For every prompt the `beam_width` sequences that a beam search finds, as transformers' `generate` does.

        Each beam is a request on blocks shared with the others. As many prompts are searched at once as have room for
        all their beams in one batch. `lora_request` and `adapter` as in `generate`.

        Raises:
            RequestError: a prompt cannot be served, or `beam_width` is above max_num_seqs; then none was started.
            EngineDeadError: the engine stopped; the cause is chained.
        """
        if not isinstance(params, BeamSearchParams):
            raise RequestError(f"Beam search takes BeamSearchParams(...); found {type(params).__name__}.")
        searches, wanted = [], _as_list(prompts)
        wishes = adapter_wishes(lora_request, adapter, len(wanted))
        adapters = {wish: self._adapter(wish) for wish in dict.fromkeys(wishes)}
        for prompt, wish in zip(wanted, wishes, strict=True):
            _text, token_ids = self._assembly.inputs.tokenize(prompt)
            request_id = str(next(self._request_ids))
            searches.append(
                BeamSearch(self.engine, self._assembly.inputs, request_id, token_ids, params, adapters[wish])
            )
        at_once = self.config.max_num_seqs // params.beam_width
        with closing(run_beam_searches(searches, self._step, at_once)) as steps:
            num_left: int | None = len(searches)
            while num_left is not None:
                with _interrupts_held():
                    num_left = next(steps, None)
        while self.engine.is_draining:
            self._step()
        return [search.output(self._assembly.tokenizer) for search in searches]

    def load_adapter(self, name: str, path: str, *, replace: bool = False) -> AdapterStatus:
        """Read a LoRA adapter, a PEFT folder or a Hugging Face id, so that prompts can name it.

        Args:
            replace: swap it for the one of this name between two steps; requests that run keep the old weights.

        Raises:
            AdapterError: it cannot be served, or the name is another's; says why.
            ConfigError: the engine serves no adapters.
        """
        loading = self.engine.load_adapter(name, path, replace=replace)
        while not loading.done():
            self._step()
        loading.result()
        return next(status for status in self.engine.adapters() if status.name == name)

    def unload_adapter(self, name: str, *, abort: bool = False) -> None:
        """Forget an adapter; its memory is free once its requests have ended.

        Args:
            abort: end them now.

        Raises:
            AdapterError: there is none of that name.
        """
        self.engine.unload_adapter(name, abort=abort)

    def pin_adapter(self, name: str, *, pinned: bool = True) -> None:
        """Let an adapter keep its place in memory and on the device, or no longer.

        Raises:
            AdapterError: there is none of that name, or no position would be left for others.
        """
        self.engine.pin_adapter(name, pinned=pinned)

    def adapters(self) -> list[AdapterStatus]:
        """The adapters that are known, and how each stands; [] when the engine serves none."""
        return self.engine.adapters()

    def explain(self) -> Explanation:
        """What was chosen for every socket, what was refused and why, and where each setting is from."""
        return explain_selection(self._assembly.selection, self.settings)

    def stats(self) -> EngineStats:
        """How the engine stands, and what it has done since start."""
        return self.engine.stats()

    @property
    def start_report(self) -> ExecutorReport:
        """What start-up found: KV blocks, bytes of weights and KV cache, seconds of each phase."""
        return self._assembly.report

    @property
    def manifest(self) -> Manifest:
        """The model's path, device and dtype, and the component chosen of each kind."""
        return self._assembly.manifest

    def get_default_sampling_params(self) -> SamplingParams:
        """What is sampled with when none are given: the defaults, changed as the model's generation_config.json
        recommends unless the setting `generation_config` is "none".

        Raises:
            ConfigError: what it recommends is out of range.
        """
        return self._default_params

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: encode, decode, apply_chat_template."""
        return self._assembly.tokenizer

    def shutdown(self) -> None:
        """Free the model's memory; the object takes no more prompts. May be called twice."""
        self.engine.stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _chat_prompt(self, messages: Sequence[Message], add_generation_prompt: bool) -> Prompt:
        if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
            raise RequestError(
                'A conversation is a list of messages, each {"role": ..., "content": ...}; found '
                f"{str(messages)[:100]!r}."
            )
        token_ids = self._assembly.tokenizer.encode_chat(messages, add_generation_prompt=add_generation_prompt)
        return {"prompt_token_ids": token_ids}

    @cached_property
    def _default_params(self) -> SamplingParams:
        recommended = self._assembly.selection.files.checkpoint.generation_config()
        return default_sampling_params(self.config.generation_config, recommended)

    def _params_for_each(
        self, params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> Sequence[SamplingParams]:
        return _for_each(self._default_params if params is None else params, num_prompts, "SamplingParams")

    def _adapter(self, wish: AdapterWish) -> Adapter | None:
        """What a request is bound to: loaded first, where its name is not known yet."""
        if wish is None:
            return None
        if isinstance(wish, LoRARequest):
            name, path = wish.name, wish.path
            known = self.engine.knows_adapter(name, path)  # of another path: refused
            if wish.load_inplace or not known:
                self.load_adapter(name, path, replace=known)
        elif not self.engine.knows_adapter(name := wish):
            self.load_adapter(name, self._assembly.finder.find(name))
        return self.engine.adapter(name)

    def _add(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        priorities: Sequence[int],
        tenants: Sequence[str | None],
        wishes: Sequence[AdapterWish],
    ) -> list[RequestOutput]:
        """Check all prompts, then queue all of them."""
        adapters = {wish: self._adapter(wish) for wish in dict.fromkeys(wishes)}
        checked = []
        for prompt, each, priority, tenant, wish in zip(prompts, params, priorities, tenants, wishes, strict=True):
            request_id = str(next(self._request_ids))
            text, token_ids = self._assembly.inputs.tokenize(prompt)
            request = self._assembly.inputs.request(
                request_id, token_ids, each, priority=priority, tenant=tenant, adapter=adapters[wish]
            )
            checked.append((request_id, text, each, request))
        outputs: list[RequestOutput] = []
        try:
            for request_id, text, each, request in checked:
                outputs.append(
                    self._assembly.outputs.add(request_id, text, request.prompt_token_ids, each, request.arrival_time)
                )
                self.engine.add(request)
        except BaseException:
            self._abort(outputs)
            raise
        return outputs

    def _run(self, outputs: Sequence[RequestOutput]) -> Iterator[None]:
        """Step until all of `outputs` are finished, pausing after each step; abort them if the loop is left."""
        try:
            while not all(output.finished for output in outputs):
                with _interrupts_held():
                    engine_outputs = self._step()
                if engine_outputs:
                    yield
        finally:
            self._abort(outputs)
        while self.engine.is_draining:
            self._step()

    def _step(self) -> list[EngineOutput]:
        """One step of the engine, with what it gives to the prompts under way."""
        engine_outputs = self.engine.step()
        for request_id in self._assembly.outputs.process(engine_outputs, time.monotonic()).to_stop:
            self.engine.abort(request_id, "stop")
        return engine_outputs

    def _abort(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            for request_id in self._assembly.outputs.abort(output):
                self.engine.abort(request_id)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end: a step cut short leaves an engine that cannot go on. A second one cuts."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def _progress(output: RequestOutput) -> tuple[int, bool]:
    return sum(len(completion.token_ids) for completion in output.outputs), output.finished


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Several prompts as they are, one as a list of one; so is whatever can be neither, for `tokenize` to refuse."""
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _for_each(value: _T | Sequence[_T], num_prompts: int, what: str) -> Sequence[_T]:
    """One value for all prompts, or one for each."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise RequestError(f"{num_prompts} prompts came with {len(value)} {what}; give one, or one for each.")
    return value
