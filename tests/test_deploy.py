"""The manifests under `deploy/` name commands, flags, paths and options: they must exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from aios_serve.auth import PUBLIC_PATHS
from aios_serve.cli import app as cli
from aios_serve.ray_app.options import RayServeConfig

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))

# What the LeaderWorkerSet controller sets in every pod of a group.
LWS = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "aios-0.aios", "LWS_WORKER_INDEX": "1"}
PROBES = {"startupProbe": "/health", "livenessProbe": "/live", "readinessProbe": "/ready"}


def documents(path):
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def of_kind(kind):
    [found] = [document for path in MANIFESTS for document in documents(path) if document["kind"] == kind]
    return found


def inside(node, key):
    """Every value under `key`, however deep."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from inside(value, key)
    elif isinstance(node, list):
        for item in node:
            yield from inside(item, key)


def containers(document):
    return [container for group in inside(document, "containers") for container in group]


def server_command(container):
    """The words of aios-serve's command line; None if the container runs something else."""
    words = [*container.get("command", []), *container.get("args", [])]
    if words[:2] == ["sh", "-c"]:
        words = shell_words(words[2])
        return words[words.index("aios_serve") + 1 :]
    return words[1:] if words[:1] == ["aios-serve"] else None


def shell_words(line):
    for name, value in LWS.items():
        line = line.replace(f"${name}", value)
    assert "$" not in line, "a variable that nobody sets"
    return shlex.split(line.removeprefix("exec "))


def commands():
    found = [
        (path.name, command)
        for path in MANIFESTS
        for document in documents(path)
        for command in map(server_command, containers(document))
        if command is not None
    ]
    assert {name for name, _ in found} == {"single.yaml", "leaderworkerset.yaml"}
    return found


def known_flags():
    return {option for param in typer.main.get_command(cli).params for option in (*param.opts, *param.secondary_opts)}


@pytest.mark.parametrize(("name", "command"), commands())
def test_flags_exist(name, command):
    flags = {word.partition("=")[0] for word in command if word.startswith("-")}
    assert flags
    assert flags - known_flags() == set()
    assert not re.search(r"(?i)key|token|secret", " ".join(command)), "keys come from secrets"


def test_torchrun_takes_its_options():
    lines = [container["args"][0] for container in containers(of_kind("LeaderWorkerSet"))]
    assert len(lines) == 2
    assert len(set(lines)) == 1, "leader and workers run the same program"
    words = shell_words(lines[0])
    assert words[0] == "torchrun"
    options = get_args_parser().parse_args(words[1:])
    assert (options.nnodes, options.node_rank, options.master_addr) == ("2", 1, LWS["LWS_LEADER_ADDRESS"])
    assert options.module
    assert options.training_script == "aios_serve"
    sizes = {name: int(size) for name, size in re.findall(r"--(\w+)-parallel-size=(\d+)", lines[0])}
    ranks = of_kind("LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["size"] * int(options.nproc_per_node)
    assert sizes["tensor"] * sizes["pipeline"] == ranks


def test_probes_ask_what_is_public():
    for path in MANIFESTS:
        for document in documents(path):
            for probe, expected in PROBES.items():
                for settings in inside(document, probe):
                    assert settings["httpGet"]["path"] == expected
                    assert expected in PUBLIC_PATHS
    assert len(list(inside(of_kind("Deployment"), "readinessProbe"))) == 1


def test_pods_live_longer_than_the_server_needs_to_drain():
    for name, command in commands():
        [timeout] = re.findall(r"--shutdown-timeout=(\d+)", " ".join(command))
        for document in documents(DEPLOY / "kubernetes" / name):
            assert all(grace > int(timeout) for grace in inside(document, "terminationGracePeriodSeconds"))


def test_selectors_find_their_pods():
    for path in MANIFESTS:
        labels = [
            metadata.get("labels", {}) for document in documents(path) for metadata in inside(document, "metadata")
        ]
        for service in (document for document in documents(path) if document["kind"] == "Service"):
            selector = service["spec"]["selector"]
            assert any(selector.items() <= found.items() for found in labels), path.name


def test_ports_are_those_that_are_listened_on():
    for path in MANIFESTS:
        ports = [
            port["containerPort"]
            for group in inside(documents(path), "ports")
            for port in group
            if "containerPort" in port
        ]
        assert 8000 in ports


def test_the_ray_service_is_one_that_the_application_accepts():
    service = of_kind("RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    [application] = config["applications"]
    assert application["import_path"] == "aios_serve.ray_app:build_app"
    options = RayServeConfig.from_args(application["args"])
    assert options.max_replicas > options.min_replicas
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [worker] = containers(group)
    assert options.num_gpus <= worker["resources"]["limits"]["nvidia.com/gpu"]
    assert options.num_cpus <= int(worker["resources"]["requests"]["cpu"])
    assert group["maxReplicas"] >= options.max_replicas
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > options.server.shutdown_timeout
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


def test_the_ray_version_is_one_that_the_extra_allows():
    project = tomllib.loads((ROOT / "packages/aios-serve/pyproject.toml").read_text(encoding="utf-8"))["project"]
    [requirement] = project["optional-dependencies"]["ray"]
    version = of_kind("RayService")["spec"]["rayClusterConfig"]["rayVersion"]
    assert requirement.startswith(f"ray[serve]>={version.removesuffix('.0')},")


def test_the_image_holds_every_package():
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    packages = set(re.findall(r"\./(packages/[\w-]+)", text))
    assert packages == {f"packages/{path.name}" for path in (ROOT / "packages").iterdir() if path.is_dir()}
