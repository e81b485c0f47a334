"""Runs an exported HART bundle. No torch anywhere below this package.

>>> from runtime import Pipeline
>>> Pipeline.load("engines/demo")("a red circle", seed=0)[0].save("out.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline, Result, Scale

__all__ = ["Pipeline", "Result", "Scale"]


def __getattr__(name: str) -> Any:
    """Load the pipeline on first use: ``hart-run --help`` should not wait for it."""
    if name in __all__:
        import runtime.pipeline

        return getattr(runtime.pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
