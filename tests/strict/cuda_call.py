"""How the functions of the played CUDA runtime answer: a status first, then what they give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

from tests.strict import cuda_names
from tests.strict.cuda_names import cudaError_t
from tests.strict.device import Refused, StrictCuda
from tests.strict.rules import BrokenRule

P = ParamSpec("P")


def gives(values: int = 0) -> Callable[[Callable[P, Any]], Callable[P, tuple[Any, ...]]]:
    """A function of CUDA that gives this many values, or None for each where it fails."""

    def decorated(function: Callable[P, Any]) -> Callable[P, tuple[Any, ...]]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> tuple[Any, ...]:
            cuda: StrictCuda = args[0]._cuda  # type: ignore[attr-defined]
            with cuda.lock:
                try:
                    cuda.enter(function.__name__)
                    found = function(*args, **kwargs)
                except Refused as refused:
                    cuda.last_error = refused.status
                    return (refused.status, *[None] * values)
                except BrokenRule as broken:
                    cuda.note(broken)
                    raise
            return (cudaError_t.cudaSuccess, *(found if values > 1 else [found] * values))

        return call

    return decorated


class Calls:
    """Functions of CUDA on a played device, with its enumerations and numbers beside them."""

    def __init__(self, cuda: StrictCuda) -> None:
        self._cuda = cuda

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cuda") and hasattr(cuda_names, name):
            return getattr(cuda_names, name)
        raise AttributeError(f"module 'cuda.bindings.runtime' has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        own = [name for cls in type(self).__mro__ for name in vars(cls)]
        return [name for name in [*own, *vars(cuda_names)] if name.startswith("cuda")]
