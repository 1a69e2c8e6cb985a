from __future__ import annotations

import subprocess
import sys

import pytest

import aios_sched

TORCH_FREE = [
    "aios_sched",
    "aios_sched.admission",
    "aios_sched.ahead",
    "aios_sched.config",
    "aios_sched.deadlines",
    "aios_sched.engine",
    "aios_sched.errors",
    "aios_sched.executor",
    "aios_sched.output",
    "aios_sched.output_estimate",
    "aios_sched.overlapped_executor",
    "aios_sched.planner",
    "aios_sched.policy.base",
    "aios_sched.policy.fcfs",
    "aios_sched.policy.registry",
    "aios_sched.request",
    "aios_sched.routing.base",
    "aios_sched.routing.router",
    "aios_sched.scheduler",
    "aios_sched.stats",
    "aios_sched.stop",
    "aios_sched.validation",
]


def test_everything_but_batch_and_model_runner_leaves_torch_out():
    names = "Scheduler, Request, Engine, Executor, LocalExecutor, StepHandle, FCFSQueue, SchedulerConfig, EngineStats"
    code = f"import sys, {', '.join(TORCH_FREE)}\nfrom aios_sched import {names}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_exported_name_exists():
    assert sorted(aios_sched.__all__) == sorted(aios_sched._MODULES)
    for name in aios_sched.__all__:
        assert getattr(aios_sched, name).__name__ == name or name == "FinishReason"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Schedular"):
        _ = aios_sched.Schedular
