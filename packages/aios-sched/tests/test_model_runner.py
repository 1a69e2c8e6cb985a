"""From a step to tensors and back, with a decoder that only writes down what it is given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from aios_kvcache.block import BlockCopy
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SampledToken, SamplingRow
from aios_sched.batch import pack
from aios_sched.model_runner import ModelRunner
from aios_sched.output import ScheduledRequest, SchedulerOutput


def sampling(request_id, position):
    return SamplingRow(
        request_id=request_id,
        params=SamplingParams(),
        seed=0,
        position=position,
        prompt_token_ids=[],
        output_token_ids=[],
        stop_token_ids=(),
    )


def step(*requests, copies=(), finished=()):
    return SchedulerOutput(
        step_id=0,
        requests=requests,
        block_copies=copies,
        num_scheduled_tokens=sum(len(request.token_ids) for request in requests),
        finished_request_ids=finished,
    )


DECODE = ScheduledRequest(
    request_id="d", token_ids=[41], start=9, block_table=[4, 2, 7], sampling=sampling("d", position=10)
)
CHUNK = ScheduledRequest(request_id="c", token_ids=[5, 6, 7], start=4, block_table=[1, 3], sampling=None)
LAST_CHUNK = ScheduledRequest(
    request_id="l", token_ids=[8, 9], start=0, block_table=[5], sampling=sampling("l", position=2)
)


def test_tokens_of_all_requests_stand_in_one_row_without_padding():
    batch = pack(step(DECODE, CHUNK, LAST_CHUNK), device=torch.device("cpu"))
    assert batch.tokens_T.tolist() == [41, 5, 6, 7, 8, 9]
    assert batch.positions_T.tolist() == [9, 4, 5, 6, 0, 1]
    assert batch.tokens_T.dtype == batch.positions_T.dtype == batch.sample_rows_S.dtype == torch.int64
    assert [(s.start, s.length, list(s.block_table)) for s in batch.sequences] == [
        (9, 1, [4, 2, 7]),
        (4, 3, [1, 3]),
        (0, 2, [5]),
    ]


def test_last_token_of_each_request_that_samples_is_marked():
    batch = pack(step(DECODE, CHUNK, LAST_CHUNK), device=torch.device("cpu"))
    assert batch.sample_rows_S.tolist() == [0, 5]
    assert [row.request_id for row in batch.sampling] == ["d", "l"]


class Recorder:
    """Decoder, cache and sampler in one: writes down each call in its order."""

    config = SimpleNamespace(vocab_size=11)
    device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def copy_blocks(self, copies):
        self.calls.append(("copy", tuple(copies)))

    def bind(self, sequences):
        self.calls.append(("bind", len(sequences)))

    def __call__(self, tokens_T, positions_T, cache):
        assert cache is self
        assert torch.is_inference_mode_enabled()
        self.calls.append(("forward", tokens_T.tolist()))
        return tokens_T[:, None] * torch.ones(1, 2)

    def logits(self, hidden_SD):
        self.calls.append(("logits", hidden_SD[:, 0].tolist()))
        return torch.zeros(len(hidden_SD), 11)

    def sample(self, logits_SV, rows):
        self.calls.append(("sample", [row.request_id for row in rows]))
        return [SampledToken(token_id=index) for index in range(len(rows))]

    def forget(self, request_id):
        self.calls.append(("forget", request_id))


@pytest.fixture
def recorder():
    return Recorder()


def test_step_goes_through_pages_decoder_and_sampler_in_this_order(recorder):
    copy = BlockCopy(source=1, destination=2)
    runner = ModelRunner(recorder, recorder, recorder)
    result = runner.execute(step(DECODE, CHUNK, LAST_CHUNK, copies=(copy,), finished=("old",)))
    assert recorder.calls == [
        ("forget", "old"),
        ("copy", (copy,)),
        ("bind", 3),
        ("forward", [41, 5, 6, 7, 8, 9]),
        ("logits", [41, 9]),
        ("sample", ["d", "l"]),
    ]
    assert {name: token.token_id for name, token in result.sampled.items()} == {"d": 0, "l": 1}
    assert runner.vocab_size == 11


def test_step_in_which_nothing_samples_computes_no_logits(recorder):
    result = ModelRunner(recorder, recorder, recorder).execute(step(CHUNK))
    assert result.sampled == {}
    assert recorder.calls[-1] == ("forward", [5, 6, 7])
