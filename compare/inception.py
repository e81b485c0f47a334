"""Features of the Frechet distance: those of the Inception of 2015-12-05, in torch-fidelity's port.

It resizes pictures as TensorFlow 1 does, so these are the features of the published evaluation suites, and
may be held against the statistics that come with them.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hart_runtime.common.errors import MOST_SAID, InputError
from hart_runtime.common.weight_files import WeightFiles
from hart_runtime.hart.weights import FLOATS, opened, read

POOL = "2048"
"""The library's name of the last average pooling: TensorFlow's ``pool_3``, 2048 features."""

Extract = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Pictures (B, H, W, 3) to their features (B, D)."""


def inception(weights: Path) -> Extract:
    """The network with somebody's weights, on a GPU if there is one.

    Args:
        weights: a state dict, such as torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth`` or
            pytorch-fid's ``pt_inception-2015-12-05-6726825d.pth``; read as every weight file is, no code
            in it is run.

    Raises:
        InputError: the file holds another network's weights, or none.
    """
    if not weights.is_file():
        raise InputError(f"{weights}: no such file of Inception's weights")
    with opened(WeightFiles((weights,))) as entries:
        state = {entry.path: read(entry, torch.float32) for entry in entries if entry.kind in FLOATS}
    plain = io.BytesIO()  # the library would unpickle the user's file without a limit
    torch.save(state, plain)
    plain.seek(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        network = _network()("inception", [POOL], plain).to(device)
    except RuntimeError as error:
        found = " ".join(" ".join(str(error).splitlines()[1:]).split())[:MOST_SAID]
        raise InputError(
            f"{weights}: expected the Inception of 2015-12-05 with 1008 classes, as torch-fidelity and "
            f"pytorch-fid have it, found another network's weights ({found})"
        ) from None

    def extract(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            (found,) = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))
        return np.asarray(found.cpu().numpy())

    return extract


def _network() -> Any:
    """The library's class, without what its ``__init__`` imports beside it: torchvision, which fails to load
    beside any torch but the one that it was built for, and which this network does without.
    """
    spec = find_spec("torch_fidelity")
    assert spec is not None
    whole = sys.modules.get(spec.name)
    sys.modules[spec.name] = whole or module_from_spec(spec)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    finally:
        if whole is None:
            del sys.modules[spec.name]
    return FeatureExtractorInceptionV3
