"""Launching a step waits for nothing: not for a value of the device, and not for a copy to it.

The device is torch's meta device. Its tensors have no values, so whatever looks at one raises; a mode around it refuses
copies that would make the host wait on a GPU. Values are checked on the CPU, against steps that run one after another.
"""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aios_kvcache.block import BlockCopy
from aios_kvcache.paged_cache import PagedKVCache
from aios_model.decoder import DecoderModel
from aios_model.families import find_hf_family
from aios_model.sampling.device_sampler import DeviceSampler
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SamplingRow
from aios_sched.ahead import PendingOutput
from aios_sched.errors import PendingTokenError
from aios_sched.model_runner import ModelRunner
from aios_sched.newest_tokens import NewestTokens
from aios_sched.output import PENDING_TOKEN, ScheduledRequest, SchedulerOutput

VOCAB_SIZE, BLOCK_SIZE = 120, 4
META = torch.device("meta")
RAW_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


class WaitError(Exception):
    """The host would have waited for the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses copies between host and meta device that wait, and reading one number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            raise WaitError("reads a number of the device")
        out = func(*args, **given)
        if "non_blocking" in (names := [argument.name for argument in func._schema.arguments]):
            place = names.index("non_blocking")
            is_free = given.get("non_blocking", args[place] if place < len(args) else False)
            sources = [arg.device for arg in args if isinstance(arg, torch.Tensor)]
            if not is_free and any(source != out.device for source in sources):
                raise WaitError("waits for a copy")
        return out


@contextmanager
def no_waiting(monkeypatch):
    """`torch.tensor(..., device=...)` copies where no mode sees it."""
    make = torch.tensor

    def checked(data, **options):
        if torch.device(options.get("device") or "cpu") == META:
            raise WaitError("torch.tensor waits for its copy")
        return make(data, **options)

    with monkeypatch.context() as patch, NoWaiting():
        patch.setattr(torch, "tensor", checked)
        yield


class Records:
    """Brings nothing anywhere: what is to be brought is counted."""

    def __init__(self):
        self.num_started = 0

    def start(self, tensors):
        self.num_started += 1
        return self

    def wait(self):
        raise AssertionError("waited while launching")


@pytest.fixture
def runner():
    config = find_hf_family(RAW_CONFIG).read_hf(RAW_CONFIG)
    decoder = DecoderModel(config).eval()
    decoder.rotary.load(device=META, dtype=torch.float32)
    cache = PagedKVCache(config, num_blocks=40, block_size=BLOCK_SIZE, dtype=torch.float32, device=META)
    records = Records()
    sampler = DeviceSampler(vocab_size=VOCAB_SIZE, device=META, downloads=records)
    return ModelRunner(decoder, cache, sampler, downloads=records)


def sampling(request_id, position, output=(), **params):
    return SamplingRow(
        request_id=request_id,
        params=SamplingParams(max_tokens=50, **params),
        seed=1,
        position=position,
        prompt_token_ids=[1, 2, 3],
        output_token_ids=output,
        stop_token_ids=(0,),
    )


def step(*rows, copies=(), finished=()):
    return SchedulerOutput(
        step_id=0,
        requests=rows,
        block_copies=copies,
        num_scheduled_tokens=sum(len(row.token_ids) for row in rows),
        finished_request_ids=finished,
    )


def row(request_id, token_ids, start, sample):
    pages = random.sample(range(1, 40), -(-(start + len(token_ids)) // BLOCK_SIZE))
    return ScheduledRequest(request_id=request_id, token_ids=token_ids, start=start, block_table=pages, sampling=sample)


OPTIONS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 20, "min_p": 0.01},
    {"temperature": 0, "logprobs": 5},
    {"temperature": 0, "logit_bias": {3: 1.0}, "allowed_token_ids": (3, 4, 5)},
    {"temperature": 0, "min_tokens": 9},
]
"""What may be planned ahead."""


def test_launching_waits_for_nothing(runner, monkeypatch):
    """Prompts, chunks, decodes, rows planned ahead and copies of pages, with every option that may be planned ahead."""
    names = [f"r{index}" for index in range(len(OPTIONS))]
    named = list(zip(names, OPTIONS, strict=True))
    first = [row(name, [5, 6, 7], 0, sampling(name, 3, **options)) for name, options in named]
    chunk = row("chunk", list(range(1, 12)), 3, None)
    slow = row("slow", [4], 3, sampling("slow", 4, [4], repetition_penalty=1.2, bad_words_token_ids=((1, 2),)))
    ahead = [row(name, [PENDING_TOKEN], 3, sampling(name, 4, PendingOutput(1), **options)) for name, options in named]
    with no_waiting(monkeypatch):
        runner.launch(step(*first, chunk))
        runner.launch(step(*ahead, slow, copies=(BlockCopy(source=1, destination=2),), finished=("gone",)))
        runner.launch(step(row("chunk", [1, 2], 14, None)))


def test_a_mode_that_forgives_everything_would_prove_nothing(monkeypatch):
    there = torch.empty(3, device=META)
    for waits in (
        lambda: torch.zeros(3).to(META),
        lambda: torch.tensor([1, 2], device=META),
        lambda: there.copy_(torch.zeros(3)),
        lambda: there.tolist(),
        lambda: there.cpu(),
        lambda: there[0].item(),
        lambda: bool(there.any()),
        lambda: there[there > 0],
    ):
        for mode in (torch.no_grad(), torch.inference_mode()):  # they show different calls
            with mode, no_waiting(monkeypatch), pytest.raises((WaitError, RuntimeError, NotImplementedError)):
                waits()
    with no_waiting(monkeypatch):
        assert torch.zeros(3).to(META, non_blocking=True).device == META


def test_step_planned_ahead_cannot_be_executed(runner):
    with pytest.raises(PendingTokenError, match="planned ahead"):
        runner.execute(step(row("a", [PENDING_TOKEN], 3, sampling("a", 4, PendingOutput(1)))))


def test_token_that_no_step_samples_is_an_error(runner):
    with pytest.raises(PendingTokenError, match="'a'"):
        runner.launch(step(row("a", [PENDING_TOKEN], 3, sampling("a", 4, PendingOutput(1)))))


def test_pending_output_has_a_length_and_no_tokens():
    output = PendingOutput(3)
    assert len(output) == 3
    for read in (lambda: output[-1], lambda: list(output), lambda: output[:2], lambda: 5 in output):
        with pytest.raises(PendingTokenError, match="reads_output=True"):
            read()


def test_newest_tokens_come_from_the_newest_step_that_sampled_the_request():
    newest = NewestTokens()
    newest.keep(["a", "b", "c"], torch.tensor([10, 11, 12]))
    newest.keep(["c", "d"], torch.tensor([22, 23]))
    tokens_T = torch.tensor([PENDING_TOKEN, 7, PENDING_TOKEN, PENDING_TOKEN, 8])
    newest.put(tokens_T, [(0, "c"), (2, "a"), (3, "d")])
    assert tokens_T.tolist() == [22, 7, 10, 23, 8]
    newest.forget("a")
    newest.forget("nobody")
    assert len(newest) == 3
    with pytest.raises(PendingTokenError):
        newest.put(tokens_T, [(0, "a")])


def test_step_without_tokens_is_waited_for_too(runner):
    """Or the host would pile up chunks of a prompt on the device."""
    launched = runner.launch(step(row("chunk", [1, 2, 3], 0, None)))
    with pytest.raises(AssertionError, match="waited"):
        launched.result()
