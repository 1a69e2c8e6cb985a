"""The decoder as one native call per step: `NativeDecoder` stands in for `DecoderModel`, which is its oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_double, c_int64

import torch
from torch import Tensor

from aios_kvcache.native.native_cache import NativePagedKVCache
from aios_model.config import ModelConfig
from aios_model.decoder import DecoderLayer, DecoderModel
from aios_model.errors import UnsupportedModelError
from aios_model.layers.attention import Attention
from aios_model.layers.embedding import Embedding
from aios_model.layers.linear import Linear
from aios_model.layers.mlp import MLP
from aios_model.layers.norm import RMSNorm
from aios_model.layers.rope import RotaryEmbedding
from aios_model.native.library import pointer
from aios_model.native.threads import ThreadPool
from aios_model.weights.block_rows import BlockRows
from aios_quant.linear import QuantizedLinear
from aios_quant.native.matrix import NativeLinear, NativeMatrix
from aios_quant.native.reduction import StepReduction
from aios_quant.native.step_structures import PHASES, DecoderStruct, LayerStruct
from aios_quant.native.structures import quant_function


class NativeDecoder:
    """Runs all layers of a decoder in one call, on the pages of one cache.

    Takes the place of the `DecoderModel` in a `ModelRunner`. It borrows the model's packed weights and its
    mapped embedding; rotations are the model's own module.

    Args:
        decoder: Loaded, its Linear layers quantised with native kernels.
        cache: The pages that every step will be bound to.
        pool: Threads that compute.
        max_positions: Longest sequence, in tokens.
        reduce: Adds up the partial sums of a tensor-parallel group; None if the decoder holds whole layers.

    Attributes:
        config: What the whole model looks like.

    Raises:
        UnsupportedModelError: The model has layers that the native step does not know; `supports` says so beforehand.
    """

    def __init__(
        self,
        decoder: DecoderModel,
        cache: NativePagedKVCache,
        *,
        pool: ThreadPool,
        max_positions: int,
        reduce: StepReduction | None = None,
    ) -> None:
        reason = unsupported(decoder)
        if reason is not None:
            raise UnsupportedModelError(f"the native step cannot run this model: {reason}")
        self.config = decoder.config
        self.dtype = decoder.dtype
        self.device = decoder.device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._embedding = _embedding_of(decoder)
        self._cache = cache
        self._pool = pool
        self._keep: list[object] = [decoder]  # what the C structures point into
        self._rotations = rotation_table(decoder.rotary, max_positions)
        self._head = self._linear(decoder.head, group=None, step=None) if isinstance(decoder.head, Linear) else None
        self._layers_done = c_int64()
        self._reduce = reduce
        self._struct = self._describe(decoder, cache)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._profile: ctypes.Array[c_double] | None = None

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, cache: NativePagedKVCache) -> Tensor:
        """Hidden states after the last norm, [T, D] float32; as `DecoderModel.forward`, for the bound batch.

        Args:
            tokens_T: Token ids, int64, or the hidden states [T, D] of an earlier stage.
            positions_T: Position of each token in its own sequence, int64.
            cache: The one given at construction, bound to the step's batch.

        Raises:
            Whatever `reduce` gave up with.
        """
        assert cache is self._cache, "a native decoder runs on the pages it was built for"
        x_TD = self._embedding(tokens_T).to(torch.float32).contiguous()
        hidden_TD = torch.empty_like(x_TD)
        positions_T = positions_T.contiguous()
        model, batch = ctypes.addressof(self._struct), ctypes.addressof(cache.batch)
        needed = quant_function("aios_step_bytes")(self._pool.pointer, model, batch)
        if needed + 64 > len(self._memory):
            self._memory = torch.empty(needed + 64, dtype=torch.uint8)
        memory = pointer(self._memory)
        quant_function("aios_step")(
            self._pool.pointer,
            model,
            batch,
            pointer(x_TD),
            pointer(positions_T),
            pointer(hidden_TD),
            memory + -memory % 64,
            None if self._profile is None else ctypes.addressof(self._profile),
        )
        if self._reduce is not None:
            self._reduce.check()
        return hidden_TD

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, [S, V] float32."""
        assert self._head is not None, "an earlier stage has no head"
        return self._head.forward(hidden_SD)

    @property
    def num_layers_done(self) -> int:
        """Layers computed so far, in all steps; may be read by another thread while a step runs."""
        return self._layers_done.value

    def profile(self) -> dict[str, float]:
        """Seconds spent per phase since the first call, which switches the accounting on."""
        if self._profile is None:
            self._profile = (c_double * len(PHASES))()
        return dict(zip(PHASES, self._profile, strict=True))

    def _describe(self, decoder: DecoderModel, cache: NativePagedKVCache) -> DecoderStruct:
        config = decoder.local_config
        layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        steps = {kind: _common_step([_linear_of(layer, kind) for layer in layers]) for kind in _KINDS}
        # q, k, v and gate, up read the same normalised x through one buffer.
        finest = min((step for step in (steps["qkv"], steps["gate_up"]) if step), default=0)
        steps["qkv"] = steps["gate_up"] = finest
        structs = (LayerStruct * len(layers))()
        for index, layer in enumerate(layers):
            self._describe_layer(structs[index], layer, steps)
            structs[index].pages = cache.kv_pool(index)
            structs[index].scale = config.layers[index].scale
            structs[index].window = config.layers[index].window or 0
        self._keep.append(structs)
        return DecoderStruct(
            num_layers=len(layers),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            layers=structs,
            final_norm=self._norm(decoder.norm) if isinstance(decoder.norm, RMSNorm) else None,
            rotations=pointer(self._rotations),
            reduce=None if self._reduce is None else self._reduce.function,
            reduce_context=None if self._reduce is None else self._reduce.context,
            layers_done=ctypes.addressof(self._layers_done),
        )

    def _describe_layer(self, struct: LayerStruct, layer: DecoderLayer, steps: dict[str, int]) -> None:
        struct.attention_norm = self._norm(layer.attention_norm)
        struct.mlp_norm = self._norm(layer.mlp_norm)
        struct.query_norm = self._norm(layer.attention.query_norm)
        struct.key_norm = self._norm(layer.attention.key_norm)
        for kind in _KINDS:
            step = steps[kind]
            linear = self._linear(_linear_of(layer, kind), group=max(step, 32), step=step)
            setattr(struct, kind, linear.struct)

    def _linear(self, linear: Linear, *, group: int | None, step: int | None) -> NativeLinear:
        matrices = native_matrices(linear)
        start = 0
        for matrix in matrices:
            matrix.set_bias(None if linear.bias is None else linear.bias[start : start + matrix.num_rows])
            start += matrix.num_rows
        described = NativeLinear(matrices, pool=self._pool, input_group=group, input_step=step)
        self._keep.append(described)
        return described

    def _norm(self, norm: RMSNorm | None) -> int | None:
        if norm is None:
            return None
        weight = norm.weight.to(torch.float32).contiguous()
        self._keep.append(weight)
        return pointer(weight)


_KINDS = ("qkv", "output", "gate_up", "down")


def unsupported(decoder: DecoderModel) -> str | None:
    """Why the native step cannot run a model; None if it can."""
    config: ModelConfig = decoder.local_config
    if decoder.device.type != "cpu":
        return f"it is on {decoder.device}"
    if any(spec.moe for spec in config.layers):
        return "its layers are mixtures of experts"
    if any(
        (spec.num_key_value_heads, spec.head_dim) != (config.num_key_value_heads, config.head_dim)
        for spec in config.layers
    ):
        return "its layers differ in their heads"
    linears = [module for module in decoder.modules() if isinstance(module, Linear)]
    if not all(native_matrices(linear) for linear in linears):
        return "its weights are not packed for native kernels"
    return None


def native_matrices(linear: Linear) -> list[NativeMatrix]:
    """The packed matrices of a layer, top to bottom; empty if it has none."""
    if not isinstance(linear, QuantizedLinear):
        return []
    matrices = [kernel for kernel in linear.kernels if isinstance(kernel, NativeMatrix)]
    return matrices if len(matrices) == len(linear.kernels) else []


def rotation_table(rotary: RotaryEmbedding, max_positions: int) -> Tensor:
    """Cosines and sines of every position, float32 [positions, H]: H/2 cosines, then H/2 sines."""
    rotation = rotary(torch.arange(max_positions))
    half = rotation.cos_T1H.shape[-1] // 2
    # Rotation negates the sines of the first half; those of the second are the angle's own.
    table = torch.cat((rotation.cos_T1H[:, 0, :half], rotation.sin_T1H[:, 0, half:]), dim=-1)
    return table.to(torch.float32).contiguous()


def _embedding_of(decoder: DecoderModel) -> Callable[[Tensor], Tensor]:
    """[T] int64 -> [T, D]: native where the table's encoding is known there, else the model's own module."""
    table = decoder.embedding.table if isinstance(decoder.embedding, Embedding) else None
    if table is None or decoder.dtype != torch.float32 or not BlockRows.supports(table):
        return decoder.embedding
    return BlockRows(table).gather


def _linear_of(layer: DecoderLayer, kind: str) -> Linear:
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(attention, Attention)
    assert isinstance(mlp, MLP)
    return {"qkv": attention.qkv, "output": attention.output, "gate_up": mlp.gate_up, "down": mlp.down}[kind]


def _common_step(linears: list[Linear]) -> int:
    steps = [matrix.input_step for linear in linears for matrix in native_matrices(linear) if matrix.input_step]
    return min(steps, default=0)
