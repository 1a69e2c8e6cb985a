"""`aios-serve`: flags become options, mistakes become one line, and nothing heavy is imported on the way."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

from aios_sched.speculative.config import SpeculativeConfig
from aios_serve import cli
from aios_serve.config import EngineConfig
from aios_serve.server_config import ServerConfig


@pytest.fixture
def run(monkeypatch):
    """Run the command line; returns the configs that would be served."""
    served = []

    def fake_run(engine_config, server_config, log_level):
        served.append((engine_config, server_config, log_level))
        return 0

    monkeypatch.setattr(cli, "_run", fake_run)
    monkeypatch.delenv("AIOS_API_KEY", raising=False)

    def run(*args):
        with pytest.raises(SystemExit) as leaving:
            cli.main(args)
        assert leaving.value.code == 0
        return served[-1]

    return run


@pytest.fixture
def complain(monkeypatch, capsys):
    """Run a wrong command line; returns the one line it says."""
    monkeypatch.setattr(cli, "_run", lambda *_: pytest.fail("it started"))

    def complain(*args):
        with pytest.raises(SystemExit) as leaving:
            cli.main(args)
        assert leaving.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("aios-serve: ")
        assert line.count("\n") == 1
        return line

    return complain


def test_without_arguments_every_default_is_that_of_the_configs(run):
    engine, server, level = run()
    assert engine == EngineConfig()
    assert server == ServerConfig()
    assert level == "info"


def test_every_flag_arrives(run, tmp_path):
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).touch()
    engine, server, level = run(
        *("some/model", "--served-model-name", "a", "--served-model-name", "b", "--tokenizer", "t", "--revision", "r"),
        *("--download-dir", "d", "--load-format", "dummy", "--dtype", "bfloat16", "--device", "cpu", "--seed", "7"),
        *("--max-model-len", "8k", "--generation-config", "none", "--chat-template", "c.jinja", "--max-logprobs", "5"),
        *("--host", "0.0.0.0", "--port", "9000", "--uds", "x.sock", "--api-key", "k1", "--api-key", "k2"),
        *("--allowed-origins", "http://a", "--allowed-origins", '["http://b"]', "--shutdown-timeout", "3"),
        *("--ssl-certfile", str(tmp_path / "cert.pem"), "--ssl-keyfile", str(tmp_path / "key.pem")),
        *("--gpu-memory-utilization", "0.5", "--kv-cache-memory-bytes", "1GiB", "--block-size", "32"),
        *("--no-enable-prefix-caching", "--kv-cache-policy", "contiguous", "--max-num-seqs", "4"),
        *("--max-num-batched-tokens", "64", "--no-enable-chunked-prefill", "--max-num-queued-reqs", "9", "-tp", "1"),
        *("--scheduling-policy", "priority", "--priority-aging-seconds", "2", "--request-timeout", "60"),
        *("--threads", "3", "--no-engine-process", "--log-level", "warning"),
        *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 6}'),
    )
    assert engine == EngineConfig(
        model="some/model",
        served_model_name=("a", "b"),
        tokenizer="t",
        revision="r",
        download_dir="d",
        load_format="dummy",
        dtype="bfloat16",
        device="cpu",
        seed=7,
        max_model_len=8192,
        generation_config="none",
        chat_template="c.jinja",
        max_logprobs=5,
        device_memory_utilization=0.5,
        kv_cache_memory_bytes=2**30,
        block_size=32,
        enable_prefix_caching=False,
        kv_cache_policy="contiguous",
        max_num_seqs=4,
        max_num_batched_tokens=64,
        enable_chunked_prefill=False,
        scheduling_policy="priority",
        priority_aging_seconds=2.0,
        request_timeout=60.0,
        speculative=SpeculativeConfig(method="ngram", num_speculative_tokens=5, prompt_lookup_max=6),
        max_num_queued_reqs=9,
        threads=3,
        engine_process=False,
        log_level="warning",
    )
    assert (server.host, server.port, str(server.uds)) == ("0.0.0.0", 9000, "x.sock")
    assert server.api_keys == ("k1", "k2")
    assert server.allowed_origins == ("http://a", "http://b")
    assert server.shutdown_timeout == 3
    assert server.uses_https
    assert level == "warning"


def test_weights_can_be_offloaded(run):
    assert run("--cpu-offload-gb", "2.5")[0].cpu_offload_gb == 2.5
    assert run()[0].cpu_offload_gb == 0


def test_number_of_pages_can_be_given(run):
    assert run("--num-gpu-blocks-override", "50")[0].num_gpu_blocks_override == 50


@pytest.mark.parametrize(("text", "tokens"), [("auto", None), ("8192", 8192), ("8k", 8192), ("32K", 32768)])
def test_context_length_is_read_as_people_write_it(run, text, tokens):
    assert run("--max-model-len", text)[0].max_model_len == tokens


def test_key_can_come_from_the_environment(run, monkeypatch):
    monkeypatch.setenv("AIOS_API_KEY", "secret")
    assert run()[1].api_keys == ("secret",)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--port", "x"], ["--port", "integer"]),
        (["--port", "99999"], ["--port=99999", "65535"]),
        (["--max-model-len", "8q"], ["--max-model-len='8q'", "8k"]),
        (["--max-model-len", "0"], ["--max-model-len=0", "at least 1"]),
        (["--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["--tensor-parallel-size", "0"], ["--tensor-parallel-size=0", "at least 1"]),
        (["-pp", "-1"], ["--pipeline-parallel-size=-1"]),
        (["--enable-expert-parallel"], ["--enable-expert-parallel=True", "2 or more"]),
        (["--distributed-executor-backend", "slurm"], ["--distributed-executor-backend", "slurm", "torchrun"]),
        (["--rank-timeout", "0"], ["--rank-timeout=0"]),
        (["--max-num-seqs", "0"], ["--max-num-seqs=0"]),
        (["--max-num-batched-tokens", "8"], ["--max-num-batched-tokens=8", "--max-num-seqs=64"]),
        (["--block-size", "-1"], ["--block-size=-1"]),
        (["--threads", "0"], ["--threads=0"]),
        (["--seed", "-1"], ["--seed=-1"]),
        (["--cpu-offload-gb", "1", "--device", "cpu"], ["--cpu-offload-gb=1.0", "in host memory already"]),
        (["--gpu-memory-utilization", "90"], ["--device-memory-utilization=90", "0.9"]),
        (["--kv-cache-memory-bytes", "lots"], ["--kv-cache-memory-bytes='lots'", "4GiB"]),
        (["--kv-cache-memory-bytes", "1g", "--num-gpu-blocks-override", "5"], ["--num-gpu-blocks-override"]),
        (["--speculative-config", '{"method": "medusa"}'], ["--speculative-config='{", "method='medusa'", "ngram"]),
        (["--speculative-config", "ngram"], ["--speculative-config='ngram'", "no JSON", '{"method"']),
        (
            ["--max-model-len", "4k", "--num-gpu-blocks-override", "255"],
            ["--num-gpu-blocks-override=255", "--max-model-len=4096", "needs 256 pages of 16 tokens", "4080"],
        ),
        (["--ssl-certfile", "x.pem"], ["--ssl-keyfile"]),
        (["--api-key", ""], ["API key"]),
        (["--allowed-origins", "[1"], ["--allowed-origins='[1'", "JSON"]),
        (["--shutdown-timeout", "-1"], ["--shutdown-timeout=-1"]),
        (["--served-model-name", ""], ["--served-model-name"]),
        (["--no-such-flag"], ["--no-such-flag", "--help"]),
        (["--port"], ["--port", "argument"]),
        (["one", "two"], ["two"]),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it_and_the_remedy(complain, args, words):
    line = complain(*args)
    for word in words:
        assert word in line


def test_help_shows_every_flag_with_an_explanation(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for name in set(inspect.signature(cli.serve).parameters) - {"model"}:
        assert "--" + name.replace("_", "-") in text
    for title in ("Examples", "Model", "HTTP", "Memory", "Batching", "Process"):
        assert title in text
    assert "aios-serve Qwen/Qwen3-0.6B --port 9000" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == "aios-serve 0.1.0\n"


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["--port", "x"], ["-tp", "0"]])
def test_help_and_mistakes_import_nothing_heavy(args):
    code = (
        "import sys\nfrom aios_serve.cli import main\n"
        f"try: main({args!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'fastapi', 'uvicorn', 'tokenizers', 'numpy', 'prometheus_client'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_smallest_legal_pool_is_served(run):
    engine, _, _ = run("--max-model-len", "4k", "--num-gpu-blocks-override", "256")
    assert (engine.max_model_len, engine.num_gpu_blocks_override) == (4096, 256)


def test_one_page_fewer_ends_with_status_2_and_the_arithmetic_before_anything_is_loaded():
    options = ["--max-model-len", "4096", "--num-gpu-blocks-override", "255", "--port", "0"]
    command = [sys.executable, "-X", "importtime", "-m", "aios_serve.cli", "/no/such/model", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert line == (
        "aios-serve: --num-gpu-blocks-override=255 cannot be used: one sequence of --max-model-len=4096 tokens needs "
        "256 pages of 16 tokens, and these hold 4080 tokens; give as many pages, or lower --max-model-len to 4080"
    )
    assert not re.search(r"\| +(torch|uvicorn|aios_serve\.server)$", result.stderr, re.MULTILINE)


def test_address_in_use_ends_with_status_1_and_one_line():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "aios_serve.cli", "--port", port]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert f"port {port} on 127.0.0.1 is in use" in result.stderr
    assert "Traceback" not in result.stderr
