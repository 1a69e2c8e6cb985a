"""A model made of nothing but memory, and a driver that does everything to a scheduler that can be done to it.

`PageStoreRunner` keeps one token per slot of the pool. The next token of a sequence is a hash of the tokens that it
reads back *through the block table it is given*: one stale page, one slot off at a chunk's border, one page with two
owners, and the output differs from that of the request generated alone.
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections import deque
from types import SimpleNamespace

import pytest

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.tier_costs import PREEMPTION_MODES, TierCosts, TransferSeconds
from aios_kvcache.tiers import PageTiers
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SampledToken
from aios_sched.config import SchedulerConfig
from aios_sched.drafting import Drafting
from aios_sched.output import PENDING_TOKEN
from aios_sched.planner import StepPlanner
from aios_sched.policy.registry import make_policy
from aios_sched.request import Request, RequestStatus
from aios_sched.scheduler import Scheduler
from aios_sched.speculative.fixed import FixedController
from aios_sched.verification import accept

VOCAB_SIZE = 50
EOS = 0
DEADLINES = 1e12  # the far future: the driver says when it has come


def next_token(token_ids, seed):
    return zlib.crc32(array("q", token_ids).tobytes(), seed & 0xFFFFFFFF) % VOCAB_SIZE


def generate_alone(request, *, max_model_len):
    """The reference: (output tokens, finish reason, stop reason) of a request that has the world to itself."""
    params, tokens, output = request.params, list(request.prompt_token_ids), []
    max_tokens = max_model_len if params.max_tokens is None else params.max_tokens
    while True:
        token = next_token(tokens, request.seed)
        tokens.append(token)
        output.append(token)
        if len(output) > params.min_tokens:
            if token == EOS and not params.ignore_eos:
                return output, "stop", None
            if token in params.stop_token_ids:
                return output, "stop", token
        if len(output) == max_tokens or len(tokens) == max_model_len:
            return output, "length", None


class PageStoreRunner:
    """Runs steps on a pool that stores tokens."""

    vocab_size = VOCAB_SIZE

    def __init__(self, block_size, *, losses=None, share=0.5):
        self.block_size = block_size
        self.slots = {}
        self.host, self.disk, self.lost = {}, {}, set()
        self.losses, self.share = losses, share  # a random generator, if the disk loses pages
        self.num_moved = 0
        self.num_executed = 0
        self.forgotten = []
        self.newest = {}  # the token that each request's newest row sampled, for rows that were planned ahead

    def execute(self, output):
        self.num_executed += 1
        self.forgotten += output.finished_request_ids
        for request_id in output.finished_request_ids:
            self.newest.pop(request_id, None)
        self.move(output)
        self.copy_blocks(output.block_copies)
        self.write(output)
        result = accept(output, [token for row in output.requests if row.sampling for token in self.sample(row)])
        self.newest |= {request_id: token.token_id for request_id, token in result.sampled.items()}
        numbers = range(output.first_swap, output.first_swap + len(output.swaps))
        result.lost_swaps = tuple(number for number in numbers if number in self.lost)
        return result

    def move(self, output, *, stop=None):
        assert output.first_swap <= self.num_moved, "a step came before the one in front of it"
        for number, swap in list(enumerate(output.swaps, start=output.first_swap))[:stop]:
            if number < self.num_moved:
                continue
            self.num_moved = number + 1
            if swap.kind == "out":
                self.host[swap.target] = self.page(swap.source)
            elif swap.kind == "in":
                self.fill(swap.target, self.host[swap.source])
            elif swap.kind == "demote":
                self.disk[swap.target] = self.host[swap.source]
            elif self.losses is not None and self.losses.random() < self.share:
                self.lost.add(number)
                self.fill(swap.target, [-1] * self.block_size)
            else:
                self.fill(swap.target, self.disk[swap.source])

    def page(self, block_id):
        return [self.slots.get(block_id * self.block_size + offset) for offset in range(self.block_size)]

    def fill(self, block_id, tokens):
        for offset, token in enumerate(tokens):
            self.slots[block_id * self.block_size + offset] = token

    def copy_blocks(self, copies):
        size = self.block_size
        for copy in copies:
            for offset in range(size):
                self.slots[copy.destination * size + offset] = self.slots.get(copy.source * size + offset)

    def write(self, output):
        written = set()
        for row in output.requests:
            for position, token_id in enumerate(row.token_ids, start=row.start):
                slot = self.slot(row, position)
                assert slot not in written, f"slot {slot} is written twice in one step"
                written.add(slot)
                self.slots[slot] = self.newest.get(row.request_id) if token_id == PENDING_TOKEN else token_id

    def sample(self, row):
        """Tokens behind the known ones and behind each draft."""
        end = row.start + len(row.token_ids)
        num_known = end - row.num_drafts
        assert row.sampling.position == num_known
        assert len(row.sampling.prompt_token_ids) + len(row.sampling.output_token_ids) == num_known
        token_ids = [self.slots.get(self.slot(row, position)) for position in range(end)]
        assert None not in token_ids, "reads a slot that nobody wrote"
        seed = row.sampling.seed
        return [SampledToken(token_id=next_token(token_ids[:length], seed)) for length in range(num_known, end + 1)]

    def slot(self, row, position):
        block_id = row.block_table[position // self.block_size]
        assert block_id > 0, "page 0 belongs to nobody"
        return block_id * self.block_size + position % self.block_size


class DelayedExecutor:
    """Runs a step only when its result, or that of a later one, is asked for: several are on their way."""

    def __init__(self, runner, *, max_steps_in_flight):
        self.max_steps_in_flight = max_steps_in_flight
        self.vocab_size = runner.vocab_size
        self.most_in_flight = 0
        self._runner = runner
        self._queue = deque()

    def submit(self, output):
        handle = DelayedStep(self, output)
        self._queue.append(handle)
        self.most_in_flight = max(self.most_in_flight, len(self._queue))
        return handle

    def run_until(self, handle):
        while handle.outcome is None:
            step = self._queue.popleft()
            try:
                step.outcome = self._runner.execute(step.output)
            except Exception as error:
                step.outcome = error

    def shutdown(self):
        assert not self._queue


class DelayedStep:
    def __init__(self, executor, output):
        self.executor, self.output, self.outcome = executor, output, None

    def result(self):
        self.executor.run_until(self)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Workload:
    """Draws limits and requests. Prompts share prefixes, so that pages are shared, and duplicates meet in one step."""

    def __init__(self, seed, policy=None):
        self.random = rng = random.Random(seed)
        self.block_size = rng.choice([1, 2, 3, 4, 8])
        self.max_model_len = rng.randint(4, 48)
        longest = -(-(self.max_model_len - 1) // self.block_size)
        # Often the smallest legal pool: the longest request fits, and nothing beside it.
        self.num_blocks = longest + rng.choice([0, 0, 1, 2, longest // 2, longest, 3 * longest])
        self.max_num_seqs = rng.choice([1, 2, 3, 5, 8])
        self.chunked = rng.random() < 0.8
        low = self.max_num_seqs if self.chunked else max(self.max_num_seqs, self.max_model_len)
        self.config = SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=low + rng.choice([0, 0, 1, 3, 7, 20, 100]),
            max_model_len=self.max_model_len,
            enable_chunked_prefill=self.chunked,
            watermark=rng.choice([0, 0, 0.01, 0.2]),
            expected_output=random.Random(seed + 1).choice(["estimated", "none"]),
            max_steps_in_flight=(steps := rng.choice([1, 1, 2, 3])),
            schedule_ahead=steps == 1 and random.Random(seed + 2).random() < 0.7,
        )
        # Drawn apart, so that a seed means the same limits and prompts under every policy.
        self.policy_name = policy or random.Random(seed).choice(["fcfs", "priority", "fair", "prefix"])
        self.priorities = rng.choice([[0], [0], [-1, 0, 5]]) if self.policy_name == "priority" else [0]
        self.prefixes = [self._tokens(rng.randint(1, self.max_model_len)) for _ in range(3)]
        self.num_requests = 0

    def block_manager(self):
        # A hash with few values: pages meet collisions all the time.
        few = self.random.random() < 0.3
        return BlockManager(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            enable_prefix_caching=self.random.random() < 0.8,
            hash_function=(lambda key: zlib.crc32(repr(key).encode()) % 7) if few else hash,
            tiers=self._tiers(),
        )

    def _tiers(self):
        rng = self.random
        if rng.random() < 0.4:
            return None
        transfers = TransferSeconds(page_out=1.0, page_in=1.0, disk_read=rng.choice([1.0, 1000.0]))
        costs = TierCosts(transfers, mode=rng.choice(PREEMPTION_MODES), block_size=self.block_size)
        if rng.random() < 0.5:
            costs.note_prefill(1, rng.choice([0.1, 0.5, 2.0]))  # so that some things are worth moving, and some not
        num_host = rng.choice([1, 1, 2, self.num_blocks])
        return PageTiers(num_host_pages=num_host, num_disk_pages=rng.choice([0, 3, 50, 50]), costs=costs)

    def request(self):
        rng = self.random
        prefix = rng.choice(self.prefixes)
        num_shared = rng.choice([rng.randint(0, len(prefix)), rng.randint(0, 6)])
        prompt = prefix[:num_shared] + self._tokens(rng.choice([0, 0, 1, 2, 9]))
        prompt = (prompt or self._tokens(1))[: self.max_model_len - 1]
        room = self.max_model_len - len(prompt)
        max_tokens = rng.choice([None, rng.randint(1, room)])
        self.num_requests += 1
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, max_tokens or room) if rng.random() < 0.3 else 0,
            stop_token_ids=tuple(self._tokens(rng.choice([0, 0, 1, 3]))),
            ignore_eos=rng.random() < 0.3,
        )
        return Request(
            request_id=f"r{self.num_requests}",
            prompt_token_ids=prompt,
            params=params,
            seed=rng.choice([0, 1, 2**31]),
            eos_token_ids=(EOS,),
            priority=rng.choice(self.priorities),
            tenant=f"tenant {self.num_requests % 3}",
            arrival_time=1e9 + self.num_requests,
            reads_output=self.num_requests % 5 == 0,
            cache_salt=rng.choice(["", "", "", "tenant"]),
        )

    def _tokens(self, count):
        return [self.random.randrange(VOCAB_SIZE) for _ in range(count)]


class ErringOracle:
    """Drafts what will come, with errors; or garbage, even what is no token."""

    def __init__(self, rng):
        self.rng = rng
        self.error_rate = rng.choice([0, 0.1, 0.5, 1])
        self.known = set()

    def propose(self, contexts):
        self.known.update(context.request_id for context in contexts)
        return [self.guess(list(context.token_ids), context) for context in contexts]

    def guess(self, token_ids, context):
        drafts = []
        for _ in range(self.rng.randint(0, context.max_drafts)):
            token = next_token(token_ids, context.sampling.seed)
            if self.rng.random() < self.error_rate:
                token = self.rng.choice([token, self.rng.randrange(VOCAB_SIZE), self.rng.choice([-1, VOCAB_SIZE])])
            token_ids.append(token)
            drafts.append(token)
            if token < 0:
                break
        return drafts

    def forget(self, request_id):
        self.known.remove(request_id)

    def close(self):
        pass


class MoodyController(FixedController):
    """Wants drafts for a request or not, from one question to the next: so it is planned ahead now and then."""

    def __init__(self, rng):
        super().__init__(rng.randint(1, 6))
        self.rng, self.share = rng, rng.choice([0.1, 0.5, 1])

    def num_drafts(self, request_id, *, num_requests):
        wanted = super().num_drafts(request_id, num_requests=num_requests)
        return wanted if self.rng.random() < self.share else 0


class Driver:
    """Adds, schedules, returns, aborts and rolls back at random, and checks what must hold after every single move."""

    def __init__(
        self,
        seed,
        *,
        policy=None,
        scheduler_class=Scheduler,
        planner_class=StepPlanner,
        block_manager_class=BlockManager,
    ):
        self.workload = workload = Workload(seed, policy)
        self.random = workload.random
        self.block_manager = workload.block_manager()
        self.block_manager.__class__ = block_manager_class
        policy = make_policy(workload.policy_name, block_manager=self.block_manager)
        self.scheduler = scheduler_class(workload.config, self.block_manager, policy)
        self.scheduler._planner.__class__ = planner_class
        losses = random.Random(seed) if self.random.random() < 0.7 else None
        self.runner = PageStoreRunner(workload.block_size, losses=losses)
        self.max_steps_in_flight = self.random.choice([1, 2, 3, 4])
        self.eager = self.random.random() < 0.5  # steps run when they are submitted, not when their result is taken
        self.busy = self.random.random() < 0.5  # like an engine: the next step leaves as soon as one returns
        # Drawn apart, so that a seed means the same moves with and without.
        rng = random.Random(seed + 2)
        self.proposer = ErringOracle(rng)
        controller = MoodyController(rng)
        self.drafting = Drafting(self.proposer, controller, vocab_size=VOCAB_SIZE) if rng.random() < 0.6 else None
        self.in_flight = deque()
        self.requests, self.outputs, self.ended = {}, {}, {}
        self.num_steps = self.num_rows_ahead = 0

    def run(self, num_moves):
        moves = [self.add, self.schedule, self.schedule, self.take_result, self.take_result]
        for _ in range(num_moves):
            rare = self.random.random()
            if rare < 0.03:
                self.abort()
            elif rare < 0.06:
                self.fail_some()
            else:
                self.random.choice(moves)()
            self.check()
        self.drain()
        self.check_end()
        return self

    # -- moves ------------------------------------------------------------------------------------

    def add(self):
        request = self.workload.request()
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []
        if len(self.requests) % 4 == 0:
            request.deadline = DEADLINES + len(self.requests)
        self.scheduler.add(request)

    def schedule(self):
        if len(self.in_flight) >= self.max_steps_in_flight:
            return
        if self.drafting is not None:
            self.drafting.draft(self.scheduler)
        output = self.scheduler.schedule()
        if output is None:
            if not self.in_flight:
                assert not self.scheduler.has_unfinished, "work is left, nothing is in flight, and nothing can run"
            return
        self.num_steps += 1
        self.check_output(output)
        self.in_flight.append((output, self.runner.execute(output) if self.eager else None))

    def take_result(self):
        if self.in_flight:
            output, result = self.in_flight.popleft()
            result = result or self.runner.execute(output)
            self.collect(self.scheduler.update(output, result))
            if self.drafting is not None:
                self.drafting.note(output, result, seconds=1.0, proposer_seconds=0.0)
            if self.busy:
                self.schedule()

    def abort(self):
        ids = self.random.sample(sorted(self.requests), min(len(self.requests), 2))
        self.collect(self.scheduler.abort([*ids, "unknown"]))
        self.collect(self.scheduler.expire(DEADLINES + len(self.requests) - 6))

    def fail_some(self):
        """The oldest step fails, so all behind it are undone; some ran already, some half, some not at all."""
        while self.in_flight:
            output, result = self.in_flight.pop()
            in_order = output.first_swap <= self.runner.num_moved  # else a runner refuses the step
            if result is None and in_order and self.random.random() < 0.3:
                num_swaps = self.random.choice([0, len(output.swaps) // 2, len(output.swaps)])
                self.runner.move(output, stop=num_swaps)
                if num_swaps == len(output.swaps):
                    self.runner.copy_blocks(output.block_copies)
                    self.runner.write(output)
            self.scheduler.rollback(output)

    def drain(self):
        limit = self.num_steps + 200 + sum(self.workload.max_model_len * 8 for _ in self.requests)
        while self.scheduler.has_unfinished:
            assert self.num_steps < limit, "it runs in circles"
            self.schedule()
            self.take_result()
            self.check()

    def collect(self, token_outputs):
        for output in token_outputs:
            assert output.request_id not in self.ended, "news after the end"
            self.outputs[output.request_id] += output.token_ids
            assert len(output.logprobs) == len(output.token_ids)
            if output.finish_reason is not None:
                assert output.timing.num_generation_tokens == len(self.outputs[output.request_id])
                self.ended[output.request_id] = (output.finish_reason, output.stop_reason, output.error)

    # -- checks -----------------------------------------------------------------------------------

    def check_output(self, output):
        config = self.workload.config
        rows = output.requests
        assert 0 < output.num_scheduled_tokens == sum(len(row.token_ids) for row in rows)
        assert output.num_scheduled_tokens <= config.max_num_batched_tokens, "over the budget"
        assert len({row.request_id for row in rows}) == len(rows), "a request is there twice"
        assert len(rows) <= config.max_num_seqs, "more requests than seats"
        for row in rows:
            request = self.requests[row.request_id]
            assert not request.draft_token_ids, "drafts that were used, or had no place, are kept"
            assert row.num_drafts < request.max_tokens - len(request.output_token_ids) or not row.num_drafts
            if row.token_ids == [PENDING_TOKEN]:
                self.num_rows_ahead += 1
                self.check_row_ahead(request, row)
                continue
            end = row.start + row.num_known_tokens
            assert row.token_ids[: row.num_known_tokens] == request.token_ids[row.start : end] != [], "wrong tokens"
            assert (row.sampling is not None) == (end == request.num_tokens), "samples in the middle"
            if not config.enable_chunked_prefill:
                assert row.sampling is not None, "a prompt was cut"

    def check_row_ahead(self, request, row):
        config = self.workload.config
        assert config.schedule_ahead, "planned ahead without being told to"
        assert request.num_new_tokens == -1, "not the next token"
        assert (row.start, row.sampling.position) == (request.num_tokens, request.num_tokens + 1), "wrong place"
        assert not request.reads_output, "planned ahead of what it reads"
        assert len(request.output_token_ids) + 1 < request.max_tokens, "planned beyond its last token"
        assert request.num_tokens + 1 < config.max_model_len, "planned beyond the context"

    def check(self):
        self.block_manager.check_invariants()
        assert self.scheduler.num_running <= self.workload.max_num_seqs, "more requests than seats"
        in_flight = dict.fromkeys(self.requests, 0)
        size = self.workload.block_size
        for output, _ in self.in_flight:
            for row in output.requests:
                in_flight[row.request_id] += row.num_known_tokens
                # Raises if the pages were freed. Pages being written must still be the writer's.
                table = self.block_manager.block_table(row.request_id)
                first, last = row.start // size, (row.start + len(row.token_ids) - 1) // size
                assert table[first : last + 1] == row.block_table[first : last + 1], "pages in flight were taken away"
        for request_id, request in self.requests.items():
            assert request.num_in_flight_tokens == in_flight[request_id], "miscounted what is in flight"
            most = request.num_tokens + self.workload.config.schedule_ahead
            assert request.num_computed_tokens + request.num_in_flight_tokens <= most
            assert request.token_ids == request.prompt_token_ids + request.output_token_ids, "lost its tokens"
            if request.status is RequestStatus.RUNNING and not request.num_in_flight_tokens:
                pages = -(-(request.num_tokens + self.workload.config.schedule_ahead) // size)
                assert len(self.block_manager.block_table(request_id)) <= pages, "keeps pages of drafts"

    def check_end(self):
        assert self.block_manager.num_free_blocks == self.block_manager.num_blocks, "pages leaked"
        if self.block_manager.tiers is not None:
            tiers = self.block_manager.tiers
            assert not tiers._saved, "pages of requests that are over are still kept"
            assert not any(page.num_pins for page in (*tiers.host, *tiers.disk)), "a page is pinned for ever"
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        if self.drafting is not None:
            self.drafting.forget_those_who_left(self.scheduler)
            assert not self.proposer.known, "a proposer remembers requests that are over"
        assert self.ended.keys() == self.requests.keys()
        for request_id, request in self.requests.items():
            tokens, reason, stop_reason = generate_alone(request, max_model_len=self.workload.max_model_len)
            output, ended = self.outputs[request_id], self.ended[request_id]
            if ended[0] in ("abort", "timeout"):
                assert output == tokens[: len(output)], f"{request} differs from itself alone"
            else:
                assert (output, *ended) == (tokens, reason, stop_reason, None), f"{request} differs from itself alone"


def make_scheduler(
    *,
    num_blocks=64,
    block_size=4,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    max_model_len=64,
    enable_prefix_caching=True,
    scheduler_class=Scheduler,
    policy="fcfs",
    **options,
):
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        **options,
    )
    pages = BlockManager(num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=enable_prefix_caching)
    waiting = make_policy(policy, block_manager=pages) if isinstance(policy, str) else policy
    return scheduler_class(config, pages, waiting)


def make_request(
    request_id,
    prompt,
    *,
    seed=0,
    priority=0,
    cache_salt="",
    arrival_time=None,
    tenant="default",
    deadline=None,
    **params,
):
    params.setdefault("max_tokens", 8)
    params.setdefault("ignore_eos", True)
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=SamplingParams(**params),
        seed=seed,
        eos_token_ids=(EOS,),
        priority=priority,
        cache_salt=cache_salt,
        arrival_time=arrival_time,
        tenant=tenant,
        deadline=deadline,
    )


def run_until_done(scheduler, runner, *, limit=1000):
    """Drives a scheduler one step at a time; returns (tokens per request, all token outputs, the steps)."""
    tokens, outputs, steps = {}, [], []
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        assert step is not None
        assert len(steps) < limit
        steps.append(step)
        for output in scheduler.update(step, runner.execute(step)):
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            outputs.append(output)
        scheduler.block_manager.check_invariants()
    return tokens, outputs, steps


@pytest.fixture(scope="session")
def lab():
    """The tools above; tests cannot import each other's modules."""
    return SimpleNamespace(
        EOS=EOS,
        VOCAB_SIZE=VOCAB_SIZE,
        DelayedExecutor=DelayedExecutor,
        Driver=Driver,
        ErringOracle=ErringOracle,
        PageStoreRunner=PageStoreRunner,
        Workload=Workload,
        generate_alone=generate_alone,
        make_policy=make_policy,
        make_request=make_request,
        make_scheduler=make_scheduler,
        next_token=next_token,
        run_until_done=run_until_done,
    )
