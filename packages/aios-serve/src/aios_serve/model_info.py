"""What the engine says about itself once it is ready."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aios_kvcache.tier_sizing import TierPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """The engine as built: what "auto" turned into, and where the memory goes.

    Attributes:
        model_name: The name requests use: `served_model_name` if given, else the name of the checkpoint.
        architecture: Family of the model, as "llama".
        dtype: What the model computes with: "float32", "bfloat16", "float16" or "float64".
        quantization: Scheme of the weights, "none" for plain numbers.
        kernels: What computes, and why: "native kernels for avx512", or why torch does.
        kv_dtype: Numbers in the pages: "bfloat16", "int8", "fp8", …
        device: "cpu" or "cuda".
        vocab_size: Width of the output layer: every token id of a request must be below it.
        num_weight_bytes: Memory of the weights.
        kv_cache_policy: "paged" or "contiguous".
        num_blocks: Usable pages of the pool.
        block_size: Tokens in a page.
        num_kv_bytes: Memory of the pool; on the CPU reserved virtually and backed as pages are first written.
        max_model_len: Longest prompt plus output of one request, in tokens.
        max_num_seqs: Requests that can run at once.
        max_num_batched_tokens: Token budget of one step.
        enable_prefix_caching: Whether finished prompts are found again.
        threads: Threads that compute on the CPU.
        import_seconds: Time taken by `import torch`, 0 if it was imported already.
        load_seconds: Time from then until ready.
        num_offloaded_bytes: Of the weights, those in host memory that stream to the device ahead of use.
        num_staging_bytes: Device memory of the buffers through which they come.
        tensor_parallel: Ranks that share each layer; bytes and threads above are those of all ranks.
        pipeline_parallel: Stages of the pipeline.
        num_host_pages: Pages that the host tier below the pool holds.
        num_host_tier_bytes: Memory it may take.
        num_disk_pages: Pages that the disk tier holds.
        num_disk_tier_bytes: Size of its files.
    """

    model_name: str
    architecture: str
    dtype: str
    quantization: str
    kernels: str
    kv_dtype: str
    device: str
    vocab_size: int
    num_weight_bytes: int
    kv_cache_policy: str
    num_blocks: int
    block_size: int
    num_kv_bytes: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    threads: int
    import_seconds: float
    load_seconds: float
    num_offloaded_bytes: int = 0
    num_staging_bytes: int = 0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    num_host_pages: int = 0
    num_host_tier_bytes: int = 0
    num_disk_pages: int = 0
    num_disk_tier_bytes: int = 0


def with_tiers(info: EngineInfo, plan: TierPlan | None) -> EngineInfo:
    """The engine with the tiers below its pool."""
    if plan is None:
        return info
    return replace(
        info,
        num_host_pages=plan.num_host_pages,
        num_host_tier_bytes=plan.num_host_bytes,
        num_disk_pages=plan.num_disk_pages,
        num_disk_tier_bytes=plan.num_disk_bytes,
    )
