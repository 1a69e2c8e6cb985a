"""Dummy weights are the same tensor however they are read."""

from __future__ import annotations

import torch

from aios_model.weights.dummy import DummySource

NORM = "layers.0.input_layernorm.weight"
SHAPES = {"w": (40, 70), "v": (33,), "experts": (3, 8, 16), "long": (600_000,), NORM: (16,)}


def test_slices_selections_and_gathers_equal_those_of_the_whole():
    entries = DummySource(SHAPES).entries()
    whole = {name: entry.read(dtype=torch.float32) for name, entry in entries.items()}
    for name, shape in SHAPES.items():
        assert whole[name].shape == shape
        assert torch.equal(entries[name].typed(), whole[name])
    window = entries["w"].read(rows=slice(3, 9), columns=slice(10, 21), dtype=torch.float32)
    assert torch.equal(window, whole["w"][3:9, 10:21])
    assert torch.equal(entries["w"].read(dtype=torch.bfloat16), whole["w"].bfloat16())
    part = entries["long"].read(rows=slice(530_000, 530_010), dtype=torch.float32)
    assert torch.equal(part, whole["long"][530_000:530_010])
    index = torch.tensor([2, 0, 2])
    for name in ("w", "v", "experts"):
        assert torch.equal(entries[name].gather(index, dtype=torch.float32), whole[name][index])
    assert torch.equal(
        entries["experts"].select(2).read(rows=slice(4, 8), dtype=torch.float32), whole["experts"][2, 4:8]
    )
    assert torch.equal(entries["experts"].select(1).select(3).read(dtype=torch.float32), whole["experts"][1, 3])
    assert torch.equal(entries["w"].raw(rows=slice(2, 4)).view(torch.float32), whole["w"][2:4])
    assert torch.equal(entries["v"].raw(rows=slice(2, 4)).view(torch.float32), whole["v"][2:4, None])


def test_values_are_small_differ_by_name_and_seed_and_norms_are_ones():
    first, second = (DummySource({"a": (512, 512), "b": (512, 512)}, seed=seed).entries() for seed in (0, 1))
    a, b, other = (entry.read(dtype=torch.float32) for entry in (first["a"], first["b"], second["a"]))
    assert abs(float(a.std()) - 0.02) < 1e-3
    assert abs(float(a.mean())) < 1e-3
    assert len(a.unique()) > 0.9 * a.numel()
    for independent in (b, other, a.t(), a.roll(1, 0), a.roll(1, 1)):
        assert abs(float(torch.corrcoef(torch.stack((a.flatten(), independent.flatten())))[0, 1])) < 0.02
    assert DummySource(SHAPES).entries()[NORM].read(dtype=torch.bfloat16).eq(1).all()
