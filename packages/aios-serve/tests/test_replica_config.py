"""How the machine is shared among replicas."""

from __future__ import annotations

import pytest

from aios_model.errors import ConfigError
from aios_model.native.cores import usable_cpus
from aios_serve.config import EngineConfig
from aios_serve.replica_config import replica_config, replica_environment, visible_gpus


def shares(count, *, num_cores=8, **options):
    config = EngineConfig(data_parallel=count, **options)
    return [replica_config(config, replica, num_cores=num_cores) for replica in range(count)]


def test_one_engine_keeps_what_it_has():
    config = EngineConfig(cpu_bind="auto")
    assert replica_config(config, 0) is config
    assert replica_environment(config, 0, gpus=["0", "1"]) == {}


@pytest.mark.parametrize(("count", "threads"), [(2, 4), (3, 2), (8, 1), (20, 1)])
def test_cores_are_divided(count, threads):
    assert {each.threads for each in shares(count)} == {threads}


@pytest.mark.parametrize(("ranks", "threads"), [({"tensor_parallel": 2}, 2), ({"pipeline_parallel": 4}, 1)])
def test_cores_are_divided_among_the_ranks_of_all_replicas(ranks, threads):
    assert {each.threads for each in shares(2, **ranks)} == {threads}


def test_threads_that_are_given_are_those_of_each():
    assert {each.threads for each in shares(2, threads=3)} == {3}


def test_cores_to_bind_to_are_divided_too():
    cpus = [*usable_cpus()][:2]
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    listed = ",".join(map(str, cpus))
    assert [(each.threads, each.cpu_bind) for each in shares(2, cpu_bind=listed)] == [(1, str(cpu)) for cpu in cpus]
    with pytest.raises(ConfigError, match="2 CPUs for 4 threads"):
        shares(2, cpu_bind=listed, threads=2)


def test_each_replica_sees_gpus_of_its_own():
    config = EngineConfig(data_parallel=2)
    assert [replica_environment(config, replica, gpus=["4", "5", "6"]) for replica in range(2)] == [
        {"CUDA_VISIBLE_DEVICES": "4"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]
    assert replica_environment(config, 0, gpus=[]) == {}
    assert replica_environment(EngineConfig(data_parallel=2, device="cpu"), 0, gpus=["4"]) == {}
    with pytest.raises(ConfigError, match=r"data_parallel=2.*need 2 GPUs and 1 can be seen"):
        replica_environment(config, 0, gpus=["4"])


def test_ranks_of_a_replica_see_a_gpu_each_unless_ray_deals_them_out():
    config = EngineConfig(data_parallel=2, tensor_parallel=2)
    assert replica_environment(config, 1, gpus="abcd") == {"CUDA_VISIBLE_DEVICES": "c,d"}
    with pytest.raises(ConfigError, match="need 4 GPUs and 3 can be seen"):
        replica_environment(config, 0, gpus="abc")
    config = EngineConfig(data_parallel=2, tensor_parallel=2, distributed_executor="ray")
    assert replica_environment(config, 0, gpus="a") == {}


def test_replicas_of_groups_that_torchrun_starts_are_refused(monkeypatch):
    place = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"data_parallel=2.*torchrun.*server per replica"):
        replica_environment(EngineConfig(data_parallel=2, tensor_parallel=2), 0, gpus=[])
    config = EngineConfig(data_parallel=2, tensor_parallel=2, distributed_executor="mp")
    assert replica_environment(config, 0, gpus=[]) == {}


def test_gpus_are_counted_without_a_driver(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus(environment={}, devices=tmp_path) == ["0", "1"]
    assert visible_gpus(environment={"CUDA_VISIBLE_DEVICES": "3, GPU-ab"}, devices=tmp_path) == ["3", "GPU-ab"]
    for hidden in ("", "-1"):
        assert visible_gpus(environment={"CUDA_VISIBLE_DEVICES": hidden}, devices=tmp_path) == []
