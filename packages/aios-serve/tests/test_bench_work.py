"""What is measured: names, prompts, and the figure that a result stands for."""

import pytest

from aios_model.errors import ConfigError
from aios_serve.bench.engines import ENGINES, choose_engines, choose_precisions
from aios_serve.bench.work import DEFAULT_WORK, parse_works


def test_a_name_says_how_many_sequences_and_how_long_a_prompt():
    single, batch, deep, prefill, memory = parse_works("decode-1, decode-16,decode-1@4096,prefill-512,memory-32")
    assert (single.num_sequences, single.prompt_tokens, single.new_tokens) == (1, 32, 129)
    assert (batch.num_sequences, batch.prompt_tokens, batch.new_tokens) == (16, 128, 129)
    assert (deep.num_sequences, deep.prompt_tokens, deep.new_tokens) == (1, 4096, 65)
    assert (prefill.num_sequences, prefill.prompt_tokens, prefill.new_tokens) == (1, 512, 1)
    assert (memory.num_sequences, memory.kind, memory.more_is_better) == (32, "memory", False)


def test_memory_is_measured_with_one_and_with_thirty_two_sequences():
    names = ["memory-1", "own-memory-1", "memory-32", "own-memory-32"]
    assert [work.name for work in parse_works("memory")] == names
    assert [work.name for work in parse_works("memory,memory-1")] == names
    assert {work.prompt_tokens for work in parse_works("memory")} == {128}


def test_the_default_can_be_read():
    assert len(parse_works(DEFAULT_WORK)) == 10


@pytest.mark.parametrize("name", ["", ",", "decode", "decode-0", "prefill-0", "decode-1@0", "train-1", "prefill-512@3"])
def test_work_that_does_not_exist_is_refused_by_name(name):
    with pytest.raises(ConfigError, match="work="):
        parse_works(name)


def test_prompts_are_the_same_every_time_and_other_ones_with_another_seed():
    work = parse_works("decode-3@50")[0]
    prompts = work.prompts(seed=1, vocab_size=1000)
    assert prompts == work.prompts(seed=1, vocab_size=1000)
    assert prompts != work.prompts(seed=2, vocab_size=1000)
    assert [len(prompt) for prompt in prompts] == [50] * 3
    assert all(100 <= token < 1000 for prompt in prompts for token in prompt)
    assert len({tuple(prompt) for prompt in prompts}) == 3


def test_figures_are_tokens_per_second_of_the_part_in_question():
    result = {
        "prefill_seconds": 2.0,
        "decode_seconds": 4.0,
        "decode_tokens": 100,
        "peak_rss": 300_000_000,
        "rss_after_imports": 2e8,
    }
    decode, prefill, memory, own = parse_works("decode-4,prefill-512,memory-1,own-memory-1")
    assert decode.figure(result) == 25.0
    assert prefill.figure(result) == 256.0
    assert memory.figure(result) == 300.0
    assert own.figure(result) == 100.0


def test_engines_and_precisions_are_chosen_by_name():
    assert [engine.name for engine in choose_engines("openvino, aios,openvino")] == ["openvino", "aios"]
    assert choose_precisions("8bit,4bit") == ["8bit", "4bit"]
    with pytest.raises(ConfigError, match=r"engines='exllama'.*llama\.cpp"):
        choose_engines("aios,exllama")
    with pytest.raises(ConfigError, match=r"precision='2bit'.*4bit"):
        choose_precisions("2bit")


def test_peers_are_pinned_and_settings_have_names_of_their_own():
    for engine in ENGINES.values():
        assert all("==" in package or ">=" in package for package in engine.packages)
        for variants in engine.variants.values():
            assert len({variant.name for variant in variants}) == len(variants)
