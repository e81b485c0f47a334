"""Random checkpoints are checkpoints like any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from export.bundle import export_bundle
from hart import random_checkpoint
from hart.checkpoint import load_hart, load_text_encoder
from hart.random_checkpoint import main, read_shape, write_random_checkpoint
from hart.tokenizer import ImageTokenizer
from hart.transformer import ScaleTransformer
from runtime import Pipeline

SHAPE = {
    "llm": {
        "attn_type": "llama",
        "mlp_type": "llama",
        "depth": 1,
        "embed_dim": 64,
        "num_heads": 2,
        "context_token": 8,
        "context_dim": 96,
        "patch_nums": [1, 2, 4],
        "disable_aln": True,
        "use_timestep_embed": True,
        "use_context_norm": True,
        "diff_width": 32,
        "diff_depth": 1,
        "num_sampling_steps": "4",
    },
    "tokenizer": {
        "vocab_size": 700,
        "ch": 32,
        "ch_mult": [1, 2],
        "quantizer_type": "var_hybrid",
        "v_patch_nums": [1, 2, 4],
    },
    "B": 1,
    "cfg": 4.5,
    "top_p": 0.0,
    "more_smooth": True,
}


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(SHAPE))
    return file


def test_from_a_shape_file_to_a_picture(shape: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    done = CliRunner().invoke(main, ["--shape", str(shape), "--output", str(root)])
    assert done.exit_code == 0, done.output
    assert "M random weights, fp32" in done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "tiny.json"]
    manifest = export_bundle(root, tmp_path / "bundle", "fp16")
    assert manifest.sampling.guidance == 4.5
    assert manifest.sampling.smooth
    first, second = Pipeline.load(tmp_path / "bundle", device="cpu")(["any words", "other words"])
    assert np.asarray(first).std() > 5  # a run with NaN or a flat picture would have raised
    assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_shards_hold_the_same_model(
    shape: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_checkpoint(read_shape(str(shape)), tmp_path / "whole", dtype)
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 1 << 16)
    write_random_checkpoint(read_shape(str(shape)), tmp_path / "shards", dtype)
    assert len(list((tmp_path / "shards" / "llm").glob("*.safetensors"))) > 1
    whole, shards = load_hart(tmp_path / "whole"), load_hart(tmp_path / "shards")
    for one, other in zip(whole, shards, strict=True):
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name
    texts = [load_text_encoder(tmp_path / name / "text_encoder") for name in ("whole", "shards")]
    assert torch.equal(texts[0].embed_tokens.weight, texts[1].embed_tokens.weight)


def test_another_seed_is_another_model(shape: Path, tmp_path: Path) -> None:
    heads: list[torch.Tensor] = []
    for seed in (0, 0, 1):
        root = tmp_path / f"{len(heads)}"
        write_random_checkpoint(read_shape(str(shape)), root, seed=seed)
        heads.append(load_hart(root).transformer.head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize(("name", "millions"), [("mid-256px", 95.9), ("hart-0.7b-1024px", 732.4)])
def test_the_packaged_shapes(name: str, millions: float) -> None:
    shape = read_shape(name)
    with torch.device("meta"):
        llm = ScaleTransformer(shape.llm, shape.tokenizer.vocab_size, shape.tokenizer.z_channels)
        ImageTokenizer(shape.tokenizer)
    assert sum(p.numel() for p in llm.parameters()) / 1e6 == pytest.approx(millions, abs=0.3)


def test_what_is_refused(shape: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        done = CliRunner().invoke(main, [str(a) for a in arguments])
        assert done.exit_code == 2, done.output
        return str(done.stderr)

    output = tmp_path / "x"
    assert "mid-256px" in refused("--shape", "nothing", "--output", output)
    assert "exists already" in refused("--shape", shape, "--output", tmp_path)
    shape.write_text(json.dumps({**SHAPE, "llm": {**SHAPE["llm"], "depth": 0}}))  # type: ignore[dict-item]
    assert "depth must be at least 1, found 0" in refused("--shape", shape, "--output", output)
    shape.write_text(json.dumps({"llm": {}}))
    assert "tokenizer" in refused("--shape", shape, "--output", output)
    assert not output.exists()
