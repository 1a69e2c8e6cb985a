"""Tiny models with random weights, and engines over them: on one device, and on a group of threads."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.page_mover import PageMover
from aios_kvcache.paged_cache import PagedKVCache
from aios_kvcache.swap import reads_disk
from aios_kvcache.tier_sizing import TierPlan
from aios_kvcache.tiers import PageTiers
from aios_model.config import ModelConfig
from aios_model.decoder import DecoderModel
from aios_model.families import find_hf_family
from aios_model.loader import load_weights, parameter_shapes, parameter_slots
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.sampler import Sampler
from aios_model.weights.dummy import DummyEntry
from aios_parallel.mesh import Mesh
from aios_parallel.pipeline import split_stages
from aios_parallel.stage_plan import plan_stages
from aios_parallel.stage_runner import StageRunner
from aios_parallel.tensor_parallel import shard_model
from aios_parallel.thread_group import ThreadGroup, run_threads
from aios_sched.config import SchedulerConfig
from aios_sched.drafting import Drafting
from aios_sched.engine import Engine
from aios_sched.executor import LocalExecutor
from aios_sched.model_runner import ModelRunner
from aios_sched.output import StepResult
from aios_sched.policy.fcfs import FCFSQueue
from aios_sched.request import Request
from aios_sched.scheduler import Scheduler

VOCAB_SIZE, MAX_MODEL_LEN, EOS, NUM_BLOCKS = 300, 64, 0, 24
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama-biases": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
    },
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 6},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 1},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
}


@dataclass
class RandomSource:
    """Weights large enough for a model of random numbers to look at its context."""

    shapes: dict[str, tuple[int, ...]]

    def entries(self):
        return {name: _Entry(name, shape, ones=name.endswith("norm.weight")) for name, shape in self.shapes.items()}

    def close(self) -> None:
        pass


class _Entry(DummyEntry):
    def __init__(self, name, shape, *, ones):
        super().__init__(name, tuple(shape), key=hash_of(name), ones=ones)

    def _fill(self, lines_L, columns, out_LC):
        super()._fill(lines_L, columns, out_LC)
        if not self._ones:
            out_LC.mul_(12)


def hash_of(name: str) -> int:
    return random.Random(name).getrandbits(31)


def config_of(family: str, **fields) -> ModelConfig:
    raw = {**SHAPE, **FAMILIES[family], **fields}
    return find_hf_family(raw).read_hf(raw)


def build_decoder(config: ModelConfig, *transforms, dtype=torch.float64, on_loaded=None) -> DecoderModel:
    decoder = DecoderModel(config).eval()
    source, parameters = RandomSource(parameter_shapes(decoder)), parameter_slots(decoder)
    for transform in transforms:
        transform(decoder)
    options = {"file_format": "safetensors", "dtype": dtype, "device": torch.device("cpu")}
    load_weights(decoder, source, parameters=parameters, on_loaded=on_loaded, **options)
    return decoder


def tier_plan(directory, *, host=3, disk=60) -> TierPlan:
    return TierPlan(num_host_pages=host, num_disk_pages=disk, directory=str(directory), page_bytes=1)


def build_cache(decoder: DecoderModel, num_blocks=NUM_BLOCKS) -> PagedKVCache:
    options = {"num_blocks": num_blocks, "block_size": 4, "dtype": decoder.dtype, "device": "cpu"}
    return PagedKVCache(decoder.local_config, **options)


class ThreadedRunner:
    """A StepRunner whose ranks are threads."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        expert_parallel=False,
        shard_embedding=False,
        num_blocks=NUM_BLOCKS,
        tiers: TierPlan | None = None,
    ) -> None:
        self.vocab_size = config.vocab_size
        tensor = [ThreadGroup(mesh.tensor, timeout=20).communicators() for _ in range(mesh.pipeline)]
        pipeline = [ThreadGroup(mesh.pipeline, timeout=20).communicators() for _ in range(mesh.tensor)]
        stages = plan_stages(config, mesh.pipeline)
        self.runners: list[StageRunner] = []
        self.decoders: list[DecoderModel] = []
        self.groups = []
        self.movers: list[PageMover] = []
        for rank in range(mesh.size):
            place = mesh.place(rank)
            group = tensor[place.stage][place.tensor_rank]
            transforms = [shard_model(group, expert_parallel=expert_parallel, shard_embedding=shard_embedding)]
            decoder = build_decoder(config, split_stages(place, stages), *transforms)
            cache = build_cache(decoder, num_blocks)
            mover = tiers and PageMover(cache.page_tensors, tiers)
            self.movers += [mover] if mover else []
            runner = StageRunner(
                decoder,
                cache,
                Sampler(vocab_size=config.vocab_size, device="cpu"),
                place=place,
                tensor_group=group,
                pipeline_group=pipeline[place.tensor_rank][place.stage],
                hidden_size=config.hidden_size,
                dtype=decoder.dtype,
                mover=mover,
            )
            self.runners.append(runner)
            self.decoders.append(decoder)
            self.groups.append(group)

    def execute(self, output):
        results = run_threads([lambda runner=runner: runner.execute(output) for runner in self.runners])
        parts = [result for result in results if result is not None]
        lost_swaps = tuple(sorted({number for part in parts for number in part.lost_swaps}))
        assert len(parts) == (len(self.runners) if reads_disk(output.swaps) else 1)
        sampled = {request_id: token for part in parts for request_id, token in part.sampled.items()}
        further = {request_id: tokens for part in parts for request_id, tokens in part.further.items()}
        return StepResult(sampled=sampled, further=further, lost_swaps=lost_swaps)

    def close(self):
        for mover in self.movers:
            mover.close()


def build_engine(
    runner, *, num_blocks=NUM_BLOCKS, budget=16, tiers: TierPlan | None = None, drafting: Drafting | None = None
) -> Engine:
    config = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=budget, max_model_len=MAX_MODEL_LEN, expected_output="none"
    )
    books = tiers and PageTiers(num_host_pages=tiers.num_host_pages, num_disk_pages=tiers.num_disk_pages)
    pages = BlockManager(num_blocks=num_blocks, block_size=4, tiers=books)
    return Engine(Scheduler(config, pages, FCFSQueue()), LocalExecutor(runner), drafting=drafting)


def single_runner(config: ModelConfig, num_blocks=NUM_BLOCKS) -> ModelRunner:
    decoder = build_decoder(config)
    sampler = Sampler(vocab_size=config.vocab_size, device="cpu")
    return ModelRunner(decoder, build_cache(decoder, num_blocks), sampler)


def requests(vocab_size: int = VOCAB_SIZE) -> list[Request]:
    """Greedy and sampled ones; some share a prefix, and together they need more pages than there are."""
    rng = random.Random(11)
    shared = [rng.randrange(1, vocab_size) for _ in range(13)]
    params = [
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=16, logprobs=2, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, seed=8, max_tokens=16, repetition_penalty=1.2, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=16, frequency_penalty=0.4, ignore_eos=True),
    ]
    return [
        Request(
            request_id=str(index),
            prompt_token_ids=shared[: 13 - index] + [rng.randrange(1, vocab_size) for _ in range(1 + 5 * index)],
            params=each,
            seed=each.seed or 0,
            eos_token_ids=(EOS,),
        )
        for index, each in enumerate(params)
    ]


def tokens_of(engine: Engine, pending: list[Request]) -> dict[str, list[int]]:
    """Runs all requests; the last one starts once another is done, and finds what that left in the prefix cache."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in pending}
    late, *first = pending[::-1]
    for request in first:
        engine.add(request)
    while engine.has_unfinished or late is not None:
        for output in engine.step():
            assert output.error is None, output.error
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None and late is not None:
                engine.add(late)
                late = None
    return tokens


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Callable[..., object]:
    """The functions above, by name: test modules are imported one by one and cannot import this one."""
    return lambda name: globals()[name]
