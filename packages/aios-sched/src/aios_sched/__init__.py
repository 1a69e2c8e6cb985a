"""Which tokens run next? Continuous batching: requests, the scheduler, the step, the engine loop.

In reading order:

    Request, RequestStatus          one request: its tokens, its two counters, its life
    WaitingQueue, FCFSQueue, ...    who is admitted next, and who gives way: the policies
    SchedulerConfig, Scheduler      which tokens run in the next step
    SchedulerOutput, ...            a step as plain data, and what came of it
    Executor, LocalExecutor         who runs a step
    OverlappedExecutor              the same where the device computes on its own
    PackedBatch, ModelRunner        how a step runs: the only part that imports torch
    Engine                          the loop around it all, in which a request fails alone
    EngineStats, StatsListener      what it cost
    Router, RoutingPolicy           which of several engines gets a request
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_sched.batch import PackedBatch, pack
    from aios_sched.config import SchedulerConfig
    from aios_sched.engine import Engine
    from aios_sched.errors import QueueFullError, SchedulingError, StepResultError
    from aios_sched.executor import Executor, LocalExecutor, StepHandle, StepRunner
    from aios_sched.model_runner import ModelRunner
    from aios_sched.output import ScheduledRequest, SchedulerOutput, StepResult, TokenOutput
    from aios_sched.overlapped_executor import LaunchingRunner, OverlappedExecutor
    from aios_sched.policy.base import WaitingQueue
    from aios_sched.policy.fair import FairQueue
    from aios_sched.policy.fcfs import FCFSQueue
    from aios_sched.policy.prefix import PrefixQueue
    from aios_sched.policy.priority import PriorityQueue
    from aios_sched.policy.registry import make_policy
    from aios_sched.request import FinishReason, Request, RequestStatus
    from aios_sched.routing.base import Choice, RoutedRequest, RoutingPolicy
    from aios_sched.routing.router import Router, Ticket
    from aios_sched.scheduler import Scheduler
    from aios_sched.stats import EngineStats, RequestTiming, StatsListener, StepStats

_MODULES = {
    "PackedBatch": "batch",
    "pack": "batch",
    "SchedulerConfig": "config",
    "Engine": "engine",
    "QueueFullError": "errors",
    "SchedulingError": "errors",
    "StepResultError": "errors",
    "Executor": "executor",
    "LocalExecutor": "executor",
    "StepHandle": "executor",
    "StepRunner": "executor",
    "ModelRunner": "model_runner",
    "ScheduledRequest": "output",
    "SchedulerOutput": "output",
    "StepResult": "output",
    "TokenOutput": "output",
    "LaunchingRunner": "overlapped_executor",
    "OverlappedExecutor": "overlapped_executor",
    "WaitingQueue": "policy.base",
    "FairQueue": "policy.fair",
    "FCFSQueue": "policy.fcfs",
    "PrefixQueue": "policy.prefix",
    "PriorityQueue": "policy.priority",
    "make_policy": "policy.registry",
    "FinishReason": "request",
    "Request": "request",
    "RequestStatus": "request",
    "Choice": "routing.base",
    "RoutedRequest": "routing.base",
    "RoutingPolicy": "routing.base",
    "Router": "routing.router",
    "Ticket": "routing.router",
    "Scheduler": "scheduler",
    "EngineStats": "stats",
    "RequestTiming": "stats",
    "StatsListener": "stats",
    "StepStats": "stats",
}

__all__ = [
    "Choice",
    "Engine",
    "EngineStats",
    "Executor",
    "FCFSQueue",
    "FairQueue",
    "FinishReason",
    "LaunchingRunner",
    "LocalExecutor",
    "ModelRunner",
    "OverlappedExecutor",
    "PackedBatch",
    "PrefixQueue",
    "PriorityQueue",
    "QueueFullError",
    "Request",
    "RequestStatus",
    "RequestTiming",
    "RoutedRequest",
    "Router",
    "RoutingPolicy",
    "ScheduledRequest",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerOutput",
    "SchedulingError",
    "StatsListener",
    "StepHandle",
    "StepResult",
    "StepResultError",
    "StepRunner",
    "StepStats",
    "Ticket",
    "TokenOutput",
    "WaitingQueue",
    "make_policy",
    "pack",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, when it is asked for (PEP 562): most of this package must not load torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
