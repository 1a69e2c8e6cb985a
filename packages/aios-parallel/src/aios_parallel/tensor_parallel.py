"""Tensor parallelism: every layer is cut, every rank computes its part for all tokens (arXiv 1909.08053).

Applied from outside, between building and loading, to the decoder of one device:

    qkv, gate and up   by rows: a rank computes some heads, some features; nothing is exchanged
    output and down    by columns: a rank's product is one summand of the result
    head               by rows: a rank scores some tokens of the vocabulary
    experts            each by rows and columns as above, or whole ones dealt out to the ranks (expert parallelism)

The sum over ranks is made where attention and MLP hand their output on, by hooks: two per layer. A bias behind such a
sum is held by the first rank alone. The decoder's own code does not know about any of it, nor do quantised layers,
which load their shard as they would load the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from aios_model.decoder import DecoderLayer, DecoderModel
from aios_model.errors import UnsupportedModelError
from aios_model.layers.attention import Attention
from aios_model.layers.embedding import Embedding
from aios_model.layers.linear import Linear
from aios_model.layers.mlp import MLP
from aios_model.layers.moe import MixtureOfExperts
from aios_model.model import ModelTransform
from aios_model.weights.selection import Selection
from aios_model.weights.sharded import LinearShard
from aios_parallel.communicator import Communicator
from aios_parallel.shares import (
    HeadShare,
    scaled,
    share_experts,
    share_features,
    share_heads,
    share_vocabulary,
)
from aios_parallel.vocabulary import VocabularyEmbedding


def shard_model(group: Communicator, *, expert_parallel: bool = False, shard_embedding: bool = False) -> ModelTransform:
    """A transform that leaves of a decoder what the caller's rank of `group` holds.

    Args:
        group: The ranks that share each layer.
        expert_parallel: Deal whole experts out to the ranks, rather than cutting each of them.
        shard_embedding: Cut the embedding table too. Worth an exchange where it is held in memory, on a GPU; on a CPU
            it stays in the mapped file, and costs no rank anything.

    Returns:
        To be given to `load_decoder`, behind whatever quantises; called, it raises ConfigError if the heads or features
        cannot be shared by so many ranks.
    """
    return _Shard(group=group, expert_parallel=expert_parallel, shard_embedding=shard_embedding)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    group: Communicator
    expert_parallel: bool
    shard_embedding: bool

    def __call__(self, decoder: DecoderModel) -> None:
        rank, size, config = self.group.rank, self.group.size, decoder.config
        if len({(spec.num_key_value_heads, spec.head_dim) for spec in config.layers}) > 1:
            raise UnsupportedModelError("tensor parallelism needs the same heads in every layer of a model")
        heads = share_heads(config.num_attention_heads, config.num_key_value_heads, size)[rank]
        for layer in decoder.layers:
            if isinstance(layer, DecoderLayer):
                self._attention(layer.attention, heads)
                self._mlp(layer.mlp)
        if isinstance(decoder.head, Linear):
            decoder.head.take_shard(LinearShard(rows={"": share_vocabulary(config.vocab_size, size)[rank]}))
        if self.shard_embedding and type(decoder.embedding) is Embedding:  # a later stage of a pipeline has none
            decoder.embedding = VocabularyEmbedding(config.vocab_size, config.hidden_size, group=self.group)
        local = decoder.local_config
        decoder.local_config = replace(
            local,
            num_attention_heads=heads.queries.size,
            num_key_value_heads=len(heads.kv_heads),
            intermediate_size=share_features(config.intermediate_size, size)[rank].size,
            layers=tuple(replace(spec, num_key_value_heads=len(heads.kv_heads)) for spec in local.layers),
        )

    def _attention(self, attention: Attention, heads: HeadShare) -> None:
        width = attention.head_dim
        queries, keys = scaled(heads.queries, width), scaled(heads.keys, width)
        attention.num_query_heads, attention.num_kv_heads = heads.queries.size, len(heads.kv_heads)
        attention.qkv.take_shard(LinearShard(rows={"q": queries, "k": keys, "v": keys}))
        attention.output.take_shard(LinearShard(columns=queries), bias=self.group.rank == 0)
        self._sum_output_of(attention)

    def _mlp(self, mlp: nn.Module) -> None:
        if isinstance(mlp, MixtureOfExperts):
            self._experts(mlp)
        elif isinstance(mlp, MLP):
            self._features(mlp)
        else:
            raise UnsupportedModelError(f"tensor parallelism does not know how to cut a {type(mlp).__name__}")
        self._sum_output_of(mlp)

    def _features(self, mlp: MLP) -> None:
        share: Selection = share_features(mlp.intermediate_size, self.group.size)[self.group.rank]
        mlp.intermediate_size = share.size
        mlp.gate_up.take_shard(LinearShard(rows={"gate": share, "up": share}))
        mlp.down.take_shard(LinearShard(columns=share), bias=self.group.rank == 0)

    def _experts(self, moe: MixtureOfExperts) -> None:
        if not self.expert_parallel:
            for expert in moe.experts:
                assert isinstance(expert, MLP)
                self._features(expert)
            return
        held = share_experts(len(moe.experts), self.group.size)[self.group.rank]
        moe.held_experts = held
        for index in range(len(moe.experts)):
            if index not in held:
                moe.experts[index] = nn.Module()  # nothing to load, never called

    def _sum_output_of(self, module: nn.Module) -> None:
        group = self.group

        def add_up(_module: nn.Module, _inputs: tuple[object, ...], partial: Tensor) -> Tensor:
            return group.all_reduce(partial)

        module.register_forward_hook(add_up)
