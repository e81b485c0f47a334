"""The Frechet distance of drawn pictures, with a network of random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from scipy.linalg import sqrtm

from hart_runtime.common.errors import InputError
from hart_runtime.common.install import installed
from hart_runtime.compare.frechet import FEATURES, main, normal_of
from hart_runtime.compare.inception import inception
from hart_runtime.hart.frechet import Normal, distance

NO_SOCKETS = """
import sys
def hook(event, arguments):
    assert not event.startswith("socket."), (event, arguments)
sys.addaudithook(hook)
from hart_runtime.compare.frechet import main
main()
"""
Doubles = np.ndarray[Any, np.dtype[np.float64]]


def pictures(folder: Path, seed: int, count: int = 3, side: int = 16) -> Path:
    """Noise around a grey of its own each; the last one in a folder below."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        file = folder / ("more" if number == count - 1 else "") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 60, (side, side, 3)) + rng.integers(0, 190)
        Image.fromarray(noise.astype(np.uint8)).save(file)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of no training, in the layout of the published file."""
    from hart_runtime.compare.inception import _network

    if not installed("torch_fidelity"):
        pytest.skip("torch-fidelity is not installed; the Makefile's environment has it")

    class Untrained(_network()):  # type: ignore[misc]
        def load_state_dict(self, state: object) -> None:
            """Keep what it was made with."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "nothing.pth")
    torch.manual_seed(0)
    network = Untrained("inception", ["2048"], folder / "nothing.pth")
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    file = folder / "weights.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    return pictures(tmp_path / "drawn", 1)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def independent(one: Doubles, other: Doubles) -> float:
    """By the singular values of the products of all pairs of centred features, which need no root."""
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (one, other)]
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    spread = sum(float((x**2).sum()) for x in centred)
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + spread - 2 * cross)


def test_the_distance_is_that_of_the_matrix_root() -> None:
    rng = np.random.default_rng(0)
    one = rng.standard_normal((400, 12)) @ rng.standard_normal((12, 12))
    other = rng.standard_normal((300, 12)) * rng.random(12) + 0.3
    a, b = Normal.of(one), Normal.of(other)
    root = sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert distance(a, b) == pytest.approx(independent(one, other), rel=1e-9)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)


def test_folders_and_statistics(weights: Path, drawn: Path, tmp_path: Path) -> None:
    """By the command, in a process that may open no socket."""
    other = pictures(tmp_path / "other", 2, count=4, side=24)
    extract = inception(weights)
    files = {folder: sorted(folder.rglob("*.png")) for folder in (drawn, other)}
    features = {
        folder: np.concatenate([extract(np.array(Image.open(file))[None]) for file in found]).astype(float)
        for folder, found in files.items()
    }
    assert features[drawn].shape == (3, FEATURES)
    normal = Normal.of(features[other])
    file = tmp_path / "statistics.npz"
    np.savez(file, mu=normal.mean, sigma=normal.covariance, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    expected = independent(features[drawn], features[other])
    assert expected > 1e-3
    command = [sys.executable, "-c", NO_SOCKETS, str(drawn), str(other), "--reference", str(file)]
    done = subprocess.run([*command, "--weights", str(weights)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (float(line.rpartition(": ")[2]) for line in done.stdout.splitlines())
    assert first == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert second == pytest.approx(0, abs=1e-3 * expected)
    assert f"warning: {drawn}: 3 pictures; published distances are of 50000" in done.stderr
    found = normal_of(other, extract, lambda *_: None)
    np.testing.assert_allclose(found.mean, normal.mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.covariance, normal.covariance, rtol=1e-2, atol=1e-5)


def test_what_is_no_reference(weights: Path, drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = tmp_path / "statistics.npz"
    options = ["--weights", weights, "--reference"]
    assert "nowhere: no such folder of pictures" in refused(drawn, *options, tmp_path / "nowhere")
    assert "empty: expected pictures (.png, " in refused(drawn, *options, tmp_path / "empty")
    assert "expected a folder of pictures, or statistics in .npz" in refused(drawn, *options, weights)
    for arrays, words in (
        ({"mu": np.zeros(64), "sigma": np.zeros((64, 64))}, "of 2048 features, found (64,) and (64, 64)"),
        ({"mu": np.zeros(2048)}, "expected arrays mu and sigma, as the ADM"),
        ({"mu": np.zeros(2048), "sigma": np.full((2048, 2048), np.nan)}, "hold NaN or infinity"),
        ({"mu": np.array([{}]), "sigma": np.zeros(1)}, "expected arrays mu and sigma"),
    ):
        np.savez(file, **arrays)  # type: ignore[arg-type]
        assert words in refused(drawn, *options, file)
    file.write_bytes(b"PK\x03\x04 and no more")
    assert "expected arrays mu and sigma" in refused(drawn, *options, file)


def test_what_is_no_set_of_pictures(drawn: Path) -> None:
    def nothing(pixels: object) -> Any:
        return np.zeros((len(pixels), 2))  # type: ignore[arg-type]

    for content, words in ((b"no picture", "2.png: not a readable picture"), (None, "expected 16 x 16 px")):
        file = drawn / "more" / "2.png"
        file.write_bytes(content) if content else Image.new("RGB", (8, 9)).save(file)
        with pytest.raises(InputError, match=words):
            normal_of(drawn, nothing, lambda *_: None)


def test_weights_of_something_else(weights: Path, drawn: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    file = tmp_path / "weights.pth"
    options = [drawn, "--reference", drawn, "--weights", file]
    assert "weights.pth: no such file" in refused(*options)
    for name, value, words in (
        ("fc.weight", torch.zeros(1000, 2048), "expected the Inception of 2015-12-05 with 1008 classes"),
        ("fc.weight", None, "Missing key(s) in state_dict: "),
        ("AuxLogits.fc.weight", torch.zeros(3), "Unexpected key(s) in state_dict: "),
        ("fc.bias", torch.full((1008,), torch.nan), "holds NaN or infinity"),
    ):
        changed = (
            {**state, name: value} if value is not None else {k: v for k, v in state.items() if k != name}
        )
        torch.save(changed, file)
        assert words in refused(*options)
    torch.save({"fc.weight": Path("/")}, file)
    assert "pickled code is never run" in refused(*options)
