"""What is changed, and how it is told whether what came of it is right."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from hart_runtime import Pipeline
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.common.text_files import read_text
from hart_runtime.runtime.bundle import TEXT_TOKENIZER, describe_files, open_bundle
from hart_runtime.runtime.cli import main as run_command
from hart_runtime.runtime.find import MANIFEST, WEIGHTS
from hart_runtime.runtime.graph_file import read_graph
from hart_runtime.runtime.tensorrt.manifest import ENGINE_MANIFEST
from hart_runtime.runtime.text import ENCODE
from tests.torture.changes import Change, change_bytes, change_json, change_png, change_tokenizer
from tests.torture.graph_changes import change_onnx
from tests.torture.outcomes import Outcome, of_error

PROMPT, SEED = "a red circle on a white background", 7
Pixels = NDArray[np.uint8]
Judged = tuple[Outcome, str]
Changer = Callable[[bytes, random.Random], Change]


class Ground(NamedTuple):
    """What every worker starts from, made once."""

    bundle: Path
    checkpoint: Path
    picture: Path
    engines: Path
    """The bundle with engines of the strict stand-in."""


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder that shares its files until they are written anew."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def put(path: Path, data: bytes) -> None:
    """Write a file of a linked copy anew."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def seal(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed."""
    file = folder / MANIFEST
    values = json.loads(file.read_bytes())
    values["files"][name] = asdict(describe_files(folder, [name])[name])
    put(file, json.dumps(values).encode())


def another_thing(path: Path, rng: random.Random) -> str:
    """In the place of a file."""
    kind = rng.choice(
        ("nothing", "a folder", "a FIFO", "a link to itself", "a link elsewhere", "a linked copy")
    )
    data = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a link elsewhere":
        path.symlink_to("/dev/zero")
    elif kind == "a linked copy":
        path.with_name("copy.bin").write_bytes(data)
        path.symlink_to("copy.bin")
    return kind


def pixels_of(pipeline: Pipeline, **options: Any) -> Pixels:
    return np.asarray(pipeline.generate([PROMPT], seed=SEED, **options).images[0])


def drawn_twice(pipeline: Pipeline) -> tuple[Pixels, bool]:
    """A picture, and whether it is the same again."""
    first = pixels_of(pipeline)
    return first, np.array_equal(first, pixels_of(pipeline))


class Bundles:
    """Bundles: a manifest, graphs, weights or tokenizer changed, sealed again or not."""

    def __init__(self, ground: Ground) -> None:
        self.source = ground.bundle
        self.load = partial(Pipeline.load, device="cpu", threads=1, backend="onnxruntime")
        self.base = self.load(ground.bundle)
        self.picture = pixels_of(self.base)
        manifest = self.base.bundle.manifest
        self.unread = {f for g in manifest.graphs.values() for f in g.forms.values()}
        self.unread |= {"smooth.onnx", "fast_transformer.onnx", "encoder.onnx"}
        self.used = np.zeros(manifest.files[WEIGHTS].size, bool)
        for name in {graph.file for graph in manifest.graphs.values()} - self.unread:
            for weight in read_graph((ground.bundle / name).read_bytes()).weights.values():
                if weight.place is not None:
                    self.used[weight.place[1] : weight.place[1] + weight.place[2]] = True

    def trial(self, folder: Path, rng: random.Random) -> Judged:
        """Change one file of a copy and draw."""
        linked(self.source, folder)
        kind = rng.choice(("manifest",) * 4 + ("graph",) * 5 + ("weights", "tokenizer", "tokenizer", "thing"))
        names = [MANIFEST, *self.base.bundle.manifest.files]
        graphs = [name for name in names if name.endswith(".onnx")]
        name = {
            "manifest": MANIFEST,
            "graph": rng.choice(
                graphs if rng.random() < 0.2 else [n for n in graphs if n not in self.unread]
            ),
            "weights": WEIGHTS,
            "tokenizer": TEXT_TOKENIZER,
        }.get(kind) or rng.choice(names)
        if kind == "thing":
            said = another_thing(folder / name, rng)
            same = said == "a linked copy"
            return self._draw(folder, f"{name}: {said}", self.picture if same else None, effect=False)
        changer: dict[str, Changer] = {
            "manifest": change_json,
            "tokenizer": change_tokenizer,
            "graph": change_onnx,
        }
        before = (folder / name).read_bytes()
        change = changer.get(kind, change_bytes)(before, rng)
        put(folder / name, change.data)
        said = f"{name}: {change.said}"
        if kind == "manifest":
            return self._of_manifest(folder, change, said)
        if change.data == before:
            return self._draw(folder, said, self.picture, effect=False)
        if rng.random() < 0.15:
            return self._draw(folder, f"{said}, seal broken", None, effect=False)
        seal(folder, name)
        if kind == "tokenizer":
            return self._draw(folder, said, None, effect=False, expect=partial(self._of_tokens, folder))
        quiet = name in self.unread or change.where == ("words",)
        if kind == "weights" and len(change.data) == len(before):
            changed = np.frombuffer(before, np.uint8) != np.frombuffer(change.data, np.uint8)
            quiet = not (changed & self.used).any()
        return self._draw(folder, said, self.picture, effect=not quiet)

    def _draw(
        self,
        folder: Path,
        said: str,
        expected: Pixels | None,
        effect: bool,
        expect: Callable[[], Pixels | None] | None = None,
    ) -> Judged:
        """Draw, and compare with the one picture that is right, or (``effect``) with itself.

        Args:
            expected: None where there must be none.
            expect: makes it, of a bundle that drew.
        """
        try:
            found, again = drawn_twice(self.load(folder))
        except Exception as error:
            outcome, message = of_error(error)
            return outcome, f"{said}: {message}"
        finally:
            gc.collect()
        if expect is not None:
            expected = expect()
        if not again or not np.array_equal(self.picture, pixels_of(self.base)):
            return Outcome.WRONG, f"{said}: not the same picture again"
        if expected is not None and np.array_equal(found, expected):
            return (Outcome.EQUAL if np.array_equal(found, self.picture) else Outcome.EFFECT), said
        return (Outcome.EFFECT if effect else Outcome.WRONG), said

    def _of_manifest(self, folder: Path, change: Change, said: str) -> Judged:
        """Settings, the type of products and the pyramid may change a picture, nothing else."""
        place = change.where
        if place[:1] == ("sampling",):
            return self._draw(folder, said, None, effect=False, expect=partial(self._of_sampling, change))
        effect = place[:1] == ("precision",) or place[:2] == ("model", "patch_nums")
        return self._draw(folder, said, self.picture, effect)

    def _of_sampling(self, change: Change) -> Pixels:
        settings = SamplingSettings(**json.loads(change.data)["sampling"])
        bundle = self.base.bundle
        manifest = replace(bundle.manifest, sampling=settings)
        return pixels_of(Pipeline(replace(bundle, manifest=manifest), self.base.backend, 1))

    def _of_tokens(self, folder: Path) -> Pixels | None:
        """The picture of the ids that the library itself makes of the prompt with the changed file."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(read_text(folder / TEXT_TOKENIZER))  # with a byte order mark, too
        padding, length = tokenizer.padding, self.base.bundle.manifest.model.context_token
        tokenizer.no_padding()
        tokenizer.no_truncation()
        found = tokenizer.encode(PROMPT).ids[:length]
        pad = [padding["pad_id"]] * (length - len(found))
        ids = np.array([pad + found if padding["direction"] == "left" else found + pad], np.int64)
        mask = ids != padding["pad_id"]
        try:
            outputs = self.base.backend.run(ENCODE, {"input_ids": ids, "mask": mask})
            features = self.base.backend.to_host(outputs["features"])
            return np.asarray(self.base.from_features(features, mask, seed=SEED).images[0])
        except Exception:  # ids that the graph does not take: no picture is right
            return None


class Pictures:
    """Pictures of hart-run, drawn again from what they carry."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.base = Pipeline.load(ground.bundle, device="cpu", threads=1, backend="onnxruntime")
        self.png = ground.picture.read_bytes()
        self.picture = np.asarray(Image.open(ground.picture))

    def trial(self, folder: Path, rng: random.Random) -> Judged:
        """Change a picture and draw it again with the command."""
        folder.mkdir()
        change = change_png(self.png, rng)
        (folder / "in.png").write_bytes(change.data)
        words = [
            "--engine",
            self.ground.bundle,
            "--from-image",
            folder / "in.png",
            "--output",
            folder / "out.png",
        ]
        done = CliRunner().invoke(run_command, [*map(str, words), "--threads", "1", "--json"])
        said = f"{change.said}: exit {done.exit_code}, {done.stderr.strip()[:300]}"
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            return Outcome.TRACEBACK, f"{said}{done.exception!r}"
        if left := [path.name for path in folder.iterdir() if path.name not in ("in.png", "out.png")]:
            return Outcome.HALF, f"{said}: left {left}"
        if done.exit_code:
            one = done.exit_code in (1, 2) and len(done.stderr.splitlines()) == 1
            return (Outcome.REFUSED if one else Outcome.TRACEBACK), said
        json.loads(done.stdout)
        found = np.asarray(Image.open(folder / "out.png"))
        if np.array_equal(found, self.picture):
            return Outcome.EQUAL, said
        with Image.open(folder / "in.png") as image:
            image.load()
            record = json.loads(image.info["hart"])
        drawn = self.base.generate([record["prompt"]], seed=record["seed"], **record["settings"]).images[0]
        return (Outcome.EFFECT if np.array_equal(found, np.asarray(drawn)) else Outcome.WRONG), said


class Engines:
    """Engines of the strict stand-in, their description changed, or they themselves."""

    def __init__(self, ground: Ground) -> None:
        from tests.torture.ground import on_a_strict_machine

        on_a_strict_machine()
        self.source = ground.engines
        self.picture = pixels_of(Pipeline.load(ground.engines, backend="tensorrt"))

    def trial(self, folder: Path, rng: random.Random) -> Judged:
        """Engines draw the picture that they drew before, or none."""
        linked(self.source, folder)
        (described,) = folder.glob(f"*/{ENGINE_MANIFEST}")
        engine = rng.choice(sorted(described.parent.glob("*.engine")))
        kind = rng.choice(("manifest",) * 6 + ("engine", "engine", "thing"))
        if kind == "thing":
            file = rng.choice((described, engine))
            said = f"{file.name}: {another_thing(file, rng)}"
        else:
            file, changer = (described, change_json) if kind == "manifest" else (engine, change_bytes)
            change = changer(file.read_bytes(), rng)
            put(file, change.data)
            said = f"{file.name}: {change.said}"
        try:
            found, again = drawn_twice(Pipeline.load(folder, backend="tensorrt"))
        except Exception as error:
            outcome, message = of_error(error)
            return outcome, f"{said}: {message}"
        finally:
            gc.collect()
        return (Outcome.EQUAL if again and np.array_equal(found, self.picture) else Outcome.WRONG), said


def checked(folder: Path) -> None:
    """A bundle is whole; raises InputError."""
    open_bundle(folder)
