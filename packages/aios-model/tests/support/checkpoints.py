"""Small random checkpoints in the real formats, made by transformers and the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
import transformers

SHAPE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def _rope(rope_type: str, **fields) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **fields}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32}

# Name -> (config class, fields). Windows are shorter than the sequences that the tests run.
CASES: dict[str, tuple[str, dict]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": ("LlamaConfig", {"tie_word_embeddings": False, **_rope("default", rope_theta=500_000.0)}),
    "llama3.1": ("LlamaConfig", {"tie_word_embeddings": False, **_rope("llama3", **_LLAMA3)}),
    "llama3.2-tied": ("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 32, **_rope("llama3", **_LLAMA3)}),
    "llama-linear": ("LlamaConfig", _rope("linear", factor=2.5)),
    "llama-dynamic": ("LlamaConfig", _rope("dynamic", factor=2.0)),
    "llama-yarn": ("LlamaConfig", _rope("yarn", **_YARN)),
    "llama-yarn-tuned": (
        "LlamaConfig",
        _rope("yarn", **_YARN, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.3, truncate=False),
    ),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 9, "head_dim": 24}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2.5-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3Config", {"head_dim": 32, **_rope("yarn", **_YARN)}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-unnormalised": (
        "Qwen3MoeConfig",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}

# Cases whose every trait GGUF can express (windows of llama and qwen files, biases on the MLP and NTK cannot be).
GGUF_CASES = (
    "llama2",
    "llama3",
    "llama3.1",
    "llama3.2-tied",
    "llama-linear",
    "llama-yarn",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3-yarn",
    "qwen3-moe-all-layers",
)
CASES["qwen3-moe-all-layers"] = (
    "Qwen3MoeConfig",
    {**CASES["qwen3-moe"][1], "mlp_only_layers": []},
)


def random_model(case: str, seed: int) -> transformers.PreTrainedModel:
    """A transformers model of that case, every parameter drawn at random, biases and norms too."""
    config_class, fields = CASES[case]
    config = getattr(transformers, config_class)(**{**SHAPE, **fields}, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.15 * noise)
    return model


def save_safetensors(model: transformers.PreTrainedModel, folder: Path, *, sharded: bool) -> Path:
    """Saves as transformers does, in one file or in several with an index."""
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    return folder


def save_gguf(model: transformers.PreTrainedModel, folder: Path, path: Path) -> Path:
    """Writes the checkpoint in `folder` as a GGUF file in float32, as llama.cpp's converter lays it out."""
    config = model.config
    architecture = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}.get(
        config.model_type, config.model_type
    )
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, config)
    tensors = _saved_tensors(folder)
    for name, tensor in _gguf_tensors(tensors, config, architecture).items():
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _write_metadata(writer: gguf.GGUFWriter, config) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _gguf_tensors(tensors: dict[str, torch.Tensor], config, architecture: str) -> dict[str, torch.Tensor]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    out: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            tensor = _interleave(tensor, heads)
        if ".experts." in stem:
            block, expert, part = stem.split(".experts.")[0], *stem.split(".experts.")[1].split(".")
            experts.setdefault(f"{block}.experts.{part}", {})[int(expert)] = tensor
            continue
        out[f"{names.get_name(stem)}.{kind}"] = tensor
    for stem, parts in experts.items():
        out[f"{names.get_name(stem)}.weight"] = torch.stack([parts[i] for i in range(len(parts))])
    if config.rope_parameters["rope_type"] == "llama3":
        out["rope_freqs.weight"] = _llama3_factors(config)
    return out


def _interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.view(heads, 2, tensor.shape[0] // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)


def _llama3_factors(config) -> torch.Tensor:
    """Divisors of the plain frequencies, taken from transformers' own scaled ones."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    return plain / scaled
