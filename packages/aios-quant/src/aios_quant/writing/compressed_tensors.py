"""Weights in the compressed-tensors convention, which vLLM and transformers read; the way back from
`aios_quant.checkpoints.compressed_tensors`, where the layouts are described.

    int4, int8-a16   pack-quantized    codes packed into int32 words
    int8             int-quantized     int8 [N, K]; inputs are rounded too, per token, while the model runs
    fp8              float-quantized   float8_e4m3fn [N, K]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aios_quant.quantized_tensor import Fp8Tensor, PackedWeight, QuantizedTensor
from aios_quant.settings import QuantizeSettings

PACKED = "pack-quantized"
INTEGERS = "int-quantized"
FLOATS = "float-quantized"
_FORMATS = {"int4": PACKED, "int8-a16": PACKED, "int8": INTEGERS, "fp8": FLOATS}


def weight_tensors(stem: str, weight: PackedWeight, scheme: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that stand for one weight, by name.

    Args:
        stem: Name of the layer, such as `model.layers.0.mlp.up_proj`.
        weight: [N, K].
        scheme: One of the schemes above.
        dtype: Of the checkpoint's floats.
    """
    if isinstance(weight, Fp8Tensor):
        codes = weight.codes_NK.view(torch.float8_e4m3fn)
        return {f"{stem}.weight": codes, f"{stem}.weight_scale": _scales(weight.scales_N.unsqueeze(1), dtype)}
    tensors = {f"{stem}.weight_scale": _scales(weight.scales_NG, dtype)}
    if _FORMATS[scheme] == INTEGERS:
        assert weight.mins_NG is None, "INT8 is symmetric"
        return {**tensors, f"{stem}.weight": weight.codes_NK.bitwise_xor(128).view(torch.int8)}
    tensors[f"{stem}.weight_packed"] = pack_words(weight.codes_NK, weight.bits)
    tensors[f"{stem}.weight_shape"] = torch.tensor(weight.shape)
    if weight.mins_NG is not None:
        tensors[f"{stem}.weight_zero_point"] = pack_words(_zero_points(weight).T, weight.bits).T.contiguous()
    return tensors


def quantization_config(settings: QuantizeSettings, *, group_size: int | None, ignore: Sequence[str]) -> dict[str, Any]:
    """The field of that name of `config.json`.

    Args:
        settings: What was done.
        group_size: Columns per scale; None for whole rows.
        ignore: Layers that were left as they are.
    """
    schemes = [settings.scheme]
    groups = {"group_0": _group(settings.scheme, settings.symmetric, group_size, targets=["Linear"])}
    if settings.head_scheme != "none":
        schemes.append(settings.head_format)
        groups["group_1"] = _group(settings.head_format, True, None, targets=["lm_head"])
    formats = {_FORMATS[scheme] for scheme in schemes}
    if len(formats) > 1:  # older readers know no format per group, so it is left out where one says it all
        for group, scheme in zip(groups.values(), schemes, strict=True):
            group["format"] = _FORMATS[scheme]
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(formats) > 1 else _FORMATS[settings.scheme],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def pack_words(codes_NK: Tensor, bits: int) -> Tensor:
    """Codes below 2**bits, packed along K into int32 words, lowest bits first: [N, ceil(K * bits / 32)]."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes_NK, (0, -codes_NK.shape[1] % per_word))
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=codes_NK.device)
    words = (padded.unflatten(1, (-1, per_word)).to(torch.int64) << shifts).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _zero_points(weight: QuantizedTensor) -> Tensor:
    """The whole numbers that `-min / scale` are."""
    assert weight.mins_NG is not None
    return (-weight.mins_NG / weight.scales_NG).round().to(torch.uint8)


def _scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as float16 where that is exact, which is the shortest form that kernels keep; else in `dtype`.

    They were rounded to `dtype` when the codes were chosen, so a reader that holds them in `dtype` gets the same.
    """
    halves = scales.to(torch.float16)
    return halves if torch.equal(halves.to(scales.dtype), scales) else scales.to(dtype)


def _group(scheme: str, symmetric: bool, group_size: int | None, *, targets: list[str]) -> dict[str, Any]:
    inputs = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
        "group_size": None,
    }
    weights: dict[str, Any] = {
        "num_bits": 4 if scheme == "int4" else 8,
        "type": "float" if scheme == "fp8" else "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs if _FORMATS[scheme] == INTEGERS else None,
        "output_activations": None,
    }
