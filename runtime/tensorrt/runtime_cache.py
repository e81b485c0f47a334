"""What TensorRT-RTX compiles for a GPU at first use, kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from typing import Any

from platformdirs import user_cache_path

from hart_runtime.runtime.tensorrt.manifest import EngineManifest
from hart_runtime.runtime.tensorrt.package import Package


class RuntimeCache:
    """One file for the engines of a bundle; nothing is lost without it but time."""

    def __init__(self, package: Package, manifest: EngineManifest, engines: Iterable[str]) -> None:
        self._trt = package.api
        hashes = "".join(manifest.engines[name].file.identity for name in engines)
        identity = hashlib.sha256(hashes.encode()).hexdigest()[:16]
        self._file = user_cache_path("hart-runtime") / f"{package.name}-{package.version}-{identity}.cache"
        self._cache: Any = None
        self._written = b""
        self._grown = False

    def configure(self, engine: Any) -> Any:
        """Runtime configuration of a context: shared cache, captured graphs."""
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._file.is_file():
                self._written = self._file.read_bytes()
                self._cache.deserialize(self._written)
        config.set_runtime_cache(self._cache)
        self._grown = True
        return config

    def save(self, again: bool = False) -> None:
        """Write what contexts added since; ``again`` for what arrived late, compiled while others ran."""
        if not (self._grown or again):
            return
        self._grown = False
        if self._cache is None or (held := bytes(self._cache.serialize())) == self._written:
            return
        with contextlib.suppress(OSError):  # a folder that cannot be written costs only time
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_suffix(".partial")
            partial.write_bytes(held)
            partial.replace(self._file)
            self._written = held

    def close(self) -> None:
        """Write the rest, and let go of it: it belongs to an engine."""
        self.save(again=True)
        self._cache = None
