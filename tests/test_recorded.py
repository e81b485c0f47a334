"""hart-compare follows the loop through a recording, and sees where the loop does something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.compare.recorded import graph_calls
from hart_runtime.compare.reference import Reference
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.families.hart import GRAPHS, HART, NAME
from hart_runtime.runtime.families.names import FAST, NEXT_SCALE, RESIDUAL_STEP, SAMPLE, SMOOTH, TEXT_ENCODER
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.program import Run
from tests.conftest import ExportOnce
from tests.test_compare import record_golden
from tests.test_compare_catches import CHECKPOINT


@pytest.fixture(scope="module")
def recorded(export_once: ExportOnce) -> tuple[Reference, Manifest]:
    bundle = export_once(CHECKPOINT, "fp32")
    return record_golden(CHECKPOINT, bundle), open_bundle(bundle).manifest


def test_every_graph_is_called_in_the_order_of_the_loop(recorded: tuple[Reference, Manifest]) -> None:
    reference, manifest = recorded
    calls = graph_calls(reference.batches[0], reference.settings, manifest)
    assert {call.graph for call in calls} == set(GRAPHS) - {TEXT_ENCODER, FAST}
    scales = len(manifest.model.patch_nums)
    assert sum(call.graph == SMOOTH for call in calls) == scales, "also where the run was not smooth"
    labels = list(dict.fromkeys(call.label for call in calls if call.label.startswith("scale")))
    assert labels == [f"scale{k}" for k in range(scales)]
    for call in calls:
        spec = manifest.graphs[call.graph]
        assert list(call.inputs) == [tensor.name for tensor in spec.inputs]
        assert list(call.outputs) == [tensor.name for tensor in spec.outputs]


Change = Callable[[Run, NDArray[Any]], Run]
"""Of a run, and of the last latent for its shape."""


def doubled(name: str) -> Change:
    return lambda run, _: replace(run, constants={**run.constants, name: run.constants[name] * 2})


def starts_anew(run: Run, latent: NDArray[Any]) -> Run:
    """The sum of the scales before is lost."""
    return replace(run, constants={**run.constants, "f_hat": np.zeros_like(latent)})


def other_noise(run: Run, latent: NDArray[Any]) -> Run:
    return replace(run, random=lambda noise: {name: 1 - a for name, a in run.random(noise).items()})


@pytest.mark.parametrize(
    ("graph", "index", "change", "name"),
    [
        (SAMPLE, 2, doubled("guidance"), "guidance"),
        (RESIDUAL_STEP, 0, doubled("timestep"), "timestep"),
        (NEXT_SCALE, 1, starts_anew, "f_hat"),
        (SAMPLE, 1, other_noise, "uniform"),
    ],
)
def test_a_loop_that_is_wired_otherwise_is_seen(
    recorded: tuple[Reference, Manifest],
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
    index: int,
    change: Change,
    name: str,
) -> None:
    reference, manifest = recorded
    latent = reference.batches[0]["final.f_hat"]

    def steps(*arguments):  # type: ignore[no-untyped-def]
        return tuple(
            replace(
                step,
                runs=tuple(
                    change(run, latent) if (run.graph, run.index) == (graph, index) else run
                    for run in step.runs
                ),
            )
            for step in HART.steps(*arguments)
        )

    monkeypatch.setitem(FAMILIES, NAME, replace(HART, steps=steps))
    with pytest.raises(RunError, match=f"graph {graph}, .*: the loop feeds another {name} than"):
        graph_calls(reference.batches[0], reference.settings, manifest)


def test_a_recording_that_lacks_something_is_refused(recorded: tuple[Reference, Manifest]) -> None:
    reference, manifest = recorded
    tensors = {name: value for name, value in reference.batches[0].items() if name != "scale1.hidden"}
    with pytest.raises(InputError, match=r"the recording lacks scale1\.hidden"):
        graph_calls(tensors, reference.settings, manifest)
