"""The C structures of `csrc/step.h`, field by field."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

from aios_kvcache.native.kernels import KvPool
from aios_quant.native.structures import LinearStruct


class LayerStruct(ctypes.Structure):
    """`aios::Layer`."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", LinearStruct),
        ("output", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("pages", KvPool),
        ("scale", c_float),
        ("window", c_int32),
    )


ReduceFunction = ctypes.CFUNCTYPE(None, c_void_p, POINTER(c_float), c_int64)


class DecoderStruct(ctypes.Structure):
    """`aios::Decoder`."""

    _fields_ = (
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("eps", c_float),
        ("layers", POINTER(LayerStruct)),
        ("final_norm", c_void_p),
        ("rotations", c_void_p),
        ("reduce", c_void_p),
        ("reduce_context", c_void_p),
        ("layers_done", c_void_p),
    )


PHASES = ("norms", "qkv", "rotate", "attend", "output", "gate_up", "activate", "down")
"""What `aios_step` accounts its time to, in the order of `aios::Phase`."""
