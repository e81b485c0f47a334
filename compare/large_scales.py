"""The reference on what an engine's graphs were fed: for scales too large to run it as a whole.

The transformer goes block by block, with one block's keys and values in memory at a time, so that
the reference needs its weights and little more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.compare.metrics import compare_tensors
from hart_runtime.compare.recorded import step_slack
from hart_runtime.compare.rehearsal import CACHE
from hart_runtime.compare.replay import RELATIVE
from hart_runtime.export.graphs import build_graphs
from hart_runtime.hart.checkpoint import load_hart
from hart_runtime.hart.diffusion import guide
from hart_runtime.hart.model import Hart
from hart_runtime.hart.rope import Rotation
from hart_runtime.hart.transformer import attention, scaled_dot_product
from hart_runtime.runtime.families.names import DECODER, RESIDUAL_STEP, TRANSFORMER
from hart_runtime.runtime.manifest import Manifest

INDICES = 1e-3
"""Share of indices that may differ: a draw can fall between two roundings of the same boundary."""

Arrays = dict[str, NDArray[Any]]


@torch.inference_mode()
def compare_captured(checkpoint: Path, manifest: Manifest, folder: Path) -> Iterator[tuple[str, bool]]:
    """Compare run after run of a float32 bundle.

    Args:
        folder: what :class:`hart_runtime.compare.rehearsal_steps.Capture` wrote.

    Returns:
        A line for each run with the largest error of its outputs over the reference's largest
        magnitude (for indices: the share that differs), and whether that is within 1e-4 (1e-3).
    """
    model = load_hart(find_checkpoint(checkpoint, ema=manifest.averaged))
    for file in sorted(folder.glob("[0-9]*.npz")):
        _, graph, scale = file.stem.split("-")
        with np.load(file) as opened:
            arrays = {name: opened[name] for name in opened.files}
        fed, found = (
            {name.removeprefix(kind): a for name, a in arrays.items() if name.startswith(kind)}
            for kind in ("in.", "out.")
        )
        if graph == TRANSFORMER:
            past = manifest.scale_dims(1)[int(scale)]["past"]
            errors = dict(_transformer(model, fed, found, past, folder / CACHE))
        else:
            expected, slack = _expected(model, manifest, graph, fed)
            if "codes" in expected:  # a lookup: the index says where it is another code
                same = (expected["index"] == found["index"])[..., None]
                found["codes"] = np.where(same, found["codes"], expected["codes"])
            errors = {
                name: compare_tensors(value, found[name], slack.get(name, 0.0)).error
                for name, value in expected.items()
            }
        words = ", ".join(f"{name} {'not finite' if e is None else f'{e:.1e}'}" for name, e in errors.items())
        fine = all(
            e is not None and e <= (INDICES if name == "index" else RELATIVE) for name, e in errors.items()
        )
        yield f"scale {scale} {graph}: {words}", fine


def _transformer(
    model: Hart, fed: Arrays, found: Arrays, past: int, cache: Path
) -> Iterator[tuple[str, float | None]]:
    """All blocks one after another; the worst keys and values of any block, and the hidden states.

    Nothing reads the keys and values of the last scale, so backends do not keep them: there the
    hidden states have to do.
    """
    x, angles = torch.from_numpy(fed["x"]), torch.from_numpy(fed["angles"])
    condition = torch.from_numpy(fed.get("block_condition", fed["x"][:, 0]))
    rotation = Rotation.of(angles)
    present = past + x.shape[1]
    worst: dict[str, list[float]] = {"keys": [], "values": []}
    for i, block in enumerate(model.transformer.blocks):
        theirs = {name: _rows_first(cache / f"{name}_{i}.npy") for name in ("key", "value")}
        before = [torch.from_numpy(np.ascontiguousarray(theirs[n][:, :past])) for n in ("key", "value")]
        x, pair = block(x, rotation, condition, (before[0], before[1]), attention)
        for name, value in zip(("key", "value"), pair, strict=True):
            kept = theirs[name][:, past:present]
            if not kept.size:
                continue
            new = torch.from_numpy(np.ascontiguousarray(kept))
            worst[f"{name}s"].append(float((new - value[:, past:]).abs().max() / value[:, past:].abs().max()))
    for name, errors in worst.items() if worst["keys"] else ():
        yield name, max(errors) if np.isfinite(errors).all() else None
    yield "hidden", compare_tensors(x.numpy(), found["hidden"]).error


def _rows_first(file: Path) -> NDArray[Any]:
    """(2B, T, C) of a layer's cache, which graphs have tokens first."""
    array: NDArray[Any] = np.load(file, mmap_mode="r")
    return array.swapaxes(0, 1)


def _expected(model: Hart, manifest: Manifest, graph: str, fed: Arrays) -> tuple[Arrays, Arrays]:
    """What PyTorch makes of a graph's inputs, and what may be off because they amplify rounding."""
    if graph == DECODER:  # the reference itself: the graph takes large pictures in strips
        image = (model.tokenizer.decode(torch.from_numpy(fed["f_hat"])) + 1) / 2
        return {"image": image.numpy()}, {}
    built = build_graphs(model, None, manifest.model.patch_nums, scaled_dot_product)[graph]()
    inputs = [_tensor(fed[name], example) for name, (example, _) in built.inputs.items()]
    outputs = built.module.eval()(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = {name: value.numpy() for name, value in zip(built.outputs, outputs, strict=True)}
    if graph != RESIDUAL_STEP:
        return expected, {}
    net = model.transformer.diffloss.net
    x, embedded, timestep, _, guidance, _ = inputs
    conditional, unconditional = net(x.repeat(2, 1, 1), timestep, embedded).chunk(2)
    eps = guide(conditional, unconditional, guidance).chunk(2, dim=-1)[0]
    return expected, {"x_out": step_slack(fed["residual"], eps.numpy(), fed["coefficients"])}


def _tensor(array: NDArray[Any], example: Tensor) -> Tensor:
    return torch.from_numpy(np.array(array)).to(example.dtype)
