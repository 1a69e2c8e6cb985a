"""Rounds: who is measured when, and who is measured no more."""

from aios_serve.bench.engines import Engine, Variant
from aios_serve.bench.rounds import plan_tasks, run_rounds
from aios_serve.bench.samples import Sample
from aios_serve.bench.work import parse_works


def fake_engine(name, *variants, single_only=False):
    settings = tuple(Variant(name=each, model="source", options={}, single_only=single_only) for each in variants)
    return Engine(name=name, runner="run_fake", variants={"4bit": settings})


class ScriptedMeasure:
    """Figures by setting; remembers what it was asked for."""

    def __init__(self, **figures):
        self.figures = figures
        self.asked = []

    def __call__(self, task, round_number):
        self.asked.append((round_number, task.variant.name, task.work.name))
        return Sample(
            round_number=round_number,
            engine=task.engine.name,
            precision=task.precision,
            variant=task.variant.name,
            work=task.work.name,
            figure=self.figures[task.variant.name],
            result={},
        )

    def in_round(self, number):
        return [variant for asked, variant, _ in self.asked if asked == number]


def run(engines, works, repeats, **figures):
    measure = ScriptedMeasure(**figures)
    tasks = plan_tasks(engines, ["4bit"], parse_works(works))
    samples = list(run_rounds(tasks, measure, repeats=repeats))
    assert len(samples) == len(measure.asked)
    return measure


def test_engines_alternate_and_every_second_round_goes_backwards():
    engines = [fake_engine("x", "a"), fake_engine("y", "b"), fake_engine("z", "c")]
    measure = run(engines, "decode-1,prefill-8", 3, a=1, b=1, c=1)
    assert measure.in_round(1) == [*"abc", *"abc"]
    assert measure.in_round(2) == [*"cba", *"cba"]
    assert measure.in_round(3) == measure.in_round(1)
    works = [work for number, _, work in measure.asked if number == 2]
    assert works == ["decode-1"] * 3 + ["prefill-8"] * 3


def test_slow_settings_of_an_engine_are_dropped_after_the_first_round():
    engines = [fake_engine("x", "fast", "close", "slow"), fake_engine("y", "other")]
    measure = run(engines, "decode-1", 3, fast=100, close=80, slow=70, other=10)
    assert set(measure.in_round(1)) == {"fast", "close", "slow", "other"}
    assert set(measure.in_round(2)) == set(measure.in_round(3)) == {"fast", "close", "other"}


def test_what_failed_is_not_tried_again():
    measure = run([fake_engine("x", "good", "broken")], "decode-1", 2, good=5, broken=None)
    assert measure.in_round(2) == ["good"]
    assert run([fake_engine("x", "broken")], "decode-1", 3, broken=None).in_round(2) == []


def test_memory_is_measured_once():
    measure = run([fake_engine("x", "a")], "memory-1,decode-1", 3, a=5)
    assert [work for _, _, work in measure.asked].count("memory-1") == 1
    assert [work for _, _, work in measure.asked].count("decode-1") == 3


def test_settings_for_one_sequence_take_no_batches():
    tasks = plan_tasks([fake_engine("x", "a", single_only=True)], ["4bit"], parse_works("decode-1,decode-8,prefill-8"))
    assert [task.work.name for task in tasks] == ["decode-1", "prefill-8"]


def test_precisions_that_an_engine_does_not_offer_are_left_out():
    assert plan_tasks([fake_engine("x", "a")], ["8bit", "bf16"], parse_works("decode-1")) == []
