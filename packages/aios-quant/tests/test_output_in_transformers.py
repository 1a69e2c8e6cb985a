"""What we write, transformers and compressed-tensors load, with the same logits."""

from __future__ import annotations

import pytest
import torch
import transformers

from aios_model.cache import ContiguousCache
from aios_model.model import load_decoder
from aios_model.weights.hub import resolve_model
from aios_quant.checkpoints.source import quantized_checkpoint
from aios_quant.convert import quantize_checkpoint
from aios_quant.settings import QuantizeSettings

CASES = [
    ("llama3", {"scheme": "int4", "method": "awq", "head_scheme": "int8"}),
    ("llama3.2-tied", {"scheme": "int4", "method": "gptq", "group_size": 32}),
    ("llama3.2-tied", {"scheme": "int8-a16", "head_scheme": "int8"}),
    ("llama-biases", {"scheme": "int8-a16", "method": "awq"}),
    ("mistral-window", {"scheme": "fp8"}),
    ("qwen2", {"scheme": "int4", "method": "gptq", "dtype": "float16"}),
    ("qwen3", {"scheme": "fp8", "head_scheme": "int8"}),
    ("qwen3-yarn", {"scheme": "int4"}),
]


@pytest.fixture
def convert(tiny_checkpoint, tmp_path):
    def run(case: str, fields: dict):
        settings = QuantizeSettings(**{"window": 32, "num_windows": 3, **fields})
        quantize_checkpoint(str(tiny_checkpoint(case)), tmp_path / "out", settings)
        return tmp_path / "out"

    return run


@torch.inference_mode()
def our_logits(folder, tokens: torch.Tensor) -> torch.Tensor:
    """Of the dequantised weights, so that nothing but the files is compared."""
    files = resolve_model(str(folder))
    decoder = load_decoder(files, dtype="float32", device="cpu", source_transforms=[quantized_checkpoint])
    cache = ContiguousCache(decoder.config, max_length=len(tokens), dtype=torch.float32, device=decoder.device)
    return decoder.logits(decoder(tokens, torch.arange(len(tokens)), cache))


@torch.inference_mode()
def their_logits(folder, tokens: torch.Tensor, *, dequantize: bool = False) -> torch.Tensor:
    config = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **config
    )
    return model.eval()(tokens[None]).logits[0]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(("case", "fields"), CASES, ids=str)
def test_weight_only_checkpoints_have_the_same_logits(case, fields, convert):
    folder, tokens = convert(case, fields), torch.randint(0, 95, (40,))
    assert relative_error(our_logits(folder, tokens), their_logits(folder, tokens)) < 1e-5


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_an_asymmetric_checkpoint_has_the_same_logits(convert):
    """transformers 5.23 builds its zero points unpacked, so it loads no packed ones, its own included, unless it
    dequantises at once, in the float16 of the scales."""
    folder = convert("llama3", {"scheme": "int4", "symmetric": False, "method": "awq"})
    tokens = torch.randint(0, 95, (40,))
    assert relative_error(our_logits(folder, tokens), their_logits(folder, tokens, dequantize=True)) < 2e-3


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_an_int8_checkpoint_has_the_same_weights_and_rounds_its_inputs(convert):
    folder, tokens = convert("llama3.2-tied", {"scheme": "int8", "head_scheme": "int8"}), torch.randint(0, 95, (40,))
    ours = our_logits(folder, tokens)
    assert relative_error(ours, their_logits(folder, tokens, dequantize=True)) < 1e-2
    # W8A8: they round each token's inputs to one scale, which the comparison of plain weights does not.
    assert 1e-4 < relative_error(ours, their_logits(folder, tokens)) < 0.15


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe-unnormalised"])
def test_experts_have_the_same_logits(case, convert):
    """transformers fuses experts, dequantised in the float16 of their scales."""
    folder, tokens = convert(case, {"scheme": "int4", "method": "awq"}), torch.randint(0, 95, (40,))
    ours, theirs = our_logits(folder, tokens), their_logits(folder, tokens)
    errors = (ours - theirs).abs().amax(dim=-1) / theirs.abs().max()
    assert errors.median() < 5e-3  # a token in ten may lie between two experts


def test_a_changed_word_is_noticed(convert):
    from safetensors.torch import load_file, save_file

    folder, tokens = convert("llama3", {"scheme": "int4"}), torch.randint(0, 95, (40,))
    before = their_logits(folder, tokens)
    shard = next(folder.glob("model-00002-*"))
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.down_proj.weight_packed"][0, 0] ^= 0x70000000
    save_file(tensors, shard, {"format": "pt"})
    after = their_logits(folder, tokens)
    assert relative_error(after, before) > 1e-4
    assert relative_error(our_logits(folder, tokens), after) < 1e-5
