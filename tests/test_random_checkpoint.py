"""Random checkpoints are checkpoints like any other."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from hart_runtime import Pipeline
from hart_runtime.common.checkpoint import Network, find_checkpoint
from hart_runtime.common.config import config_to_dict
from hart_runtime.common.errors import InputError
from hart_runtime.export.bundle import export_bundle
from hart_runtime.export.request import Request
from hart_runtime.hart import random_weights
from hart_runtime.hart.checkpoint import load_hart, load_text_encoder
from hart_runtime.hart.kl_tokenizer import KlTokenizer
from hart_runtime.hart.mar import MarTransformer
from hart_runtime.hart.mar_checkpoint import load_mar
from hart_runtime.hart.published import llm_buffers, tokenizer_extras
from hart_runtime.hart.random_checkpoint import QWEN2_1_5B, main, read_shape, write_random_checkpoint
from hart_runtime.hart.random_mar import read_mar_shape
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.transformer import ScaleTransformer
from tests.golden_runs import HERE
from tests.mar_models import HEADS, SMALL

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
    manifest = export_bundle(Request(find_checkpoint(root), "fp16"), tmp_path / "bundle")
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
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 1 << 16)
    write_random_checkpoint(read_shape(str(shape)), tmp_path / "shards", dtype)
    assert len(list((tmp_path / "shards" / "llm").glob("*.safetensors"))) > 1
    whole, shards = (
        load_hart(find_checkpoint(tmp_path / "whole")),
        load_hart(find_checkpoint(tmp_path / "shards")),
    )
    for one, other in zip(whole, shards, strict=True):
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name
    texts = [load_text_encoder(Network(tmp_path / name / "text_encoder")) for name in ("whole", "shards")]
    assert torch.equal(texts[0].embed_tokens.weight, texts[1].embed_tokens.weight)


def test_another_seed_is_another_model(shape: Path, tmp_path: Path) -> None:
    heads: list[torch.Tensor] = []
    for seed in (0, 0, 1):
        root = tmp_path / f"{len(heads)}"
        write_random_checkpoint(read_shape(str(shape)), root, seed=seed)
        heads.append(load_hart(find_checkpoint(root)).transformer.head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def keys_in(name: str) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Part -> key -> type and shape, from a list of what published models are stored as."""
    found: dict[str, dict[str, tuple[str, list[int]]]] = defaultdict(dict)
    for line in (HERE / name).read_text().splitlines():
        folder, pattern, dtype, shape = line.split()
        parts = [_numbers(part) for part in pattern.split(".")]
        for names in itertools.product(*parts):
            found[folder][".".join(names)] = dtype, [int(n) for n in shape.split("x")] if shape != "-" else []
    return found


def _numbers(part: str) -> list[str]:
    """``block_1-2`` stands for block_1 and block_2, ``0,2`` for 0 and 2."""
    found = re.fullmatch(r"(\D*)(\d+)([-,])([\d,]+)", part)
    if found is None:
        return [part]
    name, first, kind, rest = found.groups()
    several = range(int(first), int(rest) + 1) if kind == "-" else [first, *rest.split(",")]
    return [f"{name}{number}" for number in several]


def test_the_published_keys_and_shapes() -> None:
    shape = read_shape("hart-0.7b-1024px")
    expected = keys_in("published_keys.txt")
    assert len(expected["llm"]) == 317
    assert len(expected["tokenizer"]) == 346
    with torch.device("meta"):
        llm = ScaleTransformer(shape.llm, shape.tokenizer.vocab_size, shape.tokenizer.z_channels)
        image = ImageTokenizer(shape.tokenizer)
    parameters = {
        "llm": dict(llm.named_parameters()),
        "tokenizer": {f"vae.{key}": p for key, p in image.named_parameters()},
    }
    extras = {"llm": llm_buffers(shape.llm), "tokenizer": tokenizer_extras(shape.tokenizer)}
    for folder, expected_here in expected.items():
        found = {key: described(p) for key, p in parameters[folder].items()}
        found |= {key: described(make()) for key, make in extras[folder].items()}
        assert found == expected_here


def described(tensor: torch.Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def test_everything_that_is_published(shape: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    done = CliRunner().invoke(main, ["--shape", str(shape), "--output", str(root), "--published"])
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (root / "llm").iterdir()) == [
        "config.json",
        "ema_model.bin",
        "model.safetensors",
    ]
    plain = load_file(root / "llm" / "model.safetensors")
    averaged = torch.load(root / "llm" / "ema_model.bin", weights_only=True)
    assert plain.keys() == averaged.keys()
    levels, mask = plain["lvl_1L"], plain["attn_bias_for_masking"]
    assert levels.tolist() == [[0] * 8 + [1] * 4 + [2] * 16]
    assert mask.shape == (1, 1, 28, 28)
    assert mask[0, 0, 8].tolist() == [0.0] * 12 + [-torch.inf] * 16  # level 1 sees the context and itself
    head = load_hart(find_checkpoint(root)).transformer.head.weight
    assert torch.equal(head, averaged["head.weight"])
    assert not torch.equal(head, plain["head.weight"])
    assert "disc.main.11.weight" in load_file(root / "tokenizer" / "model.safetensors")


def test_the_text_encoder_of_the_published_model(shape: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        encoder = TextEncoder(QWEN2_1_5B)
    assert sum(p.numel() for p in encoder.parameters()) == 1_543_714_304
    arguments = ["--shape", str(shape), "--output", str(tmp_path / "x"), "--text-encoder", "qwen2-1.5b"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert "1536 wide" in done.stderr
    assert "96" in done.stderr


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
    assert "depth: expected 1 to 1000, found 0" in refused("--shape", shape, "--output", output)
    shape.write_text(json.dumps({"llm": {}}))
    assert "tokenizer" in refused("--shape", shape, "--output", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "tensors", "millions"), [("base", 364, 207.92), ("large", 476, 478.33), ("huge", 604, 942.40)]
)
def test_the_published_keys_and_shapes_of_mar(name: str, tensors: int, millions: float) -> None:
    shape, expected = read_mar_shape(f"mar-{name}-256px"), keys_in("mar_keys.txt")
    with torch.device("meta"):
        parts = {f"mar_{name}": MarTransformer(shape.transformer), "kl16": KlTokenizer(shape.tokenizer)}
    for part, model in parts.items():
        assert {key: described(value) for key, value in model.state_dict().items()} == expected[part]
    assert len(expected[f"mar_{name}"]) == tensors
    assert len(expected["kl16"]) == 312
    transformer, tokenizer = (sum(p.numel() for p in model.parameters()) / 1e6 for model in parts.values())
    assert transformer == pytest.approx(millions, abs=0.01)
    assert tokenizer == pytest.approx(66.46, abs=0.01)


def test_a_checkpoint_of_mar_from_a_shape_file(tmp_path: Path) -> None:
    file, root = tmp_path / "tiny.json", tmp_path / "mar_tiny"
    values = {"masked": config_to_dict(SMALL.transformer), "tokenizer": config_to_dict(SMALL.tokenizer)}
    file.write_text(json.dumps(values))
    done = CliRunner().invoke(main, ["--shape", str(file), "--output", str(root)])
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in root.iterdir()) == ["checkpoint-last.pth", "kl16.ckpt"]
    assert [*torch.load(root / "checkpoint-last.pth", weights_only=True)] == ["model_ema"]
    assert [*torch.load(root / "kl16.ckpt", weights_only=True)] == ["model"]
    written = load_mar(root / "checkpoint-last.pth", root / "kl16.ckpt", heads=HEADS)
    again = tmp_path / "again"
    done = CliRunner().invoke(main, ["--shape", str(file), "--output", str(again), "--published"])
    assert done.exit_code == 0, done.output
    assert [*torch.load(again / "checkpoint-last.pth", weights_only=True)] == ["model", "model_ema"]
    other = load_mar(again / "checkpoint-last.pth", again / "kl16.ckpt", heads=HEADS, ema=False)
    assert torch.equal(written.transformer.mask_token, other.transformer.mask_token)  # the first set made
    for change, words in (
        ({"masked": {}}, "missing num_classes"),
        ({"masked": {**values["masked"], "depth": 3}}, "unknown depth"),
        ({"masked": {**values["masked"], "token_channels": 8}}, "tokens are made of 8 latent channels"),
        ({"tokenizer": 3}, "expected an object 'tokenizer', found 3"),
    ):
        file.write_text(json.dumps({**values, **change}))
        done = CliRunner().invoke(main, ["--shape", str(file), "--output", str(tmp_path / "x")])
        assert done.exit_code == 2
        assert words in done.stderr
    with pytest.raises(InputError, match="expected a shape of HART, found one of MAR"):
        read_shape("mar-base-256px")
