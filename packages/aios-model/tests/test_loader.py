"""Weights go where they belong, or loading fails with the name of what is wrong."""

from __future__ import annotations

import json

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from aios_model.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from aios_model.layers.linear import Linear
from aios_model.model import load_model, weight_bytes
from aios_model.weights.permuted import rows_in_halves


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama checkpoint with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    checkpoints.save_safetensors(checkpoints.random_model("llama3", seed=1), tmp_path, sharded=False)
    vocabulary = {chr(33 + i): i for i in range(90)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_model_loads_with_monotone_progress(folder):
    seen = []
    model = load_model(str(folder), device="cpu", progress=lambda stage, share: seen.append((stage, share)))
    shares = [share for stage, share in seen if stage == "loading weights"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert model.decoder.dtype == torch.float32
    # All but the embedding, which stays in the mapped file.
    total = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert model.num_weight_bytes == 4 * (total - 160 * 64)


def test_a_missing_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(folder), device="cpu")


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[63\], the config asks for \[64\]"):
        load_model(str(folder), device="cpu")


def test_a_left_over_tensor_is_refused_because_it_would_change_the_results(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_model(str(folder), device="cpu")


def test_derived_buffers_of_old_checkpoints_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    load_model(str(folder), device="cpu")


def test_a_tied_checkpoint_may_carry_its_head_which_the_tie_overrides(folder):
    change_config(folder, tie_word_embeddings=True)
    model = load_model(str(folder), device="cpu")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(model.decoder.head.dense_weight(), embedding, rtol=0, atol=0)


def test_quantised_checkpoints_and_remote_code_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedModelError, match=r"quantised \(awq\).*aios-quant"):
        load_model(str(folder), device="cpu")
    change_config(folder, quantization_config=["awq"])
    with pytest.raises(UnsupportedModelError, match="unknown"):
        load_model(str(folder), device="cpu")
    change_config(folder, quantization_config=None, auto_map={"AutoModel": "evil.py"})
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        load_model(str(folder), device="cpu")


def test_a_source_transform_may_present_a_quantised_checkpoint_as_a_plain_one(folder):
    """The weights lie under other names, which the transform puts right."""
    change_config(folder, quantization_config={"quant_method": "renamed"})
    names = load_file(folder / "model.safetensors").keys()
    change_tensors(folder, lambda tensors: [tensors.update({f"{name}.codes": tensors.pop(name)}) for name in names])

    class Renamed:
        def __init__(self, source):
            self._source = source

        def entries(self):
            return {name.removesuffix(".codes"): entry for name, entry in self._source.entries().items()}

        def close(self):
            self._source.close()

    seen = []

    def present(source, files):
        seen.append(files.root)
        return Renamed(source)

    model = load_model(str(folder), device="cpu", source_transforms=[present])
    head = load_file(folder / "model.safetensors")["lm_head.weight.codes"]
    assert torch.equal(model.decoder.head.dense_weight(), head)
    assert seen == [folder]
    load_model(str(folder), device="cpu", source_transforms=[present], load_format="dummy")
    assert seen == [folder]


def test_dummy_weights_need_no_weight_file_and_repeat(folder):
    (folder / "model.safetensors").unlink()
    first = load_model(str(folder), device="cpu", load_format="dummy", seed=3)
    second = load_model(str(folder), device="cpu", load_format="dummy", seed=3)
    head = first.decoder.head.dense_weight()
    assert torch.equal(head, second.decoder.head.dense_weight())
    assert head.std() > 0
    with pytest.raises(ModelNotFoundError, match="--load-format dummy"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "'int3'.*float32"),
        ({"device": "abacus"}, "'abacus'"),
        ({"context_length": 129}, r"129.*128"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        load_model(str(folder), **{"device": "cpu", **options})


def test_cuda_without_a_device_says_so(folder):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ConfigError, match="no CUDA device"):
        load_model(str(folder), device="cuda")


def test_transforms_run_between_building_and_loading(folder):
    seen = []

    def transform(decoder):
        seen.append(all(layer.weight.device.type == "meta" for layer in decoder.modules() if isinstance(layer, Linear)))

    model = load_model(str(folder), device="cpu", transforms=[transform])
    assert seen == [True]
    assert weight_bytes(model.decoder) == model.num_weight_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 64, 200])
def test_a_packed_linear_computes_what_a_plain_one_does(dtype, rows):
    layer = Linear(48, {"a": 20, "b": 45}, bias=True)
    weight, bias = torch.randn(65, 48).to(dtype), torch.randn(65).to(dtype)
    layer.set_weight(weight)
    layer.bias = bias
    x = torch.randn(rows, 48).to(dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(layer.dense_weight(), weight)


def test_interleaved_rows_are_put_back_into_halves():
    halves = torch.arange(12).view(2, 6)
    interleaved = halves.view(2, 2, 3).transpose(1, 2).reshape(12)
    assert interleaved[rows_in_halves(12, 2)].tolist() == list(range(12))


def test_dynamic_rope_is_stretched_for_the_context_that_is_served_and_no_further(folder):
    from aios_model.errors import InvalidRequestError
    from aios_model.generate import generate_tokens
    from aios_model.sampling.params import SamplingParams

    change_config(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0})
    declared = load_model(str(folder), device="cpu")
    stretched = load_model(str(folder), device="cpu", context_length=200)
    assert (declared.decoder.context_length, stretched.decoder.context_length) == (128, 200)
    frequencies = [model.decoder.rotary.inverse_frequencies for model in (declared, stretched)]
    assert (frequencies[1][1:] < frequencies[0][1:]).all()
    prompt, params = [1] * 150, SamplingParams(temperature=0, max_tokens=2)
    assert len(list(generate_tokens(stretched, prompt, params))) in (1, 2)
    with pytest.raises(InvalidRequestError, match="150 tokens, the context holds 128"):
        next(generate_tokens(declared, prompt, params))
