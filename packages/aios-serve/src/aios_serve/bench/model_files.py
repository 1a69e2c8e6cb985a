"""The model in the form that each engine reads, made from one GGUF file and kept in the cache.

source                  the GGUF file as given
gguf/TYPE               requantised by llama.cpp; the source itself if it is of that type
openvino/fp16           built by OpenVINO GenAI from gguf/F16
openvino/int8, int4     its weights compressed by NNCF
transformers/DTYPE      dequantised to safetensors by transformers
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aios_model.errors import CheckpointError
from aios_model.weights.bundled import find_bundled_model
from aios_model.weights.gguf_file import GGUFFile
from aios_serve.bench.commands import run_module
from aios_serve.bench.engines import ENGINES
from aios_serve.bench.errors import BenchError
from aios_serve.bench.runners.make_random import SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_serve.bench.environments import Environments

MAKE_TIMEOUT = 3600.0
RANDOM = "random:"

# `general.file_type` of GGUF metadata (llama.cpp's llama_ftype).
_FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 32: "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """How one form is made: a module of `runners`, the engine whose environment it needs, and what it reads."""

    engine: str
    module: str
    reads: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceModel:
    """The GGUF file that everything is made from.

    Attributes:
        path: The file.
        name: The model's name, for tables.
        file_type: What most of its weights are, such as Q4_1; None if the file does not say.
        vocab_size: Token ids are below it.
        context_length: Tokens that it was made for.
    """

    path: Path
    name: str
    file_type: str | None
    vocab_size: int
    context_length: int

    @classmethod
    def read(cls, path: Path) -> SourceModel:
        """Look into a GGUF file.

        Raises:
            BenchError: no such file, or no GGUF file: peers have no other form in common.
            CheckpointError: it is corrupted.
        """
        if not path.is_file() or path.suffix != ".gguf":
            raise BenchError(f"--model={path} is no GGUF file; peers are compared on one, which all of them can read")
        with GGUFFile(path) as file:
            metadata = file.metadata
        architecture = metadata.get("general.architecture")
        tokens, context = metadata.get("tokenizer.ggml.tokens"), metadata.get(f"{architecture}.context_length")
        if not isinstance(tokens, list) or not isinstance(context, int):
            raise CheckpointError(f"{path}: the vocabulary or the context length is missing from the metadata")
        return cls(
            path=path,
            name=path.name.removesuffix(".gguf"),
            file_type=_FILE_TYPES.get(metadata.get("general.file_type")),  # type: ignore[call-overload]
            vocab_size=len(tokens),
            context_length=context,
        )

    @property
    def fingerprint(self) -> str:
        """Distinguishes files of the same name, without reading them whole."""
        stat = self.path.stat()
        return hashlib.sha256(f"{self.path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]


def find_source(
    model: str | None, folder: Path, *, environments: Environments, threads: int, report: Callable[[str], None]
) -> SourceModel:
    """The model to compare on.

    Args:
        model: A GGUF file; None is the bundled model, and "random:1b" or "random:3b" a Llama of that size with random
            weights, made when first asked for.
        folder: Where models that are made are kept.
        environments: Where the generator runs.
        threads: Threads for it.
        report: Told what is being done.

    Raises:
        BenchError: as of `SourceModel.read`, or the generator failed.
    """
    if model is None:
        return SourceModel.read(find_bundled_model())
    if not model.startswith(RANDOM):
        return SourceModel.read(Path(model).expanduser().absolute())
    shape = model.removeprefix(RANDOM)
    if shape not in SHAPES:
        raise BenchError(f"--model={model} is unknown; random models are {', '.join(RANDOM + each for each in SHAPES)}")
    target = folder / f"random-{shape}.gguf"
    if not target.exists():
        report(f"making a model of random weights, {shape}")
        target.parent.mkdir(parents=True, exist_ok=True)
        python = environments.python(ENGINES["llama.cpp"])
        arguments = (str(find_bundled_model()), str(target), shape, str(threads))
        what = f"making {target.name}"
        run_module(python, "make_random", *arguments, what=what, timeout=MAKE_TIMEOUT, threads=threads)
    return SourceModel.read(target)


class ModelFiles:
    """All forms of one model, made when first asked for.

    Args:
        source: What they are made from.
        folder: Where they are kept, in a folder of their own.
        environments: Where the peers' converters run.
        threads: Threads for converting.
        report: Told what is being done.
    """

    def __init__(
        self,
        source: SourceModel,
        folder: Path,
        *,
        environments: Environments,
        threads: int,
        report: Callable[[str], None],
    ) -> None:
        self._source = source
        self._folder = folder / f"{source.name}-{source.fingerprint}"
        self._environments = environments
        self._threads = threads
        self._report = report

    def path(self, form: str) -> Path:
        """Where a form is.

        Raises:
            BenchError: the converter failed, or its environment cannot be installed.
        """
        if form in ("source", f"gguf/{self._source.file_type}"):
            return self._source.path
        target = self._folder / (f"{form}.gguf" if form.startswith("gguf/") else form)
        if not target.exists():
            self._make(form, target)
        return target

    def _make(self, form: str, target: Path) -> None:
        step, (_, kind) = _step(form), form.split("/")
        source = self.path(step.reads)
        python = self._environments.python(ENGINES[step.engine])
        self._report(f"making {form} of {self._source.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        run_module(
            python,
            step.module,
            *(str(source), str(target), kind, str(self._threads)),
            what=f"making {form} of {self._source.name}",
            timeout=MAKE_TIMEOUT,
            threads=self._threads,
        )


def _step(form: str) -> _Step:
    if form.startswith("gguf/"):
        return _Step(engine="llama.cpp", module="make_gguf", reads="source")
    if form == "openvino/fp16":
        return _Step(engine="openvino", module="make_openvino", reads="gguf/F16")
    if form.startswith("openvino/"):
        return _Step(engine="openvino", module="make_openvino", reads="openvino/fp16")
    return _Step(engine="transformers", module="make_transformers", reads="source")
