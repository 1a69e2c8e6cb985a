"""Where a rank stands: ranks are numbered so that those of one tensor-parallel group are neighbours.

    rank = stage * tensor_size + tensor_rank

A layer's partial sums are exchanged sixty times a token, hidden states once per stage: neighbours share a host, and a
pipeline's borders are what may lie between hosts.
"""

from __future__ import annotations

from dataclasses import dataclass

from aios_model.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The shape of a group: every stage of the pipeline is a tensor-parallel group.

    Attributes:
        tensor: Ranks that share each layer.
        pipeline: Stages.
    """

    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        if self.tensor < 1 or self.pipeline < 1:
            raise ConfigError(f"a group needs one rank at least, got {self.tensor} x {self.pipeline}")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline

    @property
    def sampling_rank(self) -> int:
        """The rank that draws the tokens: the first of the last stage."""
        return (self.pipeline - 1) * self.tensor

    def place(self, rank: int) -> Place:
        """Where `rank` stands."""
        if not 0 <= rank < self.size:
            raise ConfigError(f"rank {rank} is not one of the {self.size} of a {self.tensor} x {self.pipeline} group")
        return Place(mesh=self, rank=rank, stage=rank // self.tensor, tensor_rank=rank % self.tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One rank's place.

    Attributes:
        mesh: The whole.
        rank: Its number.
        stage: Its stage of the pipeline.
        tensor_rank: Its number among those that share its layers.
    """

    mesh: Mesh
    rank: int
    stage: int
    tensor_rank: int

    @property
    def is_first_stage(self) -> bool:
        """Whether tokens enter here."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether logits leave here."""
        return self.stage == self.mesh.pipeline - 1

    @property
    def samples(self) -> bool:
        """Whether it draws the tokens."""
        return self.rank == self.mesh.sampling_rank

    @property
    def tensor_ranks(self) -> list[int]:
        """All that share its layers, itself included, in order."""
        first = self.stage * self.mesh.tensor
        return list(range(first, first + self.mesh.tensor))

    @property
    def pipeline_ranks(self) -> list[int]:
        """Those of the same tensor rank in every stage, in order."""
        return list(range(self.tensor_rank, self.mesh.size, self.mesh.tensor))
