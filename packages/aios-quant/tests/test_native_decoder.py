"""The decoder in one native call: equal to the modules it stands in for, and bitwise the same whatever else runs."""

from __future__ import annotations

import random

import checkpoints
import pytest
import torch

from aios_kvcache.attention_plan import SequenceSlice
from aios_kvcache.native.native_cache import NativePagedKVCache
from aios_model.cache import ContiguousCache
from aios_model.decoder import DecoderModel
from aios_model.model import load_decoder
from aios_model.native import native_status
from aios_model.native.isa import available_isas
from aios_model.native.threads import get_pool
from aios_model.weights.bundled import find_bundled_model
from aios_model.weights.hub import resolve_model
from aios_quant.native import decoder as native_decoder
from aios_quant.native.decoder import NativeDecoder, unsupported
from aios_quant.native.matrix import NativeMatrix
from aios_quant.native.reduction import PythonReduction
from aios_quant.schemes.registry import find_scheme
from aios_quant.transform import quantize_model

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().reason)

DENSE = [case for case, (kind, _) in checkpoints.CASES.items() if "Moe" not in kind and "Mixtral" not in kind]
SCHEMES = ["none", "int8", "int8-a16", "int4-g32", "int4-g32-asym"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def make(case: str):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            made[case] = checkpoints.save_safetensors(checkpoints.random_model(case, seed=7), folder, sharded=False)
        return resolve_model(str(made[case]))

    return make


def native_model(files, scheme: str, *, kv_dtype=torch.float32) -> tuple[NativeDecoder, NativePagedKVCache]:
    pool = get_pool(1)

    def pack(weight, activation, dtype):
        return NativeMatrix(weight, activation=activation, pool=pool)

    decoder = load_decoder(
        files, dtype="float32", device="cpu", transforms=[quantize_model(find_scheme(scheme), kernel_factory=pack)]
    )
    assert unsupported(decoder) is None
    cache = NativePagedKVCache(decoder.config, num_blocks=64, block_size=16, pool=pool, kv_dtype=kv_dtype)
    return NativeDecoder(decoder, cache, pool=pool, max_positions=128), cache


def hidden(model: NativeDecoder, cache: NativePagedKVCache, batch: list[tuple[list[int], SequenceSlice]]):
    """Hidden states of each sequence's new tokens."""
    cache.bind([piece for _, piece in batch])
    tokens = torch.tensor([token for new, _ in batch for token in new])
    positions = torch.tensor([piece.start + i for new, piece in batch for i in range(len(new))])
    return model(tokens, positions, cache).split([len(new) for new, _ in batch])


@torch.inference_mode()
def reference_logits(decoder: DecoderModel, tokens: list[int]) -> torch.Tensor:
    cache = ContiguousCache(decoder.config, max_length=len(tokens), dtype=decoder.dtype, device=decoder.device)
    return decoder.logits(decoder(torch.tensor(tokens), torch.arange(len(tokens)), cache))


@pytest.mark.parametrize("case", DENSE)
@torch.inference_mode()
def test_every_dense_family_computes_what_its_modules_compute(case, saved) -> None:
    files = saved(case)
    reference = load_decoder(files, dtype="float32", device="cpu")
    tokens = torch.randint(0, reference.config.vocab_size, (40,)).tolist()
    expected = reference_logits(reference, tokens)
    model, cache = native_model(files, "none")
    got = model.logits(
        torch.cat(hidden(model, cache, [(tokens, SequenceSlice(start=0, length=40, block_table=[3, 9, 4]))]))
    )
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES[1:])
@torch.inference_mode()
def test_quantised_decoder_computes_what_quantised_modules_compute(scheme, saved) -> None:
    """The module path runs the torch reference of the same scheme: the differences are those of rounding."""
    files = saved("qwen3")
    reference = load_decoder(files, dtype="float32", device="cpu", transforms=[quantize_model(find_scheme(scheme))])
    tokens = torch.randint(0, reference.config.vocab_size, (40,)).tolist()
    expected = reference_logits(reference, tokens)
    model, cache = native_model(files, scheme)
    got = model.logits(
        torch.cat(hidden(model, cache, [(tokens, SequenceSlice(start=0, length=40, block_table=[1, 2, 3]))]))
    )
    assert (got - expected).norm() <= 2e-2 * expected.norm()  # an input at a tie may round the other way


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float32], ids=str)
@torch.inference_mode()
def test_rows_are_bitwise_the_same_in_any_batch_and_any_chunks_with_any_number_of_threads(
    scheme, kv_dtype, saved
) -> None:
    model, cache = native_model(
        saved(random.choice(["llama2", "qwen3", "mistral-window", "llama-biases"])), scheme, kv_dtype=kv_dtype
    )
    vocabulary = model.config.vocab_size
    sequences = [torch.randint(0, vocabulary, (random.randint(1, 100),)).tolist() for _ in range(6)]
    tables = [list(range(1 + 7 * i, 8 + 7 * i)) for i in range(6)]
    alone = [
        hidden(model, cache, [(tokens, SequenceSlice(start=0, length=len(tokens), block_table=table))])[0]
        for tokens, table in zip(sequences, tables, strict=True)
    ]
    for threads in (1, 2, 3):
        get_pool(threads)
        done = [0] * len(sequences)
        random.shuffle(tables)
        got: list[list[torch.Tensor]] = [[] for _ in sequences]
        while any(done[i] < len(tokens) for i, tokens in enumerate(sequences)):
            batch = []
            for i, tokens in enumerate(sequences):
                size = min(random.choice([0, 1, 1, 2, 7, 30]), len(tokens) - done[i])
                if size:
                    piece = SequenceSlice(start=done[i], length=size, block_table=tables[i])
                    batch.append((i, tokens[done[i] : done[i] + size], piece))
            random.shuffle(batch)
            if not batch:
                continue
            for (i, new, _), rows in zip(batch, hidden(model, cache, [entry[1:] for entry in batch]), strict=True):
                got[i].append(rows.clone())
                done[i] += len(new)
        for rows, expected in zip(got, alone, strict=True):
            assert torch.equal(torch.cat(rows), expected), (threads, scheme)
    get_pool(1)


@torch.inference_mode()
def test_logits_are_bitwise_the_same_for_one_row_and_many(saved) -> None:
    model, _ = native_model(saved("llama3"), "int8")
    rows = torch.randn(33, model.config.hidden_size)
    alone = torch.cat([model.logits(row[None]) for row in rows])
    for size in (2, 5, 16, 33):
        assert torch.equal(model.logits(rows[:size]), alone[:size])


def test_mixture_of_experts_is_left_to_the_modules(saved) -> None:
    pool = get_pool(1)

    def pack(weight, activation, dtype):
        return NativeMatrix(weight, activation=activation, pool=pool)

    files = saved("qwen3-moe")
    decoder = load_decoder(
        files, dtype="float32", device="cpu", transforms=[quantize_model(find_scheme("int8"), kernel_factory=pack)]
    )
    assert "mixtures of experts" in (unsupported(decoder) or "")
    tokens = torch.randint(0, decoder.config.vocab_size, (30,)).tolist()
    expected = reference_logits(load_decoder(files, dtype="float32", device="cpu"), tokens)
    cache = NativePagedKVCache(decoder.config, num_blocks=8, block_size=16, pool=pool, kv_dtype=torch.float32)
    cache.bind([SequenceSlice(start=0, length=30, block_table=[5, 2])])
    with torch.inference_mode():
        got = decoder.logits(decoder(torch.tensor(tokens), torch.arange(30), cache))
    assert (got - expected).norm() <= 0.1 * expected.norm()


def test_profile_accounts_for_every_phase(saved) -> None:
    model, cache = native_model(saved("llama2"), "int8")
    model.profile()
    hidden(model, cache, [([1, 2, 3], SequenceSlice(start=0, length=3, block_table=[1]))])
    assert all(seconds > 0 for seconds in model.profile().values())


@pytest.mark.parametrize("isa", [isa.name for isa in available_isas()][1:])
def test_other_instruction_sets_pass_the_same_tests(isa, run_with_isa) -> None:
    run_with_isa(isa, __file__, "-k", "not instruction_sets and not int8-a16 and not asym")


def test_the_bundled_models_embedding_is_looked_up_natively_and_equal_to_the_modules() -> None:
    decoder = load_decoder(resolve_model(str(find_bundled_model())), dtype="float32", device="cpu")
    look_up = native_decoder._embedding_of(decoder)
    assert look_up is not decoder.embedding
    tokens = torch.randint(0, decoder.config.vocab_size, (100,))
    assert torch.equal(look_up(tokens), decoder.embedding(tokens))


def test_partial_sums_are_added_up_between_segments(saved) -> None:
    files = saved("llama3")
    plain, cache = native_model(files, "int8")
    tokens, sums = [1, 2, 3, 4, 5], []
    expected = hidden(plain, cache, [(tokens, SequenceSlice(start=0, length=5, block_table=[1]))])

    def halve_and_double(values: torch.Tensor) -> None:
        sums.append(values.clone())
        values.mul_(0.5).mul_(2)

    pool = get_pool(1)
    reduce = PythonReduction(halve_and_double)
    summed = NativeDecoder(plain._keep[0], cache, pool=pool, max_positions=128, reduce=reduce)
    got = hidden(summed, cache, [(tokens, SequenceSlice(start=0, length=5, block_table=[2]))])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    layers = plain.config.num_hidden_layers
    assert [each.numel() for each in sums] == [5 * plain.config.hidden_size] * 2 * layers
    assert summed.num_layers_done == layers

    def fail(values: torch.Tensor) -> None:
        raise RuntimeError("the others are gone")

    broken = NativeDecoder(plain._keep[0], cache, pool=pool, max_positions=128, reduce=PythonReduction(fail))
    with pytest.raises(RuntimeError, match="are gone"):
        hidden(broken, cache, [(tokens, SequenceSlice(start=0, length=5, block_table=[3]))])
