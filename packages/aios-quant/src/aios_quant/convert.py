"""Makes a quantised checkpoint: layer by layer, in bounded memory, and from where it was interrupted.

One decoder layer in float32 and the calibration windows' hidden states are in memory. What is written is a plain
compressed-tensors checkpoint; see `writing`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from aios_model.config import LayerSpec, ModelConfig
from aios_model.config_file import read_json
from aios_model.decoder import DecoderLayer
from aios_model.errors import ConfigError
from aios_model.model import Progress, resolve_device
from aios_model.tokenizer.tokenizer import Tokenizer
from aios_model.weights.hub import ModelFiles, resolve_model
from aios_quant.calibrate.awq import Awq
from aios_quant.calibrate.data import TokenWindows, read_windows
from aios_quant.calibrate.gptq import Gptq
from aios_quant.calibrate.grid import GridSpec
from aios_quant.calibrate.hooks import CalibrationRun, quantizable_linears
from aios_quant.calibrate.rtn import RoundToNearest
from aios_quant.layerwise import LayerwiseCheckpoint
from aios_quant.quantized_tensor import PackedWeight
from aios_quant.settings import QuantizeSettings
from aios_quant.writing.compressed_tensors import quantization_config
from aios_quant.writing.hf_config import hf_config
from aios_quant.writing.model_tensors import ModelTensors
from aios_quant.writing.output_folder import OutputFolder
from aios_quant.writing.rope_factors import with_llama3_scaling
from aios_quant.writing.tokenizer_files import token_ids, write_tokenizer

_ROPE_FACTORS = "rope_freqs.weight"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Calibrator(Protocol):
    """A method: chooses the codes of one layer's weights.

    Attributes:
        needs_inputs: Whether it looks at what the layer is fed.
    """

    @property
    def needs_inputs(self) -> bool: ...  # noqa: D102

    def quantize_layer(
        self, layer: DecoderLayer, layer_spec: LayerSpec, run: CalibrationRun | None
    ) -> dict[str, PackedWeight]:
        """The codes of all quantisable Linears, by path in the layer, parts stacked.

        What is not quantised (norms, biases, a router) may be changed in `layer`, so that it and the codes together
        compute what the layer did.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeReport:
    """What was done.

    Attributes:
        output: The folder.
        seconds: This call took.
        num_bytes: Of all shards.
        num_layers: Of the model.
        num_resumed: Layers that an earlier call had finished.
        num_tokens: Calibrated with; 0 if none.
        group_size: Columns per scale; None for whole rows.
    """

    output: Path
    seconds: float
    num_bytes: int
    num_layers: int
    num_resumed: int
    num_tokens: int
    group_size: int | None


def quantize_checkpoint(
    model: str | None,
    output: Path,
    settings: QuantizeSettings,
    *,
    calibration: Path | None = None,
    revision: str | None = None,
    download_dir: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantises a model into a folder; called again after an interruption, it goes on.

    Args:
        model: As for `load_model`: folder, GGUF file, hub id, or None for the bundled one.
        output: Folder to write; new, or begun with the same model and settings.
        settings: What is to be done.
        calibration: Text for all methods but `rtn`, see `calibrate.data`; None for the bundled one.
        revision: As for `load_model`.
        download_dir: As for `load_model`.
        device: Where layers are computed: `cpu`, `cuda`, or `auto`.
        progress: Told what is being done and how much of it is done.

    Raises:
        ConfigError: An option cannot be honoured, or the folder holds something else.
        ModelError: The model cannot be read.
    """
    started = time.perf_counter()
    files = resolve_model(model, revision=revision, download_dir=download_dir)
    with torch.inference_mode():
        conversion = _Conversion(files, settings, calibration, resolve_device(device))
        num_resumed, num_bytes = conversion.run(output, progress or (lambda stage, share: None))
    return QuantizeReport(
        output=output,
        seconds=time.perf_counter() - started,
        num_bytes=num_bytes,
        num_layers=conversion.num_layers,
        num_resumed=num_resumed,
        num_tokens=conversion.num_tokens,
        group_size=conversion.group_size,
    )


class _Conversion:
    """One model on its way into one folder."""

    def __init__(
        self, files: ModelFiles, settings: QuantizeSettings, calibration: Path | None, device: torch.device
    ) -> None:
        self._files = files
        self._settings = settings
        self._device = device
        self._checkpoint = LayerwiseCheckpoint(files, device=device)
        self._config = config = _full_config(self._checkpoint)
        self.num_layers = config.num_hidden_layers
        self.group_size = settings.group_size_for(_linear_shapes(config))
        self._dtype = _stored_dtype(settings, config)
        self._tensors = ModelTensors(config=config, settings=settings, dtype=_DTYPES[self._dtype])
        self._calibrator = _calibrator(settings, self.group_size, _DTYPES[self._dtype])
        self._windows = self._read_windows(calibration) if self._calibrator.needs_inputs else None
        self.num_tokens = 0 if self._windows is None else self._windows.tokens_WS.numel()

    def run(self, output: Path, progress: Progress) -> tuple[int, int]:
        """Does what is left to do: layers that were finished before, and bytes of all shards."""
        folder = OutputFolder(output, self._recipe(), num_layers=self.num_layers)
        num_resumed, table = folder.num_finished, self._checkpoint.table
        if not folder.is_complete:
            folder.write_shard(0, self._tensors.table("embedding.weight", table("embedding.weight")))
            self._convert_layers(folder, progress)
            progress("writing the head", 1.0)
            tail = self._tensors.table("norm.weight", table("norm.weight"))
            folder.write_shard(self.num_layers + 1, tail | self._tensors.head(table("head.weight")))
            write_tokenizer(self._files, output, max_length=self._config.max_position_embeddings)
        num_bytes = folder.finish(self._hf_config())
        self._checkpoint.close()
        return num_resumed, num_bytes

    def _convert_layers(self, folder: OutputFolder, progress: Progress) -> None:
        run = self._calibration_run(folder)
        for index in range(folder.num_finished, self.num_layers):
            progress(f"layer {index + 1} of {self.num_layers}", index / self.num_layers)
            layer, spec = self._checkpoint.layer(index), self._config.layers[index]
            packed = self._calibrator.quantize_layer(layer, spec, run)
            folder.write_shard(index + 1, self._tensors.layer(index, layer, packed))
            if run is not None:
                for path, linear in quantizable_linears(layer).items():
                    linear.set_weight(packed[path].dequantize())
                run.advance(layer, spec)
            folder.finish_layer(index, None if run is None else run.hidden_WSD)

    def _calibration_run(self, folder: OutputFolder) -> CalibrationRun | None:
        """The windows in front of the first unfinished layer."""
        if self._windows is None:
            return None
        tokens_WS = self._windows.tokens_WS
        rotation = self._checkpoint.rotary()(torch.arange(tokens_WS.shape[1], device=self._device))
        if folder.num_finished:
            return CalibrationRun(folder.read_hidden().to(self._device), rotation)
        embedding = self._checkpoint.table("embedding.weight")
        hidden = torch.stack([embedding.gather(tokens_S, dtype=torch.float32) for tokens_S in tokens_WS])
        return CalibrationRun(hidden.to(self._device), rotation)

    def _read_windows(self, calibration: Path | None) -> TokenWindows:
        window, limit = self._settings.window, self._config.max_position_embeddings
        if window > limit:
            raise ConfigError(f"window = {window} tokens exceeds the {limit} that the model supports")
        tokenizer = Tokenizer.from_files(self._files)
        num_windows = self._settings.num_windows
        windows = read_windows(tokenizer, calibration, bundled="calibration", length=window, limit=num_windows)
        highest = int(windows.tokens_WS.max())
        if highest >= self._config.vocab_size:
            raise ConfigError(f"the tokenizer makes token {highest}, the model knows {self._config.vocab_size}")
        return windows

    def _hf_config(self) -> dict[str, Any]:
        """The original `config.json` with what has changed, or one of our own making."""
        tied = self._config.tie_word_embeddings and self._settings.head_scheme == "none"
        if self._files.format == "gguf":
            ids = token_ids(self._files)
            raw = hf_config(self._config, dtype=self._dtype, tie_word_embeddings=tied, token_ids=ids)
        else:
            raw = read_json(self._files.root / "config.json")
            raw |= {"tie_word_embeddings": tied, "dtype": self._dtype, "torch_dtype": self._dtype}
        ignore = self._tensors.unquantised()
        quantization = quantization_config(self._settings, group_size=self.group_size, ignore=ignore)
        return {**raw, "quantization_config": quantization}

    def _recipe(self) -> dict[str, Any]:
        """All that decides what is written."""
        sources = [{"name": path.name, "bytes": path.stat().st_size} for path in self._files.weight_paths]
        settings = asdict(self._settings) | {"dtype": self._dtype, "group_size": self.group_size}
        recipe = {"model": self._files.name, "weights": sources, "settings": settings}
        if self._windows is None:
            del settings["window"], settings["num_windows"]
            return recipe
        return {**recipe, "calibration": {"text": self._windows.name, "tokens": self._windows.fingerprint}}


def _calibrator(settings: QuantizeSettings, group_size: int | None, dtype: torch.dtype) -> Calibrator:
    if settings.scheme == "fp8":
        return RoundToNearest(spec=None, scale_dtype=dtype)
    spec = GridSpec(bits=settings.bits, group_size=group_size, symmetric=settings.symmetric, scale_dtype=dtype)
    if settings.method in ("awq", "awq-gptq"):
        return Awq(spec=spec, stored_dtype=dtype, compensate=settings.method == "awq-gptq")
    if settings.method == "gptq":
        return Gptq(spec=spec)
    return RoundToNearest(spec=spec, scale_dtype=dtype)


def _full_config(checkpoint: LayerwiseCheckpoint) -> ModelConfig:
    """The model's config; GGUF keeps one kind of rotary scaling among the tensors."""
    factors = checkpoint.entry(_ROPE_FACTORS)
    if factors is None:
        return checkpoint.config
    return with_llama3_scaling(checkpoint.config, factors.read(dtype=torch.float32))


def _stored_dtype(settings: QuantizeSettings, config: ModelConfig) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    return config.torch_dtype if config.torch_dtype in _DTYPES else "bfloat16"


def _linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[N, K] of every part of every Linear that is quantised, by path; of layers that look alike the first."""
    first = {spec.moe: index for index, spec in reversed(list(enumerate(config.layers)))}
    shapes: dict[str, tuple[int, int]] = {}
    for index in first.values():
        layer = DecoderLayer(config, config.layers[index], layer=index)
        for path, linear in quantizable_linears(layer).items():
            for part, width in linear.parts.items():
                shapes[f"layers.{index}.{path}{'.' if part else ''}{part}"] = (width, linear.in_features)
    return shapes
