"""The KV cache: tokens first, grown at its end, and never held twice."""

from __future__ import annotations

import subprocess
import sys

import onnx_ir as ir
import pytest

from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.contract import PAST
from hart_runtime.runtime.families.names import TRANSFORMER
from tests.conftest import ExportOnce


def test_old_tokens_meet_the_new_ones_first(export_once: ExportOnce) -> None:
    """Work on them alone could be done long before, for all layers at once."""
    model = ir.load(export_once(DEMO_CHECKPOINT, "fp32") / "transformer.onnx")
    pasts = [value for value in model.graph.inputs if str(value.name).startswith(PAST)]
    assert pasts
    for past in pasts:
        (use,) = (use for use in past.uses() if use.node.op_type != "Shape")
        assert (use.node.op_type, use.idx) == ("Concat", 0)
        assert use.node.attributes.get_int("axis") == 0
        assert str(use.node.inputs[1].name) == str(past.name).replace("past_", "new_")  # type: ignore[union-attr]


PEAK = """
import resource, sys
import numpy as np
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.backends.sessions import open_sessions
from pathlib import Path

bundle = open_bundle(Path(sys.argv[1]))
spec = bundle.manifest.graphs["transformer"]
session = open_sessions(bundle, {"transformer": spec}, 1)["transformer"]
dims = {"rows": 2, "length": 4, "past": 30_000}
inputs = {
    t.name: np.full([dims.get(n, n) for n in t.shape], 0.01, t.dtype) for t in spec.inputs
}
tensor = next(value.nbytes for name, value in inputs.items() if name.startswith("past_"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
session.run(None, inputs)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print((after - before) / tensor, sum(name.startswith("past_") for name in inputs))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the most memory that a process had, in KiB")
def test_the_cache_is_held_once(export_once: ExportOnce) -> None:
    """A run needs the grown keys and values of a layer or two, not of all."""
    bundle = export_once(DEMO_CHECKPOINT, "fp32")
    assert TRANSFORMER in open_bundle(bundle).manifest.graphs
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(bundle)], capture_output=True, text=True, check=True
    )
    extra, tensors = map(float, done.stdout.split())
    assert tensors == 12
    assert extra < tensors * 0.75, "as much as a second cache"
