"""What the executor of a rank group adds to a step: `python benchmarks/control_plane.py`.

Two ranks are real processes that compute nothing. A step of decodes is encoded, sent to both, decoded there, and its
tokens come back from one: the time from `submit` to `result` is what a group costs beside computing and exchanging.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from time import perf_counter

from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SamplingRow
from aios_parallel.control.driver import RankGroup
from aios_parallel.executor import GroupExecutor
from aios_parallel.launch.processes import RankProcesses
from aios_parallel.mesh import Mesh
from aios_sched.output import ScheduledRequest, SchedulerOutput

RANK = """
import argparse, socket
from aios_model.sampling.rows import SampledToken
from aios_parallel.control.connection import Connection
from aios_parallel.control.messages import command_reader
from aios_parallel.control.rank_loop import serve_rank
from aios_parallel.tracing.rank_tracer import RankTracer
from aios_sched.output import StepResult

parser = argparse.ArgumentParser()
parser.add_argument("--fd", type=int)
parser.add_argument("--rank", type=int)
given = parser.parse_args()

class Rank:
    progress = num_exchanges = 0
    tracer = RankTracer()
    def call(self, name, arguments, report):
        return None
    def execute(self, output):
        if given.rank == 0:
            return StepResult(sampled={row.request_id: SampledToken(token_id=7) for row in output.requests})

raise SystemExit(serve_rank(Connection(socket.socket(fileno=given.fd), command_reader()), Rank()))
"""


def main() -> None:
    """Prints a line per number of sequences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--context", type=int, default=2048, help="tokens of each sequence")
    given = parser.parse_args()
    processes = RankProcesses([sys.executable, "-c", RANK])
    group = RankGroup([processes.start(rank) for rank in range(given.ranks)], end_processes=processes.end)
    group.call("ready", [{}] * given.ranks, lambda *_: None)
    group.start_steps()
    executor = GroupExecutor(group, mesh=Mesh(tensor=given.ranks), vocab_size=1000)
    for num_sequences in (1, 8, 32, 64):
        micros = sorted(measure(executor, num_sequences, given.steps, given.context))
        median, late = statistics.median(micros), micros[len(micros) * 99 // 100]
        print(f"{num_sequences:3} sequences: median {median:5.0f} µs a step, 99th percentile {late:5.0f}")
    executor.shutdown()


def measure(executor: GroupExecutor, num_sequences: int, num_steps: int, context: int) -> list[float]:
    """Microseconds of each step, once the ranks know the sequences."""
    params = SamplingParams()
    outputs = [[0] for _ in range(num_sequences)]
    tables = [list(range(context // 16)) for _ in range(num_sequences)]
    prompt = [0] * context
    micros = []
    for step in range(num_steps + 10):
        rows = tuple(
            ScheduledRequest(
                request_id=f"{num_sequences}-{index}",
                token_ids=[7],
                start=context + step,
                block_table=tables[index].copy(),
                sampling=SamplingRow(
                    request_id=f"{num_sequences}-{index}",
                    params=params,
                    seed=index,
                    position=context + step + 1,
                    prompt_token_ids=prompt,
                    output_token_ids=outputs[index],
                ),
            )
            for index in range(num_sequences)
        )
        output = SchedulerOutput(
            step_id=step, requests=rows, block_copies=(), num_scheduled_tokens=num_sequences, finished_request_ids=()
        )
        started = perf_counter()
        executor.submit(output).result()
        micros.append((perf_counter() - started) * 1e6)
        for tokens in outputs:
            tokens.append(7)
    return micros[10:]


if __name__ == "__main__":
    main()
