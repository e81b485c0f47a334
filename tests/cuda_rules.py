"""Asks a real CUDA whether the rules hold that the tests' own CUDA enforces.

``python -m tests.cuda_rules [--output FILE.json] [NUMBER ...]``. Every rule is asked in a process of its own,
since some errors of a device last until its process ends. A rule that CUDA breaks makes a stand-in that is
too kind, and is a failure; one that CUDA is more lenient about is only told. Exit code 1: one is broken.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BYTES = 1024
PAST = 64 << 20
"""Bytes that are more than an allocation of :data:`BYTES` can have behind it."""
HELD = 0.3
"""Seconds for which a stream is kept busy."""
LIMIT = 120
"""Seconds of one rule's process; the first use of a GPU takes its time."""
OUT_OF_MEMORY, NO_DEVICE, INVALID_HANDLE, NOT_READY, ILLEGAL_ADDRESS = 2, 100, 400, 600, 700
UP, DOWN, BETWEEN = "cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"
GLOBAL, LOCAL = "cudaStreamCaptureModeGlobal", "cudaStreamCaptureModeThreadLocal"


class Broken(Exception):  # noqa: N818  (what it is)
    """CUDA does what the rule says it never does."""


class Lenient(Exception):  # noqa: N818
    """CUDA allows what the rule forbids: nothing depends on that."""


class Unasked(Exception):  # noqa: N818
    """It cannot be asked without harm, or not on this machine."""


def expect(what: str, found: object, *allowed: object) -> None:
    if found not in allowed:
        raise Broken(f"{what}: found {found}, the rule says {' or '.join(map(str, allowed))}")


class Device:
    """A stream, two allocations and a page-locked buffer."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self.stream = self.ok(api.cudaStreamCreateWithFlags(api.cudaStreamNonBlocking))
        self.a, self.b = self.ok(api.cudaMalloc(BYTES)), self.ok(api.cudaMalloc(BYTES))
        self.pinned, self.back = self.ok(api.cudaMallocHost(BYTES)), self.ok(api.cudaMallocHost(BYTES))
        floats(self.pinned)[:] = 7
        floats(self.back)[:] = 0

    @staticmethod
    def ok(answer: tuple[Any, ...]) -> Any:
        expect("a plain call", int(answer[0]), 0)
        return answer[1] if len(answer) > 1 else None

    def copy(self, to: Any, source: Any, kind: str, stream: Any = None, nbytes: int = BYTES) -> int:
        direction = getattr(self.api.cudaMemcpyKind, kind)
        on = self.stream if stream is None else stream
        return status(self.api.cudaMemcpyAsync, to, source, nbytes, direction, on)

    def begin(self, mode: str = LOCAL) -> int:
        return status(
            self.api.cudaStreamBeginCapture, self.stream, getattr(self.api.cudaStreamCaptureMode, mode)
        )

    def end(self) -> int:
        return status(self.api.cudaStreamEndCapture, self.stream)

    def captured(self) -> Any:
        """A copy from a to b that can be launched."""
        expect("a capture", self.begin(), 0)
        expect("a captured copy", self.copy(self.b, self.a, BETWEEN), 0)
        graph = self.ok(self.api.cudaStreamEndCapture(self.stream))
        return self.ok(self.api.cudaGraphInstantiate(graph, 0))

    def wait(self) -> None:
        self.ok(self.api.cudaStreamSynchronize(self.stream))

    def what_lies_at(self, address: int) -> float:
        expect("a copy back", self.copy(self.back, address, DOWN), 0)
        self.wait()
        return float(floats(self.back)[0])

    def hold(self) -> None:
        """Keep the stream busy; a stand-in that is late anyway has no such call."""
        if launch := getattr(self.api, "cudaLaunchHostFunc", None):
            sleep = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value
            self.ok(launch(self.stream, sleep, int(HELD * 1e6)))


def status(call: Callable[..., Any], *arguments: Any) -> int:
    """What a call answers."""
    return int(call(*arguments)[0])


def floats(address: Any) -> NDArray[np.float32]:
    return np.ctypeslib.as_array((ctypes.c_float * (BYTES // 4)).from_address(int(address)))


@contextlib.contextmanager
def elapsed() -> Iterator[list[float]]:
    start, found = time.perf_counter(), [0.0]
    yield found
    found[0] = time.perf_counter() - start


def rule_01(api: Any) -> str:
    device = Device(api)
    device.hold()
    expect("an upload", device.copy(device.a, device.pinned, UP), 0)
    expect("a copy back", device.copy(device.back, device.a, DOWN), 0)
    expect("what came back before the wait", float(floats(device.back)[0]), 0.0)
    expect("the busy stream", status(api.cudaStreamQuery, device.stream), NOT_READY)
    device.wait()
    expect("what came back", float(floats(device.back)[0]), 7.0)
    return "copies on a busy stream return at once and happen later"


def rule_02(api: Any) -> str:
    device = Device(api)
    event = device.ok(api.cudaEventCreate())
    host = np.zeros(4, np.float32)
    down = api.cudaMemcpyKind.cudaMemcpyDeviceToHost
    calls = {
        "cudaMalloc": (8,),
        "cudaFree": (device.b,),
        "cudaMallocHost": (8,),
        "cudaFreeHost": (device.back,),
        "cudaMemcpy": (host.ctypes.data, device.a, 16, down),
        "cudaMemset": (device.a, 0, 16),
        "cudaStreamSynchronize": (device.stream,),
        "cudaDeviceSynchronize": (),
        "cudaEventSynchronize": (event,),
    }
    allowed = []
    for name, arguments in calls.items():
        expect("a capture", device.begin(), 0)
        answer = status(getattr(api, name), *arguments)
        api.cudaGetLastError()
        ended = device.end()
        if answer == 0 and ended == 0:
            allowed.append(name)
            if name == "cudaFree":
                device.b = device.ok(api.cudaMalloc(BYTES))
            if name == "cudaFreeHost":
                device.back = device.ok(api.cudaMallocHost(BYTES))
        else:
            expect(f"the end of a capture with {name} ({answer})", ended != 0, True)
    device.ok(device_copy(device))
    if allowed:
        raise Lenient(f"a capture survives {', '.join(allowed)}")
    return f"{len(calls)} calls are refused in a capture and invalidate it"


def device_copy(device: Device) -> tuple[int]:
    """A copy, and a wait for it."""
    answer = device.copy(device.a, device.pinned, UP)
    device.wait()
    return (answer,)


def rule_03(api: Any) -> str:
    device = Device(api)

    def elsewhere() -> int:
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(status(api.cudaMalloc, 8)))
        thread.start()
        thread.join()
        return answers[0]

    device.begin(LOCAL)
    expect("cudaMalloc of another thread, in thread-local mode", elsewhere(), 0)
    expect("the capture", device.end(), 0)
    device.begin(GLOBAL)
    refused, ended = elsewhere(), device.end()
    if refused == 0 and ended == 0:
        raise Lenient("a capture in global mode survives cudaMalloc of another thread")
    return f"in global mode another thread's cudaMalloc answers {refused}, and the capture {ended}"


def rule_04(api: Any) -> str:
    device = Device(api)
    device.begin()
    second = device.begin()
    expect("a second capture on the stream", second != 0, True)
    status(api.cudaMalloc, 8)
    api.cudaGetLastError()
    answer = device.copy(device.a, device.pinned, UP)
    expect("the end of an invalid capture", device.end() != 0, True)
    api.cudaGetLastError()
    device.ok(device_copy(device))
    if answer == 0:
        raise Lenient("a copy on a stream with an invalid capture succeeds")
    return f"until it is ended, an invalid capture answers {answer}; then the stream is as good as new"


def rule_05(api: Any) -> str:
    device = Device(api)
    launchable = device.captured()
    for value in (1.0, 2.0):
        floats(device.pinned)[:] = value
        device.ok(device_copy(device))
        expect("the target before the launch", device.what_lies_at(device.b) == value, False)
        device.ok(api.cudaGraphLaunch(launchable, device.stream))
        expect("the target after it", device.what_lies_at(device.b), value)
    return "a captured copy runs at each launch, on what lies there then"


def rule_06(api: Any) -> str:
    device = Device(api)
    device.ok(api.cudaFree(device.b))
    beyond = {"a second free": status(api.cudaFree, device.b)}
    api.cudaGetLastError()
    much = np.zeros(PAST, np.uint8)
    beyond["a copy past the end"] = device.copy(device.a, much.ctypes.data, UP, nbytes=PAST)
    after = status(api.cudaStreamSynchronize, device.stream)
    if passed := [what for what, answer in beyond.items() if not answer and not after]:
        raise Lenient(f"{', '.join(passed)} passes")
    answers = ", ".join(f"{what} ({answer})" for what, answer in beyond.items())
    return f"refused: {answers}; a wait afterwards answers {after}"


def rule_07(api: Any) -> str:
    device = Device(api)
    device.hold()
    device.copy(device.a, device.pinned, UP)
    with elapsed() as took:
        answer = status(api.cudaFree, device.a)
    device.wait()
    if answer:
        return f"a free of memory in use answers {answer}"
    waited = took[0] > HELD / 2
    raise Lenient(f"a free of memory in use {'waits for it' if waited else 'returns at once'}")


def rule_08(api: Any) -> str:
    device = Device(api)
    device.hold()
    device.copy(device.a, device.pinned, UP)
    floats(device.pinned)[:] = 8
    late = device.what_lies_at(device.a) == 8
    pageable = np.full(BYTES // 4, 3, np.float32)
    device.hold()
    with elapsed() as took:
        answer = device.copy(device.a, pageable.ctypes.data, UP)
    pageable[:] = 4
    arrived = device.what_lies_at(device.a)
    if answer:
        return "refused"
    how = f"one from pageable memory returns in {took[0] * 1e3:.1f} ms and brings what was "
    how += "there then" if arrived == 3 else "there later"
    page = "later" if late else "then"
    raise Lenient(f"a copy from page-locked memory brings what lies there {page}; {how}")


def rule_09(api: Any) -> str:
    device = Device(api)
    array = np.zeros(BYTES // 4, np.float32)
    device.ok(device_copy(device))
    device.hold()
    with elapsed() as took:
        expect("a copy to pageable memory", device.copy(array.ctypes.data, device.a, DOWN), 0)
    device.wait()
    expect("what came", float(array[0]), 7.0)
    return (
        f"a copy to pageable memory returns after {took[0] * 1e3:.0f} ms of {HELD * 1e3:.0f} on a busy stream"
    )


def rule_10(api: Any) -> str:
    device = Device(api)
    pageable = np.full(BYTES // 4, 3, np.float32)
    device.begin()
    answer = device.copy(device.a, pageable.ctypes.data, UP)
    ended = device.end()
    api.cudaGetLastError()
    if answer == 0 and ended == 0:
        raise Lenient("a copy from pageable memory is captured, with its address")
    return f"a copy from pageable memory answers {answer} in a capture, and its end {ended}"


def rule_11(api: Any) -> str:
    device = Device(api)
    device.hold()
    device.copy(device.a, device.pinned, UP)
    with elapsed() as took:
        answer = status(api.cudaMemsetAsync, device.b, 0, BYTES, 0)
        if answer == 0:
            status(api.cudaStreamSynchronize, 0)
    device.wait()
    if answer:
        return "refused"
    if took[0] > HELD / 2:
        raise Broken("the default stream waited for a non-blocking one")
    return f"the default stream went on after {took[0] * 1e3:.1f} ms beside a busy non-blocking one"


def rule_12(api: Any) -> str:
    raise Unasked("CUDA counts no handles")


def rule_13(api: Any) -> str:
    device = Device(api)
    first, second = device.ok(api.cudaEventCreate()), device.ok(api.cudaEventCreate())
    untimed = device.ok(api.cudaEventCreateWithFlags(api.cudaEventDisableTiming))
    expect("events that were not recorded", status(api.cudaEventElapsedTime, first, second), INVALID_HANDLE)
    api.cudaGetLastError()
    device.ok(api.cudaEventRecord(first, device.stream))
    device.hold()
    device.copy(device.a, device.pinned, UP)
    for event in (second, untimed):
        device.ok(api.cudaEventRecord(event, device.stream))
    expect("an event that has not come", status(api.cudaEventElapsedTime, first, second), NOT_READY)
    device.ok(api.cudaEventSynchronize(second))
    device.ok(api.cudaEventElapsedTime(first, second))
    expect("an event without time", status(api.cudaEventElapsedTime, first, untimed), INVALID_HANDLE)
    return "only events that were recorded and have come have a time"


def rule_14(api: Any) -> str:
    device = Device(api)
    launchable = device.captured()
    device.hold()
    device.copy(device.a, device.pinned, UP)
    device.ok(api.cudaGraphLaunch(launchable, device.stream))
    answer = status(api.cudaGraphExecDestroy, launchable)
    arrived = device.what_lies_at(device.b) == 7
    if answer:
        return f"a graph in flight is not destroyed ({answer})"
    raise Lenient(f"a graph can be destroyed in flight, its work {'is done' if arrived else 'is lost'}")


FAULT = b"""
.version 7.0
.target sm_75
.address_size 64
.visible .entry fault() { .reg .u64 %a; .reg .u32 %v; mov.u64 %a, 16; mov.u32 %v, 1;
st.global.u32 [%a], %v; ret; }
"""
"""Writes where nobody may, in the language that drivers compile themselves."""


def rule_15(api: Any) -> str:
    device = Device(api)
    try:
        from cuda.bindings import driver
    except ImportError:
        raise Unasked("a kernel that fails needs the driver's bindings") from None
    module = device.ok(driver.cuModuleLoadData(FAULT))
    kernel = device.ok(driver.cuModuleGetFunction(module, b"fault"))
    device.ok(driver.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, int(device.stream), 0, 0))
    answers = {
        "a wait": status(api.cudaStreamSynchronize, device.stream),
        "a second wait": status(api.cudaStreamSynchronize, device.stream),
        "cudaMalloc": status(api.cudaMalloc, 8),
        "cudaFree": status(api.cudaFree, device.a),
        "cudaMemcpyAsync": device.copy(device.b, device.pinned, UP),
    }
    for what, answer in answers.items():
        expect(f"{what} on a lost device", answer, ILLEGAL_ADDRESS)
    return "every call on a lost device answers alike"


def rule_16(api: Any) -> str:
    device = Device(api)
    _, total = api.cudaMemGetInfo()[1:]
    expect("more than there is", status(api.cudaMalloc, total * 2), OUT_OF_MEMORY)
    expect("the last error", int(api.cudaGetLastError()[0]), OUT_OF_MEMORY, 0)
    expect("the last error after it was asked for", int(api.cudaGetLastError()[0]), 0)
    expect("a little", status(api.cudaMalloc, 8), 0)
    device.ok(device_copy(device))
    return "memory that is out is out for that call alone"


def rule_17(api: Any) -> str:
    answer = int(api.cudaGetDeviceCount()[0])
    if answer == 0:
        raise Unasked("no GPU was to be visible, and one is")
    expect("a machine whose GPUs are hidden", answer, NO_DEVICE)
    return "no device is error 100; a driver that is too old cannot be had here"


def rule_18(api: Any) -> str:
    device = Device(api)
    addresses = [device.ok(api.cudaMalloc(size)) for size in (1, 3, 257, 1000, 65537, 3 << 20)]
    expect("addresses beside a multiple of 256", [a for a in addresses if int(a) % 256], [])
    return "allocations begin at multiples of 256"


RULES = {
    int(name.removeprefix("rule_")): f for name, f in list(globals().items()) if name.startswith("rule_")
}
HIDDEN = {17}
"""Asked with every GPU hidden."""


def ask(number: int) -> tuple[str, str]:
    """How one rule stands here, in a word and in a sentence."""
    try:
        from cuda.bindings import runtime

        return "holds", RULES[number](runtime)
    except Lenient as error:
        return "lenient", str(error)
    except Unasked as error:
        return "not asked", str(error)
    except Broken as error:
        return "broken", str(error)
    except AssertionError as error:  # of a stand-in, where CUDA would do harm
        return "holds", str(error)


def ask_apart(number: int) -> tuple[str, str]:
    """The same in a process of its own."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if number in HIDDEN else {}
    command = [sys.executable, "-m", "tests.cuda_rules", "--one", str(number)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
            env={**os.environ, **hidden},
            cwd=Path(__file__).parent.parent,
        )
    except subprocess.TimeoutExpired:
        return "broken", f"no answer after {LIMIT} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return "broken", last
    word, sentence = json.loads(lines[-1])
    return word, sentence


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--one"]:
        print(json.dumps(ask(int(arguments[1]))))
        return 0
    output = Path(arguments[1]) if arguments[:1] == ["--output"] else None
    numbers = [int(a) for a in arguments[2 if output else 0 :]] or [*RULES]
    found = {}
    for number in numbers:
        found[number] = ask_apart(number)
        print(f"rule {number}: {': '.join(found[number])}", flush=True)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(word == "broken" for word, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
