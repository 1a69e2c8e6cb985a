"""Makes an OpenVINO model of an F16 GGUF file, with weights as they are or compressed by NNCF. Runs in its environment.

GenAI reads GGUF files and can save what it built; NNCF compresses weights as `optimum-cli export openvino
--weight-format int8` does (per channel, asymmetric), without needing torch.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib import import_module
from pathlib import Path

COMPRESSION = {
    "int8": {"mode": "INT8_ASYM"},
    "int8-sym": {"mode": "INT8_SYM"},
    "int4": {"mode": "INT4_ASYM", "group_size": 64, "ratio": 1.0},
}


def main(source: str, target: str, kind: str, threads: str) -> None:
    """Convert.

    Args:
        source: A GGUF file in F16 for "fp16" and "gguf"; a folder of this script's "fp16" otherwise.
        target: The folder to write; a folder under this name is always whole.
        kind: "fp16", "gguf" (GGUF blocks kept as OpenVINO keeps them) or a name in `COMPRESSION`.
        threads: How many threads to use.
    """
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        if kind in COMPRESSION:
            _compress(Path(source), folder, kind)
        else:
            _read_gguf(Path(source), folder, int(threads))
        folder.rename(target)


def _read_gguf(source: Path, folder: Path, threads: int) -> None:
    """GenAI saves the model beside the file it read, so it reads it through a link."""
    genai = import_module("openvino_genai")
    link = folder / "model.gguf"
    link.symlink_to(source.resolve())
    genai.LLMPipeline(str(link), "CPU", INFERENCE_NUM_THREADS=threads, enable_save_ov_model=True)
    link.unlink()
    if not (folder / "openvino_model.xml").exists():
        raise SystemExit(f"OpenVINO GenAI read {source}, but saved no model")


def _compress(source: Path, folder: Path, kind: str) -> None:
    nncf, openvino = import_module("nncf"), import_module("openvino")
    options = dict(COMPRESSION[kind])
    mode = getattr(nncf.CompressWeightsMode, str(options.pop("mode")))
    model = nncf.compress_weights(openvino.Core().read_model(source / "openvino_model.xml"), mode=mode, **options)
    openvino.save_model(model, folder / "openvino_model.xml")
    for file in source.glob("*token*"):
        shutil.copy(file, folder)
