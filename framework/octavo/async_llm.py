"""AsyncLLM: the engine in a thread of its own, answers as asynchronous streams."""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, TypeVar

from octavo.assemble import assemble
from octavo.errors import AdapterError, EngineDeadError, RequestError
from octavo.explanation import Explanation, explain_selection
from octavo.input_processor import Prompt, default_sampling_params
from octavo.lora.adapter import AdapterStatus
from octavo.lora.request import AdapterWish, LoRARequest, adapter_wishes
from octavo.output_processor import snapshot
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.settings import Settings, as_settings
from octavo.tokenizer import Tokenizer

_Answer = RequestOutput | BaseException
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    """Where a prompt's outputs go: a queue of the event loop that asked."""

    loop: asyncio.AbstractEventLoop
    answers: asyncio.Queue[_Answer]

    def put(self, answer: _Answer) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.answers.put_nowait, answer)


class AsyncLLM:
    """Like LLM, for asyncio: any number of `generate` streams run in one batch.

    One thread owns the engine; what others want of it goes through one queue of commands, so nothing is locked.
    """

    def __init__(
        self, model: str | None = None, *, config: str | os.PathLike[str] | Settings | None = None, **settings: Any
    ) -> None:
        """Load `model` with `settings`, the fields of EngineConfig, or those of the YAML file `config`; as LLM does."""
        self.settings = as_settings(model, config, settings)
        self.config = self.settings.config
        self._assembly = assemble(self.config)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open: dict[str, tuple[RequestOutput, _Stream]] = {}
        self._failure: BaseException | None = None
        self._stopping = False
        self._ended = threading.Event()
        self._request_ids = itertools.count()
        self._thread = threading.Thread(target=self._serve, name="octavo-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | None = None,
        adapter: str | None = None,
        priority: int = 0,
        tenant: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the growing output of one prompt; the last one is finished.

        Closing the stream, or cancelling the task that reads it, aborts the request.

        Args:
            lora_request, adapter: the LoRA adapter to answer with, as in `LLM.generate`.
            priority, tenant: for the scheduler policy, as in `LLM.generate`.

        Raises:
            RequestError: the prompt or its parameters cannot be served, or the id is in use.
            AdapterError: the adapter is not known or cannot be served.
            EngineDeadError: the engine stopped; the cause is chained.
        """
        params = sampling_params if sampling_params is not None else self._default_params
        name = request_id if request_id is not None else f"request-{next(self._request_ids)}"
        text, token_ids = self._assembly.inputs.tokenize(prompt)
        adapter_name = await self._adapter_name(*adapter_wishes(lora_request, adapter, 1))
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        self._command(lambda: self._add(name, text, token_ids, params, priority, tenant, adapter_name, stream))
        ended = False
        try:
            while not ended:
                answer = await stream.answers.get()
                if isinstance(answer, BaseException):
                    ended = True
                    raise answer
                ended = answer.finished
                yield answer
        finally:
            if not ended:
                self._commands.put(lambda: self._abort(name, stream))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream yields a last output with finish_reason "abort". Unknown ids are no error."""
        self._command(lambda: self._abort(request_id))

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> AdapterStatus:
        """Read a LoRA adapter while requests run, as `LLM.load_adapter`.

        Raises:
            AdapterError: it cannot be served, or the name is another's; says why.
            ConfigError: the engine serves no adapters.
        """
        engine = self._assembly.engine
        loading = await self._ask(lambda: engine.load_adapter(name, path, replace=replace))
        await asyncio.shield(asyncio.wrap_future(loading))
        for status in await self.adapters():
            if status.name == name:
                return status
        raise AdapterError(f"Adapter {name!r} was unloaded as soon as it had been loaded.")

    async def unload_adapter(self, name: str, *, abort: bool = False) -> None:
        """Forget an adapter; return when its requests have ended and its memory is free.

        Args:
            abort: end them now.

        Raises:
            AdapterError: there is none of that name.
        """
        unloading = await self._ask(lambda: self._assembly.engine.unload_adapter(name, abort=abort))
        await asyncio.shield(asyncio.wrap_future(unloading))

    async def pin_adapter(self, name: str, *, pinned: bool = True) -> None:
        """Let an adapter keep its place, or no longer, as `LLM.pin_adapter`."""
        await self._ask(lambda: self._assembly.engine.pin_adapter(name, pinned=pinned))

    async def adapters(self) -> list[AdapterStatus]:
        """The adapters that are known, and how each stands; [] when the engine serves none."""
        return await self._ask(self._assembly.engine.adapters)

    def explain(self) -> Explanation:
        """What was chosen for every socket, what was refused and why, and where each setting is from."""
        return explain_selection(self._assembly.selection, self.settings)

    def get_default_sampling_params(self) -> SamplingParams:
        """What is sampled with when none are given, as `LLM.get_default_sampling_params`."""
        return self._default_params

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: encode, decode, apply_chat_template."""
        return self._assembly.tokenizer

    @property
    def num_unfinished(self) -> int:
        """Prompts being worked on."""
        return len(self._open)

    def shutdown(self) -> None:
        """End every open stream with EngineDeadError and free the model's memory. May be called twice."""
        self._commands.put(self._stop)
        self._thread.join()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    @cached_property
    def _default_params(self) -> SamplingParams:
        recommended = self._assembly.selection.files.checkpoint.generation_config()
        return default_sampling_params(self.config.generation_config, recommended)

    async def _adapter_name(self, wish: AdapterWish) -> str | None:
        """Of an adapter that is known: loaded first, where it was not."""
        if wish is None:
            return None
        engine = self._assembly.engine
        if isinstance(wish, LoRARequest):
            known = engine.knows_adapter(wish.name, wish.path)  # of another path: refused
            if wish.load_inplace or not known:
                await self.load_adapter(wish.name, wish.path, replace=known)
            return wish.name
        if not engine.knows_adapter(wish):
            await self.load_adapter(wish, await asyncio.to_thread(self._assembly.finder.find, wish))
        return wish

    async def _ask(self, call: Callable[[], _T]) -> _T:
        """What a call gives that is made on the engine's thread, between two steps."""
        answer: Future[_T] = Future()

        def command() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # who asked was cancelled
            try:
                answer.set_result(call())
            except BaseException as error:  # whatever it is, it is the asker's
                answer.set_exception(error)

        self._command(command)
        return await asyncio.wrap_future(answer)

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        if self._ended.is_set():  # asked after `put`: a command put before that is still taken
            raise _dead(self._failure)

    # ------------------------------------------------------------------------------------- the engine's thread

    def _serve(self) -> None:
        """Step while there is work, take commands between steps, wait for one while there is none."""
        try:
            while not self._stopping:
                while not self._commands.empty() or not (self._assembly.engine.has_unfinished or self._stopping):
                    self._commands.get()()
                if not self._stopping:
                    self._step()
            self._failure = RuntimeError("it was shut down")
        except BaseException as error:
            self._failure = error
        finally:
            self._ended.set()
            while not self._commands.empty():
                with suppress(Exception):  # the engine may be in any state; who is still waiting is told below
                    self._commands.get()()
            for _, stream in self._open.values():
                stream.put(_dead(self._failure))
            self._open.clear()
            self._assembly.engine.stop()

    def _step(self) -> None:
        processed = self._assembly.outputs.process(self._assembly.engine.step(), time.monotonic())
        for request_id in processed.to_stop:
            self._assembly.engine.abort(request_id, "stop")
        for output in processed.changed:
            self._publish(output)

    def _add(
        self,
        request_id: str,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams,
        priority: int,
        tenant: str | None,
        adapter_name: str | None,
        stream: _Stream,
    ) -> None:
        output = None
        try:
            if request_id in self._open:
                raise RequestError(f"Request id {request_id!r} is in use; ids must be unique while they run.")
            adapter = None if adapter_name is None else self._assembly.engine.adapter(adapter_name)
            request = self._assembly.inputs.request(
                request_id, token_ids, params, priority=priority, tenant=tenant, adapter=adapter
            )
            output = self._assembly.outputs.add(
                request_id, text, request.prompt_token_ids, params, request.arrival_time
            )
            self._assembly.engine.add(request)
        except Exception as error:  # whatever it is, it is this request's
            self._end(output)
            stream.put(error)
        else:
            self._open[request_id] = (output, stream)

    def _abort(self, request_id: str, of_stream: _Stream | None = None) -> None:
        """End a request; with `of_stream` only while it is still that stream's, for an id may be used again."""
        output, stream = self._open.get(request_id, (None, None))
        if output is not None and of_stream in (None, stream):
            self._end(output)
            self._publish(output)

    def _end(self, output: RequestOutput | None) -> None:
        if output is not None:
            for engine_request_id in self._assembly.outputs.abort(output):
                self._assembly.engine.abort(engine_request_id)

    def _publish(self, output: RequestOutput) -> None:
        _, stream = self._open[output.request_id]
        if output.finished:
            del self._open[output.request_id]
        stream.put(snapshot(output))

    def _stop(self) -> None:
        self._stopping = True


def _dead(cause: BaseException | None) -> EngineDeadError:
    error = EngineDeadError(f"The engine is not running: {cause}")
    error.__cause__ = cause
    return error
