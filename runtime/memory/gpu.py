"""Which GPU this is, as far as programs that were built for one depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime.memory.cuda import check, cuda


@dataclass(frozen=True)
class Gpu:
    """One model of GPU."""

    name: str
    """As its driver spells it."""
    capability: str
    """Compute capability, such as "8.9"."""
    multiprocessors: int
    memory: int
    """Bytes."""

    def is_like(self, other: Gpu) -> bool:
        """Whether what was built on one is for the other: drivers differ a little in the memory they tell."""
        same = (self.name, self.capability, self.multiprocessors)
        alike = same == (other.name, other.capability, other.multiprocessors)
        return alike and abs(self.memory - other.memory) < 0.05 * self.memory

    def __str__(self) -> str:
        return f"{self.name} ({self.multiprocessors} multiprocessors, {self.memory / 1e9:.1f} GB)"


def present_gpu(device: int = 0) -> Gpu | None:
    """What CUDA says of a GPU; None where there is none, or no cuda-python."""
    try:
        api = cuda()
        if check(api.cudaGetDeviceCount()) <= device:
            return None
        found = check(api.cudaGetDeviceProperties(device))
    except (InputError, RunError):
        return None
    name = found.name.decode(errors="replace") if isinstance(found.name, bytes) else str(found.name)
    return Gpu(
        name=name.strip("\0 "),
        capability=f"{found.major}.{found.minor}",
        multiprocessors=int(found.multiProcessorCount),
        memory=int(found.totalGlobalMem),
    )
