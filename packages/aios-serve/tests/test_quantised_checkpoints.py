"""From `aios-quant quantize` to an answer: every scheme and method, through the command line and the whole engine."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from aios_model.cache import ContiguousCache
from aios_model.model import load_decoder
from aios_model.weights.hub import resolve_model
from aios_quant.checkpoints.source import quantized_checkpoint
from aios_quant.cli import app
from aios_serve import InferenceEngine, SamplingParams

pytestmark = pytest.mark.slow

ROUNDINGS = [
    ("int8", "rtn"),
    ("int8", "awq"),
    ("int8-a16", "gptq"),
    ("int4", "rtn"),
    ("int4", "awq"),
    ("int4", "gptq"),
    ("int4", "awq-gptq"),
    ("fp8", "rtn"),
]
TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
QUESTION = [{"role": "user", "content": "how are you?"}]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    checkpoints.save_safetensors(checkpoints.random_model("llama3", seed=3), folder, sharded=False)
    tokenizer = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(95)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@torch.inference_mode()
def logits_after(folder: Path, tokens: list[int], count: int) -> torch.Tensor:
    """Logits in front of each of the last `count` tokens, from the dequantised weights in float32 on torch."""
    decoder = load_decoder(
        resolve_model(str(folder)), dtype="float32", device="cpu", source_transforms=[quantized_checkpoint]
    )
    cache = ContiguousCache(decoder.config, max_length=len(tokens), dtype=torch.float32, device=decoder.device)
    hidden = decoder(torch.tensor(tokens), torch.arange(len(tokens)), cache)
    return decoder.logits(hidden[-count - 1 : -1])


@pytest.mark.parametrize(("scheme", "method"), ROUNDINGS, ids=str)
def test_what_quantize_wrote_answers_in_a_chat(scheme, method, original, tmp_path) -> None:
    arguments = ["--scheme", scheme, "--method", method, "--window", "32", "--num-windows", "3"]
    result = CliRunner().invoke(app, ["quantize", str(original), "-o", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 0, result.output
    with InferenceEngine(str(tmp_path / "out"), device="cpu", threads=1) as engine:
        (output,) = engine.chat(QUESTION, PARAMS)
    answer = output.outputs[0].token_ids
    assert len(answer) == PARAMS.max_tokens
    # Inputs are rounded to 8 bits as well: the token chosen is the likeliest, or near it on the scale of all logits.
    logits = logits_after(tmp_path / "out", output.prompt_token_ids + answer, len(answer))
    behind = logits.max(dim=-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert bool((behind <= 0.1 * logits.std()).all()), (behind, logits.std())
