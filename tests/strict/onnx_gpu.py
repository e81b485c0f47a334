"""Plays ONNX Runtime with its CUDA provider, on a :class:`tests.strict.device.StrictCuda`.

Everything that is not about CUDA is the real library.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime as real

from tests.strict.device import Refused, StrictCuda
from tests.strict.onnx_session import CPU, CUDA, Arena, Session
from tests.strict.rules import BrokenRule

DEFAULTS = {
    "device_id": "0",
    "user_compute_stream": "0",
    "enable_cuda_graph": "0",
    "use_tf32": "1",
    "arena_extend_strategy": "kNextPowerOfTwo",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "cudnn_conv_use_max_workspace": "1",
    "do_copy_in_default_stream": "1",
    "gpu_mem_limit": "18446744073709551615",
}
"""Of the provider's options, as far as somebody may set them here."""


class StrictOnnx:
    """The library that tests put in the place of ``onnxruntime``, as far as it is about CUDA."""

    def __init__(self, cuda: StrictCuda) -> None:
        self.cuda = cuda
        self.arena_limit: int | None = None
        """Bytes that all arenas together may grow to."""
        self.arena_bytes = 0
        self.shared: Arena | None = None
        self.api = _Module(self)

    def count(self, call: str, nbytes: int) -> None:
        """Bytes that an arena took more."""
        self.arena_bytes += nbytes
        if self.arena_limit is not None and self.arena_bytes > self.arena_limit:
            raise BrokenRule(39, call, f"arenas of {self.arena_bytes} bytes, the limit is {self.arena_limit}")


class _Module(ModuleType):
    """What is imported: the real module, but for what is played."""

    def __init__(self, strict: StrictOnnx) -> None:
        super().__init__("onnxruntime")
        self._strict = strict

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def preload_dlls(
        self, cuda: bool = True, cudnn: bool = True, msvc: bool = True, directory: Any = None
    ) -> None:
        pass

    def create_and_register_allocator_v2(self, provider: str, memory: Any, options: Any, arena: Any) -> None:
        if provider != CUDA:
            real.create_and_register_allocator_v2(provider, memory, options, arena)
            return
        exact = 1 in {arena.arena_extend_strategy, int(options.get("arena_extend_strategy", 0) or 0)}
        self._strict.shared = Arena(self._strict, int(memory.device_id), exact)

    def InferenceSession(
        self,
        path_or_bytes: Any,
        sess_options: Any = None,
        providers: Any = None,
        provider_options: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = [p if isinstance(p, tuple) else (p, {}) for p in providers or ()]
        options = {name: dict(own) for name, own in given}
        for (name, _), own in zip(given, provider_options or (), strict=False):
            options[name].update(own)
        if CUDA not in options:
            return real.InferenceSession(path_or_bytes, sess_options, providers, provider_options, **kwargs)
        try:
            self._strict.cuda.enter("InferenceSession")
        except Refused:  # it says so on stderr, and goes on without the device
            return real.InferenceSession(path_or_bytes, sess_options, [CPU], **kwargs)
        return Session(self._strict, Path(path_or_bytes), sess_options, {**DEFAULTS, **_texts(options[CUDA])})


def _texts(options: dict[str, Any]) -> dict[str, str]:
    if unknown := set(options) - set(DEFAULTS):
        raise RuntimeError(f"Unknown provider option: {', '.join(sorted(unknown))}")
    return {name: str(value) for name, value in options.items()}
