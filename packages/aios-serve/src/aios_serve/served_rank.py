"""One rank of a group, as the driver addresses it: meets the others, loads its part of the model, runs its steps."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from aios_kvcache.sizing import PoolPlan
from aios_kvcache.tier_sizing import TierPlan
from aios_model.decoder import DecoderLayer, DecoderModel
from aios_model.host_memory import return_freed_memory
from aios_model.native.cores import resolve_cpu_bind, usable_cores
from aios_parallel.expert_load import ExpertCounter
from aios_parallel.mesh import Mesh, Place
from aios_parallel.pipeline import split_stages
from aios_parallel.rank_groups import GroupStore, RankGroups, Rendezvous, needs_store, open_groups, open_store
from aios_parallel.stage_plan import plan_stages
from aios_parallel.stage_runner import StageRunner
from aios_parallel.tensor_parallel import shard_model
from aios_parallel.tracing.rank_tracer import TRACE_CALLS, RankTracer
from aios_quant.native.decoder import NativeDecoder
from aios_quant.native.reduction import PythonReduction, StepReduction
from aios_serve.assembly import scheduler_config
from aios_serve.build import describe
from aios_serve.config import EngineConfig
from aios_serve.model_part import ModelPart, Progress, default_threads
from aios_serve.served_model import find_model, served_vocabulary
from aios_serve.structured.processor import GrammarProcessor
from aios_serve.structured.store import GrammarStore

if TYPE_CHECKING:
    from aios_model.model import ModelTransform
    from aios_sched.output import SchedulerOutput, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class _Membership:
    """What a rank knows of itself and the others, once it has met them.

    Attributes:
        config: The options, with its share of the host's cores.
        place: Where it stands.
        rendezvous: Where the others are.
        device: Where it computes.
        num_neighbours: Ranks on its host, itself included.
    """

    config: EngineConfig
    place: Place
    rendezvous: Rendezvous
    device: torch.device
    num_neighbours: int


class ServedRank:
    """See `aios_parallel.control.rank_loop.Rank`.

    Args:
        import_seconds: Time that importing torch took, for the record.
    """

    def __init__(self, *, import_seconds: float = 0.0) -> None:
        self._import_seconds = import_seconds
        self._started = time.perf_counter()
        self._member: _Membership | None = None
        self._store: GroupStore | None = None
        self._groups: RankGroups | None = None
        self._part: ModelPart | None = None
        self._runner: StageRunner | None = None
        self._expert_counter: ExpertCounter | None = None
        self._native: NativeDecoder | None = None
        self._num_layers_done = 0  # by modules
        self.tracer = RankTracer()

    def call(self, name: str, arguments: dict[str, Any], report: Progress) -> Any:
        """See Rank: `meet`, `load` and `allocate`, in this order; then `expert_load` and those of the tracer."""
        match name:
            case "meet":
                return self._meet(**arguments)
            case "load":
                return self._load(report, **arguments)
            case "allocate":
                return self._allocate(**arguments)
            case "expert_load":
                assert self._expert_counter is not None, "experts come with the weights"
                return list(self._expert_counter.load().tokens.items())
            case _ if name in TRACE_CALLS:
                return self.tracer.answer(name, arguments)
            case _:
                raise ValueError(f"a rank has no function {name!r}")

    def execute(self, output: SchedulerOutput) -> StepResult | None:
        """See Rank."""
        assert self._runner is not None, "steps come after `allocate`"
        return self._runner.execute(output)

    @property
    def progress(self) -> int:
        """See Rank: layers, and exchanges with others."""
        layers = self._num_layers_done if self._native is None else self._native.num_layers_done
        return layers + self.num_exchanges

    @property
    def num_exchanges(self) -> int:
        """See Rank."""
        return 0 if self._groups is None else self._groups.num_exchanges

    def _meet(
        self,
        *,
        config: dict[str, Any],
        rank: int,
        run_id: str,
        hosts: list[str],
        addresses: list[str],
    ) -> int | None:
        """Learns who the others are; the first rank opens a store if they need one, and tells its port."""
        own = _own_config(msgspec.convert(config, EngineConfig), rank=rank, hosts=hosts)
        mesh = Mesh(tensor=own.tensor_parallel, pipeline=own.pipeline_parallel)
        device = _own_device(own, hosts[:rank].count(hosts[rank]))
        self._member = _Membership(
            config=own,
            place=mesh.place(rank),
            rendezvous=Rendezvous(run_id=run_id, mesh=mesh, hosts=tuple(hosts), addresses=tuple(addresses)),
            device=device,
            num_neighbours=hosts.count(hosts[rank]),
        )
        if rank == 0 and needs_store(mesh, tuple(hosts), on_gpu=device.type == "cuda"):
            self._store = open_store(addresses[0] or "127.0.0.1")
            return self._store.port
        return None

    def _load(self, report: Progress, *, store: tuple[str, int] | None) -> dict[str, Any]:
        """Joins the groups, reads the rank's part of the weights; returns what it looks like."""
        member = self._member
        assert member is not None, "ranks meet before they load"
        report("meeting the other ranks", None)
        rendezvous = replace(member.rendezvous, store=store and tuple(store))
        self._groups = groups = open_groups(member.place, rendezvous, device=member.device, store=self._store)
        self.tracer.watch(tensor=groups.tensor, pipeline=groups.pipeline)
        files = find_model(member.config)
        self._part = part = ModelPart.load(
            member.config,
            files,
            transforms=_transforms(member, groups),
            num_neighbours=member.num_neighbours,
            progress=report,
        )
        self._expert_counter = ExpertCounter(part.decoder)
        plan = part.plan()
        limits = scheduler_config(member.config, plan, on_cpu=member.device.type == "cpu")
        seconds = time.perf_counter() - self._started
        info = describe(
            member.config, files, part, plan, limits, import_seconds=self._import_seconds, load_seconds=seconds
        )
        return {"info": asdict(info), "plan": asdict(plan)}

    def _allocate(self, *, plan: dict[str, Any], tiers: dict[str, Any] | None = None) -> dict[str, float] | None:
        """Reserves as many pages as every rank has, and builds what runs steps; tells what moving a page takes."""
        assert self._member is not None, "ranks have met by now"
        assert self._groups is not None, "groups are open by now"
        assert self._part is not None, "pages come after weights"
        tensor, decoder = self._groups.tensor, self._part.decoder
        reduce: StepReduction | None = None
        if tensor.size > 1:
            reduce = tensor.native_reduce or PythonReduction(tensor.all_reduce)
        config, files = self._member.config, self._part.files
        grammars = GrammarStore(lambda: served_vocabulary(config, files))
        width = decoder.config.vocab_size
        processor = GrammarProcessor(grammars, vocab_size=width)
        model, pages, sampler = self._part.build(PoolPlan(**plan), reduce, logits_processors=[processor])
        if isinstance(model, NativeDecoder):
            self._native = model
        for layer in decoder.layers:
            if isinstance(layer, DecoderLayer):
                layer.register_forward_hook(self._count_layer)
        mover = None if tiers is None else self._part.open_tiers(pages, TierPlan(**tiers))
        self._runner = StageRunner(
            model,
            pages,
            sampler,
            place=self._member.place,
            tensor_group=tensor,
            pipeline_group=self._groups.pipeline,
            hidden_size=decoder.config.hidden_size,
            dtype=decoder.dtype,
            mover=mover,
        )
        return_freed_memory()
        return None if mover is None else asdict(mover.measure())

    def _count_layer(self, *_: object) -> None:
        self._num_layers_done += 1


def _transforms(member: _Membership, groups: RankGroups) -> list[ModelTransform]:
    """What leaves of a decoder the rank's part."""

    def split(decoder: DecoderModel) -> None:
        split_stages(member.place, plan_stages(decoder.config, member.place.mesh.pipeline))(decoder)

    shard = shard_model(
        groups.tensor,
        expert_parallel=member.config.expert_parallel,
        shard_embedding=member.device.type != "cpu",
    )
    return [split, shard]


def _own_config(config: EngineConfig, *, rank: int, hosts: list[str]) -> EngineConfig:
    """The options with the rank's share of its host's cores."""
    neighbours, index = hosts.count(hosts[rank]), hosts[:rank].count(hosts[rank])
    threads = config.threads or max(1, min(default_threads(), usable_cores() // neighbours))
    cores = resolve_cpu_bind(config.cpu_bind, num_threads=threads * neighbours)
    if cores is None:
        return replace(config, threads=threads)
    own = cores[index * threads : (index + 1) * threads]
    return replace(config, threads=threads, cpu_bind=",".join(map(str, own)))


def _own_device(config: EngineConfig, local_rank: int) -> torch.device:
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = local_rank % torch.cuda.device_count()  # Ray shows each rank its own GPU only
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
