"""Trainers of the demos: a few steps, interrupted and gone on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hart_runtime.common.config import ClassTransformerConfig
from hart_runtime.hart.demo import class_training, training
from hart_runtime.hart.demo.optimise import TransformerStage

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pictures."""
    for module in (class_training, training):
        monkeypatch.setattr(module, "DATASET", 32)


@pytest.mark.parametrize("model", ["hart", "var"])
def test_classes_are_learned(
    small: None, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hart_runtime.hart.demo.optimise.SAVE_EVERY", 4)
    config: ClassTransformerConfig = {"hart": class_training.HART, "var": class_training.VAR}[model]
    config = replace(config, depth=1)
    stage = replace(class_training.STAGE, batch=8)
    stopped = replace(stage, steps=4, horizon=8)
    class_training.train_classes(config, tmp_path, 0, CPU, stopped)
    resumed = class_training.train_classes(config, tmp_path, 0, CPU, replace(stage, steps=8))
    log = (tmp_path / f"classes-{model}.log").read_text().splitlines()
    assert [line.partition(":")[0] for line in log] == ["step 4", "step 8"]
    assert ("diffusion" in log[0]) == (model == "hart")
    (tmp_path / f"classes-{model}.pt").unlink()
    whole = class_training.train_classes(config, tmp_path, 0, CPU, replace(stage, steps=8))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_texts_are_learned(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (TransformerStage("first", steps=2, batch=4, learning_rate=1e-3, fine_scenes=2.0),)
    monkeypatch.setattr(training, "TRANSFORMER_STAGES", stages)
    tokenizer = class_training.shapes_tokenizer()
    text, transformer, _ = training.train_transformer(tokenizer, tmp_path, 0, CPU)
    assert all(bool(p.isfinite().all()) for network in (text, transformer) for p in network.parameters())
    line = (tmp_path / "first.log").read_text()
    assert line.startswith("step 2: cross_entropy ")
    assert "diffusion" in line
