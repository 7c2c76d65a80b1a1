"""The output processor: from what a step gave each request to the outputs a user reads."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_model import EOS, token_ids_of, write_tokenizer

from octavo import RequestOutput, SamplingParams
from octavo.builtin.hf_checkpoint import HuggingFaceCheckpoint
from octavo.engine.engine import EngineOutput
from octavo.errors import RequestError
from octavo.output_processor import OutputProcessor, ProcessedOutputs, snapshot
from octavo.outputs import Logprob, RequestMetrics, TokenLogprobs
from octavo.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(HuggingFaceCheckpoint(str(folder)).tokenizer())


@pytest.fixture
def outputs(tokenizer: Tokenizer) -> OutputProcessor:
    return OutputProcessor(tokenizer)


def add(outputs: OutputProcessor, request_id: str = "a", **fields: Any) -> RequestOutput:
    return outputs.add(request_id, "prompt", token_ids_of("prompt"), SamplingParams(**fields), 1.0)


def said(request_id: str, text: str, finish_reason: str | None = None, **fields: Any) -> EngineOutput:
    """What a step gives a request: these characters as tokens."""
    defaults: dict[str, Any] = {
        "new_token_ids": token_ids_of(text),
        "stop_reason": None,
        "num_cached_tokens": 0,
        "first_scheduled_time": 2.0,
        "num_preemptions": 0,
    }
    return EngineOutput(request_id=request_id, finish_reason=finish_reason, **{**defaults, **fields})


def process(outputs: OutputProcessor, *engine_outputs: EngineOutput, now: float = 3.0) -> ProcessedOutputs:
    return outputs.process(engine_outputs, now)


def test_an_output_grows_with_each_step_until_the_engine_ends_it(outputs: OutputProcessor) -> None:
    output = add(outputs)
    for text, wanted in (("h", "h"), ("e", "he")):
        processed = process(outputs, said("a", text))
        assert (processed.changed, processed.to_stop) == ([output], [])
        assert output.outputs[0].text == wanted
        assert not output.finished
    process(outputs, said("a", "y", "length"))
    assert (output.outputs[0].text, output.outputs[0].finish_reason, output.finished) == ("hey", "length", True)
    assert output.outputs[0].token_ids == token_ids_of("hey")


def test_completions_of_one_prompt_change_their_output_once_a_step_and_finish_it_together(
    outputs: OutputProcessor,
) -> None:
    output = add(outputs, n=2)
    assert process(outputs, said("a/0", "x", "length"), said("a/1", "y")).changed == [output]
    assert not output.finished
    process(outputs, said("a/1", "z", "length"))
    assert output.finished
    assert [(each.index, each.text) for each in output.outputs] == [(0, "x"), (1, "yz")]


def test_a_token_that_ended_an_output_is_no_text_unless_it_is_asked_for(outputs: OutputProcessor) -> None:
    params: dict[str, dict[str, Any]] = {
        "without": {},
        "with": {"include_stop_str_in_output": True},
        "special": {"include_stop_str_in_output": True, "skip_special_tokens": False},
    }
    for name, fields in params.items():
        add(outputs, name, **fields)
    ends = {name: token_ids_of("a.") for name in params} | {"special": [*token_ids_of("a"), EOS]}
    stops = [said(name, "", "stop", new_token_ids=ids, stop_reason=ids[-1]) for name, ids in ends.items()]
    found = {output.request_id: output.outputs[0] for output in process(outputs, *stops).changed}
    assert {name: completion.text for name, completion in found.items()} == {
        "without": "a",
        "with": "a.",
        "special": "a</s>",
    }
    assert {name: completion.stop_reason for name, completion in found.items()} == {
        name: ids[-1] for name, ids in ends.items()
    }
    assert found["without"].token_ids == token_ids_of("a.")


def test_a_stop_string_ends_an_output_and_what_still_comes_for_it_is_dropped(outputs: OutputProcessor) -> None:
    output = add(outputs, stop=["END"])
    shown = []
    for character in "a EN":
        process(outputs, said("a", character))
        shown.append(output.outputs[0].text)
    assert shown == ["a", "a ", "a ", "a "]  # nothing of what may become the stop string
    processed = process(outputs, said("a", "D"))
    assert processed.to_stop == ["a"]
    assert (output.outputs[0].text, output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (
        "a ",
        "stop",
        "END",
    )
    assert process(outputs, said("a", "late")) == ProcessedOutputs(changed=[], to_stop=[])
    assert output.outputs[0].token_ids == token_ids_of("a END")


def test_a_stop_string_in_the_last_token_counts_and_stops_nothing_that_has_ended(outputs: OutputProcessor) -> None:
    output = add(outputs, stop=["!"])
    processed = process(outputs, said("a", "x!", "length"))
    assert processed.to_stop == []
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("x", "stop")


@pytest.mark.parametrize("end", ["length", "abort"])
def test_what_was_held_back_for_a_stop_string_is_shown_at_the_end(outputs: OutputProcessor, end: str) -> None:
    output = add(outputs, stop=["END"])
    process(outputs, said("a", "E"))
    assert output.outputs[0].text == ""
    if end == "abort":
        assert outputs.abort(output) == ["a"]
        assert output.outputs[0].text == "E"
    else:
        process(outputs, said("a", "N", end))
        assert output.outputs[0].text == "EN"
    assert (output.outputs[0].finish_reason, output.finished) == (end, True)


def test_aborting_ends_what_is_unfinished(outputs: OutputProcessor) -> None:
    output = add(outputs, n=3)
    process(outputs, said("a/1", "x", "length"))
    assert outputs.abort(output) == ["a/2", "a/0"]
    assert [completion.finish_reason for completion in output.outputs] == ["abort", "length", "abort"]
    assert outputs.abort(output) == []


@pytest.mark.parametrize(("first", "second"), [(("a", 1), ("a", 1)), (("a", 2), ("a/1", 1)), (("a/0", 1), ("a", 2))])
def test_an_id_in_use_is_refused_and_its_holder_goes_on(
    outputs: OutputProcessor, first: tuple[str, int], second: tuple[str, int]
) -> None:
    output = add(outputs, first[0], n=first[1])
    with pytest.raises(RequestError, match="is in use"):
        add(outputs, second[0], n=second[1])
    engine_id = first[0] if first[1] == 1 else f"{first[0]}/1"
    process(outputs, said(engine_id, "x"))
    assert "x" in [completion.text for completion in output.outputs]


def test_the_times_and_counts_of_a_request_are_kept(outputs: OutputProcessor) -> None:
    output = add(outputs, n=2)
    process(outputs, said("a/0", "x", num_cached_tokens=8), said("a/1", "x", num_cached_tokens=16), now=3.0)
    process(outputs, said("a/0", "x", num_preemptions=2, first_scheduled_time=9.0), now=4.0)
    process(outputs, said("a/1", "x"), now=5.0)
    metrics = output.metrics
    assert metrics is not None
    assert (metrics.arrival_time, metrics.first_scheduled_time) == (1.0, 2.0)
    assert (metrics.first_token_time, metrics.last_token_time) == (3.0, 5.0)
    assert (output.num_cached_tokens, metrics.num_preemptions) == (16, 2)


def test_metrics_say_how_long_each_stage_took_once_it_has_ended() -> None:
    metrics = RequestMetrics(arrival_time=1.0)
    stages = ("queue_seconds", "ttft_seconds", "decode_seconds", "e2e_seconds")
    assert [getattr(metrics, stage) for stage in stages] == [None] * 4
    metrics.first_scheduled_time, metrics.first_token_time, metrics.last_token_time = 1.5, 3.0, 7.0
    assert [getattr(metrics, stage) for stage in stages] == [0.5, 2.0, 4.0, 6.0]


def some_logprobs(text: str) -> list[TokenLogprobs]:
    """Of each character -1, and of "~" beside it -0.5."""
    other = token_ids_of("~")[0]
    return [TokenLogprobs(token_ids=(one, other), logprobs=(-1.0, -0.5), rank=2) for one in token_ids_of(text)]


def test_logprobs_come_with_their_tokens_and_sum_up(outputs: OutputProcessor) -> None:
    completion = add(outputs, logprobs=1).outputs[0]
    assert (completion.logprobs, completion.cumulative_logprob) == ([], 0.0)
    process(outputs, said("a", "he", logprobs=some_logprobs("he")))
    process(outputs, said("a", "y", "length", logprobs=some_logprobs("y")))
    assert completion.cumulative_logprob == -3.0
    (y,), (tilde,) = token_ids_of("y"), token_ids_of("~")
    assert completion.logprobs is not None
    assert completion.logprobs[2] == {y: Logprob(-1.0, 2, "y"), tilde: Logprob(-0.5, 1, "~")}


def test_tokens_of_one_step_behind_a_stop_string_are_dropped_with_their_logprobs(outputs: OutputProcessor) -> None:
    completion = add(outputs, logprobs=1, stop="o w").outputs[0]
    process(outputs, said("a", "hello world", logprobs=some_logprobs("hello world")))
    assert completion.text == "hell"
    assert completion.token_ids == token_ids_of("hello w")
    assert completion.logprobs is not None
    assert (len(completion.logprobs), completion.cumulative_logprob) == (7, -7.0)


def test_a_prompt_s_logprobs_are_those_of_whichever_completion_computed_it(outputs: OutputProcessor) -> None:
    output = add(outputs, n=3, prompt_logprobs=0)
    process(outputs, said("a/0", "x"))  # a fork: it computed nothing
    assert output.prompt_logprobs is None
    process(outputs, said("a/1", "x", prompt_logprobs=some_logprobs("rompt")))
    first = output.prompt_logprobs
    assert first is not None
    assert [None if entry is None else next(iter(entry)) for entry in first] == [None, *token_ids_of("rompt")]
    process(outputs, said("a/2", "x", prompt_logprobs=some_logprobs("rompt")))
    assert output.prompt_logprobs is first


def test_a_snapshot_does_not_change_with_later_steps(outputs: OutputProcessor) -> None:
    output = add(outputs, logprobs=0)
    process(outputs, said("a", "x", logprobs=some_logprobs("x")), now=3.0)
    taken = snapshot(output)
    process(outputs, said("a", "y", "length", logprobs=some_logprobs("y")), now=4.0)
    assert (taken.outputs[0].cumulative_logprob, len(taken.outputs[0].logprobs or [])) == (-1.0, 1)
    assert (taken.outputs[0].text, taken.outputs[0].token_ids, taken.finished) == ("x", token_ids_of("x"), False)
    assert taken.metrics is not None
    assert taken.metrics.last_token_time == 3.0
