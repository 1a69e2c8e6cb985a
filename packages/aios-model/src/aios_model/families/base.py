"""What a model family is: how its config reads and what its tensors are called.

A family file holds differences only. All six share one decoder; they differ in biases, head norms, windows, experts and
in names. `Family.read_hf` and `Family.read_gguf` produce the same `ModelConfig`; `Family.locate` says which checkpoint
tensor fills a parameter of ours, whose path reads like `layers.3.attention.qkv.q.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aios_model.config import LayerSpec, ModelConfig
from aios_model.errors import UnsupportedModelError
from aios_model.families.fields import ConfigFields, gguf_rope_scaling, hf_rope

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLocation:
    """Where a parameter lies in a checkpoint.

    Attributes:
        name: The checkpoint's tensor name.
        expert: Index along the leading dimension, where one tensor holds all experts (GGUF); else None.
        interleaved_heads: Number of heads whose rows are stored with rotary pairs side by side (GGUF of the
            `llama` architecture) and must be put back into halves; else None.
    """

    name: str
    expert: int | None = None
    interleaved_heads: int | None = None


HF_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "model.layers.{layer}.input_layernorm",
    "attention.qkv.q": "model.layers.{layer}.self_attn.q_proj",
    "attention.qkv.k": "model.layers.{layer}.self_attn.k_proj",
    "attention.qkv.v": "model.layers.{layer}.self_attn.v_proj",
    "attention.output": "model.layers.{layer}.self_attn.o_proj",
    "attention.query_norm": "model.layers.{layer}.self_attn.q_norm",
    "attention.key_norm": "model.layers.{layer}.self_attn.k_norm",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm",
    "mlp.gate_up.gate": "model.layers.{layer}.mlp.gate_proj",
    "mlp.gate_up.up": "model.layers.{layer}.mlp.up_proj",
    "mlp.down": "model.layers.{layer}.mlp.down_proj",
}

GGUF_NAMES: Mapping[str, str] = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "blk.{layer}.attn_norm",
    "attention.qkv.q": "blk.{layer}.attn_q",
    "attention.qkv.k": "blk.{layer}.attn_k",
    "attention.qkv.v": "blk.{layer}.attn_v",
    "attention.output": "blk.{layer}.attn_output",
    "attention.query_norm": "blk.{layer}.attn_q_norm",
    "attention.key_norm": "blk.{layer}.attn_k_norm",
    "mlp_norm": "blk.{layer}.ffn_norm",
    "mlp.gate_up.gate": "blk.{layer}.ffn_gate",
    "mlp.gate_up.up": "blk.{layer}.ffn_up",
    "mlp.down": "blk.{layer}.ffn_down",
    "mlp.router": "blk.{layer}.ffn_gate_inp",
    "mlp.experts.gate_up.gate": "blk.{layer}.ffn_gate_exps",
    "mlp.experts.gate_up.up": "blk.{layer}.ffn_up_exps",
    "mlp.experts.down": "blk.{layer}.ffn_down_exps",
}


def _no_window(raw: ConfigFields, layer: int) -> int | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family: its names in files and its differences from Llama.

    Attributes:
        name: `model_type` of its `config.json`.
        architectures: Class names that `architectures` of a `config.json` may hold.
        gguf_architecture: `general.architecture` of its GGUF files.
        window: Sliding window of a layer, read from the raw HF config; None sees everything.
        is_moe: Whether a layer has experts, read from the raw HF config.
        qkv_bias: Biases on q, k and v, unless `attention_bias` in the config says otherwise.
        reads_attention_bias: Whether `attention_bias` of the config is honoured (it then covers the output too).
        qk_norm: RMS norm on every query and key head.
        hf_names: Tensor names beyond or instead of the common ones.
        gguf_interleaves_rope: Whether GGUF files store the rows of q and k with rotary pairs side by side.
        default_rope_theta: Rotary base where the config does not say.
        default_norm_topk_prob: Whether router weights are normalised where the config does not say.
    """

    name: str
    architectures: tuple[str, ...]
    gguf_architecture: str
    window: Callable[[ConfigFields, int], int | None] = _no_window
    is_moe: Callable[[ConfigFields, int], bool] = field(default=lambda raw, layer: False)
    qkv_bias: bool = False
    reads_attention_bias: bool = False
    qk_norm: bool = False
    hf_names: Mapping[str, str] = field(default_factory=dict)
    gguf_interleaves_rope: bool = False
    default_rope_theta: float = 10_000.0
    default_norm_topk_prob: bool = True

    def read_hf(self, raw: Mapping[str, Any]) -> ModelConfig:
        """Translates a parsed `config.json`. Raises UnsupportedModelError naming the field it cannot honour."""
        fields = ConfigFields(raw)
        heads = fields.integer("num_attention_heads")
        head_dim = fields.integer("head_dim", fields.integer("hidden_size") // max(heads, 1))
        kv_heads = fields.integer("num_key_value_heads", heads)
        theta, scaling = hf_rope(raw, self.default_rope_theta)
        bias = self.reads_attention_bias and fields.boolean("attention_bias", False)
        experts = fields.integer("num_experts", fields.integer("num_local_experts", 0))
        fields.require("hidden_act", "silu", default="silu")
        return ModelConfig(
            architecture=self.name,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            qkv_bias=self.qkv_bias or bias,
            output_bias=bias,
            mlp_bias=fields.boolean("mlp_bias", False),
            qk_norm=self.qk_norm,
            num_experts=experts,
            num_experts_per_tok=fields.integer("num_experts_per_tok", 0) if experts else 0,
            moe_intermediate_size=fields.integer("moe_intermediate_size", fields.integer("intermediate_size")),
            norm_topk_prob=fields.boolean("norm_topk_prob", self.default_norm_topk_prob),
            torch_dtype=fields.text("dtype", fields.text("torch_dtype", None)),
            layers=tuple(
                LayerSpec(
                    num_key_value_heads=kv_heads,
                    head_dim=head_dim,
                    window=self.window(fields, layer),
                    scale=head_dim**-0.5,
                    moe=self.is_moe(fields, layer),
                )
                for layer in range(fields.integer("num_hidden_layers"))
            ),
        )

    def read_gguf(self, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> ModelConfig:
        """Translates GGUF metadata; `tensors` maps names to shapes, which tell of biases, head norms and ties."""
        prefix = self.gguf_architecture
        fields = ConfigFields(metadata, prefix=f"{prefix}.")
        heads = fields.integer("attention.head_count")
        kv_heads = fields.integer("attention.head_count_kv", heads)
        hidden = fields.integer("embedding_length")
        head_dim = fields.integer("attention.key_length", hidden // heads)
        fields.require("attention.value_length", head_dim, default=head_dim)
        fields.require("rope.dimension_count", head_dim, default=head_dim)
        experts = fields.integer("expert_count", 0)
        width = fields.integer("feed_forward_length", 0) or fields.integer("expert_feed_forward_length")
        window = fields.integer("attention.sliding_window", 0) or None
        return ModelConfig(
            architecture=self.name,
            vocab_size=tensors["token_embd.weight"][0] if "token_embd.weight" in tensors else 0,
            hidden_size=hidden,
            intermediate_size=width,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=fields.integer("context_length"),
            rope_theta=fields.number("rope.freq_base", 10_000.0),
            rope_scaling=gguf_rope_scaling(fields),
            tie_word_embeddings="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            output_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_down.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
            num_experts=experts,
            num_experts_per_tok=fields.integer("expert_used_count", 0),
            moe_intermediate_size=fields.integer("expert_feed_forward_length", width),
            norm_topk_prob=True,
            layers=tuple(
                LayerSpec(
                    num_key_value_heads=kv_heads,
                    head_dim=head_dim,
                    window=window,
                    scale=head_dim**-0.5,
                    moe=f"blk.{layer}.ffn_gate_inp.weight" in tensors,
                )
                for layer in range(fields.integer("block_count"))
            ),
        )

    def locate(self, path: str, file_format: str, config: ModelConfig) -> TensorLocation:
        """Names the checkpoint tensor behind one of our parameters.

        Args:
            path: Ours, such as `layers.3.mlp.experts.7.gate_up.gate.weight`.
            file_format: `safetensors` or `gguf`.
            config: The model's, for head counts.
        """
        layer = _LAYER.match(path)
        key, _, kind = (path[layer.end() :] if layer else path).rpartition(".")
        expert = _EXPERT.search(path)
        key = _EXPERT.sub(".experts.", key + ".").removesuffix(".")
        names = GGUF_NAMES if file_format == "gguf" else {**HF_NAMES, **self.hf_names}
        if key not in names:
            raise UnsupportedModelError(f"{self.name} has no {file_format} name for the parameter {path}")
        numbers = {"layer": layer and layer[1], "expert": expert and expert[1]}
        name = f"{names[key].format(**numbers)}.{kind}"
        if file_format != "gguf":
            return TensorLocation(name=name)
        return TensorLocation(
            name=name,
            expert=int(expert[1]) if expert else None,
            interleaved_heads=self._interleaved_heads(key, config),
        )

    def _interleaved_heads(self, key: str, config: ModelConfig) -> int | None:
        if not self.gguf_interleaves_rope:
            return None
        return {"attention.qkv.q": config.num_attention_heads, "attention.qkv.k": config.num_key_value_heads}.get(key)
