"""Draws that nobody waits for: the tokens of `Sampler`, bit for bit, on a device whose values cannot be read."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
import torch

from aios_model.sampling.device_sampler import DeviceSampler
from aios_model.sampling.errors import NonFiniteLogitsError, NoTokenLeftError
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SamplingRow
from aios_model.sampling.sampler import Sampler


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from a second thread, and on a busy machine they wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_row(index: int, vocab: int) -> SamplingRow:
    tokens = [random.randrange(vocab) for _ in range(40)]
    num_outputs = random.randint(0, 20)
    params = SamplingParams(
        temperature=random.choice([0.0, 0.05, 0.7, 1.0, 2.0]),
        top_k=random.choice([0, 0, 1, 7, random.randint(1, vocab), vocab + 5]),
        top_p=random.choice([1.0, 1.0, random.uniform(0.001, 0.999), 1 - 1e-9]),
        min_p=random.choice([0.0, 0.0, random.uniform(0.0, 0.2)]),
        repetition_penalty=random.choice([1.0, 1.0, 1.3]),
        frequency_penalty=random.choice([0.0, 0.0, 0.4]),
        min_tokens=random.choice([0, 0, 10]),
        max_tokens=100,
        logit_bias=random.choice([None, None, {tokens[0]: 3.0, tokens[1]: -100.0}]),
        allowed_token_ids=random.choice([None, None, tuple({*tokens[:6]})]),
        bad_words_token_ids=random.choice([(), (), tuple((token,) for token in tokens[:9])]),
        logprobs=random.choice([None, None, 0, 1, 5, 20]),
    )
    return SamplingRow(
        request_id=str(index),
        params=params,
        seed=random.randrange(-(2**63), 2**63),
        position=random.randrange(10**6),
        prompt_token_ids=tokens[:20],
        output_token_ids=tokens[20 : 20 + num_outputs],
        stop_token_ids=tuple(tokens[30:33]),
    )


def random_logits(rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, vocab, dtype=dtype) * random.choice([0.1, 3.0, 10.0])
    if random.random() < 0.4:
        step = random.choice([0.125, 1.0, 4.0])
        x = (x / step).round() * step
    if random.random() < 0.3:
        x[torch.rand(rows, vocab) < 0.5] = -math.inf
        x[:, random.randrange(vocab)] = 0.0
    return x


def outcome(sampler: Sampler | DeviceSampler, logits: torch.Tensor, rows: list[SamplingRow]) -> object:
    try:
        return sampler.sample(logits, rows)
    except (NonFiniteLogitsError, NoTokenLeftError) as error:
        return type(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab", [30, 301, 5000])
def test_tokens_and_logprobs_are_those_of_the_sampler(vocab, dtype):
    for _ in range(12):
        rows = [random_row(index, vocab) for index in range(random.randint(1, 9))]
        logits = random_logits(len(rows), vocab, dtype)
        before = logits.clone()
        wanted = outcome(Sampler(vocab_size=vocab, device="cpu"), logits, rows)
        assert outcome(DeviceSampler(vocab_size=vocab, device="cpu"), logits, rows) == wanted
        assert torch.equal(logits, before), "the model's logits were changed"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_noticed_with_the_result(bad, temperature):
    params = SamplingParams(temperature=temperature)
    rows = [
        SamplingRow(request_id=name, params=params, seed=1, position=1, prompt_token_ids=[1], output_token_ids=[])
        for name in ("sound", "broken")
    ]
    logits = torch.randn(2, 50)
    logits[1, random.randrange(50)] = bad
    launched = DeviceSampler(vocab_size=50, device="cpu").launch(logits, rows)
    with pytest.raises(NonFiniteLogitsError, match="broken") as caught:
        launched.result()
    assert "sound" not in str(caught.value)


def test_bans_give_way_where_they_would_leave_nothing():
    params = SamplingParams(temperature=0, bad_words_token_ids=((0,), (1,), (2,)), max_tokens=9)
    row = SamplingRow(request_id="r", params=params, seed=0, position=1, prompt_token_ids=[0], output_token_ids=[])
    [token] = DeviceSampler(vocab_size=3, device="cpu").sample(torch.tensor([[0.0, 2.0, 1.0]]), [row])
    assert token.token_id == 1


def test_forgetting_drops_what_was_remembered():
    sampler = DeviceSampler(vocab_size=30, device="cpu")
    params = SamplingParams(temperature=0, logit_bias={3: 1.0})
    row = SamplingRow(request_id="r", params=params, seed=0, position=1, prompt_token_ids=[0], output_token_ids=[])
    sampler.sample(torch.zeros(1, 30), [row])
    assert sampler.num_remembered_requests == 1
    sampler.forget("r")
    assert sampler.num_remembered_requests == 0


@dataclass
class Records:
    """Keeps what is to be brought to the host."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def start(self, tensors):
        self.shapes += [tuple(tensor.shape) for tensor in tensors]
        return self

    def wait(self):
        raise AssertionError("waited while launching")


@pytest.mark.parametrize("vocab", [30, 5000])
def test_launching_reads_no_value_from_the_device(vocab):
    """Tensors of torch's meta device have no values: whatever looks at one raises."""
    for _ in range(15):
        rows = [random_row(index, vocab) for index in range(random.randint(1, 9))]
        records = Records()
        sampler = DeviceSampler(vocab_size=vocab, device="meta", downloads=records)
        sample = sampler.launch(torch.empty(len(rows), vocab, device="meta"), rows)
        assert sample.token_ids_S.device.type == "meta"
        assert records.shapes[:2] == [(len(rows),), (len(rows),)]


def test_the_sampler_that_waits_fails_on_such_a_device():
    """Otherwise the test above could be green because the device forgives everything."""
    rows = [random_row(0, 30)]
    with pytest.raises((RuntimeError, NotImplementedError)):
        Sampler(vocab_size=30, device="meta").sample(torch.empty(1, 30, device="meta"), rows)
