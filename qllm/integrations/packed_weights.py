"""Forms of weights for kernels, kept beside tensors of torch that belong to somebody else."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from .. import _core

Form = TypeVar("Form")


class PackedWeights(Generic[Form]):
    """Packed forms of weights that belong to somebody else, found by the memory of their tensors.

    A form is used as long as all tensors it was made of are in the same memory and unchanged: by
    torch's version counters, which every change of a tensor in place raises, and on the CPU by a
    sample of their bytes, since `tensor.data` changes without one. It is dropped when the memory is
    freed.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], tuple[tuple[int, ...], Form, list[Any]]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        """Forgets all."""
        self._held.clear()

    def get(
        self, tensors: Sequence[Tensor], options: tuple[Any, ...], make: Callable[[], Form]
    ) -> Form:
        """The form for these tensors and options, from `make` where there is none or another."""
        places: list[int] = []
        state: list[int] = []
        for tensor in tensors:
            places += (tensor.data_ptr(), tensor.nbytes)
            # a tensor made in inference mode has no version, and none of its changes are counted
            state.append(-1 if tensor.is_inference() else tensor._version)
        if tensors[0].is_cpu:
            state.append(_core.sample_words(*places))
        key = (*options, *places)
        found = self._held.get(key)
        if found is not None and found[0] == tuple(state):
            return found[1]
        made = make()

        def forget(_: Any) -> None:
            self._held.pop(key, None)

        watched = [weakref.ref(tensor.untyped_storage(), forget) for tensor in tensors]
        self._held[key] = tuple(state), made, watched
        return made
