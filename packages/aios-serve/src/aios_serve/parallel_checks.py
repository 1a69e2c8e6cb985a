"""Whether a model can be spread over a group of ranks as asked: known before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_model.errors import ConfigError
from aios_parallel.shares import share_experts, share_features, share_heads
from aios_parallel.stage_plan import plan_stages

if TYPE_CHECKING:
    from aios_model.config import ModelConfig
    from aios_parallel.mesh import Mesh
    from aios_serve.config import EngineConfig


def check_mesh(config: EngineConfig, model: ModelConfig, mesh: Mesh) -> None:
    """Raises ConfigError, saying what would do, if `model` cannot be cut into as many parts."""
    share_heads(model.num_attention_heads, model.num_key_value_heads, mesh.tensor)
    share_features(model.intermediate_size, mesh.tensor)
    plan_stages(model, mesh.pipeline)
    if not config.expert_parallel:
        return
    if not model.num_experts:
        raise ConfigError(f"expert_parallel=True cannot be used: {model.architecture} has no experts; leave it out")
    share_experts(model.num_experts, mesh.tensor)
