"""Writes a GGUF file in another type with llama.cpp's own quantiser. Runs in llama.cpp's environment."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


def main(source: str, target: str, kind: str, threads: str) -> None:
    """Requantise.

    Args:
        source: The GGUF file to read.
        target: The file to write; a file under this name is always whole.
        kind: llama.cpp's name of the type, such as Q4_0.
        threads: How many threads to use.
    """
    llama = import_module("llama_cpp")
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = int(threads)
    params.allow_requantize = True
    partial = Path(f"{target}.partial")
    status = llama.llama_model_quantize(source.encode(), str(partial).encode(), params)
    if status:
        raise SystemExit(f"llama_model_quantize of {source} to {kind} returned {status}")
    partial.rename(target)
