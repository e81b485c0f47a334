"""What TensorRT measured while it built engines: with it, the next build measures only what is new.

Kept in two places: beside the engines, so that a bundle that is carried over brings it along, and in the
user's cache folder, for every other bundle. The files are for one version of the package and one model of
GPU. They only save time: one that cannot be used is ignored, and so is a folder that cannot be written.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from hart_runtime.common.files import read_regular
from hart_runtime.runtime.memory.gpu import Gpu
from hart_runtime.runtime.tensorrt.package import Package

TIMINGS = "timing-*.cache"
"""Names of its files."""


class TimingCache:
    """Measurements of one package on one GPU, read once and written after every engine."""

    def __init__(self, package: Package, gpu: Gpu | None, folder: Path) -> None:
        """``folder``: of the bundle."""
        # What is built ahead of time, or for a GPU that is not known, measures nothing that could be kept.
        keeps = gpu is not None and not package.ahead_of_time
        name = timing_file(package, gpu) if gpu is not None else ""
        self._files = [place / name for place in (folder, user_cache_path("hart-runtime"))] if keeps else []
        self._found = [data for file in self._files if (data := _read(file))]
        self._cache: Any = None

    def load(self, config: Any) -> None:
        """Give a builder's configuration everything that is known."""
        if not self._files:
            return
        self._cache = config.create_timing_cache(b"")
        for data in self._found:
            other = config.create_timing_cache(data)
            if other is not None:
                self._cache.combine(other, False)  # of another GPU or version: not taken
        config.set_timing_cache(self._cache, False)

    def save(self, config: Any) -> None:
        """Keep what a build has measured."""
        if not self._files:
            return
        data = bytes(config.get_timing_cache().serialize())
        self._found = [data]
        for file in self._files:
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(".partial")
                partial.write_bytes(data)
                partial.replace(file)


def timing_file(package: Package, gpu: Gpu) -> str:
    """Such as ``timing-tensorrt-10.13.3.9-nvidia-h200.cache``."""
    model = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return f"timing-{package.name}-{package.version}-{model}.cache"


def _read(file: Path) -> bytes:
    try:
        return read_regular(file)
    except OSError:
        return b""
