"""CUDA memory, streams and graphs, through cuda-python."""

from __future__ import annotations

from typing import Any

from hart.errors import InputError, RunError


def cuda() -> Any:
    """The runtime bindings of cuda-python.

    Raises:
        InputError: they are not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise InputError(
            f"cuda-python cannot be loaded ({error}); install it with: pip install cuda-bindings"
        ) from None
    return runtime


def check(result: tuple[Any, ...]) -> Any:
    """Value of a CUDA call.

    Raises:
        RunError: the call failed.
    """
    status, *values = result
    if int(status) != 0:
        raise RunError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def compute_capability() -> str | None:
    """That of the first GPU, such as "8.9"; None where there is no GPU (or no cuda-python)."""
    try:
        api = cuda()
        if check(api.cudaGetDeviceCount()) == 0:
            return None
        attribute = api.cudaDeviceAttr
        major = check(api.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, 0))
        minor = check(api.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, 0))
    except (InputError, RunError):
        return None
    return f"{major}.{minor}"
