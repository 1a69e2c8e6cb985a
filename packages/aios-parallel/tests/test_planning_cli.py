"""The command recommends, explains, prints JSON and plots; what cannot be is one line that says what to do."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest

from aios_parallel.cli import main

QWEN_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
MIXTURE = QWEN_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
PLAN_KEYS = {
    "tensor_parallel_size": int,
    "pipeline_parallel_size": int,
    "data_parallel_size": int,
    "enable_expert_parallel": bool,
    "quantization": str,
    "fits": bool,
    "bytes_per_rank": dict,
    "decode_seconds": float,
    "decode_reading_seconds": float,
    "decode_computing_seconds": float,
    "decode_communicating_seconds": (int, float),
    "num_micro_batches": int,
    "bubble": (int, float),
    "alone_seconds": float,
    "prefill_seconds": float,
    "tokens_per_second": float,
    "decode_speedup": (float, type(None)),
    "prefill_speedup": (float, type(None)),
    "one_device_max_batch": int,
    "sent_bytes_per_token": (int, float),
    "collectives_per_token": int,
    "max_batch": int,
}


@pytest.fixture
def run(tmp_path, capsys):
    def run(raw, *options, command="plan"):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(SystemExit) as stop:
            main([command, str(tmp_path), *options])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture
def plan(run):
    def plan(raw, *options):
        code, out, err = run(raw, "--json", *options)
        assert code == 0, err
        return json.loads(out)

    return plan


def test_json_has_the_documented_members(plan):
    result = plan(LLAMA_70B, "--devices", "16", "--hosts", "2", "--device-type", "h100")
    assert set(result) == {"model", "hardware", "workload", "objective", "assumptions", "recommended", "plans"}
    for each in (result["recommended"], *result["plans"]):
        for key, kind in PLAN_KEYS.items():
            assert isinstance(each[key], kind), key
    assert all(set(each) == set(PLAN_KEYS) for each in result["plans"])
    memory = result["recommended"]["bytes_per_rank"]
    parts = sum(memory[name] for name in ("weights", "kv_cache", "activations", "reserve"))
    assert memory["used"] == pytest.approx(parts)
    assert memory["used"] <= memory["capacity"]
    ranks = result["recommended"]["ranks"]
    sizes = ("tensor_parallel_size", "pipeline_parallel_size")
    assert len(ranks) == result["recommended"][sizes[0]] * result["recommended"][sizes[1]]
    assert max(rank["bytes"]["used"] for rank in ranks) == pytest.approx(memory["used"])
    assert result["hardware"]["link"]["name"] == "nvlink"


def test_tables_show_shards_plans_and_assumptions(run):
    code, out, _ = run(QWEN_8B, "--devices", "2", "--device-type", "h100")
    assert code == 0
    for text in ("8.19B parameters", "aios-serve", "ranks of one replica", "tok/s", "assumptions", "lower bounds"):
        assert text in out


def test_a_model_that_fits_one_device_is_replicated_when_links_are_slow(plan):
    result = plan(QWEN_8B, "--devices", "2", "--hosts", "2", "--device-type", "h100", "--network", "ethernet-10")
    assert result["recommended"]["data_parallel_size"] == 2
    assert any("exchange nothing" in reason for reason in result["recommended"]["reasons"])
    assert "--data-parallel-size 2 --quantization int8" in result["recommended"]["command"]


def test_tensor_parallelism_stays_within_a_host(plan):
    best = plan(LLAMA_70B, "--devices", "16", "--hosts", "2", "--device-type", "h100")["recommended"]
    assert best["tensor_parallel_size"] == 8
    assert any(reason.startswith("TP stays within a host: with TP=16") for reason in best["reasons"])
    assert any("--nnodes 2" in reason for reason in best["reasons"])
    assert any(reason.startswith("INT4 makes it fit one device: use that first") for reason in best["reasons"])
    assert "--tensor-parallel-size 8 --data-parallel-size 2" in best["command"]
    assert best["decode_speedup"] is None


def test_a_pipeline_crosses_slow_hosts(plan):
    options = ("--network", "ethernet-10", "--network-latency", "1ms", "--quantization", "none", "--batch", "32")
    best = plan(LLAMA_70B, "--devices", "4", "--hosts", "4", "--device-type", "h100", *options)["recommended"]
    assert (best["tensor_parallel_size"], best["pipeline_parallel_size"]) == (1, 4)
    assert any("micro-batches in flight" in reason for reason in best["reasons"])
    assert "--pipeline-parallel-size 4" in best["command"]


def test_four_bits_are_taken_only_where_nothing_else_fits(plan):
    options = ("--device-type", "rtx-4090", "--batch", "4", "--context", "2048")
    best = plan(LLAMA_70B, "--devices", "2", *options)["recommended"]
    assert best["quantization"] == "int4"
    assert sum("do not fit" in reason for reason in best["reasons"]) == 2
    assert plan(LLAMA_70B, "--devices", "4", *options)["recommended"]["quantization"] == "int8"
    assert (
        plan(LLAMA_70B, "--devices", "4", *options, "--objective", "devices")["recommended"]["quantization"] == "int4"
    )


def test_replicated_kv_heads_are_counted(plan):
    best = plan(MIXTURE, "--devices", "8", "--device-type", "h100", "-tp", "8", "--quantization", "none")["recommended"]
    assert any("ranks hold 8 together, so the KV cache takes 2 times the memory" in each for each in best["reasons"])


def test_padding_is_named(plan):
    raw = QWEN_8B | {"num_attention_heads": 10, "num_key_value_heads": 2}
    best = plan(raw, "--devices", "3", "--device-type", "h100", "-tp", "3")["recommended"]
    assert any("10 query heads do not divide by 3: padding makes them 11" in each for each in best["reasons"])
    assert [rank["kv_heads"] for rank in best["ranks"]] == [[0, 1], [0, 2], [1, 2]]


def test_experts_go_to_ranks_on_request(plan):
    options = ("--devices", "4", "--device-type", "h100", "--enable-expert-parallel", "-tp", "4")
    best = plan(MIXTURE, *options)["recommended"]
    assert "--enable-expert-parallel" in best["command"]
    assert [rank["experts"] for rank in best["ranks"]] == [[0, 32], [32, 64], [64, 96], [96, 128]]


def test_objectives_differ(plan):
    options = ("--devices", "8", "--device-type", "l40s", "--batch", "256", "--context", "1024", "--prompt", "512")
    fast, many, few = (
        plan(QWEN_8B, *options, "--objective", name)["recommended"] for name in ("latency", "throughput", "devices")
    )
    assert fast["alone_seconds"] < many["alone_seconds"]
    assert fast["tokens_per_second"] < many["tokens_per_second"]
    size = [
        plan["tensor_parallel_size"] * plan["pipeline_parallel_size"] * plan["data_parallel_size"]
        for plan in (few, many)
    ]
    assert size[0] < size[1]


def test_measured_collectives_change_the_plan(plan, tmp_path):
    path = tmp_path / "times.json"
    rows = [{"bytes": size, "ranks": 8, "seconds": 5e-3} for size in (1, 10_000_000)]
    path.write_text(json.dumps({"name": "a slow afternoon", "rows": rows}))
    options = ("--devices", "8", "--device-type", "h100", "-tp", "8")
    before, after = plan(QWEN_8B, *options), plan(QWEN_8B, *options, "--collectives", str(path))
    extra = after["recommended"]["decode_communicating_seconds"] - before["recommended"]["decode_communicating_seconds"]
    assert extra == pytest.approx(72 * 5e-3, rel=0.02)
    assert any("a slow afternoon" in text for text in after["assumptions"])


@pytest.mark.parametrize("command", ["plan", "scaling"])
def test_plots_are_svg(run, tmp_path, command):
    path = tmp_path / "plot.svg"
    devices = ("--devices", "8") if command == "plan" else ()
    code, _, err = run(QWEN_8B, *devices, "--device-type", "h100", "--plot", str(path), command=command)
    assert code == 0, err
    root = ET.fromstring(path.read_text())
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert 3 <= len(lines) <= 5
    places = [tuple(map(float, place.split(","))) for line in lines for place in line.get("points").split()]
    assert all(84 <= x <= 736 and 48 <= y <= 404 for x, y in places)


def test_weak_scaling_goes_from_one_device_to_all_hosts(run):
    code, out, _ = run(QWEN_8B, "--json", "--network", "ethernet-10", "--batch-per-device", "4", command="scaling")
    assert code == 0
    points = json.loads(out)["points"]
    assert [point["num_devices"] for point in points] == [1, 2, 4, 8, 16, 32, 64, 16, 32, 64]
    assert all(point["batch"] == 4 * point["num_devices"] for point in points)
    assert points[0]["efficiency"] == 1
    replicas = [point for point in points if point["name"] == "TP + DP"]
    assert all(point["efficiency"] == pytest.approx(points[3]["efficiency"]) for point in replicas)
    stages = [point for point in points if point["name"] == "TP + PP"]
    assert all(point["efficiency"] < points[3]["efficiency"] for point in stages)


def test_weak_scaling_prints_assumptions_above_the_table(run):
    code, out, _ = run(
        LLAMA_70B, "--max-hosts", "2", "--device-type", "h100", "--batch-per-device", "2", command="scaling"
    )
    assert code == 0
    assert out.index("assumptions") < out.index("efficiency")
    assert "no fit" in out


@pytest.mark.parametrize(
    ("raw", "options", "code", "message"),
    [
        (QWEN_8B, ["--devices", "3", "--hosts", "2"], 2, r"3 devices cannot be spread evenly over 2 hosts"),
        (QWEN_8B, ["--device-type", "h100", "-tp", "2"], 2, r"TP=2 needs 2 devices, there are 1"),
        (
            QWEN_8B,
            ["--device-type", "h100", "--devices", "8", "--batch", "4", "-dp", "8"],
            2,
            r"more replicas than the 4",
        ),
        (QWEN_8B, ["--device-type", "h100", "--enable-expert-parallel"], 2, r"this model has none"),
        (MIXTURE, ["--device-type", "h100", "--enable-expert-parallel"], 2, r"TP must be 2 or more"),
        (
            QWEN_8B,
            ["--device-type", "h100", "--devices", "40", "-tp", "40"],
            1,
            r"TP=40: 40 ranks cannot share 32 attention heads",
        ),
        (
            QWEN_8B,
            ["--device-type", "h100", "--devices", "40", "-pp", "40"],
            1,
            r"PP=40: 36 layers cannot make 40 pipeline",
        ),
        (QWEN_8B, ["--device-type", "abacus"], 2, r"device type 'abacus' is unknown"),
        (QWEN_8B, ["--device-type", "h100", "--memory", "much"], 2, r"--memory is 'much'"),
        (QWEN_8B, ["--devices", "0"], 2, r"Invalid value for '--devices'.*see aios-parallel --help"),
        (QWEN_8B | {"architectures": ["Unheard"]}, [], 1, r"architecture 'Unheard' is not supported"),
    ],
)
def test_mistakes_are_one_line(run, raw, options, code, message):
    found, out, err = run(raw, *options)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_what_would_fit_is_named_when_nothing_does(run):
    code, _, err = run(
        LLAMA_70B, "--device-type", "h100", "--quantization", "none", "--batch", "8", "--context", "4096"
    )
    assert code == 1
    assert "nothing fits 1 × h100" in err
    assert "needs 141 GB for weights, 10.7 GB for the KV cache of 8 × 4096 tokens" in err
    assert "lacks 80.3 GB per device" in err
    assert "--quantization int4 (one device)" in err
    assert "--devices 3 (" in err
    _, _, err = run(LLAMA_70B, "--device-type", "h100", "--quantization", "int4")
    assert "--batch 12; --context 1024; --devices 4" in err


def test_weights_that_nothing_makes_fit_say_so(run):
    code, _, err = run(
        LLAMA_70B, "--device-type", "l4", "--memory", "1GB", "--batch", "1", "--context", "512", "--prompt", "1"
    )
    assert code == 1
    assert "not eight times the devices would do" in err


def test_scaling_that_never_fits_says_what_to_lower(run):
    code, _, err = run(LLAMA_70B, "--device-type", "t4", "--max-hosts", "1", command="scaling")
    assert code == 1
    assert "even TP=8 lacks" in err
    code, _, err = run(QWEN_8B, "--quantization", "none,int8", command="scaling")
    assert code == 2
    assert "names several schemes" in err


def test_a_plot_that_cannot_be_written_is_an_error(run, tmp_path):
    code, _, err = run(QWEN_8B, "--device-type", "h100", "--batch", "8", "--plot", str(tmp_path / "no" / "plot.svg"))
    assert code == 1
    assert "cannot be written" in err
