"""The bucket of a tenant's limits: whatever is held, spent and released, and when, no minute sees more than it may."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_serve.error_responses import ApiError
from aios_serve.tenants.account import FIRST_TOKEN_SECONDS, TenantAccount
from aios_serve.tenants.tenant import Tenant
from aios_serve.tenants.token_bucket import TokenBucket
from aios_serve.tenants.visit import Visit

EPSILON = 1e-6


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_minutes_worth_may_come_at_once_and_flows_back_evenly(clock):
    bucket = TokenBucket(60, clock=clock)
    assert bucket.hold(60)
    bucket.spend(60)
    assert not bucket.hold(1)
    assert bucket.seconds_until(1) == pytest.approx(1.0)
    clock.now += 1.0
    assert bucket.hold(1)
    clock.now += 1e6
    assert bucket.available == 59  # no more than a minute's worth is saved up, and one is held


def test_what_is_not_used_is_there_again_at_once(clock):
    bucket = TokenBucket(100, clock=clock)
    assert bucket.hold(90)
    assert not bucket.hold(20)
    bucket.spend(5)
    bucket.release(85)
    assert bucket.available == pytest.approx(95)


def test_what_is_held_stays_promised_however_long_it_takes(clock):
    bucket = TokenBucket(100, clock=clock)
    assert bucket.hold(100)
    clock.now += 3600
    assert not bucket.hold(1)
    bucket.spend(100)
    assert not bucket.hold(1)


def test_a_new_size_keeps_what_fits(clock):
    bucket = TokenBucket(100, clock=clock)
    bucket.resize(10)
    assert bucket.available == 10
    bucket.resize(1000)
    assert bucket.available == 10
    clock.now += 6
    assert bucket.available == pytest.approx(110)


def test_put_back_does_not_exceed_the_limit(clock):
    bucket = TokenBucket(10, clock=clock)
    bucket.put_back(5)
    assert bucket.available == 10


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0, 100)),
        st.tuples(st.just("hold"), st.integers(1, 150)),
        st.tuples(st.just("spend"), st.integers(0, 5), st.floats(0, 1)),
        st.tuples(st.just("release"), st.integers(0, 5)),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(per_minute=st.integers(1, 120), steps=STEPS)
def test_no_window_sees_more_than_its_share_plus_one_burst(per_minute, steps):
    clock = Clock()
    bucket = TokenBucket(per_minute, clock=clock)
    open_holds, spent = [], []
    for kind, *arguments in steps:
        if kind == "wait":
            clock.now += arguments[0]
        elif kind == "hold":
            if bucket.hold(arguments[0]):
                open_holds.append(float(arguments[0]))
        elif open_holds:
            index = arguments[0] % len(open_holds)
            if kind == "spend":
                amount = open_holds[index] * arguments[1]
                bucket.spend(amount)
                open_holds[index] -= amount
                spent.append((clock.now, amount))
            else:
                bucket.release(open_holds.pop(index))
        assert bucket.available >= -EPSILON
        assert bucket.held == pytest.approx(sum(open_holds), abs=EPSILON)
        assert bucket.available + bucket.held <= per_minute + EPSILON
    for first, (begin, _) in enumerate(spent):
        total = 0.0
        for end, amount in spent[first:]:
            total += amount
            assert total <= per_minute * (1 + (end - begin) / 60) + EPSILON


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.lists(st.floats(0, 20), max_size=120))
def test_no_minute_sees_more_requests_than_two_minutes_worth(per_minute, pauses):
    clock = Clock()
    account = TenantAccount(Tenant(name="a", requests_per_minute=per_minute), clock=clock)
    admitted = []
    for pause in pauses:
        clock.now += pause
        if (wait := retry_after(account)) is not None:
            clock.now += wait
            assert retry_after(account) is None  # who waits as long as told is let in
        admitted.append(clock.now)
    for begin in admitted:
        assert sum(begin <= time < begin + 60 for time in admitted) <= 2 * per_minute


def retry_after(account):
    """Seconds that a request is told to wait; None if it is let in."""
    try:
        account.enter()
    except ApiError as refusal:
        return int(refusal.headers["Retry-After"])
    return None


def visit(clock, **terms):
    return Visit(TenantAccount(Tenant(name="a", **terms), clock=clock))


def test_a_visit_settles_what_it_did_not_use(clock):
    account = TenantAccount(Tenant(name="a", tokens_per_minute=100, max_concurrent=4), clock=clock)
    one = Visit(account)
    one.enter()
    one.reserve(num_prompt_tokens=10, max_tokens=20, num_choices=3)
    assert (account.tokens.available, account.tokens.held) == (30, 70)
    one.note_start()
    assert (account.num_running, account.tokens.available, account.tokens.held) == (3, 30, 60)
    clock.now += 0.3
    one.note_tokens(5, prompt_index=0, num_cached_tokens=8)
    one.note_tokens(5, prompt_index=0, num_cached_tokens=8)
    one.leave("success")
    assert account.num_running == 0
    assert account.tokens.available == pytest.approx(80.5)
    assert (account.num_prompt_tokens, account.num_cached_tokens, account.num_generation_tokens) == (10, 8, 10)
    assert account.first_tokens[FIRST_TOKEN_SECONDS.index(0.5)] == 1
    assert account.outcomes["success"] == 1


@pytest.mark.parametrize(
    ("terms", "asked", "words"),
    [
        ({"tokens_per_minute": 100}, (50, 51, 1), ["tokens_per_minute", "100", "50 tokens of prompt", "51"]),
        ({"tokens_per_minute": 100}, (10, 46, 2), ["tokens_per_minute", "2 times 46"]),
        ({"max_concurrent": 3}, (1, 1, 4), ["max_concurrent", "3", "4 choices"]),
    ],
)
def test_what_can_never_fit_is_400_and_holds_nothing(clock, terms, asked, words):
    one = visit(clock, **terms)
    one.enter()
    prompt, max_tokens, choices = asked
    with pytest.raises(ApiError) as caught:
        one.reserve(num_prompt_tokens=prompt, max_tokens=max_tokens, num_choices=choices)
    assert (caught.value.status, caught.value.code) == (400, "tenant_limit_exceeded")
    assert all(word in caught.value.message for word in words), caught.value.message
    one.leave("invalid")
    assert one.account.num_running == 0
    assert one.account.tokens is None or one.account.tokens.available == 100


def test_what_fits_later_is_429_with_the_numbers(clock):
    account = TenantAccount(Tenant(name="a", tokens_per_minute=600), clock=clock)
    first, second = Visit(account), Visit(account)
    first.enter()
    second.enter()
    first.reserve(num_prompt_tokens=500, max_tokens=40, num_choices=1)
    first.note_start()
    with pytest.raises(ApiError, match="limit 600, left 60, 40 held for requests that run, asked for 90") as caught:
        second.reserve(num_prompt_tokens=80, max_tokens=10, num_choices=1)
    assert caught.value.headers["Retry-After"] == "3"
    clock.now += 3
    second.reserve(num_prompt_tokens=80, max_tokens=10, num_choices=1)
    assert account.throttled == {"requests_per_minute": 0, "tokens_per_minute": 1, "max_concurrent": 0}


def test_new_terms_keep_what_was_taken_and_let_open_requests_end(clock):
    account = TenantAccount(Tenant(name="a", tokens_per_minute=100, requests_per_minute=2), clock=clock)
    one = Visit(account)
    one.enter()
    one.reserve(num_prompt_tokens=10, max_tokens=50, num_choices=1)
    one.note_start()
    account.adopt(Tenant(name="a", tokens_per_minute=60))
    assert account.requests is None
    assert account.tokens.available == 10  # 60 fit, 50 are held
    one.note_tokens(50, prompt_index=0, num_cached_tokens=0)
    account.adopt(Tenant(name="a"))
    one.leave("success")
    assert account.tokens is None
    assert account.num_running == 0


@pytest.mark.parametrize("starts", [False, True])
def test_what_the_server_had_no_room_for_costs_nothing(clock, starts):
    account = TenantAccount(Tenant(name="a", tokens_per_minute=100, requests_per_minute=5), clock=clock)
    one = Visit(account)
    one.enter()
    one.reserve(num_prompt_tokens=10, max_tokens=50, num_choices=1)
    if starts:
        one.note_start()
    one.leave("unavailable")
    assert (account.requests.available, account.tokens.available, account.tokens.held) == (5, 100, 0)
    assert (account.num_prompt_tokens, account.num_running) == (0, 0)


def test_an_answer_of_unsaid_length_gets_what_a_minute_leaves(clock):
    assert visit(clock, tokens_per_minute=100).room(500, num_prompt_tokens=40, num_choices=2) == 30
    assert visit(clock, tokens_per_minute=100).room(20, num_prompt_tokens=40, num_choices=2) == 20
    assert visit(clock).room(500, num_prompt_tokens=40, num_choices=2) == 500
