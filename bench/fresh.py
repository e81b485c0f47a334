"""The first picture of a new process, as hart-run draws it: where its time and memory go.

The process is this module (``python -m hart_runtime.bench.fresh``), so that its peak memory is its own; it
imports what hart-run imports and nothing of the benchmark's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FirstPicture:
    """Seconds and bytes of one fresh process that draws one picture."""

    imports: float
    """Process start to everything imported, the inference library included."""
    verify: float
    """Reading the bundle's manifest and checking every file's hash."""
    open: float
    """Creating sessions or deserializing engines."""
    run: float
    """The first picture, prompt to pixels."""
    save: float
    total: float
    """Process start to the PNG on disk."""
    imports_bytes: int
    """Resident memory after the imports."""
    open_bytes: int
    """Resident memory with everything loaded, and the text encoder closed again."""
    peak_bytes: int
    """Highest resident memory of the process, weights included."""
    gpu_bytes: int | None
    """Growth of the GPU memory in use, None without NVML."""


def draw_in_a_fresh_process(
    bundle: Path, device: str, threads: int | None, backend: str, size: int | None = None
) -> FirstPicture:
    """Start a process that draws one picture, and return what it says of itself.

    Raises:
        RunError: the process failed; holds the last line it wrote.
    """
    from hart_runtime.bench import gpu
    from hart_runtime.common.errors import RunError
    from hart_runtime.runtime.backends.names import parse_device

    before = gpu.memory_used(parse_device(device)[1])
    options = {"bundle": str(bundle), "device": device, "threads": threads, "backend": backend, "size": size}
    done = subprocess.run(
        [sys.executable, "-m", "hart_runtime.bench.fresh", json.dumps({**options, "started": time.time()})],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"a fresh process could not draw a picture with {bundle}: {last}")
    values = json.loads(done.stdout)
    after = values.pop("gpu_used")
    grown = None if before is None or after is None else after - before
    return FirstPicture(**values, gpu_bytes=grown)


def _draw(options: dict[str, Any]) -> dict[str, Any]:
    """Load, draw and save once in this process."""
    import rich.progress  # noqa: F401

    import hart_runtime.runtime.cli  # noqa: F401
    from hart_runtime.bench.workload import drawing, subject
    from hart_runtime.runtime.backends.backend import Backend
    from hart_runtime.runtime.backends.names import AUTO, ONNXRUNTIME, OPENVINO
    from hart_runtime.runtime.backends.registry import open_backend
    from hart_runtime.runtime.bundle import Bundle, open_bundle
    from hart_runtime.runtime.pipeline import Pipeline
    from hart_runtime.runtime.stages import TEXT_ENCODER

    if options["backend"] in (AUTO, ONNXRUNTIME):
        import onnxruntime  # noqa: F401
    elif options["backend"] == OPENVINO:
        import openvino  # noqa: F401

    times = [options["started"], time.time()]
    imports_bytes = _resident("VmRSS")
    bundle = open_bundle(Path(options["bundle"])).at_size(options["size"])
    times.append(time.time())
    encoding, last = 0.0, times[-1]

    def open_part(part: Bundle) -> Backend:
        return open_backend(part, options["device"], options["threads"], options["backend"])

    def lap(stage: str) -> None:
        nonlocal encoding, last
        now = time.time()
        if stage == TEXT_ENCODER:
            encoding += now - last
        last = now

    asked = subject(bundle)
    if asked is not None:
        pipeline = Pipeline.for_prompts(bundle, [asked], 1, open_part, options["threads"], lap)
    else:
        pipeline = Pipeline(bundle, open_part(bundle), options["threads"])
    draw = drawing(pipeline, 1)
    times.append(time.time())
    open_bytes = _resident("VmRSS")
    image = draw()[0]
    times.append(time.time())
    with tempfile.TemporaryDirectory(prefix="hart-bench-") as folder:
        image.save(Path(folder) / "out.png")
        times.append(time.time())
    names = ("imports", "verify", "open", "run", "save")
    seconds = {name: end - start for name, start, end in zip(names, times, times[1:], strict=False)}
    seconds["open"] -= encoding
    seconds["run"] += encoding
    peak = _resident("VmHWM")

    from hart_runtime.bench import gpu
    from hart_runtime.runtime.backends.names import parse_device

    return {
        **seconds,
        "total": times[-1] - times[0],
        "imports_bytes": imports_bytes,
        "open_bytes": open_bytes,
        "peak_bytes": peak,
        "gpu_used": gpu.memory_used(parse_device(options["device"])[1]),
    }


def _resident(kind: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process, in bytes.

    Not ru_maxrss: a new process inherits that from the one that started it.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{kind}:\s*(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    print(json.dumps(_draw(json.loads(sys.argv[1]))))
