"""The common form of a quantised weight: its arithmetic, its slices, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from aios_quant.quantized_tensor import Fp8Tensor, QuantizedTensor


def random_tensor(rows: int, columns: int, group_size: int, *, mins: bool = True) -> QuantizedTensor:
    shape = (rows, columns // group_size)
    return QuantizedTensor(
        codes_NK=torch.randint(0, 16, (rows, columns), dtype=torch.uint8),
        bits=4,
        zero=0 if mins else 8,
        group_size=group_size,
        scales_NG=torch.rand(shape).half(),
        mins_NG=torch.randn(shape).half() if mins else None,
    )


@pytest.mark.parametrize("mins", [True, False])
def test_dequantised_weight_is_scale_times_code_plus_minimum(mins):
    weight = random_tensor(5, 96, 32, mins=mins)
    values = weight.dequantize(torch.float64)
    for row, column in ((0, 0), (4, 31), (2, 32), (3, 95)):
        group = column // 32
        expected = weight.scales_NG[row, group].double() * (int(weight.codes_NK[row, column]) - weight.zero)
        expected += 0 if weight.mins_NG is None else weight.mins_NG[row, group].double()
        assert values[row, column] == expected
    assert weight.dequantize().dtype == torch.float32
    torch.testing.assert_close(weight.dequantize(torch.bfloat16), weight.dequantize().bfloat16(), rtol=0, atol=0)


def test_rows_put_together_again_are_the_tensor():
    weight = random_tensor(7, 64, 32)
    again = QuantizedTensor.concat([weight.rows(0, 3), weight.rows(3, 7)])
    assert torch.equal(again.dequantize(), weight.dequantize())
    floats = Fp8Tensor(codes_NK=torch.randint(0, 127, (4, 9), dtype=torch.uint8), scales_N=torch.rand(4))
    again = Fp8Tensor.concat([floats.rows(0, 1), floats.rows(1, 4)])
    assert torch.equal(again.dequantize(), floats.dequantize())


def test_other_formats_cannot_be_stacked():
    with pytest.raises(ValueError, match="cannot be stacked"):
        QuantizedTensor.concat([random_tensor(2, 64, 32), random_tensor(2, 64, 64)])
    with pytest.raises(ValueError, match="cannot be stacked"):
        QuantizedTensor.concat([random_tensor(2, 64, 32), random_tensor(2, 64, 32, mins=False)])


def test_contradicting_fields_are_refused():
    good = {"codes_NK": torch.zeros(2, 64, dtype=torch.uint8), "bits": 4, "zero": 8, "group_size": 32}
    scales = torch.ones(2, 2)
    for changes, message in (
        ({"codes_NK": torch.zeros(2, 64)}, "uint8"),
        ({"bits": 3}, "bits = 3"),
        ({"zero": 16}, "zero = 16"),
        ({"group_size": 48}, "group_size = 48"),
        ({"group_size": 64}, "scales"),
        ({"mins_NG": torch.ones(2, 1)}, "mins"),
        ({"scales_NG": scales.double()}, "scales"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantizedTensor(**{**good, "scales_NG": scales, **changes})
    with pytest.raises(ValueError, match="float32"):
        Fp8Tensor(codes_NK=torch.zeros(2, 64, dtype=torch.uint8), scales_N=torch.ones(3))
