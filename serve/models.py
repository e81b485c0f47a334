"""The bundles that a server offers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hart_runtime.common.errors import InputError
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.class_names import ClassNames
from hart_runtime.runtime.families.names import ENCODER, TEXT_ENCODER
from hart_runtime.runtime.find import MANIFEST, find_bundles
from hart_runtime.runtime.manifest import Manifest, check_contract, read_manifest


@dataclass(frozen=True)
class Model:
    """A bundle by its manifest; its weights are opened by the workers."""

    folder: Path
    manifest: Manifest
    created: int
    """Seconds since 1970, of the manifest."""
    classes: ClassNames | None = None
    """Of a model that draws these, and no texts."""

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.manifest.name

    @property
    def size(self) -> str:
        """Of its pictures, as the contract spells it."""
        return f"{self.manifest.model.image_size}x{self.manifest.model.image_size}"

    @property
    def takes_pictures(self) -> bool:
        """Whether it goes on from one that is given."""
        return ENCODER in self.manifest.graphs

    @property
    def sizes(self) -> dict[str, Model]:
        """The same model for each size of its pictures, its own first."""
        found = [replace(self, manifest=manifest) for manifest in self.manifest.every_size.values()]
        return {model.size: model for model in found}

    @property
    def tokens(self) -> int:
        """Of a picture, all scales together."""
        return self.manifest.model.num_tokens


def find_models(places: Iterable[Path]) -> dict[str, Model]:
    """All bundles at some places, by name; the first is what requests without a name get.

    Raises:
        InputError: no bundle, one that takes no prompts, or two of one name.
    """
    models: dict[str, Model] = {}
    for folder in dict.fromkeys(folder for place in places for folder in find_bundles(place)):
        manifest, identity = read_manifest(folder)
        check_contract(manifest, str(folder / MANIFEST))
        if not manifest.model.num_classes and TEXT_ENCODER not in manifest.graphs:
            raise InputError(
                f"{folder}: this bundle has no text encoder, and requests bring prompts; export it again "
                f"with one (`text_encoder`)"
            )
        if manifest.name in models:
            raise InputError(
                f"{folder}: is called {manifest.name}, as {models[manifest.name].folder} is; requests choose "
                f"by name, so export one of them under another (`output`)"
            )
        classes = None
        if manifest.model.num_classes:
            classes = ClassNames.of(Bundle(folder, manifest, identity))
        models[manifest.name] = Model(folder, manifest, int((folder / MANIFEST).stat().st_mtime), classes)
    return models


def check_screened(models: Mapping[str, Model]) -> None:
    """Raises InputError: a safety model would have nothing to read."""
    if all(model.classes for model in models.values()):
        raise InputError("`safety_model`: reads texts, and these bundles draw classes")


def spread(drawn: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` scales (or iterations), after which pictures are shown about equally long after each other.

    Args:
        drawn: tokens that each draws.

    A scale takes about as long as it has tokens, so the last ones take most of the time.
    """
    done = [0]
    for tokens in drawn:
        done.append(done[-1] + tokens)
    found: list[int] = []
    for number in range(1, count + 1):
        low, high = (found[-1] + 1 if found else 0), len(drawn) - (count - number)
        moment = done[-1] * number / (count + 1)
        found.append(min(range(low, high), key=lambda scale: abs(done[scale + 1] - moment)))
    return tuple(found)
