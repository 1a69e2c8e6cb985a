"""Constraints are judged within seconds, whatever they are: by processes that may crash, hang, and be killed."""

import asyncio
import importlib.util
import sys
import threading
import time
from pathlib import Path

import pytest

from aios_model.errors import InvalidRequestError
from aios_model.sampling import SamplingParams, StructuredOutputsParams
from aios_sched.errors import QueueFullError
from aios_serve.structured import checker as checker_module
from aios_serve.structured.checker import NUM_WORKERS, GrammarChecker, check_can_end
from aios_serve.structured.errors import CheckerLostError, GrammarError
from aios_serve.structured.vocabulary import Vocabulary

spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

FINE = StructuredOutputsParams(regex="a+b")
BROKEN = StructuredOutputsParams(regex="(a")
SLOW = StructuredOutputsParams(regex="(a|b*c)?" * 20_000)
"""Takes 9 s to be refused."""
DEEP = StructuredOutputsParams(
    grammar="\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(8000)) + '\nr8000: "a"\nstart: r0'
)
"""Overflows the stack of llguidance's compiler, and takes its process with it."""


def vocabulary():
    return Vocabulary.of(scripted.byte_tokenizer(), eos_token_ids=(scripted.EOS,), vocab_size=scripted.VOCAB_SIZE)


@pytest.fixture
def make_checker():
    made = []

    def make(read=vocabulary, **options):
        made.append(GrammarChecker(read, **{"timeout": 20.0, **options}))
        return made[-1]

    yield make
    for checker in made:
        checker.close()


def test_verdicts_are_those_of_the_compiler_and_remembered(make_checker):
    checker = make_checker()
    assert not checker._running, "a process was started before there was anything to do"
    checker.check(FINE)
    for _ in range(2):
        with pytest.raises(GrammarError, match="unclosed group") as caught:
            checker.check(BROKEN)
        assert caught.value.param == "structured_outputs.regex"
    [worker] = checker._running
    worker.kill()
    checker.check(FINE)
    with pytest.raises(GrammarError, match="unclosed group"):
        checker.check(BROKEN)


def test_what_takes_too_long_or_crashes_is_refused_and_others_go_on(make_checker):
    checker = make_checker(timeout=1.0)
    checker.check(FINE)
    started = time.monotonic()
    for constraint, reason in ((SLOW, "takes longer than 1 s"), (DEEP, "too deep or too large")):
        for _ in range(2):  # at once the second time
            with pytest.raises(GrammarError, match=reason) as caught:
                checker.check(constraint)
            assert caught.value.param == constraint.param
    assert time.monotonic() - started < 5
    checker.check(StructuredOutputsParams(regex="another"))


def test_a_worker_that_was_killed_is_replaced(make_checker):
    checker = make_checker()
    checker.check(FINE)
    [worker] = checker._running
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(GrammarError):
        checker.check(StructuredOutputsParams(regex="b"))  # nobody knows that the constraint was not to blame
    checker.check(StructuredOutputsParams(regex="c"))


async def test_the_event_loop_goes_on_while_something_compiles(make_checker):
    checker = make_checker(timeout=1.0)
    await checker.check_soon(FINE)
    slow = asyncio.create_task(checker.check_soon(SLOW))
    gaps, last = [], time.monotonic()
    while not slow.done():
        await asyncio.sleep(0.01)
        gaps.append(time.monotonic() - last)
        last = time.monotonic()
    with pytest.raises(GrammarError, match="longer than"):
        await slow
    assert len(gaps) > 20
    await checker.check_soon(StructuredOutputsParams(regex="quick"))


async def test_one_that_goes_away_leaves_the_verdict_to_the_others(make_checker):
    checker = make_checker()
    first, second = (asyncio.create_task(checker.check_soon(BROKEN)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(GrammarError):
        await second
    with pytest.raises(asyncio.CancelledError):
        await first


def test_too_many_that_wait_are_told_to_come_back(make_checker, monkeypatch):
    monkeypatch.setattr(checker_module, "MAX_WAITING", NUM_WORKERS)
    go_on = threading.Event()

    def read():
        go_on.wait(20)
        return vocabulary()

    checker = make_checker(read)
    waiting = [checker._ask(StructuredOutputsParams(regex=f"a{number}")) for number in range(NUM_WORKERS)]
    with pytest.raises(QueueFullError):
        checker.check(FINE)
    go_on.set()
    assert [future.result(timeout=60).error for future in waiting] == [None] * NUM_WORKERS
    checker.check(FINE)


def test_verdicts_are_bounded(make_checker, monkeypatch):
    monkeypatch.setattr(checker_module, "MAX_VERDICTS", 2)
    checker = make_checker()
    for number in range(4):
        checker.check(StructuredOutputsParams(regex=f"a{number}"))
    assert len(checker._verdicts) == 2


def test_a_process_that_cannot_be_started_is_an_error_of_ours(make_checker):
    checker = make_checker(command=[sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(CheckerLostError):
        checker.check(FINE)


def test_closing_ends_the_processes_and_refuses_the_rest(make_checker):
    checker = make_checker()
    checker.check(FINE)
    [worker] = checker._running
    checker.close()
    checker.close()
    assert worker._process.poll() is not None
    with pytest.raises(CheckerLostError):
        checker.check(StructuredOutputsParams(regex="new"))


def test_outputs_that_could_never_end_are_refused():
    with pytest.raises(InvalidRequestError, match="no end-of-sequence") as caught:
        check_can_end(SamplingParams(structured_outputs=FINE), ())
    assert caught.value.param == "structured_outputs"
    with pytest.raises(InvalidRequestError, match="which is 7") as caught:
        check_can_end(SamplingParams(structured_outputs=FINE, allowed_token_ids=[1, 2]), (7, 8))
    assert caught.value.param == "allowed_token_ids"
    for allowed in ([1, 8], [1, 9]):
        check_can_end(SamplingParams(structured_outputs=FINE, allowed_token_ids=allowed, stop_token_ids=[9]), (7, 8))
