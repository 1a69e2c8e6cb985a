"""Options of the Ray Serve application, as a command line and as a YAML file give them. No Ray is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aios_model.errors import ConfigError
from aios_serve.ray_app.options import RayServeConfig


def test_words_of_a_command_line_become_numbers():
    config = RayServeConfig.from_args(
        {
            "model": "org/name",
            "max_model_len": "8k",
            "kv_cache_memory_bytes": "1GiB",
            "enable_prefix_caching": "false",
            "device_memory_utilization": "0.5",
            "max_num_seqs": "16",
            "max_replicas": "3",
            "num_gpus": "0.5",
            "api_key": "secret",
            "shutdown_timeout": "5",
            "tool_call_parser": "hermes",
            "enable_auto_tool_choice": "false",
            "reasoning_parser": "qwen3",
        }
    )
    assert config.engine.model == "org/name"
    assert config.engine.max_model_len == 8192
    assert config.engine.kv_cache_memory_bytes == 2**30
    assert config.engine.enable_prefix_caching is False
    assert config.engine.device_memory_utilization == 0.5
    assert (config.min_replicas, config.max_replicas, config.num_gpus) == (1, 3, 0.5)
    assert config.target_ongoing_requests == 8
    assert config.server.api_keys == ("secret",)
    assert config.server.shutdown_timeout == 5
    assert (config.server.tool_call_parser, config.server.reasoning_parser) == ("hermes", "qwen3")
    assert config.server.enable_auto_tool_choice is False


def test_values_of_a_file_keep_their_types():
    args = {"max_replicas": 2, "num_cpus": 4, "served_model_name": ["a", "b"], "allowed_origins": ["http://x"]}
    config = RayServeConfig.from_args(args)
    assert config.engine.served_model_name == ("a", "b")
    assert config.server.allowed_origins == ("http://x",)
    assert config.engine.threads == 4, "a replica uses the cores that were set aside for it"
    assert RayServeConfig.from_args({"num_cpus": 4, "threads": 2}).engine.threads == 2


def test_a_local_path_is_made_absolute(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert RayServeConfig.from_args({"model": "model.gguf"}).engine.model == str(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"max_replica": 2}, "unknown option 'max_replica'; did you mean 'max_replicas'"),
        ({"max-model-len": "8k"}, "did you mean 'max_model_len'"),
        ({"zzz": 1}, "known options: .*max_num_seqs.*"),
        ({"port": 80}, "port is not an option here.*--http-port"),
        ({"max_replicas": 0}, "max_replicas=0 cannot be used"),
        ({"max_replicas": "two"}, "max_replicas='two' cannot be used: it must be a whole number"),
        ({"max_replicas": 1.5}, "max_replicas=1.5 cannot be used"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas=2 is below min_replicas=3"),
        ({"num_gpus": -1}, "num_gpus=-1 cannot be used"),
        ({"num_cpus": float("nan")}, "num_cpus=nan cannot be used"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests=0 cannot be used"),
        ({"target_ongoing_requests": 9, "max_num_seqs": 8}, "at most max_num_seqs=8"),
        ({"enable_prefix_caching": "perhaps"}, "write true or false"),
        ({"shutdown_timeout": "soon"}, "shutdown_timeout='soon' cannot be used"),
        ({"api_key": [1]}, "api_key cannot be used"),
        ({"dtype": "int7"}, "dtype='int7' cannot be used"),
        ({"max_model_len": "long"}, "max_model_len='long' cannot be used"),
    ],
)
def test_what_cannot_be_honoured_is_refused(args, reason):
    with pytest.raises(ConfigError, match=reason):
        RayServeConfig.from_args(args)


def test_without_ray_the_error_says_what_to_install():
    script = (
        "import sys; sys.modules['ray'] = None\n"
        "from aios_serve.ray_app import build_app\n"
        "try:\n    build_app({})\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.startswith("ConfigError")
    assert "pip install 'aios-serve[ray]'" in said
