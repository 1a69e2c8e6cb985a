"""The model that drafts for the served one: another one, a copy of it with fewer bits, or its first layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.sizing import PoolPlan
from aios_model.errors import ConfigError
from aios_model.sampling.sampler import LogitsProcessor
from aios_sched.speculative.config import SpeculativeConfig
from aios_sched.speculative.draft_model import DraftModelProposer
from aios_sched.speculative.early_exit import early_exit
from aios_serve.config import EngineConfig
from aios_serve.model_part import ModelPart, Progress
from aios_serve.served_model import find_model


def draft_proposer(
    target: ModelPart, plan: PoolPlan, *, logits_processors: Sequence[LogitsProcessor], progress: Progress
) -> DraftModelProposer | None:
    """The draft model that the target's options ask for, with pages of its own; None if they ask for none.

    Args:
        target: The served model.
        plan: Its pool; the draft model gets as many pages.
        logits_processors: What the target's sampler runs, in objects of their own.
        progress: Told what is being done.

    Raises:
        ModelError: The draft model cannot be found, read or run.
        ConfigError: It does not have the target's tokens, or cannot be honoured on this device.
        PoolTooSmallError: The memory does not hold its pages.
    """
    speculative = target.config.speculative
    if speculative is None or not speculative.needs_model:
        return None
    if target.decoder.device.type != "cpu":
        raise ConfigError(
            f"speculative method {speculative.method!r} cannot be used on {target.decoder.device}: its pages have no "
            "share of the device's memory yet; use 'suffix' or 'ngram'"
        )
    progress("loading the draft model", None)
    part = _draft_part(target, speculative, plan, progress)
    width, wanted = part.decoder.config.vocab_size, target.decoder.config.vocab_size
    if width != wanted:
        raise ConfigError(f"the draft model has {width} tokens and the served one {wanted}; they must have the same")
    draft_plan = part.plan()
    model, pages, sampler = part.build(draft_plan, logits_processors=logits_processors)
    books = BlockManager(num_blocks=draft_plan.num_blocks, block_size=draft_plan.block_size)
    return DraftModelProposer(model, pages, books, sampler, context_length=draft_plan.max_model_len)


def _draft_part(target: ModelPart, speculative: SpeculativeConfig, plan: PoolPlan, progress: Progress) -> ModelPart:
    config = _draft_config(target.config, speculative, plan)
    if speculative.method == "early_exit":
        assert speculative.num_layers is not None, "the configuration has checked it"
        return replace(target, config=config, decoder=early_exit(target.decoder, num_layers=speculative.num_layers))
    return ModelPart.load(config, find_model(config), num_neighbours=target.num_neighbours, progress=progress)


def _draft_config(config: EngineConfig, speculative: SpeculativeConfig, plan: PoolPlan) -> EngineConfig:
    """The options of the draft model: those of the target, but for the model, the pool and what lies below it."""
    alike = replace(
        config,
        speculative=None,
        max_model_len=None,
        num_gpu_blocks_override=plan.num_blocks,
        block_size=plan.block_size,
        kv_cache_memory_bytes=None,
        kv_cache_policy="paged",
        kv_offloading_size=0,
        kv_offloading_disk_size=0,
    )
    if speculative.method == "draft_model":
        quantization = speculative.quantization or "auto"
        return replace(alike, model=speculative.model, revision=None, quantization=quantization, load_format="auto")
    if speculative.method == "self":
        return replace(alike, quantization=speculative.quantization or "int4")
    return alike
