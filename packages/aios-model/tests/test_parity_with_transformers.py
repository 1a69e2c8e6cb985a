"""Every family computes what transformers computes, from both file formats."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch

from aios_model.cache import ContiguousCache
from aios_model.config_file import read_model_config
from aios_model.decoder import DecoderModel
from aios_model.loader import load_weights
from aios_model.model import open_source
from aios_model.weights.hub import resolve_model

SEQUENCE = 48


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes each case once: case -> (transformers model, folder)."""
    made = {}

    def make(case: str):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            model = checkpoints.random_model(case, seed=len(made))
            sharded = len(made) % 2 == 0
            made[case] = model, checkpoints.save_safetensors(model, folder, sharded=sharded)
        return made[case]

    return make


def load_decoder(path: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
    files = resolve_model(str(path))
    decoder = DecoderModel(read_model_config(files))
    source, file_format = open_source(files, decoder)
    load_weights(decoder, source, file_format=file_format, dtype=dtype, device=torch.device("cpu"))
    return decoder


@torch.inference_mode()
def all_logits(decoder: DecoderModel, tokens: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Logits [T, V] of every position, run in chunks of the given sizes."""
    cache = ContiguousCache(decoder.config, max_length=len(tokens), dtype=decoder.dtype, device=decoder.device)
    rows = []
    for piece in tokens.split(chunks):
        positions = torch.arange(cache.length, cache.length + len(piece))
        rows.append(decoder.logits(decoder(piece, positions, cache)))
        cache.advance(len(piece))
    return torch.cat(rows)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_same_logits(decoder: DecoderModel, model, *, bound: float = 1e-4) -> None:
    tokens = torch.randint(0, decoder.config.vocab_size, (SEQUENCE,))
    with torch.inference_mode():
        theirs = model(tokens[None]).logits[0].to(decoder.dtype)
    assert relative_error(all_logits(decoder, tokens, [SEQUENCE]), theirs) <= bound
    one_by_one = [17, 1, 1, 11] + [1] * (SEQUENCE - 30)
    assert relative_error(all_logits(decoder, tokens, one_by_one), theirs) <= bound


@pytest.mark.parametrize("case", checkpoints.CASES)
def test_safetensors_give_the_logits_of_transformers(case, saved):
    model, folder = saved(case)
    assert_same_logits(load_decoder(folder), model)


@pytest.mark.parametrize("case", checkpoints.GGUF_CASES)
def test_gguf_gives_the_logits_of_transformers(case, saved, tmp_path):
    model, folder = saved(case)
    path = checkpoints.save_gguf(model, folder, tmp_path / "model.gguf")
    assert_same_logits(load_decoder(path), model)


@pytest.mark.parametrize("case", ["llama3.1", "qwen3-moe"])
def test_float64_agrees_up_to_the_float32_angles_of_transformers(case, saved):
    model, folder = saved(case)
    try:
        assert_same_logits(load_decoder(folder, torch.float64), model.double(), bound=1e-5)
    finally:
        model.float()


def test_bfloat16_stays_near_float32(saved):
    model, folder = saved("llama3")
    tokens = torch.randint(0, 160, (SEQUENCE,))
    ours = all_logits(load_decoder(folder, torch.bfloat16), tokens, [SEQUENCE])
    with torch.inference_mode():
        theirs = model(tokens[None]).logits[0]
    assert ours.dtype == torch.float32
    assert relative_error(ours, theirs) < 0.1


def test_a_planted_error_is_seen(saved):
    model, folder = saved("qwen3")
    decoder = load_decoder(folder)
    decoder.layers[1].attention.query_norm._eps.fill_(1.0)
    with pytest.raises(AssertionError):
        assert_same_logits(decoder, model)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["llama3.1", "qwen3-moe"])
def test_cuda_gives_the_logits_of_transformers(case, saved):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    model, folder = saved(case)
    files = resolve_model(str(folder))
    decoder = DecoderModel(read_model_config(files))
    source, file_format = open_source(files, decoder)
    device = torch.device("cuda")
    load_weights(decoder, source, file_format=file_format, dtype=torch.float32, device=device)
    tokens = torch.randint(0, decoder.config.vocab_size, (SEQUENCE,))
    cache = ContiguousCache(decoder.config, max_length=SEQUENCE, dtype=torch.float32, device=device)
    with torch.inference_mode():
        theirs = model(tokens[None]).logits[0]
        hidden = decoder(tokens.to(device), torch.arange(SEQUENCE, device=device), cache)
        assert relative_error(decoder.logits(hidden).cpu(), theirs) <= 1e-3
