"""An engine without a model, and without torch: the real scheduler and pages, and a runner that repeats the prompt.

Token k of an answer is token k of the prompt, over and over. Control characters in a prompt make the runner misbehave.
Run as a script it is the engine process of these tests.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from aios_kvcache.block_manager import BlockManager
from aios_model.generation_config import GenerationDefaults
from aios_model.sampling.rows import SampledToken, TokenLogprobs
from aios_model.tokenizer.parts import TokenizerParts
from aios_model.tokenizer.tokenizer import Tokenizer
from aios_model.weights.hub import ModelFiles
from aios_sched.config import SchedulerConfig
from aios_sched.engine import Engine
from aios_sched.executor import LocalExecutor
from aios_sched.output import StepResult
from aios_sched.policy.registry import make_policy
from aios_sched.scheduler import Scheduler
from aios_serve.engine_port import EnginePort, StepTokenCounter
from aios_serve.model_info import EngineInfo
from aios_serve.served_model import ServedModel

RAISE, SLEEP, SLOW = "\x01", "\x02", "\x03"
EOS = 256
VOCAB_SIZE = 257
NUM_BLOCKS = 64
BLOCK_SIZE = 4
MAX_MODEL_LEN = 128


class ScriptedRunner:
    vocab_size = VOCAB_SIZE

    def execute(self, output):
        sampled = {}
        for scheduled in output.requests:
            row = scheduled.sampling
            if row is None:
                continue
            prompt = row.prompt_token_ids
            self._misbehave(prompt)
            token_id = prompt[len(row.output_token_ids) % len(prompt)]
            logprobs = None
            if row.params.logprobs is not None:
                logprobs = TokenLogprobs(token_id=token_id, logprob=-0.5, rank=1, top=((token_id, -0.5),))
            sampled[scheduled.request_id] = SampledToken(token_id=token_id, logprobs=logprobs)
        return StepResult(sampled=sampled)

    def _misbehave(self, prompt):
        if ord(RAISE) in prompt:
            raise RuntimeError("scripted fault")
        if ord(SLEEP) in prompt:
            time.sleep(3)
        if ord(SLOW) in prompt:
            time.sleep(0.02)


def build_scripted(config, progress):
    progress("reading the script", 0.5)
    block_manager = BlockManager(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    limits = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or 64,
        max_model_len=MAX_MODEL_LEN,
        max_num_queued=config.max_num_queued_reqs,
    )
    step_tokens = StepTokenCounter()
    policy = make_policy(config.scheduling_policy, block_manager=block_manager, tenant_weights=config.tenant_weights)
    engine = Engine(Scheduler(limits, block_manager, policy), LocalExecutor(ScriptedRunner()), listeners=[step_tokens])
    port = EnginePort(
        engine,
        step_tokens=step_tokens,
        reset_prefix_cache=block_manager.reset_prefix_cache,
        request_timeout=config.request_timeout,
    )
    info = EngineInfo(
        model_name="scripted",
        architecture="llama",
        dtype="float32",
        quantization="none",
        kernels="torch computes plain weights, as the reference",
        kv_dtype="float32",
        device="cpu",
        vocab_size=VOCAB_SIZE,
        num_weight_bytes=0,
        kv_cache_policy="paged",
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_kv_bytes=0,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=64,
        enable_prefix_caching=True,
        threads=1,
        import_seconds=0.0,
        load_seconds=0.0,
    )
    return SimpleNamespace(port=port, info=info, files=find_scripted(config), close=lambda: None)


def find_scripted(config):
    return ModelFiles(name="scripted", root=Path(), format="config-only", weight_paths=())


def read_scripted(config, files):
    return ServedModel(
        names=config.served_model_name or (files.name,),
        files=files,
        config=SimpleNamespace(vocab_size=VOCAB_SIZE),
        tokenizer=byte_tokenizer(),
        generation_defaults=GenerationDefaults(temperature=0.0),
        eos_token_ids=(EOS,),
    )


def byte_tokenizer():
    """Ids 0..255 are the bytes of UTF-8, 256 is the special "<eos>"."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(BPE(vocab={symbols[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("<eos>", special=True)])
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return Tokenizer(TokenizerParts(backend=backend, eos_token_ids=(EOS,), chat_templates={"default": template}))


if __name__ == "__main__":
    from aios_serve import engine_process

    sys.exit(engine_process.main(build=build_scripted))
