"""From token outputs to text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import TokenLogprobs
from aios_serve.messages import ChildOutput
from aios_serve.output_processor import OutputProcessor
from aios_serve.outputs import RequestOutput

spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)
EOS = scripted.EOS


@pytest.fixture
def processor():
    return OutputProcessor(scripted.byte_tokenizer(), eos_token_ids=(EOS,), seed=0)


def ids(request):
    return [child.engine_id for child in request.add_request.children]


def feed(processor, engine_id, token_ids, **rest):
    return processor.process([ChildOutput(engine_id=engine_id, token_ids=list(token_ids), **rest)])


def run(processor, text, params, *, tokens_per_step=1, finish_reason="length", stop_reason=None):
    """Generate `text` for a one-choice request; returns the output and the aborts."""
    request = processor.open([1], params)
    output = RequestOutput.empty(request_id="x", prompt_token_ids=[1])
    token_ids = list(text) if isinstance(text, list) else list(text.encode())
    aborts = []
    for start in range(0, len(token_ids), tokens_per_step):
        chunk = token_ids[start : start + tokens_per_step]
        last = start + tokens_per_step >= len(token_ids)
        logprobs = [TokenLogprobs(token_id=each, logprob=-1.0, rank=1, top=()) for each in chunk]
        step = feed(
            processor,
            ids(request)[0],
            chunk,
            logprobs=logprobs if params.logprobs is not None else None,
            finish_reason=finish_reason if last else None,
            stop_reason=stop_reason if last else None,
        )
        for _, delta in step.deltas:
            output.add(delta)
        aborts += step.aborts
    assert processor.num_open_requests == processor.num_open_choices == 0
    return output, aborts


def test_text_is_the_decoded_tokens_and_the_last_delta_says_why_it_ended(processor):
    output, aborts = run(processor, "hé, wörld", SamplingParams())
    choice = output.outputs[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("hé, wörld", "length", None)
    assert choice.token_ids == list("hé, wörld".encode())
    assert choice.logprobs is choice.cumulative_logprob is None
    assert output.finished
    assert aborts == []


def test_half_a_character_is_held_back(processor):
    request = processor.open([1], SamplingParams())
    first, second = "é".encode()
    ((_, delta),) = feed(processor, ids(request)[0], [first]).deltas
    assert (delta.deltas[0].text, delta.deltas[0].token_ids) == ("", [first])
    ((_, delta),) = feed(processor, ids(request)[0], [second]).deltas
    assert delta.deltas[0].text == "é"


def test_half_a_character_at_the_end_is_shown_as_such(processor):
    output, _ = run(processor, list("aé".encode()[:2]), SamplingParams())
    assert output.outputs[0].text == "a\ufffd"


@pytest.mark.parametrize("tokens_per_step", [1, 2, 5, 100])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens_cuts_the_text_and_aborts(processor, tokens_per_step, include):
    params = SamplingParams(stop=["STOP"], include_stop_str_in_output=include, logprobs=0)
    output, aborts = run(processor, "one STO STOP two", params, tokens_per_step=tokens_per_step)
    choice = output.outputs[0]
    assert choice.text == ("one STO STOP" if include else "one STO ")
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "STOP")
    assert choice.token_ids == list(b"one STO STOP")
    assert len(choice.logprobs) == len(choice.token_ids)
    assert choice.cumulative_logprob == -float(len(choice.token_ids))
    assert len(aborts) == (0 if tokens_per_step == 100 else 1)  # the engine had ended it by itself in that very step


def test_the_beginning_of_a_stop_string_is_released_at_the_end(processor):
    output, aborts = run(processor, "one STO", SamplingParams(stop=["STOP"]))
    assert output.outputs[0].text == "one STO"
    assert output.outputs[0].finish_reason == "length"
    assert aborts == []


def test_stop_strings_count_only_after_min_tokens(processor):
    output, _ = run(processor, "a.b.c.d", SamplingParams(stop=["."], min_tokens=3))
    assert output.outputs[0].text == "a.b"
    assert output.outputs[0].token_ids == list(b"a.b.")


def test_end_of_sequence_is_counted_but_not_shown(processor):
    output, _ = run(processor, [97, EOS], SamplingParams(skip_special_tokens=False), finish_reason="stop")
    choice = output.outputs[0]
    assert (choice.text, choice.token_ids, choice.finish_reason, choice.stop_reason) == ("a", [97, EOS], "stop", None)


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
def test_a_stop_token_is_shown_only_on_request(processor, include, text):
    params = SamplingParams(stop_token_ids=[98], include_stop_str_in_output=include)
    output, _ = run(processor, "ab", params, finish_reason="stop", stop_reason=98)
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == (text, 98)


def test_special_tokens_inside_the_text_follow_skip_special_tokens(processor):
    for skip, text in ((True, "ab"), (False, "a<eos>b")):
        output, _ = run(processor, [97, EOS, 98], SamplingParams(skip_special_tokens=skip, ignore_eos=True))
        assert output.outputs[0].text == text


def test_choices_end_one_by_one_and_the_request_with_the_last(processor):
    request = processor.open([1], SamplingParams(n=3))
    assert len(set(ids(request))) == 3
    assert len({child.seed for child in request.add_request.children}) == 3
    step = processor.process(
        [ChildOutput(engine_id=each, token_ids=[97 + index]) for index, each in enumerate(ids(request))]
    )
    ((_, delta),) = step.deltas
    assert [part.text for part in delta.deltas] == ["a", "b", "c"]
    assert not delta.finished
    for engine_id in ids(request)[:2]:
        ((_, delta),) = feed(processor, engine_id, [97], finish_reason="length").deltas
        assert not delta.finished
    step = feed(processor, ids(request)[2], [97], finish_reason="length")
    assert step.deltas[0][1].finished
    assert step.finished == [request]
    assert request.timing().num_generation_tokens == 6


def test_an_explicit_seed_is_the_first_choices_own_and_repeats(processor):
    seeds = [
        [child.seed for child in processor.open([1], SamplingParams(n=3, seed=-7)).add_request.children]
        for _ in range(2)
    ]
    assert seeds[0] == seeds[1]
    assert seeds[0][0] == -7
    assert len(set(seeds[0])) == 3


def test_requests_without_a_seed_repeat_with_the_engines_and_differ_without():
    def drawn(seed):
        processor = OutputProcessor(scripted.byte_tokenizer(), eos_token_ids=(), seed=seed)
        return [processor.open([1], SamplingParams()).add_request.children[0].seed for _ in range(3)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)
    assert len(set(drawn(1))) == 3


def test_one_id_used_twice_and_ids_that_look_like_each_other_stay_apart(processor):
    requests = [processor.open([1], SamplingParams(), request_id=each) for each in ("a", "a", "a.1", "a.1-0")]
    engine_ids = [engine_id for request in requests for engine_id in ids(request)]
    assert len(set(engine_ids)) == 4
    running, last = processor.abort(requests[0])
    assert running == ids(requests[0])
    assert last.finished
    assert last.deltas[0].finish_reason == "abort"
    assert processor.open_requests == requests[1:]


def test_output_of_an_aborted_request_is_dropped(processor):
    request = processor.open([1], SamplingParams())
    assert processor.close(request) == ids(request)
    assert processor.close(request) == []
    assert feed(processor, ids(request)[0], [97]).deltas == []


def test_a_failing_choice_fails_its_request_only(processor):
    failing, other = processor.open([1], SamplingParams(n=2)), processor.open([1], SamplingParams())
    step = processor.process(
        [
            ChildOutput(engine_id=ids(failing)[0], token_ids=[], finish_reason="error", error="boom"),
            ChildOutput(engine_id=ids(other)[0], token_ids=[97]),
        ]
    )
    assert step.failures == [(failing, "boom")]
    assert ids(failing)[1] in step.aborts
    assert [request for request, _ in step.deltas] == [other]
    assert failing.timing().finish_reason == "error"


def test_an_error_in_decoding_fails_that_request_only(processor, caplog):
    failing, other = processor.open([1], SamplingParams()), processor.open([1], SamplingParams())
    step = processor.process(
        [
            ChildOutput(engine_id=ids(failing)[0], token_ids=["no token"]),
            ChildOutput(engine_id=ids(other)[0], token_ids=[97]),
        ]
    )
    assert [request for request, _ in step.failures] == [failing]
    assert step.aborts == ids(failing)
    assert [request for request, _ in step.deltas] == [other]
    assert "decoding" in caplog.text


def test_deltas_that_nobody_fetched_add_up(processor):
    request = processor.open([1], SamplingParams(n=2, logprobs=0))
    whole = None
    for text, reason in (("a", None), ("b", "length")):
        for engine_id in ids(request):
            logprobs = [TokenLogprobs(token_id=ord(text), logprob=-1.0, rank=1, top=())]
            ((_, delta),) = feed(
                processor, engine_id, [ord(text)], logprobs=logprobs, finish_reason=reason, num_cached_tokens=4
            ).deltas
            if whole is None:
                whole = delta
            else:
                whole.extend(delta)
    assert whole.finished
    assert whole.num_cached_tokens == 4
    assert [(part.index, part.text, part.finish_reason, len(part.logprobs)) for part in whole.deltas] == [
        (0, "ab", "length", 2),
        (1, "ab", "length", 2),
    ]


def test_times_add_up(processor):
    request = processor.open([1, 2], SamplingParams())
    arrival = request.add_request.arrival_time
    step = feed(processor, ids(request)[0], [97], scheduled_time=arrival, num_cached_tokens=1)
    ((num_tokens, seconds, first),) = step.gained
    assert (num_tokens, first) == (1, True)
    assert seconds >= 0
    step = feed(processor, ids(request)[0], [97], finish_reason="length")
    assert step.gained[0][2] is False
    timing = request.timing()
    assert timing.queue_seconds == 0
    assert timing.prefill_seconds == timing.first_token_seconds == pytest.approx(seconds)
    assert timing.first_token_seconds + timing.decode_seconds <= timing.total_seconds
    assert (timing.num_prompt_tokens, timing.num_cached_tokens, timing.num_generation_tokens) == (2, 1, 2)
    assert timing.seconds_per_output_token == pytest.approx(timing.decode_seconds)
