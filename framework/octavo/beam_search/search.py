"""BeamSearch: one prompt's beams as requests of a running engine, forked on shared blocks as the search branches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace

from octavo.beam_search.data import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
from octavo.beam_search.selection import Beam, BeamSelection, FinishedBeam
from octavo.engine.engine import Engine, EngineOutput
from octavo.errors import AdapterError, RequestError
from octavo.input_processor import InputProcessor
from octavo.logprob_texts import LogprobTexts
from octavo.lora.adapter import Adapter
from octavo.outputs import TokenLogprobs
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from octavo.tokenizer import Tokenizer


class BeamSearch:
    """The search of one prompt. Each running beam is a request whose tokens are chosen here, none computed twice.

    Start it, give it what each of the engine's steps gave until it is finished, then read its output.

    Raises:
        RequestError: the prompt cannot be served, or the beams do not fit in one batch.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: InputProcessor,
        request_id: str,
        prompt_token_ids: list[int],
        params: BeamSearchParams,
        adapter: Adapter | None = None,
    ) -> None:
        most = engine.scheduler.max_num_seqs
        if params.beam_width > most:
            raise RequestError(
                f"beam_width is {params.beam_width}, and each beam is a request of the batch, which holds "
                f"max_num_seqs, {most}. Lower beam_width or raise max_num_seqs."
            )
        self._engine = engine
        self._params = params
        sampling = SamplingParams(
            temperature=0.0, max_tokens=params.max_tokens, ignore_eos=params.ignore_eos, logprobs=0, detokenize=False
        )
        request = inputs.request(request_id, prompt_token_ids, sampling, adapter=adapter)
        self._selection = BeamSelection(
            beam_width=params.beam_width,
            max_tokens=request.max_total_tokens - len(request.prompt_token_ids),
            end_token_ids=request.eos_token_ids,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
        )
        sampling = replace(sampling, logprobs=self._selection.num_candidates)
        self._template = replace(request, params=sampling, chosen_outside=True)
        self._num_requests = 0
        self._running: dict[str, Beam] = {}  # by request id, in the order of the selection
        self._logprobs: dict[str, TokenLogprobs] = {}  # after each beam, until all of them are there

    @property
    def finished(self) -> bool:
        return self._selection.is_done

    def start(self) -> None:
        """Queue the prompt. RequestError when it can never be served."""
        request = self._new_request([])
        self._engine.add(request)
        self._running = {request.request_id: self._selection.running[0]}

    def take(self, outputs: Iterable[EngineOutput]) -> None:
        """Take in what a step gave, and choose once all beams have been computed.

        Raises:
            AdapterError: the adapter they were to be computed with could not be loaded, or was unloaded.
        """
        for output in outputs:
            if output.request_id in self._running:
                if output.finish_reason is not None:
                    raise AdapterError(f"The beam search has ended: {output.stop_reason}")
                (self._logprobs[output.request_id],) = output.logprobs
        if self._running and len(self._logprobs) == len(self._running):
            self._selection.advance([self._logprobs[request_id] for request_id in self._running])
            self._logprobs.clear()
            self._branch([] if self.finished else self._selection.running)

    def abort(self) -> None:
        """End it here, also when it was cut short while it branched."""
        for number in range(1, self._num_requests + 1):
            self._engine.abort(self._request_id(number))
        self._running = {}

    def output(self, tokenizer: Tokenizer) -> BeamSearchOutput:
        """The finished sequences, best first."""
        return BeamSearchOutput(sequences=[self._sequence(one, tokenizer) for one in self._selection.finished])

    def _branch(self, beams: Sequence[Beam]) -> None:
        """Go on with these: one in each parent's own request, the others in forks of it."""
        request_ids = {beam: request_id for request_id, beam in self._running.items()}
        parents = {beam.parent for beam in beams}
        for parent, request_id in request_ids.items():
            if parent not in parents:  # first: its place may be needed for a fork
                self._engine.abort(request_id)
        self._running = {}
        for beam in beams:
            assert beam.parent is not None
            request_id = request_ids[beam.parent]
            if request_id in self._running:
                request = self._new_request([choice.token_ids[0] for choice in beam.parent.choices])
                self._engine.fork(request_id, request)
                request_id = request.request_id
            self._running[request_id] = beam
        for request_id, beam in self._running.items():  # after all forks, which have their origins' tokens
            self._engine.extend(request_id, beam.token_id)

    def _new_request(self, output_token_ids: list[int]) -> Request:
        template, self._num_requests = self._template, self._num_requests + 1
        return replace(
            template,
            request_id=self._request_id(self._num_requests),
            output_token_ids=output_token_ids,
            draft_token_ids=[],  # lists of its own, as these all are
            prompt_logprobs=[],
            block_ids=[],
            block_hashes=[],
            siblings=[],
        )

    def _request_id(self, number: int) -> str:
        return f"{self._template.request_id}/beam-{number}"

    def _sequence(self, one: FinishedBeam, tokenizer: Tokenizer) -> BeamSearchSequence:
        prompt_token_ids, beam = self._template.prompt_token_ids, one.beam
        is_stop = beam.token_id in self._template.eos_token_ids
        choices = beam.choices
        token_ids = [choice.token_ids[0] for choice in choices]
        if is_stop and not self._params.include_stop_str_in_output:
            token_ids.pop()
        texts = LogprobTexts(tokenizer, prompt_token_ids)
        return BeamSearchSequence(
            tokens=prompt_token_ids + token_ids,
            text=tokenizer.decode(prompt_token_ids + token_ids),
            cum_logprob=beam.cum_logprob,
            score=one.score,
            logprobs=[texts.next(choice) for choice in choices],
            finish_reason="stop" if is_stop else "length",
            stop_reason=beam.token_id if is_stop else None,
        )


def run_beam_searches(
    searches: Sequence[BeamSearch], step: Callable[[], Sequence[EngineOutput]], at_once: int
) -> Generator[int]:
    """Run them all, `at_once` at a time, yielding after each step how many are left; abort them if the loop is left."""
    waiting, live = deque(searches), list[BeamSearch]()
    try:
        while waiting or live:
            while waiting and len(live) < at_once:
                waiting[0].start()
                live.append(waiting.popleft())
            outputs = step()
            for search in live:
                search.take(outputs)
            live = [search for search in live if not search.finished]
            yield len(waiting) + len(live)
    finally:
        for search in live:
            search.abort()
