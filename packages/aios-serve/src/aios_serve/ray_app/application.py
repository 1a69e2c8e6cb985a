"""From options to a Ray Serve application: the one place that knows Ray's words for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aios_model.errors import ConfigError
from aios_serve.ray_app.engine_replica import ENGINE_DEPLOYMENT, INGRESS_DEPLOYMENT, EngineReplica
from aios_serve.ray_app.ingress import Ingress
from aios_serve.ray_app.options import RayServeConfig

if TYPE_CHECKING:
    from ray.serve import Application  # pyright: ignore[reportMissingImports]

API_KEY_VARIABLE = "AIOS_API_KEY"

_INGRESS_ROOM = 10_000
"""Requests in one ingress process at once: a bound that is never met, since `max_num_queued_reqs` holds before it."""

_HEALTH_PERIOD = 5.0
_START_ATTEMPTS = 3


def build_app(args: Mapping[str, Any]) -> Application:
    """The application, from the arguments of `serve run aios_serve.ray_app:build_app NAME=VALUE …` or of a YAML file.

    Args:
        args: Options, see `RayServeConfig.from_args`. Without `api_key`, keys are taken from the variable AIOS_API_KEY
            (several with blanks between), as `aios-serve` does: so they stay out of command lines and files.

    Raises:
        ConfigError: an unknown option, a value that cannot be honoured, or no Ray.
    """
    keys = os.environ.get(API_KEY_VARIABLE, "").split()
    return create_application(RayServeConfig.from_args({"api_key": keys, **args}))


def create_application(config: RayServeConfig) -> Application:
    """The application, from Python: `serve.run(create_application(config))`.

    Raises:
        ConfigError: Ray is not installed.
    """
    serve = _import_serve()
    engine = serve.deployment(
        EngineReplica,
        name=ENGINE_DEPLOYMENT,
        autoscaling_config=_autoscaling(config),
        # What runs is in the replica, what waits is with the ingress: a replica that comes up takes its share at once.
        max_ongoing_requests=config.engine.max_num_seqs,
        max_queued_requests=_max_queued(config),
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        graceful_shutdown_timeout_s=config.server.shutdown_timeout,
        health_check_period_s=_HEALTH_PERIOD,
        max_constructor_retry_count=_START_ATTEMPTS,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS_DEPLOYMENT,
        num_replicas=config.num_ingress_replicas,
        max_ongoing_requests=_INGRESS_ROOM,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.server.shutdown_timeout,
    )
    behind = replace(config.server, api_keys=(), allowed_origins=())  # the ingress asks for keys
    return ingress.bind(engine.bind(config.engine, behind), config)


def _autoscaling(config: RayServeConfig) -> dict[str, Any]:
    """The load is averaged over as long as it must last, so that the delays are what they say."""
    window = min(30.0, max(1.0, config.upscale_delay))
    return {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": config.target_ongoing_requests,
        "upscale_delay_s": config.upscale_delay,
        "downscale_delay_s": config.downscale_delay,
        "look_back_period_s": window,
        "metrics_interval_s": window / 3,
    }


def _max_queued(config: RayServeConfig) -> int:
    """Ray's -1 is any number, and its least is 1: the request that is just being handed over counts as waiting."""
    limit = config.engine.max_num_queued_reqs
    return -1 if limit is None else max(1, limit)


def _import_serve() -> Any:
    try:
        from ray import serve  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("the Ray Serve application needs Ray: pip install 'aios-serve[ray]'") from None
    return serve
