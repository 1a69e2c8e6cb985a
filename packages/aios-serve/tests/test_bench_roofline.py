"""Limits of the machine, and what was measured beside them."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from aios_model.config_file import read_model_config
from aios_model.errors import NativeBuildError
from aios_model.inspect import active_parameters, flops_per_token
from aios_model.native import native_status
from aios_model.native.isa import choose_isa
from aios_model.weights.hub import resolve_model
from aios_serve.bench import limits as limits_module
from aios_serve.bench.engines import ENGINES, Variant
from aios_serve.bench.errors import BenchError
from aios_serve.bench.limits import Limits, measure_limits
from aios_serve.bench.roofline import limits_line, parse_roofline_works, place
from aios_serve.bench.samples import Task
from aios_serve.bench.work import parse_works

LIMITS = Limits(
    threads=2, large_read=10e9, cached_read=20e9, float_operations=100e9, byte_operations=400e9, source="a test"
)


@pytest.fixture
def quick(monkeypatch):
    """Small buffers and short loops: the figures mean nothing."""
    for name, value in {"LARGE": 4 << 20, "CACHED": 1 << 20, "TRIES": 2, "OPERATIONS": 1_000_000}.items():
        monkeypatch.setattr(limits_module, name, value)


@pytest.mark.skipif(not native_status().available, reason=native_status().reason)
def test_native_kernels_measure_every_limit(quick):
    measured = measure_limits(2)
    assert measured.source == f"native kernels for {choose_isa().name}"
    rates = (measured.large_read, measured.cached_read, measured.float_operations, measured.byte_operations)
    assert all(rate is not None and 1e6 < rate < 1e14 for rate in rates)


def test_without_native_kernels_torch_measures(monkeypatch, quick):
    def refuse():
        raise NativeBuildError("no compiler")

    monkeypatch.setattr(limits_module, "model_library", refuse)
    monkeypatch.setattr("aios_model.hardware.measure_this_machine", lambda: SimpleNamespace(flops=5e9))
    measured = measure_limits(1)
    assert measured.source == "torch"
    assert measured.byte_operations is None
    assert "in 8 bits" not in limits_line(measured)


def config():
    return read_model_config(resolve_model(None, tokenizer_only=True))


def point(work, *, quantization="int8", limits=LIMITS, **result):
    task = Task(
        engine=ENGINES["aios"],
        precision="",
        variant=Variant(name=quantization, model="source", options={}),
        work=parse_works(work)[0],
    )
    facts = {
        "quantization": quantization,
        "num_weight_bytes": 100_000_000,
        "num_kv_bytes": 16_000_000,
        "num_blocks": 1000,
        "block_size": 16,
    }
    return place({"facts": facts, **result}, task, config(), limits)


def test_one_sequence_reads_all_weights_and_its_context_for_each_token():
    single = point("decode-1@136", decode_tokens=100, decode_seconds=2.0)
    assert single.bytes_per_token == 100_000_000 + 1000 * 200
    assert single.operations_per_token == flops_per_token(config(), context=200)
    assert single.operations_per_token > 2 * active_parameters(config())
    assert single.tokens_per_second == 50
    assert single.read_share == pytest.approx(50 * single.bytes_per_token / 10e9)
    assert single.limit == pytest.approx(10e9 / single.bytes_per_token)


def test_many_sequences_share_the_weights_until_arithmetic_is_the_limit():
    many = point("decode-64@136", decode_tokens=64, decode_seconds=1.0)
    assert many.bytes_per_token == pytest.approx(100_000_000 / 64 + 200_000)
    assert many.limit == pytest.approx(min(10e9 / many.bytes_per_token, 400e9 / many.operations_per_token))


@pytest.mark.parametrize(("quantization", "peak"), [("int8", 400e9), ("int8-a16", 100e9), ("none", 100e9)])
def test_arithmetic_is_compared_with_the_numbers_that_are_multiplied(quantization, peak):
    measured = point("decode-1", quantization=quantization, decode_tokens=10, decode_seconds=1.0)
    assert measured.arithmetic_share == pytest.approx(10 * measured.operations_per_token / peak)


def test_an_unknown_peak_is_no_share():
    limits = Limits(threads=1, large_read=1e9, cached_read=1e9, float_operations=1e9, byte_operations=None, source="")
    assert point("decode-1", limits=limits, decode_tokens=1, decode_seconds=1.0).arithmetic_share is None


def test_only_decoding_has_a_roofline_here():
    assert [work.name for work in parse_roofline_works("decode-1,decode-8@64")] == ["decode-1", "decode-8@64"]
    with pytest.raises(BenchError, match="prefill-512"):
        parse_roofline_works("decode-1,prefill-512")


@pytest.mark.parametrize("arguments", [["--help"], ["peers", "--help"], ["roofline", "--help"]])
def test_help_is_printed_without_anything_heavy(arguments):
    script = (
        "import sys\nfrom aios_serve.bench.cli import main\n"
        f"sys.argv = ['aios-bench', *{arguments}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'numpy', 'fastapi', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["peers", "--engines", "nobody"], "engines='nobody' is unknown"),
        (["peers", "--work", "sleep"], "work='sleep' is unknown"),
        (["peers", "--model", "/nowhere.gguf"], "is no GGUF file"),
        (["roofline", "--work", "prefill-5"], "has no roofline"),
    ],
)
def test_mistakes_are_one_line_and_status_1(arguments, complaint, monkeypatch, capsys):
    from aios_serve.bench import cli

    monkeypatch.setattr(sys, "argv", ["aios-bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert complaint in " ".join(capsys.readouterr().err.split())
