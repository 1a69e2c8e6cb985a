"""Masks depend on the output before a position and on nothing else: not on what was asked before, in any order."""

import importlib.util
from pathlib import Path
from random import Random

import pytest
import torch

from aios_model.sampling import SamplingParams, SamplingRow
from aios_model.sampling.sampler import Sampler
from aios_serve.structured.bitmask import _apply_on_device, apply_masks, num_mask_words
from aios_serve.structured.errors import ConstraintFailedError
from aios_serve.structured.processor import MAX_FOLLOWED, GrammarProcessor
from aios_serve.structured.store import MAX_GRAMMARS, GrammarStore
from aios_serve.structured.vocabulary import Vocabulary


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scripted = load("scripted")
EOS, VOCAB_SIZE, byte_tokenizer = scripted.EOS, scripted.VOCAB_SIZE, scripted.byte_tokenizer
random_schema = load("structured_cases").random_schema


def new_store():
    return GrammarStore(lambda: Vocabulary.of(byte_tokenizer(), eos_token_ids=(EOS,), vocab_size=VOCAB_SIZE))


@pytest.fixture(scope="module")
def store():
    return new_store()


@pytest.fixture
def processor(store):
    return GrammarProcessor(store, vocab_size=VOCAB_SIZE)


def row_of(output=(), *, request_id="r", stop_token_ids=(EOS,), **params):
    return SamplingRow(
        request_id=request_id,
        params=SamplingParams(**{"max_tokens": None, **params}),
        seed=1,
        position=3 + len(output),
        prompt_token_ids=[1, 2, 3],
        output_token_ids=list(output),
        stop_token_ids=frozenset(stop_token_ids),
    )


def allowed(processor, *rows):
    logits_RV = torch.zeros(len(rows), VOCAB_SIZE)
    processor(logits_RV, rows)
    found = [torch.nonzero(logits_V == 0)[:, 0].tolist() for logits_V in logits_RV]
    return found[0] if len(rows) == 1 else found


REGEX = {"regex": "a+b"}
JSON = {"json": {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]}}


def test_only_rows_with_a_constraint_are_masked(processor):
    plain, constrained = row_of(request_id="p"), row_of(structured_outputs=REGEX)
    assert [processor.applies_to(row) for row in (plain, constrained)] == [False, True]
    assert allowed(processor, plain, constrained, plain) == [list(range(VOCAB_SIZE)), [*b"a"], list(range(VOCAB_SIZE))]


def test_masks_follow_the_output(processor):
    assert allowed(processor, row_of(structured_outputs=REGEX)) == [*b"a"]
    assert allowed(processor, row_of(b"a", structured_outputs=REGEX)) == [*b"ab"]
    assert allowed(processor, row_of(b"aaa", structured_outputs=REGEX)) == [*b"ab"]
    assert allowed(processor, row_of(b"aaab", structured_outputs=REGEX)) == [EOS]
    assert allowed(processor, row_of(b"ab", structured_outputs=REGEX)) == [EOS]
    assert allowed(processor, row_of(structured_outputs=REGEX)) == [*b"a"]


def test_where_an_output_may_end_its_stop_tokens_are_allowed_too(processor):
    stops = (EOS, ord("x"))
    assert allowed(processor, row_of(structured_outputs={"regex": "a+"}, stop_token_ids=stops)) == [*b"a"]
    assert allowed(processor, row_of(b"a", structured_outputs={"regex": "a+"}, stop_token_ids=stops)) == [*b"ax", EOS]
    assert allowed(processor, row_of(b"ab", structured_outputs=REGEX, stop_token_ids=stops)) == [*b"x", EOS]


def test_an_output_that_has_ended_and_goes_on_repeats_the_end(processor):
    for ended in ([*b"ab", EOS], [*b"ab", EOS, EOS, EOS], [*b"ab", EOS, EOS]):
        row = row_of(ended, structured_outputs=REGEX, ignore_eos=True, stop_token_ids=())
        assert allowed(processor, row) == [EOS]
    row = row_of([*b"a", EOS, EOS], structured_outputs={"regex": "a+"}, ignore_eos=True, stop_token_ids=())
    assert allowed(processor, row) == [EOS]
    assert allowed(processor, row_of(b"a", structured_outputs={"regex": "a+"})) == [*b"a", EOS]


def test_drafts_that_leave_the_grammar_are_left_alone_and_change_nothing(processor):
    anything = list(range(VOCAB_SIZE))
    rows = [row_of(output, structured_outputs=REGEX) for output in (b"a", b"ax", b"axa", b"axab")]
    assert allowed(processor, *rows) == [[*b"ab"], anything, anything, anything]
    assert allowed(processor, row_of(b"aa", structured_outputs=REGEX)) == [*b"ab"]


@pytest.mark.parametrize("seed", range(8))
def test_masks_do_not_depend_on_what_was_asked_before(store, seed):
    """Rows in any order, of several requests, with drafts right and wrong: a new processor says the same of each."""
    random = Random(seed)
    constraints = [{"json": random_schema(random)}, REGEX, {"json_object": True}, {"choice": ["one", "only", "two"]}]
    used = GrammarProcessor(store, vocab_size=VOCAB_SIZE)
    outputs: list[list[int]] = [[] for _ in constraints]
    for _ in range(60):
        rows = []
        for index in random.sample(range(len(constraints)), random.randint(1, len(constraints))):
            params = {"structured_outputs": constraints[index], "request_id": f"r{index}"}
            output = outputs[index]
            if output and random.random() < 0.3:
                del output[random.randint(0, len(output)) :]  # preempted, rerun, or drafts rejected
            drafts = random.choices([*b'"{}a:1', EOS], k=random.randint(0, 3))
            rows += [row_of([*output, *drafts[:count]], **params) for count in range(len(drafts) + 1)]
            choice = random.choice(allowed(used, row_of(output, **params)))
            if choice != EOS:
                output.append(choice)
        if random.random() < 0.2:
            used.forget(random.choice(rows).request_id)
        masks = allowed(used, *rows) if len(rows) > 1 else [allowed(used, rows[0])]
        for row, mask in zip(rows, masks, strict=True):
            assert mask == allowed(GrammarProcessor(store, vocab_size=VOCAB_SIZE), row)
            if len(mask) < VOCAB_SIZE and EOS not in row.output_token_ids:
                accepted = [token_id for token_id in range(VOCAB_SIZE) if used.accepts(row, token_id)]
                assert accepted in (mask, [token_id for token_id in mask if token_id != EOS])


def test_a_sampler_draws_outputs_of_the_form_asked_for_and_forgets(processor):
    sampler = Sampler(vocab_size=VOCAB_SIZE, device="cpu", logits_processors=[processor])
    generator = torch.Generator().manual_seed(3)
    output: list[int] = []
    while EOS not in output:
        row = row_of(output, structured_outputs=JSON, temperature=1.0)
        [token] = sampler.sample(torch.randn(1, VOCAB_SIZE, generator=generator), [row])
        output.append(token.token_id)
    assert bytes(output[:-1]).startswith(b'{"k":')
    assert processor.num_followed == 1
    sampler.forget("r")
    assert processor.num_followed == 0


def test_a_complete_output_ends_whatever_min_tokens_and_bad_words_say(processor):
    sampler = Sampler(vocab_size=VOCAB_SIZE, device="cpu", logits_processors=[processor])
    options = {"structured_outputs": REGEX, "temperature": 0, "min_tokens": 9}
    [token] = sampler.sample(torch.zeros(1, VOCAB_SIZE), [row_of(b"ab", **options)])
    assert token.token_id == EOS
    # Where it may end or go on, it goes on.
    options["structured_outputs"] = {"regex": "a+"}
    logits_RV = torch.zeros(1, VOCAB_SIZE)
    logits_RV[0, EOS] = 5
    [token] = sampler.sample(logits_RV, [row_of(b"a", **options)])
    assert token.token_id == ord("a")


def test_a_constraint_that_cannot_be_followed_fails_its_requests_by_name(processor):
    wide = {"json": {"properties": {f"p{i}": {} for i in range(2000)}}}
    rows = [row_of(b"{", request_id="wide", structured_outputs=wide), row_of(structured_outputs=REGEX)]
    broken = row_of(request_id="broken", structured_outputs={"regex": "(a"})
    with pytest.raises(ConstraintFailedError, match=r"wide: after .*broken: structured_outputs.regex") as caught:
        allowed(processor, *rows, broken)
    assert caught.value.request_ids == ("wide", "broken")
    assert allowed(processor, rows[1]) == [*b"a"]


def test_what_is_remembered_is_bounded():
    store = new_store()
    processor = GrammarProcessor(store, vocab_size=VOCAB_SIZE)
    for number in range(MAX_GRAMMARS + 5):
        allowed(processor, row_of(request_id="same", structured_outputs={"regex": f"a{{{number + 1}}}"}))
    assert (store.num_grammars, processor.num_followed) == (MAX_GRAMMARS, 1)
    for number in range(MAX_FOLLOWED + 5):
        assert allowed(processor, row_of(b"a", request_id=str(number), structured_outputs=REGEX)) == [*b"ab"]
    assert processor.num_followed == MAX_FOLLOWED
    assert allowed(processor, row_of(b"aab", request_id="0", structured_outputs=REGEX)) == [EOS]


def test_preparing_compiles_beside_whoever_asks():
    store = new_store()
    constraint = SamplingParams(structured_outputs=REGEX).structured_outputs
    future = store.prepare(constraint)
    assert future is not None
    assert future.result(timeout=30) is None
    assert store.prepare(constraint) is None
    broken = SamplingParams(structured_outputs={"regex": "(a"}).structured_outputs
    with pytest.raises(ValueError, match="unclosed"):
        store.prepare(broken).result(timeout=30)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_are_applied_alike_everywhere(vocab_size, dtype):
    torch_random = torch.Generator().manual_seed(vocab_size)
    allowed_RV = torch.rand(3, vocab_size, generator=torch_random) < 0.4
    logits_RV = torch.randn(3, vocab_size, dtype=dtype, generator=torch_random)
    padded = torch.zeros(3, 32 * num_mask_words(vocab_size), dtype=torch.int64)
    padded[:, :vocab_size] = allowed_RV.long()
    words_RM = (padded.view(3, -1, 32) << torch.arange(32)).sum(-1)
    words = words_RM.numpy().astype("uint32")
    expected = logits_RV.masked_fill(~allowed_RV, -torch.inf)
    for apply in (apply_masks, lambda logits, masks: _apply_on_device(logits, torch.from_numpy(masks.view("int32")))):
        actual = logits_RV.clone()
        apply(actual, words)
        assert torch.equal(actual, expected)
