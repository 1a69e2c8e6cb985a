"""`quantize_checkpoint` writes a complete checkpoint, in bounded memory, and goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import gc
import json
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from aios_model.cache import ContiguousCache
from aios_model.config_file import read_model_config
from aios_model.errors import AiosError, CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from aios_model.model import load_decoder
from aios_model.weights.hub import resolve_model
from aios_quant.checkpoints.source import quantized_checkpoint
from aios_quant.convert import quantize_checkpoint
from aios_quant.layerwise import LayerwiseCheckpoint
from aios_quant.settings import QuantizeSettings
from aios_quant.writing import output_folder
from aios_quant.writing.compressed_tensors import pack_words

SMALL = {"window": 32, "num_windows": 3}


def settings(**fields) -> QuantizeSettings:
    return QuantizeSettings(**{**SMALL, **fields})


def logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    decoder = load_decoder(
        resolve_model(str(path)), dtype="float32", device="cpu", source_transforms=[quantized_checkpoint]
    )
    cache = ContiguousCache(decoder.config, max_length=len(tokens), dtype=torch.float32, device=decoder.device)
    with torch.inference_mode():
        return decoder.logits(decoder(tokens, torch.arange(len(tokens)), cache))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of the median token: rounding sends one or another to a different expert."""
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# The experts of qwen3-moe are 40 wide, which has no groups.
@pytest.mark.parametrize(
    ("case", "fields", "bound"),
    [
        (case, fields, bound)
        for fields, bound in (
            ({"scheme": "int8"}, 0.06),
            ({"scheme": "int8-a16", "method": "gptq"}, 0.06),
            ({"scheme": "int8-a16", "method": "awq", "head_scheme": "int8"}, 0.06),
            ({"scheme": "fp8"}, 0.2),
            ({"scheme": "int4"}, 0.6),
            ({"scheme": "int4", "symmetric": False, "group_size": 32, "head_scheme": "int8"}, 0.6),
            ({"scheme": "int4", "method": "awq-gptq"}, 0.6),
        )
        for case in ("llama3.2-tied", "qwen2", "qwen3-moe")
        if case != "qwen3-moe" or fields["scheme"] != "int4"
    ],
    ids=str,
)
def test_what_was_written_is_near_the_original(case, fields, bound, tiny_checkpoint, tmp_path):
    report = quantize_checkpoint(str(tiny_checkpoint(case)), tmp_path / "out", settings(**fields))
    tokens = torch.randint(0, 95, (24,))
    assert relative_error(logits(tmp_path / "out", tokens), logits(tiny_checkpoint(case), tokens)) < bound
    assert report.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("model-*"))
    assert report.num_layers == 3
    assert (report.num_tokens == 0) == (fields.get("method", "rtn") == "rtn")


def test_more_bits_and_smaller_groups_are_nearer(tiny_checkpoint, tmp_path):
    tokens = torch.randint(0, 95, (24,))
    original = logits(tiny_checkpoint("llama3"), tokens)
    errors = []
    for index, fields in enumerate(({"scheme": "int8"}, {"scheme": "int4", "group_size": 32, "symmetric": False})):
        quantize_checkpoint(str(tiny_checkpoint("llama3")), tmp_path / str(index), settings(**fields))
        errors.append(relative_error(logits(tmp_path / str(index), tokens), original))
    assert 5 * errors[0] < errors[1]


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(method, tiny_checkpoint, tmp_path):
    model, chosen = str(tiny_checkpoint("llama3.2-tied")), settings(method=method)
    quantize_checkpoint(model, tmp_path / "whole", chosen)

    def die_in_layer_2(stage: str, share: float) -> None:
        if stage.startswith("layer 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(model, tmp_path / "parts", chosen, progress=die_in_layer_2)
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve_model(str(tmp_path / "parts"))
    first = (tmp_path / "parts" / "model-00002-of-00005.safetensors").stat().st_mtime_ns
    report = quantize_checkpoint(model, tmp_path / "parts", chosen)
    assert report.num_resumed == 1
    assert (tmp_path / "parts" / "model-00002-of-00005.safetensors").stat().st_mtime_ns == first
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("calibration-*"))


@pytest.mark.parametrize("moment", ["replace", "chmod", "unlink"])
def test_dying_between_two_files_loses_at_most_a_layer(moment, tiny_checkpoint, tmp_path, monkeypatch):
    """Every file system call of a kind is a place to die at; whichever it is, the next call comes to the same bytes."""
    model, chosen = str(tiny_checkpoint("llama3")), settings(method="awq")
    quantize_checkpoint(model, tmp_path / "whole", chosen)
    call = getattr(Path, moment)
    for fatal in range(1, 30, 4):
        output = tmp_path / f"{moment}{fatal}"
        countdown = iter(range(fatal - 1, -1, -1))

        def dying(path: Path, *args, countdown=countdown, **kwargs):
            if next(countdown, -1) == 0:
                raise KeyboardInterrupt
            return call(path, *args, **kwargs)

        monkeypatch.setattr(Path, moment, dying)
        with contextlib.suppress(KeyboardInterrupt):
            quantize_checkpoint(model, output, chosen)
        survived = next(countdown, None) is not None
        monkeypatch.undo()
        quantize_checkpoint(model, output, chosen)
        assert contents(output) == contents(tmp_path / "whole")
        if survived:
            break


def test_a_finished_folder_is_left_alone(tiny_checkpoint, tmp_path):
    model = str(tiny_checkpoint("llama3"))
    quantize_checkpoint(model, tmp_path / "out", settings(scheme="int8"))
    shard = tmp_path / "out" / "model-00003-of-00005.safetensors"
    before = shard.stat().st_mtime_ns
    assert quantize_checkpoint(model, tmp_path / "out", settings(scheme="int8")).num_resumed == 3
    assert shard.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"method": "gptq"}, "method: awq, now gptq"),
        ({"scheme": "int8"}, "scheme: int4, now int8; group_size: 32, now None"),
        ({"window": 16}, "window: 32, now 16"),
        ({"num_windows": 2}, "num_windows: 3, now 2"),
    ],
    ids=str,
)
def test_other_settings_are_refused_with_the_difference(change, complaint, tiny_checkpoint, tmp_path):
    model, fields = str(tiny_checkpoint("llama3")), {"scheme": "int4", "method": "awq"}
    quantize_checkpoint(model, tmp_path / "out", settings(**fields))
    with pytest.raises(ConfigError, match=complaint):
        quantize_checkpoint(model, tmp_path / "out", settings(**{**fields, **change}))


def test_another_text_or_model_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("some other text " * 50)
    quantize_checkpoint(str(tiny_checkpoint("llama3")), tmp_path / "out", settings(method="awq"))
    with pytest.raises(ConfigError, match="text: the bundled calibration text, now"):
        quantize_checkpoint(
            str(tiny_checkpoint("llama3")),
            tmp_path / "out",
            settings(method="awq"),
            calibration=tmp_path / "text.txt",
        )
    with pytest.raises(ConfigError, match="begun with other settings"):
        quantize_checkpoint(str(tiny_checkpoint("llama2")), tmp_path / "out", settings(method="awq"))


def test_a_folder_with_something_else_in_it_is_not_touched(tiny_checkpoint, tmp_path):
    (tmp_path / "diary.txt").write_text("private")
    with pytest.raises(ConfigError, match="not empty"):
        quantize_checkpoint(str(tiny_checkpoint("llama3")), tmp_path, settings())
    assert contents(tmp_path) == {"diary.txt": b"private"}


def test_an_output_that_is_a_file_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="out cannot be made a folder"):
        quantize_checkpoint(str(tiny_checkpoint("llama3")), tmp_path / "out", settings())


def test_a_full_disk_is_said_so_and_can_be_gone_on_from(tiny_checkpoint, tmp_path, monkeypatch):
    model, chosen = str(tiny_checkpoint("llama3")), settings(scheme="int8")
    save = output_folder.save_file

    def full(tensors, path, metadata):
        if "00003" in path.name:
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(output_folder, "save_file", full)
    with pytest.raises(AiosError, match=r"model-00003-of-00005.*No space left.*the same command goes on"):
        quantize_checkpoint(model, tmp_path / "out", chosen)
    monkeypatch.undo()
    assert quantize_checkpoint(model, tmp_path / "out", chosen).num_resumed == 1


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "awq-gptq"])
def test_a_gpu_makes_the_same_checkpoint_but_for_rounding(method, tiny_checkpoint, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    model, chosen = str(tiny_checkpoint("mixtral")), settings(method=method)
    for device in ("cpu", "cuda"):
        quantize_checkpoint(model, tmp_path / device, chosen, device=device)
    tokens = torch.randint(0, 95, (24,))
    assert relative_error(logits(tmp_path / "cuda", tokens), logits(tmp_path / "cpu", tokens)) < 0.1


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"recipe": 1, "finished_layers": "x", "complete": 0}'])
def test_a_damaged_record_is_refused(damage, tiny_checkpoint, tmp_path):
    (tmp_path / "quantization.json").write_text(damage)
    with pytest.raises(ConfigError, match=r"quantization\.json is damaged|other settings"):
        quantize_checkpoint(str(tiny_checkpoint("llama3")), tmp_path, settings())


def test_only_one_layer_is_in_memory(tiny_checkpoint, tmp_path, monkeypatch):
    alive: weakref.WeakSet = weakref.WeakSet()
    most, load = 0, LayerwiseCheckpoint.layer

    def counted(self, index: int):
        nonlocal most
        layer = load(self, index)
        alive.add(layer)
        gc.collect()
        most = max(most, len(alive))
        return layer

    monkeypatch.setattr(LayerwiseCheckpoint, "layer", counted)
    quantize_checkpoint(str(tiny_checkpoint("llama3")), tmp_path / "out", settings(method="gptq"))
    # The one before is let go of when the next has been read.
    assert most <= 2


def test_a_shape_without_groups_is_refused_before_anything_is_written(tiny_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp.*has no whole groups of 32 columns; no group size fits"):
        quantize_checkpoint(str(tiny_checkpoint("qwen3-moe")), tmp_path / "out", settings())
    with pytest.raises(ConfigError, match="no whole groups of 128 columns; 32 would fit"):
        quantize_checkpoint(str(tiny_checkpoint("llama3")), tmp_path / "out", settings(group_size=128))
    assert not (tmp_path / "out").exists()


def test_a_window_longer_than_the_context_is_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="window = 256 tokens exceeds the 128"):
        quantize_checkpoint(str(tiny_checkpoint("llama3")), tmp_path / "out", settings(method="awq", window=256))


def test_a_quantised_checkpoint_is_not_quantised_again(tiny_checkpoint, tmp_path):
    quantize_checkpoint(str(tiny_checkpoint("llama3")), tmp_path / "out", settings(scheme="int8"))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        quantize_checkpoint(str(tmp_path / "out"), tmp_path / "again", settings(scheme="int8"))


def test_a_checkpoint_with_a_tensor_too_many_or_too_few_is_refused(tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    source = tiny_checkpoint("llama3")
    for name, change in {
        "less": lambda tensors: tensors.pop("model.norm.weight"),
        "more": lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}),
        "other": lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(8, 64)}),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for path in source.glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"model\.(norm|layers|embed)"):
            quantize_checkpoint(str(folder), tmp_path / f"{name}-out", settings())


@pytest.mark.parametrize("case", ["llama3.1", "llama3.2-tied", "mixtral", "qwen2", "qwen3-yarn"])
def test_a_gguf_file_becomes_a_checkpoint_with_config_and_names(case, tiny_checkpoint, tmp_path):
    import checkpoints

    folder = tiny_checkpoint(case)
    model = checkpoints.transformers.AutoModelForCausalLM.from_pretrained(folder)
    path = checkpoints.save_gguf(model, folder, tmp_path / "model.gguf")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    quantize_checkpoint(str(path), tmp_path / "out", settings(scheme="int8-a16", method="awq"))
    tokens = torch.randint(0, 95, (24,))
    assert relative_error(logits(tmp_path / "out", tokens), logits(folder, tokens)) < 0.08
    read = read_model_config(resolve_model(str(tmp_path / "out")), allow_quantized=True)
    assert read.architecture == read_model_config(resolve_model(str(folder))).architecture
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_files_are_readable_by_those_who_may_read_the_folder(tiny_checkpoint, tmp_path):
    quantize_checkpoint(str(tiny_checkpoint("llama3")), tmp_path / "out", settings(scheme="int8"))
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").write_text("")
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_the_config_keeps_what_the_original_said(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen3")
    quantize_checkpoint(str(source), tmp_path / "out", settings(scheme="int8", head_scheme="int8"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert before["tie_word_embeddings"]
    assert not after["tie_word_embeddings"]
    changed = {"quantization_config", "tie_word_embeddings", "dtype", "torch_dtype"}
    assert {name: after.get(name) for name in before if name not in changed} == {
        name: before[name] for name in before if name not in changed
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"scheme": "int3"},
        {"method": "magic"},
        {"head_scheme": "int4"},
        {"dtype": "float32"},
        {"group_size": 48},
        {"scheme": "int8", "group_size": 64},
        {"scheme": "int8", "symmetric": False},
        {"scheme": "fp8", "method": "gptq"},
        {"window": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_be_honoured_are_refused(fields):
    with pytest.raises(ConfigError):
        QuantizeSettings(**fields)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_words_are_those_of_compressed_tensors(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 1 << bits, (5, 43), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))


@pytest.mark.slow
def test_a_process_killed_at_work_leaves_what_the_next_one_goes_on_with(tiny_checkpoint, tmp_path):
    model, chosen = str(tiny_checkpoint("llama3.2-tied")), settings(method="gptq")
    quantize_checkpoint(model, tmp_path / "whole", chosen)
    script = f"""
import os, signal
from pathlib import Path
from aios_quant.convert import quantize_checkpoint
from aios_quant.settings import QuantizeSettings
from aios_quant.writing import output_folder

def progress(stage, share):
    if stage.startswith("layer 3"):
        os.kill(os.getpid(), signal.SIGKILL)

quantize_checkpoint({model!r}, Path({str(tmp_path / "out")!r}), {chosen!r}, progress=progress)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert quantize_checkpoint(model, tmp_path / "out", chosen).num_resumed == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
