"""Options of `aios-serve`: what the KV cache and the weights take."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from aios_serve.config import KVCacheDType, KVCachePolicy, PreemptionMode

_option = partial(typer.Option, rich_help_panel="Memory")

DeviceMemoryUtilization = Annotated[
    float | None,
    _option(
        "--device-memory-utilization",
        "--gpu-memory-utilization",
        show_default="GPU 0.9, CPU 0.25",
        help="Share of the memory to use: on a GPU for everything, on the CPU for the KV cache.",
    ),
]
KVCacheMemoryBytes = Annotated[
    str | None,
    _option("--kv-cache-memory-bytes", metavar="BYTES", help="Size of the KV cache, such as 4GiB."),
]
CPUOffloadGB = Annotated[
    float,
    _option(
        "--cpu-offload-gb",
        metavar="GIB",
        help="GiB of weights of each GPU that stay in host memory, in whole layers that stream in ahead of use.",
    ),
]
NumGPUBlocksOverride = Annotated[
    int | None,
    _option("--num-gpu-blocks-override", help="Number of KV pages, whatever the memory; CPU too."),
]
BlockSize = Annotated[int, _option("--block-size", help="Tokens per KV page.")]
EnablePrefixCaching = Annotated[
    bool,
    _option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Keep the pages of finished prompts, so that prompts that begin alike are not computed again.",
    ),
]
KVCachePolicyOption = Annotated[
    KVCachePolicy,
    _option(
        "--kv-cache-policy",
        help="contiguous reserves a whole context per request: the naive way, to compare with.",
    ),
]
KVCacheDTypeOption = Annotated[
    KVCacheDType,
    _option(
        "--kv-cache-dtype",
        help="Numbers in the KV pages. auto: bfloat16 with native kernels, else what the model computes with. "
        "fp8_e4m3 is fp8.",
    ),
]
KVOffloadingSize = Annotated[
    str,
    _option(
        "--kv-offloading-size",
        metavar="BYTES",
        help="Host memory for pages that the pool has no room for, such as 4GiB: evicted ones, preempted ones.",
    ),
]
KVOffloadingDiskSize = Annotated[
    str,
    _option("--kv-offloading-disk-size", metavar="BYTES", help="Disk for pages that leave host memory."),
]
KVOffloadingPath = Annotated[
    Path | None,
    _option(
        "--kv-offloading-path",
        "--kv-offloading-dir",
        show_default="temporary files",
        help="Folder for that; the file has no name and is gone when the engine is.",
    ),
]
PreemptionModeOption = Annotated[
    PreemptionMode,
    _option(
        "--preemption-mode",
        help="Save a preempted request's pages there, or compute them again. auto: what is faster.",
    ),
]
