"""What `--speculative-config` takes and what it refuses, with what to do about it."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from aios_model.errors import ConfigError
from aios_sched.speculative.config import SpeculativeConfig
from aios_sched.speculative.fixed import FixedController
from aios_sched.speculative.ngram import NgramProposer
from aios_sched.speculative.registry import make_controller, make_proposer


def test_json_of_vllm_is_understood():
    text = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 6, "prompt_lookup_min": 3}'
    config = SpeculativeConfig.from_json(text)
    assert config == SpeculativeConfig(
        method="ngram", num_speculative_tokens=5, prompt_lookup_max=6, prompt_lookup_min=3
    )
    assert config.ngram_sizes == (3, 6)
    assert isinstance(make_proposer(config), NgramProposer)
    controller = make_controller(config)
    assert isinstance(controller, FixedController)
    assert controller.num_drafts("a", num_requests=64) == 5


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
    ],
)
def test_what_cannot_be_honoured_is_refused_with_what_there_is(text, message):
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig.from_json(text)
