"""The rules of CUDA, each broken once on the stand-in, as a careless executor would."""

from __future__ import annotations

import enum
import importlib.util
import inspect
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.strict import install_cuda
from tests.strict.callers import DOWN, GLOBAL, LOCAL, UP, Host, Status, breaks
from tests.strict.cuda import CudaRuntime
from tests.strict.device import StrictCuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StrictCuda:
    return install_cuda(monkeypatch)


@pytest.fixture
def host(cuda: StrictCuda) -> Host:
    return Host(cuda)


def test_every_rule_has_its_test() -> None:
    files = Path(__file__).parent.glob("test_rules*.py")
    found = re.findall(r"^def test_rule_(\d\d)\(", "".join(f.read_text() for f in files), re.MULTILINE)
    assert sorted(map(int, found)) == [*range(1, 41)]


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-python is not installed")
def test_the_runtime_is_the_real_one_s() -> None:
    """No function that cuda-python lacks, the same arguments, the same numbers."""
    from cuda.bindings import runtime as real

    played = CudaRuntime(StrictCuda(()))
    for name in dir(played):
        theirs, ours = getattr(real, name), getattr(played, name)
        if isinstance(ours, type) and issubclass(ours, enum.Enum):
            assert {k: v.value for k, v in ours.__members__.items()}.items() <= {
                k: v.value for k, v in theirs.__members__.items()
            }.items(), name
        elif isinstance(ours, int):
            assert ours == theirs, name
        elif not isinstance(ours, type):
            taken = re.findall(r"(\w+)(?:: \w+)?[,)]", theirs.__doc__.splitlines()[0])
            assert taken == [*inspect.signature(ours).parameters], name


def test_rule_01(host: Host) -> None:
    """Work happens when somebody waits."""
    assert np.isnan(host.floats(host.a)).all(), "fresh memory"
    host.upload()
    host.between()
    assert np.isnan(host.floats(host.b)).all()
    assert host.api.cudaStreamQuery(host.stream) == (Status.cudaErrorNotReady,)
    host.wait()
    assert (host.floats(host.b) == 7).all()
    assert host.cuda.counts.uploads == 1
    assert host.cuda.counts.waits == {"cudaStreamSynchronize": 1}
    host.upload()
    with breaks(host.cuda, 1):
        while host.api.cudaStreamQuery(host.stream)[0] == Status.cudaErrorNotReady:
            pass


@pytest.mark.parametrize("mode", [GLOBAL, LOCAL])
def test_rule_02(host: Host, mode: Any) -> None:
    """No waiting and no new memory while a stream is capturing."""
    event, pageable = host.ok(host.api.cudaEventCreate()), np.zeros(4, np.float32)
    for name, arguments in {
        "cudaMalloc": (8,),
        "cudaFree": (host.b,),
        "cudaMallocHost": (8,),
        "cudaHostAlloc": (8, 0),
        "cudaFreeHost": (host.pinned,),
        "cudaMemcpy": (pageable, host.a, 16, DOWN),
        "cudaMemset": (host.a, 0, 16),
        "cudaStreamSynchronize": (host.stream,),
        "cudaDeviceSynchronize": (),
        "cudaEventSynchronize": (event,),
    }.items():
        host.begin(mode)
        host.between()
        answer = getattr(host.api, name)(*arguments)
        assert answer[0] == Status.cudaErrorStreamCaptureUnsupported, name
        assert host.api.cudaGetLastError() == (answer[0],)
        assert host.api.cudaStreamEndCapture(host.stream) == (
            Status.cudaErrorStreamCaptureInvalidated,
            None,
        ), name
    host.upload()
    host.wait()  # the stream is as good as new


def test_rule_03(host: Host) -> None:
    """In global mode other threads spoil a capture as well."""

    def elsewhere() -> Any:
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(host.api.cudaMalloc(8)))
        thread.start()
        thread.join()
        return answers[0][0]

    host.begin(LOCAL)
    assert elsewhere() == Status.cudaSuccess
    host.ok(host.api.cudaStreamEndCapture(host.stream))
    host.begin(GLOBAL)
    assert elsewhere() == Status.cudaErrorStreamCaptureUnsupported
    assert host.api.cudaStreamEndCapture(host.stream)[0] == Status.cudaErrorStreamCaptureInvalidated


def test_rule_04(host: Host) -> None:
    """A failed capture has to be ended before the stream is of any use."""
    host.begin()
    assert host.api.cudaStreamBeginCapture(host.stream, LOCAL) == (Status.cudaErrorIllegalState,)
    host.api.cudaMalloc(8)
    invalid = Status.cudaErrorStreamCaptureInvalidated
    assert host.api.cudaMemcpyAsync(host.a, host.pinned, 1024, UP, host.stream) == (invalid,)
    assert host.api.cudaStreamSynchronize(host.stream) == (invalid,)
    assert host.api.cudaStreamQuery(host.stream) == (invalid,)
    assert host.api.cudaStreamEndCapture(host.stream) == (invalid, None)
    assert host.api.cudaStreamEndCapture(host.stream) == (Status.cudaErrorIllegalState, None)
    host.upload()


def test_rule_05(host: Host) -> None:
    """What is recorded runs at each launch, on what its addresses hold then."""
    launchable = host.captured()
    host.upload()
    host.wait()
    assert np.isnan(host.floats(host.b)).all()
    for value in (1, 2):
        host.floats(host.pinned)[:] = value
        host.upload()
        host.ok(host.api.cudaGraphLaunch(launchable, host.stream))
        host.wait()
        assert (host.floats(host.b) == value).all()
    assert host.cuda.counts.launches == 2


def test_rule_06(host: Host) -> None:
    """No address after its free, nor past its allocation."""
    with breaks(host.cuda, 6):
        host.api.cudaMemcpyAsync(host.a + 512, host.pinned, 1024, UP, host.stream)
    with breaks(host.cuda, 6):
        host.api.cudaMemsetAsync(host.a - 1, 0, 8, host.stream)
    with breaks(host.cuda, 6):
        host.api.cudaMemcpyAsync(host.pinned, host.pinned, 8, UP, host.stream)
    launchable = host.captured()
    host.ok(host.api.cudaFree(host.a))
    again = host.ok(host.api.cudaMalloc(1024))  # perhaps at the same address
    with breaks(host.cuda, 6):
        host.api.cudaGraphLaunch(launchable, host.stream)
    host.ok(host.api.cudaFree(again))
    with breaks(host.cuda, 6):
        host.api.cudaFree(again)


def test_rule_07(host: Host) -> None:
    """No free of what work in flight uses."""
    host.upload()
    with breaks(host.cuda, 7):
        host.api.cudaFree(host.a)
    host.ok(host.api.cudaFree(host.b))
    host.wait()
    host.ok(host.api.cudaFree(host.a))


def test_rule_08(host: Host) -> None:
    """Copies to the device come from page-locked memory, which stays as it is until they ran."""
    pageable = np.zeros(256, np.float32)
    with breaks(host.cuda, 8):
        host.api.cudaMemcpyAsync(host.a, pageable.ctypes.data, 1024, UP, host.stream)
    host.upload()
    host.floats(host.pinned)[5] = 8
    with breaks(host.cuda, 8):
        host.wait()


def test_rule_09(host: Host) -> None:
    """The host's side of a copy lives until it ran."""
    array = np.empty(256, np.float32)
    host.ok(host.api.cudaMemcpyAsync(array.ctypes.data, host.a, 1024, DOWN, host.stream))
    host.wait()
    assert host.cuda.counts.waits["cudaMemcpyAsync to pageable memory"] == 1, "CUDA waits at once"
    host.ok(host.api.cudaMemcpyAsync(array.ctypes.data, host.a, 1024, DOWN, host.stream))
    del array
    with breaks(host.cuda, 9):
        host.wait()
    with breaks(host.cuda, 9):
        gone = np.empty(256, np.float32).ctypes.data
        host.api.cudaMemcpyAsync(gone, host.a, 1024, DOWN, host.stream)
    host.upload()
    with breaks(host.cuda, 9):
        host.api.cudaFreeHost(host.pinned)


def test_rule_10(host: Host) -> None:
    """No copy of pageable memory is captured."""
    pageable = np.zeros(256, np.float32)
    host.begin()
    with breaks(host.cuda, 10):
        host.api.cudaMemcpyAsync(host.a, pageable.ctypes.data, 1024, UP, host.stream)
    host.upload()


def test_rule_11(host: Host) -> None:
    """A non-blocking stream has no order with the default stream, nor with another one without an event."""
    with breaks(host.cuda, 11):
        host.api.cudaMemsetAsync(host.a, 0, 8, 0)
    host.upload()
    with breaks(host.cuda, 11):
        host.api.cudaMemset(host.a, 0, 8)
    other = host.ok(host.api.cudaStreamCreateWithFlags(1))
    with breaks(host.cuda, 11):
        host.between(other)
    event = host.ok(host.api.cudaEventCreateWithFlags(2))
    host.ok(host.api.cudaEventRecord(event, host.stream))
    host.ok(host.api.cudaStreamWaitEvent(other, event, 0))
    host.between(other)
    host.ok(host.api.cudaStreamSynchronize(other))
    assert (host.floats(host.b) == 7).all(), "the other stream came as far as the event"


def test_rule_12(host: Host) -> None:
    """Everything is given back, and nothing that is awaited."""
    other = host.ok(host.api.cudaStreamCreateWithFlags(1))
    event = host.ok(host.api.cudaEventCreate())
    host.upload()
    host.ok(host.api.cudaEventRecord(event, host.stream))
    host.ok(host.api.cudaStreamWaitEvent(other, event, 0))
    with breaks(host.cuda, 12):
        host.api.cudaEventDestroy(event)
    with breaks(host.cuda, 12):
        host.api.cudaStreamDestroy(host.stream)
    host.ok(host.api.cudaStreamSynchronize(other))
    host.wait()
    host.ok(host.api.cudaEventDestroy(event))
    with breaks(host.cuda, 12):
        host.api.cudaEventRecord(event, host.stream)
    launchable = host.captured()
    assert host.cuda.alive() == {
        "streams": 2,
        "graph execs": 1,
        "allocations": 2,
        "page-locked buffers": 1,
    }
    with breaks(host.cuda, 12):
        host.cuda.finish()
    host.ok(host.api.cudaGraphExecDestroy(launchable))
    for address in (host.a, host.b):
        host.ok(host.api.cudaFree(address))
    host.ok(host.api.cudaFreeHost(host.pinned))
    for stream in (other, host.stream):
        host.ok(host.api.cudaStreamDestroy(stream))
    host.cuda.finish()


def test_rule_13(host: Host) -> None:
    """Only events that were recorded and have come have a time."""
    first, second = (host.ok(host.api.cudaEventCreate()) for _ in range(2))
    untimed = host.ok(host.api.cudaEventCreateWithFlags(2))
    invalid = Status.cudaErrorInvalidResourceHandle
    assert host.api.cudaEventElapsedTime(first, second) == (invalid, None)
    for event in (first, second, untimed):
        host.ok(host.api.cudaEventRecord(event, host.stream))
    assert host.api.cudaEventElapsedTime(first, second) == (Status.cudaErrorNotReady, None)
    assert host.api.cudaEventQuery(second) == (Status.cudaErrorNotReady,)
    host.ok(host.api.cudaEventSynchronize(second))
    assert host.ok(host.api.cudaEventElapsedTime(first, second)) >= 0
    assert host.api.cudaEventElapsedTime(first, untimed) == (invalid, None)


def test_rule_14(host: Host) -> None:
    """A captured graph is not destroyed in flight, nor launched after its end."""
    launchable = host.captured()
    host.upload()
    host.ok(host.api.cudaGraphLaunch(launchable, host.stream))
    with breaks(host.cuda, 14):
        host.api.cudaGraphExecDestroy(launchable)
    host.wait()
    host.ok(host.api.cudaGraphExecDestroy(launchable))
    with breaks(host.cuda, 14):
        host.api.cudaGraphLaunch(launchable, host.stream)


def test_rule_15(host: Host) -> None:
    """A lost device answers every call alike, and nobody asks for ever."""
    lost = Status.cudaErrorIllegalAddress
    host.cuda.fail("cudaStreamSynchronize", 2, lost, sticky=True)
    host.wait()
    assert host.api.cudaStreamSynchronize(host.stream) == (lost,)
    assert host.api.cudaMalloc(8) == (lost, None)
    assert host.api.cudaFree(host.a) == (lost,)
    assert host.api.cudaGetLastError() == host.api.cudaGetLastError() == (lost,)
    with breaks(host.cuda, 15):
        while host.api.cudaStreamQuery(host.stream)[0] != Status.cudaSuccess:
            pass


def test_rule_16(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may be out at any call, and be there at the next."""
    host.cuda.fail("cudaMalloc", 2, Status.cudaErrorMemoryAllocation)
    host.ok(host.api.cudaMalloc(8))
    assert host.api.cudaMalloc(8) == (Status.cudaErrorMemoryAllocation, None)
    host.ok(host.api.cudaMalloc(8))
    small = Host(install_cuda(monkeypatch, memory=4096))
    assert small.api.cudaMalloc(4096) == (Status.cudaErrorMemoryAllocation, None)
    assert small.api.cudaMemGetInfo() == (Status.cudaSuccess, 2048, 4096)
    small.ok(small.api.cudaFree(small.a))
    small.ok(small.api.cudaMalloc(3072))
    assert small.cuda.counts.peak == 4096


def test_rule_17(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is too old is another thing than no GPU."""
    for options, expected in (
        ({"driver": 12040}, Status.cudaErrorInsufficientDriver),
        ({"cards": ()}, Status.cudaErrorNoDevice),
    ):
        install_cuda(monkeypatch, **options)  # type: ignore[arg-type]
        from cuda.bindings import runtime

        assert runtime.cudaGetDeviceCount() == (expected, None)
        assert runtime.cudaMalloc(8) == (expected, None)


def test_rule_18(host: Host) -> None:
    """An allocation lies at a multiple of 256, and nothing says of how much more."""
    for nbytes in (1, 100, 5000, 1 << 20):
        address = host.ok(host.api.cudaMalloc(nbytes))
        assert address % 512 == 256
        assert (address + 128) % 256 == 128, "a part of it is as aligned as its offset"
