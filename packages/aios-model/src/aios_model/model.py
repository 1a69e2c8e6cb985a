"""From a name to a model that runs: find the files, read the config, build the decoder, fill it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from aios_model.config import ModelConfig, check_context_length
from aios_model.config_file import read_model_config
from aios_model.decoder import DecoderModel
from aios_model.errors import ConfigError
from aios_model.generation_config import GenerationDefaults
from aios_model.layers.linear import Linear
from aios_model.loader import load_weights, parameter_shapes, parameter_slots
from aios_model.tokenizer.tokenizer import Tokenizer
from aios_model.weights.dummy import DummySource
from aios_model.weights.gguf import GGUFSource
from aios_model.weights.hub import LoadFormat, ModelFiles, resolve_model
from aios_model.weights.safetensors import SafetensorsSource
from aios_model.weights.source import WeightSource

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# What is being done, and how much of it is done, 0 to 1.
Progress = Callable[[str, float], None]


class ModelTransform(Protocol):
    """Changes a decoder between building and loading: replaces its Linear layers, or drops those of other ranks."""

    def __call__(self, decoder: DecoderModel) -> None:
        """Edits `decoder`, whose weights are still empty, in place."""
        ...


class SourceTransform(Protocol):
    """Presents a checkpoint's tensors otherwise than they lie in its files, such as the codes of a quantised layer."""

    def __call__(self, source: WeightSource, files: ModelFiles) -> WeightSource:
        """The source to load from instead of `source`; `source` itself if there is nothing to do for `files`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run, and what goes with it.

    Attributes:
        config: What it looks like.
        decoder: The network, weights loaded.
        tokenizer: Text to ids and back.
        files: Where it came from.
        generation_defaults: Sampling defaults and end-of-sequence ids its authors recommend.
        num_weight_bytes: Bytes the weights occupy in memory; rows left in the mapped file do not count.
    """

    config: ModelConfig
    decoder: DecoderModel
    tokenizer: Tokenizer
    files: ModelFiles
    generation_defaults: GenerationDefaults
    num_weight_bytes: int

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence: the tokenizer's and the generation config's."""
        ids = (*self.tokenizer.eos_token_ids, *self.generation_defaults.eos_token_ids)
        return tuple(dict.fromkeys(ids))


def load_model(
    model: str | None = None,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    load_format: LoadFormat = "auto",
    download_dir: str | None = None,
    chat_template: str | None = None,
    context_length: int | None = None,
    transforms: Sequence[ModelTransform] = (),
    source_transforms: Sequence[SourceTransform] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads a model by name, with its tokenizer and its sampling defaults.

    Args:
        model: Local folder or `.gguf` file, hub id, or None for the bundled SmolLM2-135M-Instruct.
        revision: Branch, tag or commit on the hub.
        tokenizer: Model whose tokenizer to use instead.
        dtype: As in `load_decoder`, as are the options after `chat_template`.
        device: As in `load_decoder`.
        load_format: As in `load_decoder`.
        download_dir: Where the hub's files are cached.
        chat_template: Jinja text or file used instead of the model's own.
        context_length: As in `load_decoder`.
        transforms: As in `load_decoder`.
        source_transforms: As in `load_decoder`.
        seed: As in `load_decoder`.
        progress: Told what is being done and how much of it is done.

    Raises:
        ModelError: The model cannot be found, read or run.
        ConfigError: An option cannot be honoured.
    """
    files = resolve_model(model, revision=revision, download_dir=download_dir, load_format=load_format)
    if progress is not None:
        progress("reading the tokenizer", 0.0)
    tokenizer_files = files if tokenizer is None else resolve_model(tokenizer, tokenizer_only=True)
    text = Tokenizer.from_files(tokenizer_files, chat_template=chat_template)
    decoder = load_decoder(
        files,
        dtype=dtype,
        device=device,
        load_format=load_format,
        context_length=context_length,
        transforms=transforms,
        source_transforms=source_transforms,
        seed=seed,
        progress=progress,
    )
    return LoadedModel(
        config=decoder.config,
        decoder=decoder,
        tokenizer=text,
        files=files,
        generation_defaults=GenerationDefaults.from_files(files),
        num_weight_bytes=weight_bytes(decoder),
    )


def load_decoder(
    files: ModelFiles,
    *,
    dtype: str = "auto",
    device: str = "auto",
    load_format: LoadFormat = "auto",
    context_length: int | None = None,
    transforms: Sequence[ModelTransform] = (),
    source_transforms: Sequence[SourceTransform] = (),
    seed: int = 0,
    on_loaded: Callable[[nn.Module], None] | None = None,
    progress: Progress | None = None,
) -> DecoderModel:
    """Builds the network that `files` describe and fills it; whoever brings token ids needs no more than this.

    Args:
        files: Where the checkpoint is.
        dtype: `auto`, `float32`, `bfloat16`, `float16` or `float64`.
        device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.
        load_format: `auto`, `safetensors`, `gguf`, or `dummy` for random weights.
        context_length: Longest context that will be served, in tokens; None for the model's own limit.
        transforms: Applied between building and loading.
        source_transforms: Applied to what the files hold, in order; checkpoints that declare a `quantization_config`
            need one. Dummy weights are not transformed.
        seed: Of dummy weights.
        on_loaded: Told of every module that has its weights, before the next one is read; it may move them.
        progress: Told what is being done and how much of it is done.

    Raises:
        ModelError: The checkpoint cannot be read or run.
        ConfigError: An option cannot be honoured.
    """
    config = read_model_config(files, allow_quantized=len(source_transforms) > 0)
    if context_length is not None:
        check_context_length(config, context_length)
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, config, torch_device)
    decoder = DecoderModel(config, context_length=context_length).eval()
    source, file_format = open_source(files, decoder, load_format=load_format, seed=seed)
    parameters = parameter_slots(decoder)  # of the whole model: transforms may leave a part of it to other ranks
    for transform in transforms:
        transform(decoder)
    for present in source_transforms if load_format != "dummy" else ():
        source = present(source, files)
    load_weights(
        decoder,
        source,
        file_format=file_format,
        dtype=torch_dtype,
        device=torch_device,
        parameters=parameters,
        on_loaded=on_loaded,
        progress=None if progress is None else lambda share: progress("loading weights", share),
    )
    gc.collect()
    return decoder


def open_source(
    files: ModelFiles, decoder: DecoderModel, *, load_format: LoadFormat = "auto", seed: int = 0
) -> tuple[WeightSource, str]:
    """The source behind `files`, and which of a family's tensor names it uses."""
    if load_format == "dummy":
        return DummySource(parameter_shapes(decoder), seed=seed), "safetensors"
    if files.format == "gguf":
        return GGUFSource(files.weight_paths), "gguf"
    if files.format == "safetensors":
        return SafetensorsSource(files.weight_paths), "safetensors"
    raise ConfigError(f"{files.root} holds a config but no weights; add them or ask for load_format='dummy'")


def resolve_device(device: str) -> torch.device:
    """The torch device behind an option's value; ConfigError where there is no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch finds no CUDA device here; use --device cpu")
    return resolved


def resolve_dtype(dtype: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The torch dtype behind an option's value. `auto` is float32 on a CPU, elsewhere what the checkpoint declares."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype {dtype!r} is unknown; use auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    declared = _DTYPES.get(config.torch_dtype or "bfloat16", torch.bfloat16)
    return declared if declared.itemsize == 2 else torch.bfloat16


def weight_bytes(decoder: DecoderModel) -> int:
    """Bytes of memory that the decoder's weights occupy."""
    linears = sum(module.num_bytes for module in decoder.modules() if isinstance(module, Linear))
    others = (
        tensor
        for module in decoder.modules()
        if not isinstance(module, Linear) and isinstance(tensor := getattr(module, "weight", None), torch.Tensor)
    )
    return linears + sum(tensor.numel() * tensor.element_size() for tensor in others if tensor.device.type != "meta")
