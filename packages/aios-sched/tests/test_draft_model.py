"""A draft model on pages of its own, with tiny models in float64: the target as its own draft is always right."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.paged_cache import PagedKVCache
from aios_model.decoder import DecoderModel
from aios_model.errors import ConfigError
from aios_model.families import find_hf_family
from aios_model.generate import generate_tokens
from aios_model.loader import load_weights, parameter_shapes
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SamplingRow
from aios_model.sampling.sampler import Sampler
from aios_model.weights.dummy import DummyEntry
from aios_sched.speculative.base import DraftContext
from aios_sched.speculative.draft_model import DraftModelProposer
from aios_sched.speculative.early_exit import early_exit

VOCAB_SIZE, CONTEXT_LENGTH = 200, 256
RAW_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "rms_norm_eps": 1e-5,
}


class Entry(DummyEntry):
    def _fill(self, lines_L, columns, out_LC):
        super()._fill(lines_L, columns, out_LC)
        if not self._ones:
            out_LC.mul_(25)


class Source:
    def __init__(self, shapes, seed):
        self._shapes, self._seed = shapes, seed

    def entries(self):
        return {
            name: Entry(
                name,
                tuple(shape),
                key=random.Random(f"{name} {self._seed}").getrandbits(31),
                ones=name.endswith("norm.weight"),
            )
            for name, shape in self._shapes.items()
        }

    def close(self):
        pass


@dataclass
class Model:
    config: object
    decoder: DecoderModel
    eos_token_ids: tuple[int, ...] = ()


@cache
def model(seed=0):
    torch.set_num_threads(1)
    config = find_hf_family(RAW_CONFIG).read_hf(RAW_CONFIG)
    decoder = DecoderModel(config).eval()
    options = {"file_format": "safetensors", "dtype": torch.float64, "device": torch.device("cpu")}
    load_weights(decoder, Source(parameter_shapes(decoder), seed), **options)
    return Model(config, decoder)


def nudged(seed, amount):
    """The target with rounding in its weights, as after quantisation."""
    other = Model(model().config, DecoderModel(model().config).eval())
    options = {"file_format": "safetensors", "dtype": torch.float64, "device": torch.device("cpu")}
    load_weights(other.decoder, Source(parameter_shapes(other.decoder), 0), **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.decoder.parameters():
            weight.mul_(1 + amount * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return other


def tokens_of(which, prompt, params, num_tokens):
    wanted = SamplingParams(**{**{"max_tokens": num_tokens, "ignore_eos": True, "seed": 0}, **params})
    return [token.token_id for token in generate_tokens(which, list(prompt), wanted)]


def proposer_of(which, *, num_blocks=100, block_size=4, **options):
    decoder = which.decoder
    pages = PagedKVCache(
        decoder.config, num_blocks=num_blocks, block_size=block_size, dtype=torch.float64, device="cpu"
    )
    books = BlockManager(num_blocks=num_blocks, block_size=block_size)
    sampler = Sampler(vocab_size=VOCAB_SIZE, device="cpu")
    return DraftModelProposer(decoder, pages, books, sampler, context_length=CONTEXT_LENGTH, **options), books


def context(name, tokens, *, num_prompt_tokens, max_drafts=4, params=None, salt=""):
    wanted = SamplingParams(**{"seed": 0, **(params or {})})
    sampling = SamplingRow(
        request_id=name,
        params=wanted,
        seed=wanted.seed,
        position=len(tokens),
        prompt_token_ids=tokens[:num_prompt_tokens],
        output_token_ids=tokens[num_prompt_tokens:],
    )
    return DraftContext(
        request_id=name,
        token_ids=tokens,
        num_prompt_tokens=num_prompt_tokens,
        max_drafts=max_drafts,
        sampling=sampling,
        salt=salt,
    )


def random_prompt(seed, length):
    draw = random.Random(seed)
    return [draw.randrange(VOCAB_SIZE) for _ in range(length)]


SAMPLING = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0, "seed": 5},
    "truncated": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 6},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "seed": 7},
    "logprobs": {"temperature": 1.0, "logprobs": 2, "seed": 8},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_target_as_its_own_draft_is_always_right(name):
    params, draw = SAMPLING[name], random.Random(name)
    proposer, books = proposer_of(model())
    truth = {
        f"{name} {number}": (number + 5, tokens_of(model(), random_prompt(number, number + 5), params, 40))
        for number in range(4)
    }
    texts = {request: random_prompt(length - 5, length) for request, (length, _) in truth.items()}
    for _ in range(7):
        contexts = [
            context(request, texts[request], num_prompt_tokens=length, max_drafts=draw.randint(1, 4), params=params)
            for request, (length, _) in truth.items()
        ]
        for asked, drafts in zip(contexts, proposer.propose(contexts), strict=True):
            length, tokens = truth[asked.request_id]
            done = len(asked.token_ids) - length
            assert drafts == tokens[done : done + asked.max_drafts]
            texts[asked.request_id] += tokens[done : done + draw.randint(1, len(drafts) + 1)]
    for request in texts:
        proposer.forget(request)
    assert books.num_free_blocks == books.num_blocks


def test_each_token_is_computed_once():
    proposer, _ = proposer_of(model())
    prompt = random_prompt(1, 9)
    tokens = tokens_of(model(), prompt, {"temperature": 0.0}, 40)
    text = list(prompt)
    for _ in range(6):
        drafts = proposer.propose([context("r", text, num_prompt_tokens=9, params={"temperature": 0.0})])[0]
        text += [*drafts, tokens[len(text) - 9 + len(drafts)]]
    assert proposer.num_computed_tokens == len(text) - 2  # not the last draft, nor the token behind it


def test_wrong_drafts_leave_no_trace():
    """Another model drafts; what it says is what it would say to the target's text, however wrong it was before."""
    proposer, _ = proposer_of(model(1))
    greedy = {"temperature": 0.0}
    prompt = random_prompt(2, 7)
    tokens = tokens_of(model(), prompt, greedy, 40)
    text, num_wrong = list(prompt), 0
    for _ in range(12):
        drafts = proposer.propose([context("r", text, num_prompt_tokens=7, params=greedy)])[0]
        assert drafts == tokens_of(model(1), text, greedy, 4)
        place = len(text) - 7
        right = next((i for i, draft in enumerate(drafts) if draft != tokens[place + i]), len(drafts))
        num_wrong += right < len(drafts)
        text += tokens[place : place + right + 1]
    assert num_wrong > 6


def test_long_prompt_is_caught_up_in_chunks_and_others_do_not_wait():
    proposer, _ = proposer_of(model(), max_chunk_tokens=50)
    greedy = {"temperature": 0.0}
    long, short = random_prompt(3, 180), random_prompt(4, 8)
    contexts = [
        context("long", long, num_prompt_tokens=180, params=greedy),
        context("short", short, num_prompt_tokens=8, params=greedy),
    ]
    rounds, before = [], 0
    for _ in range(5):
        rounds.append(proposer.propose(contexts))
        assert proposer.num_computed_tokens - before <= 50 + 64 + 8
        before = proposer.num_computed_tokens
    assert [bool(long) for long, _ in rounds] == [False, False, False, True, True]
    assert rounds[3][0] == rounds[4][0] == tokens_of(model(), long, greedy, 4)
    assert all(answer == tokens_of(model(), short, greedy, 4) for _, answer in rounds)


@pytest.mark.parametrize("seed", range(4))
def test_few_pages_cost_drafts_and_never_a_wrong_one(seed):
    draw = random.Random(seed)
    proposer, books = proposer_of(model(), num_blocks=12)
    greedy, texts, serial, num_drafts = {"temperature": 0.0}, {}, 0, 0
    for _ in range(40):
        while len(texts) < 4:
            texts[f"r{serial}"] = random_prompt(draw.randrange(3), draw.randint(3, 20))  # some are the same
            serial += 1
        asked = draw.sample(sorted(texts), draw.randint(1, 4))
        contexts = [
            context(name, texts[name], num_prompt_tokens=len(texts[name]), params=greedy, max_drafts=draw.randint(1, 4))
            for name in asked
        ]
        for each, drafts in zip(contexts, proposer.propose(contexts), strict=True):
            truth = tokens_of(model(), each.token_ids, greedy, 5)
            assert drafts in ([], truth[: each.max_drafts])
            num_drafts += bool(drafts)
            texts[each.request_id] += truth[: draw.randint(1, len(drafts) + 1)]
            if len(each.token_ids) > 32 or draw.random() < 0.1:
                proposer.forget(each.request_id)
                del texts[each.request_id]
    assert num_drafts > 20
    proposer.close()
    assert books.num_free_blocks == books.num_blocks


def test_pages_are_shared_within_a_salt_only():
    proposer, books = proposer_of(model())
    prompt = random_prompt(5, 40)
    for name, salt in (("a", "x"), ("b", "x"), ("c", "y")):
        proposer.propose([context(name, list(prompt), num_prompt_tokens=40, params={"temperature": 0.0}, salt=salt)])
    tables = {name: books.block_table(name) for name in "abc"}
    assert tables["a"][:9] == tables["b"][:9]
    assert not set(tables["a"]) & set(tables["c"])


def test_common_noise_makes_drawn_drafts_agree():
    """A copy with rounding errors: drawn with the target's seed it agrees more often than with one of its own."""
    copy = nudged(seed=3, amount=0.02)
    agreed = {"common": 0, "own": 0}
    for number in range(40):
        prompt = random_prompt(number, 6)
        params = {"temperature": 1.0, "seed": number}
        (token,) = tokens_of(model(), prompt, params, 1)
        for noise, seed in (("common", number), ("own", number + 1000)):
            proposer, _ = proposer_of(copy)
            asked = context("r", prompt, num_prompt_tokens=6, max_drafts=1, params={**params, "seed": seed})
            agreed[noise] += proposer.propose([asked]) == [[token]]
    assert agreed["common"] > 30
    assert agreed["own"] < 20


def test_greedy_drafts_ignore_what_the_request_asks_for():
    proposer, _ = proposer_of(model(), is_greedy=True)
    prompt = random_prompt(6, 6)
    drafts = proposer.propose([context("r", prompt, num_prompt_tokens=6, params={"temperature": 1.5, "seed": 3})])
    assert drafts == [tokens_of(model(), prompt, {"temperature": 0.0}, 4)]


def test_text_beyond_the_draft_models_context_gets_no_drafts():
    proposer, _ = proposer_of(model())
    prompt = random_prompt(7, CONTEXT_LENGTH - 3)
    assert proposer.propose([context("r", prompt, num_prompt_tokens=len(prompt))]) == [[]]


def test_request_without_a_token_to_draw_gets_no_drafts_and_others_do():
    proposer, _ = proposer_of(model())
    prompt, greedy = random_prompt(8, 6), {"temperature": 0.0}
    inner = proposer._model

    class Broken:
        config, device = inner.config, inner.device

        def __call__(self, *arguments):
            return inner(*arguments)

        def logits(self, hidden_SD):
            logits_SV = inner.logits(hidden_SD)
            logits_SV[0] = torch.nan
            return logits_SV

    proposer._model = Broken()
    contexts = [context(name, list(prompt), num_prompt_tokens=6, params=greedy) for name in ("broken", "r")]
    assert proposer.propose(contexts) == [[], tokens_of(model(), prompt, greedy, 1)]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_early_exit_runs_the_first_layers_of_the_same_model(num_layers):
    shallow = early_exit(model().decoder, num_layers=num_layers)
    assert len(shallow.layers) == num_layers
    assert len(model().decoder.layers) == 3
    assert shallow.head is model().decoder.head
    prompt, greedy = random_prompt(9, 12), {"temperature": 0.0}
    expected = tokens_of(Model(shallow.config, shallow), prompt, greedy, 4)
    assert expected != tokens_of(model(), prompt, greedy, 4)
    proposer, _ = proposer_of(Model(shallow.config, shallow))
    assert proposer.propose([context("r", prompt, num_prompt_tokens=12, params=greedy)]) == [expected]


@pytest.mark.parametrize("num_layers", [0, 3])
def test_early_exit_after_no_layer_or_after_all_is_refused(num_layers):
    with pytest.raises(ConfigError, match="choose 1 to 2"):
        early_exit(model().decoder, num_layers=num_layers)


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="positive"):
        proposer_of(model(), max_chunk_tokens=0)
