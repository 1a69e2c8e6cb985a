"""What users type and which files they bring: units, devices, links, schemes, measured times, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aios_model.config_file import read_model_config
from aios_model.errors import ConfigError
from aios_model.weights.hub import resolve_model
from aios_parallel.planning.advice import serve_command
from aios_parallel.planning.collectives import CollectiveTimes, link_seconds, read_collectives, sent_bytes
from aios_parallel.planning.devices import DEVICES, Link, find_device, find_link, find_network
from aios_parallel.planning.hardware import Cluster
from aios_parallel.planning.plans import find_plans
from aios_parallel.planning.quantities import parse_bandwidth, parse_bytes, parse_flops, parse_seconds, show_bytes
from aios_parallel.planning.request import HardwareRequest, choose_schemes, make_workload
from aios_parallel.planning.weights import find_scheme

QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
LINK = Link(name="wire", bandwidth=1e9, latency=1e-5)


def model(folder, **changes):
    (folder / "config.json").write_text(json.dumps(QWEN | changes))
    files = resolve_model(folder, tokenizer_only=True)
    return files, read_model_config(files, allow_quantized=True)


def times(path, rows, **more):
    path.write_text(json.dumps({"rows": rows, **more}))
    return read_collectives(path, {"host": LINK, "network": LINK})


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_bytes, "80GB", 80e9),
        (parse_bytes, "80GiB", 80 * 2**30),
        (parse_bytes, "80g", 80 * 2**30),
        (parse_bytes, "1.5e9", 1.5e9),
        (parse_bandwidth, "3.35TB/s", 3.35e12),
        (parse_bandwidth, "100Gbit/s", 12.5e9),
        (parse_bandwidth, "1e9B", 1e9),
        (parse_flops, "989T", 989e12),
        (parse_flops, "989 TFLOPS", 989e12),
        (parse_flops, "2e12", 2e12),
        (parse_seconds, "5us", 5e-6),
        (parse_seconds, "0.02 ms", 2e-5),
        (parse_seconds, "1e-5", 1e-5),
    ],
)
def test_units(parse, text, value):
    assert parse(text, "--option") == pytest.approx(value)


@pytest.mark.parametrize("parse", [parse_bytes, parse_bandwidth, parse_flops, parse_seconds])
@pytest.mark.parametrize("text", ["", "much", "-1GB", "5 parsecs", "1e9x"])
def test_other_units_are_refused_with_an_example(parse, text):
    with pytest.raises(ConfigError, match=r"--option is .*; write a number with a unit, such as \d"):
        parse(text, "--option")


def test_nothing_is_no_memory():
    with pytest.raises(ConfigError, match=r"--memory is '0GB'; it must be above 0"):
        parse_bytes("0GB", "--memory")


def test_bytes_are_shown_as_on_datasheets():
    assert [show_bytes(n) for n in (0, 999, 3.35e12, 80e9, 999.9e6)] == ["0 B", "999 B", "3.35 TB", "80 GB", "1 GB"]


def test_devices_are_found_under_the_names_people_use():
    for name in ("h100", "H100", "rtx-4090", "rtx4090", "RTX_4090", "4090", "a100", "a100-80"):
        assert find_device(name).bandwidth > 1e11
    assert find_device("a100") is find_device("a100-80")


def test_datasheets_are_plausible():
    for device in DEVICES:
        assert 1e10 < device.memory_bytes < 3e11
        assert device.rate("int8") >= device.rate("float")
        assert device.links[0].bandwidth >= device.links[-1].bandwidth
        assert device.links[0].bandwidth < device.bandwidth


def test_unknown_hardware_is_refused_with_what_is_known():
    with pytest.raises(ConfigError, match=r"'abacus' is unknown; use cpu.*h100.*set --memory"):
        find_device("abacus")
    with pytest.raises(ConfigError, match=r"--interconnect nvlink does not exist for l4; choose one of auto, pcie"):
        find_link(find_device("l4"), "nvlink")
    with pytest.raises(ConfigError, match=r"--network 'pigeons' is unknown; choose one of ethernet"):
        find_network("pigeons")


def test_options_change_the_datasheet():
    request = HardwareRequest(
        device_type="h100",
        num_devices=4,
        num_hosts=2,
        memory="40GB",
        bandwidth="1TB/s",
        flops="100T",
        link_latency="1us",
        network="infiniband",
        network_bandwidth="10Gbit/s",
    )
    cluster = request.cluster()
    assert (cluster.device.memory_bytes, cluster.device.bandwidth) == (40e9, 1e12)
    assert cluster.device.rate("float") == pytest.approx(100e12)
    assert cluster.device.rate("int8") == pytest.approx(100e12 * 1979 / 989)
    assert "changed by options" in cluster.device.source
    assert cluster.times.links["host"] == Link(name="nvlink", bandwidth=450e9, latency=1e-6)
    assert cluster.times.links["network"] == Link(name="infiniband", bandwidth=1.25e9, latency=6e-6)


def test_a_processor_is_measured_and_shared_by_its_devices():
    one, two = (HardwareRequest(device_type="cpu", num_devices=n, num_hosts=1).cluster().device for n in (1, 2))
    assert two.memory_bytes == one.memory_bytes / 2
    assert 1e8 < two.bandwidth < 1e12
    assert 1e8 < two.rate("float") < 1e14
    given = HardwareRequest(
        device_type="cpu", num_devices=2, num_hosts=1, memory="8GiB", bandwidth="20GB/s", flops="100G"
    )
    assert given.cluster().device.source == "given by options"


def test_hosts_must_have_equally_many_devices():
    with pytest.raises(ConfigError, match=r"3 devices cannot be spread evenly over 2 hosts"):
        HardwareRequest(device_type="h100", num_devices=3, num_hosts=2).cluster()


def test_schemes_are_chosen_by_what_the_checkpoint_is(tmp_path):
    gpu = find_device("h100")
    files, config = model(tmp_path)
    assert [scheme.name for scheme in choose_schemes("auto", config, gpu, files)] == ["none", "int8", "int4"]
    assert [scheme.name for scheme in choose_schemes("fp8, int4-g32", config, gpu, files)] == ["fp8", "int4-g32"]
    for quantization, bits, group in (
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, 4, 32),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8, 0),
        ({"quant_method": "fp8"}, 8, 0),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 8, 0),
    ):
        files, config = model(tmp_path, quantization_config=quantization)
        (scheme,) = choose_schemes("auto", config, gpu, files)
        assert (scheme.name, scheme.bits, scheme.group_size) == ("as-stored", bits, group)


def test_the_bundled_gguf_is_planned_as_it_is_stored():
    files = resolve_model(None)
    (scheme,) = choose_schemes("auto", read_model_config(files), find_device("h100"), files)
    assert scheme.name == "as-stored"
    assert 4 < scheme.bits < 6
    assert scheme.group_size == 32


def test_rows_that_no_group_divides_leave_int4_out(tmp_path):
    gpu = find_device("h100")
    files, config = model(tmp_path, intermediate_size=120)
    assert [scheme.name for scheme in choose_schemes("auto", config, gpu, files)] == ["none", "int8"]
    with pytest.raises(ConfigError, match=r"int4 needs rows in whole groups of 32, this model has rows of 120"):
        find_scheme("int4", config, gpu)
    files, config = model(tmp_path, intermediate_size=96)
    assert find_scheme("int4", config, gpu).group_size == 32
    with pytest.raises(ConfigError, match=r"int4-g64 needs rows in whole groups of 64, this model has rows of 96"):
        find_scheme("int4-g64", config, gpu)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("int3", {}, r"--quantization 'int3' is unknown; choose auto, none, int8"),
        ("int4-g48", {}, r"--quantization 'int4-g48' is unknown"),
        ("as-stored", {}, r"as-stored is for packed checkpoints, this one is not"),
        ("auto", {"quantization_config": {"quant_method": "hqq"}}, r"quantised with 'hqq' .* --quantization int8 or"),
    ],
)
def test_schemes_that_cannot_be_planned_are_refused(tmp_path, name, changes, message):
    files, config = model(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        choose_schemes(name, config, find_device("h100"), files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 8192}, r"--context 8192 exceeds the 4096 tokens this model supports; ask for 4096 or less"),
        ({"context": 16, "prompt": 17}, r"--prompt 17 is longer than --context 16"),
        ({"batch": 0}, r"--batch is 0; it must be 1 or more"),
        ({"utilization": 1.5}, r"--device-memory-utilization is 1.5; it must be above 0, at most 1"),
    ],
)
def test_work_that_cannot_be_done_is_refused(tmp_path, changes, message):
    _, config = model(tmp_path)
    options = {
        "batch": 1,
        "context": None,
        "prompt": None,
        "max_num_batched_tokens": None,
        "kv_cache_dtype": "auto",
        "utilization": 0.9,
    }
    with pytest.raises(ConfigError, match=message):
        make_workload(config, find_device("h100"), **(options | changes))


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_pages_of_fewer_bits_are_planned_for_and_asked_for(tmp_path, device):
    _, config = model(tmp_path)
    hardware = find_device("h100") if device == "h100" else replace(find_device("h100"), kind="cpu")
    options = {"batch": 1, "context": 64, "prompt": None, "max_num_batched_tokens": None, "utilization": 0.9}
    times = CollectiveTimes(links={"host": LINK, "network": LINK})
    cluster = Cluster(device=hardware, num_devices=1, num_hosts=1, times=times)
    for asked, told in (("auto", "bfloat16" if device == "cpu" else "auto"), ("int8", "int8"), ("fp8", "fp8")):
        work = make_workload(config, hardware, kv_cache_dtype=asked, **options)
        [plan] = find_plans(config, [find_scheme("none", config, hardware)], cluster, work)
        assert f"--kv-cache-dtype {told} " in serve_command(plan, "m")


def test_the_formula_of_a_link():
    assert link_seconds("send", LINK, ranks=2, num_bytes=1e6) == pytest.approx(1e-5 + 1e-3)
    assert link_seconds("all_reduce", LINK, ranks=4, num_bytes=1e6) == pytest.approx(4e-5 + 1.5e-3)
    assert link_seconds("gather", LINK, ranks=5, num_bytes=1e6) == pytest.approx(3e-5 + 0.8e-3)
    assert sent_bytes("all_reduce", ranks=4, num_bytes=100) == 150
    alone = CollectiveTimes(links={"host": LINK, "network": LINK})
    assert alone.seconds("all_reduce", ranks=1, num_bytes=1e6, where="host") == 0


def test_measured_times_are_interpolated_and_go_on_with_their_last_slope(tmp_path):
    rows = [{"bytes": size, "ranks": 2, "seconds": seconds} for size, seconds in ((1000, 1e-5), (3000, 2e-5))]
    measured = times(tmp_path / "t.json", rows, name="here")
    for size, seconds in ((10, 1e-5), (1000, 1e-5), (2000, 1.5e-5), (3000, 2e-5), (7000, 4e-5)):
        assert measured.seconds("all_reduce", ranks=2, num_bytes=size, where="host") == pytest.approx(seconds)
    assert measured.name == "here"
    assert measured.seconds("send", ranks=2, num_bytes=1000, where="host") == pytest.approx(1.1e-5)
    assert measured.seconds("all_reduce", ranks=2, num_bytes=1000, where="network") == pytest.approx(2.1e-5)


def test_ranks_that_were_not_measured_scale_the_nearest_that_were(tmp_path):
    rows = [{"bytes": 1000, "ranks": ranks, "seconds": ranks * 1e-4} for ranks in (2, 8)]
    measured = times(tmp_path / "t.json", rows)
    scale = [link_seconds("all_reduce", LINK, ranks=ranks, num_bytes=1000) for ranks in (16, 8)]
    found = measured.seconds("all_reduce", ranks=16, num_bytes=1000, where="host")
    assert found == pytest.approx(8e-4 * scale[0] / scale[1])
    assert measured.seconds("all_reduce", ranks=8, num_bytes=1000, where="host") == pytest.approx(8e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot be read as JSON"),
        ("[]", r'must hold \{"rows"'),
        ('{"rows": []}', r'must hold \{"rows"'),
        ('{"rows": [3]}', r"row 0 must be an object, got int"),
        ('{"rows": [{"bytes": 1, "ranks": 2}]}', r"row 0: seconds is None; it must be a number above 0"),
        ('{"rows": [{"bytes": 1, "ranks": 1, "seconds": 1}]}', r"row 0: ranks is 1; it must be a whole number from 2"),
        ('{"rows": [{"operation": "scatter"}]}', r"operation is 'scatter'; it must be one of all_reduce, gather, send"),
        ('{"rows": [{"link": "moon"}]}', r"link is 'moon'; it must be host or network"),
        ('{"rows": [%s, %s]}' % (('{"bytes": 1, "ranks": 2, "seconds": 1}',) * 2), r"row 1 repeats an earlier one"),
    ],
)
def test_files_of_times_are_checked(tmp_path, content, message):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_collectives(path, {"host": LINK, "network": LINK})


def test_a_file_of_times_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none.json cannot be read as JSON"):
        read_collectives(tmp_path / "none.json", {"host": LINK, "network": LINK})


def test_planning_never_loads_torch():
    code = (
        "import sys\nfrom aios_parallel.cli import main\n"
        "try: main(['plan', '--devices', '2', '--device-type', 'l4', '--json'])\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recommended"]["fits"] is True


def test_what_the_benchmark_writes_is_what_plans_read(tmp_path):
    path = Path(__file__).parents[3] / "benchmarks" / "collectives.py"
    spec = importlib.util.spec_from_file_location("collectives_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark  # dataclasses look their module up
    try:
        spec.loader.exec_module(benchmark)
    finally:
        del sys.modules[spec.name]
    names = [f"{kind} {by}" for kind in ("all-reduce", "gather", "one way") for by in ("shared", "gloo")]
    figures = [
        benchmark.Figure(operation=name, numel=numel, median=1e3 * numel * (1 + place), tenth=0, ninety_ninth=0)
        for place, name in enumerate([*names, "all-reduce native", "all-reduce gloo's own"])
        for numel in (512, 2048)
    ]
    (tmp_path / "times.json").write_text(json.dumps(benchmark.planning_times(figures, 3)))
    read = read_collectives(tmp_path / "times.json", {"host": LINK, "network": LINK})
    assert read.seconds("all_reduce", ranks=3, num_bytes=2048, where="host") == pytest.approx(512e-3)
    assert read.seconds("all_reduce", ranks=3, num_bytes=2048, where="network") == pytest.approx(2 * 512e-3)
    assert read.seconds("gather", ranks=3, num_bytes=3 * 8192, where="host") == pytest.approx(3 * 2048e-3)
    assert read.seconds("send", ranks=2, num_bytes=8192, where="network") == pytest.approx(6 * 2048e-3)
    assert "3 ranks" in read.name
