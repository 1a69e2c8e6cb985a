"""What runs inside a peer's environment, with peers that are not there."""

import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from aios_serve.bench.runners import run_aios, run_llama_cpp, run_openvino
from aios_serve.bench.runners.timed_job import Timeline, _median_pass

JOB = {"model": "m", "threads": 1, "max_context": 8, "options": {}}


def timeline_of(*points):
    timeline = Timeline()
    timeline.start = 0.0
    timeline.points = [(seconds, list(counts)) for seconds, counts in points]
    return timeline


def test_decoding_counts_from_the_last_first_token_to_the_first_end():
    """Sequence 0 is a step ahead: the step that read the other prompt and the last one, alone, count for nothing."""
    timeline = timeline_of((1, [1, 0]), (3, [2, 1]), (4, [3, 2]), (5, [4, 3]), (5.5, [4, 4]))
    measured = timeline.measure(4)
    assert measured == {"prefill_seconds": 3, "decode_seconds": 2, "decode_tokens": 4, "total_seconds": 5.5}


def test_a_prefill_ends_with_its_first_token():
    assert timeline_of((2.5, [1])).measure(1) == {
        "prefill_seconds": 2.5,
        "decode_seconds": 0.0,
        "decode_tokens": 0,
        "total_seconds": 2.5,
    }


def test_a_batch_that_never_decodes_together_is_no_measurement():
    with pytest.raises(SystemExit, match="2 sequences"):
        timeline_of((1, [2, 0]), (2, [2, 1]), (3, [2, 2])).measure(2)


def test_the_median_pass_counts():
    passes = [{"decode_seconds": seconds, "decode_tokens": 10} for seconds in (3.0, 1.0, 2.0)]
    assert _median_pass(passes)["decode_seconds"] == 2.0
    assert _median_pass(passes[:2])["decode_seconds"] == 3.0
    assert _median_pass([{"decode_tokens": 0, "prefill_seconds": 7.0}])["prefill_seconds"] == 7.0


def test_a_job_prints_one_line_whatever_the_engine_prints():
    script = """
        import os
        from aios_serve.bench.runners.timed_job import serve

        class Chatty:
            version, facts = "1.2", {"a": 1}

            def generate(self, prompts, new_tokens, timeline):
                print("loading")
                os.system("echo from C")
                for count in range(1, new_tokens + 1):
                    timeline.record([count] * len(prompts))
                return [list(range(new_tokens))] * len(prompts)

        serve(lambda: lambda job: Chatty())
    """
    job = {"prompts": [[1], [2]], "warm_up": [[3], [4]], "new_tokens": 5, "seconds": 0}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=True,
    )
    [line] = done.stdout.splitlines()
    result = json.loads(line)
    assert (result["version"], result["facts"], result["produced"]) == ("1.2", {"a": 1}, [5, 5])
    assert result["decode_tokens"] == 8
    assert result["tokens"] == [0, 1, 2, 3, 4]
    assert result["peak_rss"] >= result["rss_after_imports"] > 1_000_000
    assert "from C" in done.stderr


class FakeLlama:
    """Answers the token after the newest one of each sequence; refuses what a real context would."""

    __version__ = "0"
    LLAMA_FLASH_ATTN_TYPE_ENABLED, LLAMA_FLASH_ATTN_TYPE_DISABLED = 1, 0

    def __init__(self):
        self.seen = {}
        self.calls = []
        self.logits = {}

    def __getattr__(self, name):
        return lambda *args: SimpleNamespace() if name.endswith("params") else b"x"

    def llama_vocab_n_tokens(self, _vocab):
        return 100

    def llama_memory_clear(self, _memory, _data):
        self.seen = {}

    def llama_batch_init(self, size, _embd, _sequences):
        return SimpleNamespace(
            token=[0] * size,
            pos=[0] * size,
            n_seq_id=[0] * size,
            seq_id=[[0] for _ in range(size)],
            logits=[False] * size,
            n_tokens=0,
        )

    def llama_decode(self, _context, batch):
        self.calls.append(batch.n_tokens)
        for row in range(batch.n_tokens):
            sequence = batch.seq_id[row][0]
            assert batch.pos[row] == self.seen.get(sequence, 0)
            self.seen[sequence] = batch.pos[row] + 1
            self.logits[row] = np.zeros(100, dtype=np.float32)
            self.logits[row][batch.token[row] + 1] = 1.0
        return 0

    def llama_get_logits_ith(self, _context, row):
        return self.logits[row].ctypes.data


def test_llama_cpp_reads_prompts_in_pieces_and_decodes_all_sequences_in_step(monkeypatch):
    monkeypatch.setattr(run_llama_cpp, "BATCH", 5)
    fake, timeline = FakeLlama(), Timeline()
    prompts = [[1, 2, 10], [3, 4, 20], [5, 6, 30]]
    engine = run_llama_cpp.LlamaCpp(fake, np, {**JOB, "prompts": prompts, "options": {"flash_attention": False}})
    for _ in range(2):
        assert engine.generate(prompts, 3, timeline) == [[11, 12, 13], [21, 22, 23], [31, 32, 33]]
    assert fake.calls == [5, 4, 3, 3] * 2
    assert [counts for _, counts in timeline.points] == [[1] * 3, [2] * 3, [3] * 3] * 2


class FakePipeline:
    """Continuous batching that admits one request per step."""

    def __init__(self, *_):
        self.waiting, self.running = [], []

    def add_request(self, _number, prompt, config):
        handle = SimpleNamespace(left=config["max_new_tokens"], queue=[], token=prompt[0][-1])
        handle.can_read = lambda: bool(handle.queue)
        handle.read = lambda: {0: SimpleNamespace(generated_ids=[handle.queue.pop(0)])}
        self.waiting.append(handle)
        return handle

    def has_non_finished_requests(self):
        return bool(self.waiting or self.running)

    def step(self):
        if self.waiting:
            self.running.append(self.waiting.pop(0))
        for handle in self.running:
            handle.token += 1
            handle.queue.append(handle.token)
            handle.left -= 1
        self.running = [handle for handle in self.running if handle.left]


def test_openvino_is_stepped_until_all_requests_have_their_tokens():
    genai = SimpleNamespace(
        get_version=lambda: "1",
        SchedulerConfig=SimpleNamespace,
        GenerationConfig=lambda **options: options,
        ContinuousBatchingPipeline=FakePipeline,
    )
    openvino = SimpleNamespace(Tensor=lambda array: array.tolist())
    job = {**JOB, "prompts": [[1], [2]], "options": {"pipeline": "continuous"}}
    engine, timeline = run_openvino.load(genai, openvino, np, job), Timeline()
    assert engine.generate([[10], [20]], 3, timeline) == [[11, 12, 13], [21, 22, 23]]
    assert [counts for _, counts in timeline.points] == [[1, 0], [2, 1], [3, 2], [3, 3]]


def test_openvino_s_stateful_pipeline_takes_one_sequence():
    job = {**JOB, "prompts": [[1], [2]], "options": {"pipeline": "stateful"}}
    with pytest.raises(SystemExit, match="one sequence"):
        run_openvino.load(SimpleNamespace(), SimpleNamespace(), np, job)


def test_steps_of_aios_are_stamped_with_what_each_request_has(monkeypatch):
    """The private names that the stamps hang on are those of the real InferenceEngine."""
    from aios_serve.engine import InferenceEngine

    engine = InferenceEngine.__new__(InferenceEngine)
    outputs = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[])]) for _ in range(2)]
    engine._sinks = {"0": outputs[0]}

    def step(self):
        for output in self._sinks.values():
            output.outputs[0].token_ids.append(1)
        self._sinks = {"1": outputs[1]}

    monkeypatch.setattr(InferenceEngine, "_step", step)
    timeline = Timeline()
    with run_aios.stamped_steps(engine, 2, timeline):
        for _ in range(3):
            engine._step()
    assert [counts for _, counts in timeline.points] == [[1, 0], [1, 1], [1, 2]]
    assert engine._step.__func__ is step
