"""How a step in native code adds up the partial sums of a tensor-parallel group: a C function, or a call back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from aios_quant.native.step_structures import ReduceFunction


class StepReduction(Protocol):
    """What `aios::Decoder` calls between segments: `void reduce(void* context, float* values, int64_t count)`."""

    @property
    def function(self) -> int:
        """Address of the C function, which sums `values` over all ranks, in place."""
        ...

    @property
    def context(self) -> int:
        """Its first argument."""
        ...

    def check(self) -> None:
        """Raises if a sum of the step that just ended could not be made; the step's numbers are worthless then."""
        ...


class PythonReduction:
    """Calls back into Python, for groups that cannot be reached from C: some tens of microseconds a call.

    Args:
        all_reduce: Replaces a float32 tensor [count] by the sum over all ranks.
    """

    context = 0

    def __init__(self, all_reduce: Callable[[Tensor], object]) -> None:
        self._all_reduce = all_reduce
        self._error: Exception | None = None
        self._function = ReduceFunction(self._call)

    @property
    def function(self) -> int:
        """See StepReduction."""
        address = ctypes.cast(self._function, ctypes.c_void_p).value
        assert address is not None
        return address

    def check(self) -> None:
        """See StepReduction."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _call(self, _context: object, values: ctypes._Pointer[ctypes.c_float], count: int) -> None:
        if self._error is not None:
            return  # the step is lost: it only has to end
        try:
            array = (ctypes.c_float * count).from_address(ctypes.addressof(values.contents))
            self._all_reduce(torch.frombuffer(array, dtype=torch.float32))
        except Exception as error:
            self._error = error
