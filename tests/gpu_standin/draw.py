"""Draws pictures with the real ONNX Runtime on the stand-in's libraries, and writes down what happened.

``python -m tests.gpu_standin.draw BUNDLE OUT.json PICTURES [strict]``, in an environment with
``onnxruntime-gpu`` and without torch, with the libraries on ``LD_LIBRARY_PATH`` and ``site/`` on
``PYTHONPATH``. Nothing of ours is replaced, and of ONNX Runtime's sessions only the class, by one that says
where its nodes are.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "a red circle on a white background"
PLACEMENT = "session.record_ep_graph_assignment_info"


def main(bundle: Path, output: Path, pictures: int, strict: bool) -> None:
    import onnxruntime
    from cuda.bindings.runtime import note

    from hart_runtime.runtime.backends.backend import Backend, Outputs, Values, Watched
    from hart_runtime.runtime.backends.registry import open_backend
    from hart_runtime.runtime.bundle import Bundle, open_bundle
    from hart_runtime.runtime.memory.forecast import needed
    from hart_runtime.runtime.memory.plan import make_plan
    from hart_runtime.runtime.pipeline import Pipeline
    from hart_runtime.runtime.program import Run

    warnings: list[str] = []
    logging.getLogger().addHandler(_Kept(warnings))
    sessions: list[dict[str, Any]] = []
    opened_by_ours = onnxruntime.InferenceSession

    class Session(opened_by_ours):  # type: ignore[misc,valid-type]
        """Says of itself what became of its graph."""

        def __init__(self, path: Path, options: Any, *given: Any, **named: Any) -> None:
            try:
                options.get_session_config_entry(PLACEMENT)
            except RuntimeError:  # it has no such entry yet
                options.add_session_config_entry(PLACEMENT, "1")
            said: dict[str, Any] = {"graph": Path(path).stem, "error": None}
            sessions.append(said)
            try:
                super().__init__(path, options, *given, **named)
            except Exception as error:
                said["error"] = str(error)
                raise
            said |= _described(self)

    onnxruntime.InferenceSession = Session

    def around(run: Run, inputs: Values, proceed: Callable[[Values], Outputs]) -> Outputs:
        note(f"run {run.graph}")
        outputs = proceed(inputs)
        note("done")
        return outputs

    def open_part(part: Bundle) -> Backend:
        return open_backend(part, "cuda", backend="onnxruntime", strict=strict)

    opened = open_bundle(bundle)
    note("text")
    if opened.has_text_encoder:
        pipeline = Pipeline.for_prompts(opened, [PROMPT], 1, open_part)
    else:
        pipeline = Pipeline(opened, open_part(opened))
    manifest = pipeline.bundle.manifest
    watched = Pipeline(pipeline.bundle, Watched(pipeline.backend, around), encoded=_known(pipeline.text))
    for number in range(pictures):
        note(f"picture {number}")
        if opened.has_text_encoder:
            watched.generate(PROMPT, seed=number)
        else:
            features = np.zeros((1, manifest.model.context_token, manifest.model.context_dim), np.float32)
            watched.from_features(features, np.ones(features.shape[:2], np.bool_), seed=number)
    note("over")
    del watched, pipeline
    gc.collect()
    plan = make_plan(manifest.program(manifest.sampling, 1))
    calls = [
        {
            "graph": call.graph,
            "planned": None not in call.inputs.values(),
            "uploads": {name: _nbytes(call.inputs[name]) for name in call.uploads},
        }
        for call in plan.calls
    ]
    found = {
        "version": onnxruntime.__version__,
        "sessions": sessions,
        "warnings": warnings,
        "calls": calls,
        "forecast": asdict(needed(opened.manifest, 1)),
        "arena": plan.nbytes,
        "constants": plan.constant_nbytes,
        "given": (manifest.model.context_dim * 4 + 1) * manifest.model.context_token,
        "deciding": {name: sorted(manifest.contract(name).deciding()) for name in opened.manifest.required},
    }
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _described(session: Any) -> dict[str, Any]:
    """Providers' options, operators on the CPU, and inputs that are read on the host."""
    inputs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    return {
        "options": session.get_provider_options().get("CUDAExecutionProvider", {}),
        "on_the_cpu": [
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name == "CPUExecutionProvider"
            for node in part.get_nodes()
        ],
        "on_the_host": [value.name for value, memory in inputs if memory.name.lower().startswith("cpu")],
    }


def _known(text: Any) -> Any:
    """Prompts that are encoded already; None where the bundle encodes none."""
    from hart_runtime.runtime.text import EncodedPrompts

    return text if isinstance(text, EncodedPrompts) else None


def _nbytes(view: Any) -> int:
    return view.nbytes if view is not None else 0


class _Kept(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), "strict" in sys.argv[4:])
