"""What `--speculative-config` takes and what it refuses, with what to do about it."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from aios_model.errors import ConfigError
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SamplingRow
from aios_sched.speculative.base import DraftContext
from aios_sched.speculative.config import SpeculativeConfig
from aios_sched.speculative.controller import AdaptiveController
from aios_sched.speculative.fixed import FixedController
from aios_sched.speculative.ngram import NgramProposer
from aios_sched.speculative.registry import make_controller, make_proposer
from aios_sched.speculative.suffix import SuffixProposer


def test_json_of_vllm_is_understood():
    text = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 6, "prompt_lookup_min": 3}'
    config = SpeculativeConfig.from_json(text)
    assert config == SpeculativeConfig(
        method="ngram", num_speculative_tokens=5, prompt_lookup_max=6, prompt_lookup_min=3
    )
    assert config.ngram_sizes == (3, 6)
    assert isinstance(make_proposer(config), NgramProposer)
    assert isinstance(make_controller(config), AdaptiveController)


def test_the_number_of_drafts_can_be_fixed():
    config = SpeculativeConfig.from_json('{"method": "ngram", "num_speculative_tokens": 5, "adaptive": false}')
    controller = make_controller(config)
    assert isinstance(controller, FixedController)
    assert controller.num_drafts("a", num_requests=64) == 5


def test_suffix_options_reach_the_proposer():
    text = '{"method": "suffix", "suffix_min_match": 3, "suffix_min_probability": 1, "suffix_store_tokens": 0}'
    config = SpeculativeConfig.from_json(text)
    proposer = make_proposer(config)
    assert isinstance(proposer, SuffixProposer)
    assert config.suffix_options == {"min_match": 3, "min_probability": 1, "max_store_tokens": 0}
    context = DraftContext(
        request_id="a",
        token_ids=[1, 2, 3, 4, 5, 9, 1, 2, 3],
        num_prompt_tokens=9,
        max_drafts=4,
        sampling=SamplingRow(
            request_id="a", params=SamplingParams(), seed=0, position=9, prompt_token_ids=[], output_token_ids=[]
        ),
    )
    assert proposer.propose([context]) == [[]], "three tokens of one match leave some doubt"
    certain = make_proposer(SpeculativeConfig(method="suffix", num_speculative_tokens=2, suffix_min_match=3))
    assert certain.propose([context])[0][:2] == [4, 5]


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (2, 4)),
        ({"prompt_lookup_max": 1}, (1, 1)),
        ({"prompt_lookup_max": 8}, (2, 8)),
        ({"prompt_lookup_min": 6}, (6, 6)),
        ({"prompt_lookup_min": 3}, (3, 4)),
    ],
    ids=str,
)
def test_one_bound_of_the_lookup_follows_the_other(given, sizes):
    assert SpeculativeConfig.from_mapping({"method": "ngram", **given}).ngram_sizes == sizes


def test_a_configuration_survives_the_way_through_a_dict():
    config = SpeculativeConfig(method="ngram", prompt_lookup_min=3)
    assert SpeculativeConfig.from_mapping(asdict(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ngram", r"no JSON .*write, for example, \{"),
        ('["ngram"]', "no JSON object"),
        ("{}", "no method is given; choose one of ngram"),
        ('{"method": "eagle9"}', "method='eagle9' .*choose one of ngram"),
        ('{"method": 3}', "method=3 .*choose one of ngram"),
        (
            '{"method": "ngram", "num_drafts": 3}',
            "unknown option 'num_drafts'; method 'ngram' takes .*prompt_lookup_max",
        ),
        ('{"method": "ngram", "num_speculative_tokens": 0}', "num_speculative_tokens=0 .*1 to 32"),
        ('{"method": "ngram", "num_speculative_tokens": 33}', "num_speculative_tokens=33 .*1 to 32"),
        ('{"method": "ngram", "num_speculative_tokens": true}', "num_speculative_tokens=True .*whole number"),
        ('{"method": "ngram", "num_speculative_tokens": 2.0}', "num_speculative_tokens=2.0 .*whole number"),
        ('{"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3}', "at most prompt_lookup_max=2"),
        ('{"method": "ngram", "prompt_lookup_min": 0}', "prompt_lookup_min=0 .*at least 1"),
        ('{"method": "ngram", "prompt_lookup_max": 40}', "goes up to 32"),
        ('{"method": "ngram", "adaptive": 1}', "adaptive=1 .*true or false"),
        ('{"method": "ngram", "suffix_min_match": 3}', "no option of method 'ngram'"),
        ('{"method": "suffix", "prompt_lookup_max": 3}', "no option of method 'suffix'; .*suffix_store_tokens"),
        ('{"method": "suffix", "suffix_min_match": 0}', "suffix_min_match=0 .*at least 1"),
        ('{"method": "suffix", "suffix_min_probability": 0}', "suffix_min_probability=0 .*above 0"),
        ('{"method": "suffix", "suffix_min_probability": "high"}', "suffix_min_probability='high' .*a number"),
        ('{"method": "suffix", "suffix_store_tokens": -1}', "suffix_store_tokens=-1 .*0 or more"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_what_there_is(text, message):
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig.from_json(text)
