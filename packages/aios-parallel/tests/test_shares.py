"""Who holds what: everything is held, nothing twice but kv heads, and shares are as equal as they can be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_model.errors import ConfigError
from aios_parallel.mesh import Mesh
from aios_parallel.shares import share_experts, share_features, share_heads, share_vocabulary


def held(selection) -> list[int]:
    return [run.start + i for run in selection.runs if run.start is not None for i in range(run.length)]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 12))
def test_query_heads_are_held_once_beside_their_kv_heads(kv_heads, group, ranks) -> None:
    heads = kv_heads * group
    if ranks > heads:
        with pytest.raises(ConfigError, match="cannot share"):
            share_heads(heads, kv_heads, ranks)
        return
    shares = share_heads(heads, kv_heads, ranks)
    assert [head for share in shares for head in held(share.queries)] == list(range(heads))
    for share in shares:
        width = share.queries.size // len(share.kv_heads)
        assert width * len(share.kv_heads) == share.queries.size
        place = 0
        for run in share.queries.runs:
            for i in range(run.length):
                if run.start is not None:
                    assert (run.start + i) // group == share.kv_heads[(place + i) // width]
            place += run.length
    for share in shares:
        for before, after in pairwise(share.queries.runs):
            assert before.start is None or after.start is None, "neighbours are one run"
    if kv_heads % ranks == 0:
        assert not any(share.queries.has_zeros for share in shares)
        assert {len(share.kv_heads) for share in shares} == {kv_heads // ranks}


def test_the_bundled_models_nine_heads() -> None:
    assert [(share.queries.size, share.kv_heads) for share in share_heads(9, 3, 2)] == [(3, (0,)), (6, (1, 2))]
    assert [share.kv_heads for share in share_heads(9, 3, 3)] == [(0,), (1,), (2,)]
    assert [share.queries.size for share in share_heads(9, 3, 4)] == [2, 2, 2, 3]


@given(st.integers(1, 5000), st.integers(1, 16))
def test_features_are_held_once_in_near_equal_spans(width, ranks) -> None:
    if ranks > width:
        with pytest.raises(ConfigError, match="cannot share"):
            share_features(width, ranks)
        return
    shares = share_features(width, ranks)
    assert [index for share in shares for index in held(share)] == list(range(width))
    assert all(share.size for share in shares)
    assert max(share.size for share in shares) - min(share.size for share in shares) <= 64
    if width % ranks == 0 and (width // ranks) % 256 == 0:
        assert {share.size for share in shares} == {width // ranks}


@given(st.integers(1, 5000), st.integers(1, 16))
def test_vocabulary_is_held_once_in_equal_spans(vocab, ranks) -> None:
    shares = share_vocabulary(vocab, ranks)
    assert [index for share in shares for index in held(share)] == list(range(vocab))
    assert len({share.size for share in shares}) == 1


@given(st.integers(1, 200), st.integers(1, 16))
def test_experts_are_held_once(experts, ranks) -> None:
    if ranks > experts:
        with pytest.raises(ConfigError, match="cannot share"):
            share_experts(experts, ranks)
        return
    shares = share_experts(experts, ranks)
    assert [index for share in shares for index in share] == list(range(experts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 6), st.integers(1, 6))
def test_every_rank_has_its_place(tensor, pipeline) -> None:
    mesh = Mesh(tensor=tensor, pipeline=pipeline)
    places = [mesh.place(rank) for rank in range(mesh.size)]
    assert len({(place.stage, place.tensor_rank) for place in places}) == mesh.size
    for place in places:
        assert place.tensor_ranks[place.tensor_rank] == place.rank
        assert place.pipeline_ranks[place.stage] == place.rank
    assert [place.rank for place in places if place.samples] == [mesh.sampling_rank]
    assert places[mesh.sampling_rank].is_last_stage
    with pytest.raises(ConfigError, match="not one of"):
        mesh.place(mesh.size)
