"""What happens when a module is imported: torch costs seconds and half a gigabyte, so most modules must leave it out.

`lint-imports` sees the imports as written, also those inside functions; a fresh interpreter shows which of them happen.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Modules that compute with tensors, by package; a name covers what lies below it. All others import without torch.
TENSOR_MODULES = {
    "aios_model": (
        "cache",
        "decoder",
        "generate",
        "generation_stats",
        "hardware",
        "layers",
        "loader",
        "model",
        "sampling.device_sampler",
        "sampling.drawer",
        "sampling.logprobs",
        "sampling.native_draw",
        "sampling.noise",
        "sampling.processors",
        "sampling.ranking",
        "sampling.sampler",
        "sampling.torch_draw",
        "sampling.truncation",
        "transfers",
        "weights.block_rows",
        "weights.dummy",
        "weights.gguf",
        "weights.gguf_blocks",
        "weights.packed_entry",
        "weights.permuted",
        "weights.safetensors",
        "weights.sharded",
        "weights.source",
    ),
    "aios_kvcache": (
        "attention",
        "attention_plan",
        "host_tier",
        "native.batch_buffer",
        "native.native_cache",
        "native.reference",
        "online_softmax",
        "page_mover",
        "paged_cache",
        "pool_memory",
        "stored_heads",
    ),
    "aios_sched": (
        "batch",
        "model_runner",
        "newest_tokens",
        "speculative.draft_model",
        "speculative.early_exit",
        "speculative.rejection",
    ),
    "aios_parallel": (
        "offload.device",
        "offload.streaming",
        "offload.weights",
        "pipeline",
        "rank_groups",
        "shared_memory",
        "stage_runner",
        "tensor_parallel",
        "thread_group",
        "torch_group",
        "vocabulary",
    ),
    "aios_quant": (
        "calibrate",
        "checkpoints",
        "convert",
        "evaluate",
        "kernel",
        "layerwise",
        "linear",
        "native.decoder",
        "native.matrix",
        "native.reduction",
        "quantized_tensor",
        "reading",
        "reference",
        "runner",
        "schemes.base",
        "schemes.fp8",
        "schemes.gguf",
        "schemes.int4",
        "schemes.int8",
        "schemes.stored",
        "shards",
        "transform",
        "writing",
    ),
    "aios_serve": (
        "backend",
        "build",
        "draft_part",
        "model_part",
        "served_rank",
        "structured.bitmask",
        "structured.processor",
    ),
}
COMMANDS = (
    "aios_model.cli",
    "aios_parallel.cli",
    "aios_quant.cli",
    "aios_sched.cli",
    "aios_serve.cli",
    "aios_serve.tenants.cli",
)


@pytest.mark.parametrize("package", TENSOR_MODULES)
def test_modules_without_tensors_import_without_torch(package: str) -> None:
    modules = [name for name in module_names(package) if not computes_with_tensors(name)]
    assert package in modules
    loaded = first_to_load("torch", imports=modules)
    assert loaded is None, f"importing {loaded} loads torch; if it computes with tensors, add it to TENSOR_MODULES"


@pytest.mark.parametrize("package", TENSOR_MODULES)
def test_the_list_of_tensor_modules_names_existing_modules(package: str) -> None:
    assert {f"{package}.{name}" for name in TENSOR_MODULES[package]} <= set(module_names(package))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_without_torch(command: str) -> None:
    script = (
        "import sys\n"
        f"from {command} import main\n"
        f"sys.argv = ['{command}', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    assert "Usage" in run_python(script)


def module_names(package: str) -> list[str]:
    """Names of all modules of `package`, itself first, from its files; nothing is imported."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    names = (".".join(file.relative_to(root.parent).with_suffix("").parts) for file in root.rglob("*.py"))
    return sorted(name.removesuffix(".__init__") for name in names if not name.endswith(".__main__"))


def computes_with_tensors(module: str) -> bool:
    """Whether `module` is named, itself or a parent of it, among those that need torch."""
    package, _, rest = module.partition(".")
    return any(rest == name or rest.startswith(f"{name}.") for name in TENSOR_MODULES[package])


def first_to_load(library: str, *, imports: list[str]) -> str | None:
    """Import the modules in order in a fresh interpreter; the first after which `library` is loaded, or None."""
    script = (
        "import importlib, sys\n"
        f"for name in {imports!r}:\n"
        "    importlib.import_module(name)\n"
        f"    if {library!r} in sys.modules:\n"
        "        print('LOADED', name)\n"
        "        break\n"
    )
    return next((line.split()[1] for line in run_python(script).splitlines() if line.startswith("LOADED ")), None)


def run_python(script: str) -> str:
    """Standard output of `script` in a fresh interpreter, which must succeed."""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
