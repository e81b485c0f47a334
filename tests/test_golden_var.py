"""The reference model against the published VAR code, tensor by tensor."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hart_runtime.common.errors import InputError
from hart_runtime.hart.generate import generate_classes
from hart_runtime.hart.model import Var
from hart_runtime.hart.var_checkpoint import load_var
from tests.golden_hooks import recording_all
from tests.golden_runs import (
    ABSOLUTE,
    HERE,
    IMAGE,
    ClassRun,
    class_runs,
    class_variants,
    compare,
    heads_of,
)

PLAIN = HERE / "var_plain"


@cache
def load(variant: Path) -> Var:
    return load_var(variant / "var.pth", variant / "vae.pth", num_heads=heads_of(variant))


def test_the_public_runs_are_found() -> None:
    assert {run.label for run in class_runs()} >= {"var_plain-topp0.95", "var_plain-topp0_smooth"}


@pytest.mark.parametrize("run", class_runs(), ids=lambda run: run.label)
def test_replay(run: ClassRun) -> None:
    """Every recorded tensor of every run, indices exactly."""
    found: dict[str, np.ndarray] = {}
    labels = torch.from_numpy(run.tensors()["label"])

    model = load(run.variant)
    assert model.transformer.config.patch_nums == run.patch_nums
    with recording_all(model, found) as record:
        generate_classes(model, labels, run.noise(), run.settings(), record)
    compare(run, found)


@pytest.mark.parametrize("variant", class_variants(), ids=lambda v: v.name)
def test_tokenizer_and_teacher_forced_logits(variant: Path) -> None:
    """The published training pass sees all scales at once; here each sees those before it in the cache."""
    file = variant / "golden" / "tokenizer.safetensors"
    if not file.is_file():
        assert variant.parent.resolve() != HERE.resolve()
        pytest.skip("this variant records no tokenizer")
    expected = load_file(file)
    transformer, tokenizer = load(variant)
    patch_nums = transformer.config.patch_nums
    with torch.inference_mode():
        tokens = tokenizer.encode(expected["image_in"])
        f_hats = tokenizer.quantize.accumulate(tokens.indices, patch_nums, phi_on_last=True)
        inputs = tokenizer.quantize.transformer_inputs(f_hats, patch_nums)
        found = {
            "f": tokenizer.latent(expected["image_in"]),
            "var_input": inputs,
            "image_rec": tokenizer.decode(f_hats[-1]),
        }
        for k, (index, f_hat) in enumerate(zip(tokens.indices, f_hats, strict=True)):
            found |= {f"scale{k}.idx": index, f"scale{k}.f_hat": f_hat}
        labels = expected["label"]
        condition = transformer.condition(labels)
        modulations = transformer.modulations(condition)
        logits, cache = [], None
        cells = inputs.split([n * n for n in patch_nums[1:]], dim=1)
        later = [transformer.embed_tokens(part, k).repeat(2, 1, 1) for k, part in enumerate(cells, 1)]
        for x in (transformer.start(condition), *later):
            hidden, cache = transformer(x, modulations, cache)
            logits.append(transformer.logits(hidden, condition)[: len(labels)])
        found["teacher_forced_logits_last64"] = torch.cat(logits, dim=1)[..., -64:]
    for name in expected.keys() - {"image_in", "label"}:
        if expected[name].dtype == torch.int64:
            assert torch.equal(found[name], expected[name]), name
        else:
            limit = IMAGE if "image" in name else ABSOLUTE
            assert (found[name] - expected[name]).abs().max() <= limit, name


def test_one_modulation_may_serve_all_blocks(tmp_path: Path) -> None:
    """Blocks whose own modulations are one matrix, which each adds its offset to, are the shared form."""
    plain = torch.load(PLAIN / "var.pth", weights_only=True)
    shared = {name: value for name, value in plain.items() if ".ada_lin." not in name or "head" in name}
    weight, bias = plain["blocks.0.ada_lin.1.weight"], plain["blocks.0.ada_lin.1.bias"]
    shared |= {"shared_ada_lin.1.weight": weight, "shared_ada_lin.1.bias": bias}
    depth, dim = 3, len(plain["pos_start"][0, 0])
    for i in range(depth):
        offset = torch.randn(1, 1, 6, dim, generator=torch.Generator().manual_seed(i)) / 8
        shared[f"blocks.{i}.ada_gss"] = offset
        plain[f"blocks.{i}.ada_lin.1.weight"] = weight
        plain[f"blocks.{i}.ada_lin.1.bias"] = bias + offset.flatten()
    pictures = []
    for name, state in (("plain", plain), ("shared", shared)):
        save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / f"{name}.safetensors")
        model = load_var(tmp_path / f"{name}.safetensors", PLAIN / "vae.pth")
        run = next(run for run in class_runs() if run.variant == PLAIN.resolve())
        labels = torch.from_numpy(run.tensors()["label"])
        pictures.append(generate_classes(model, labels, run.noise(), run.settings()))
    assert model.transformer.config.shared_aln
    torch.testing.assert_close(*pictures, atol=IMAGE, rtol=0)


def test_without_normalised_attention_heads_are_64_wide(tmp_path: Path) -> None:
    state = torch.load(PLAIN / "var.pth", weights_only=True)
    state = {name: value.clone() for name, value in state.items() if "scale_mul_1H11" not in name}
    save_file(state, tmp_path / "var.safetensors")
    for heads, expected in ((None, 1), (4, 4)):
        config = load_var(tmp_path / "var.safetensors", PLAIN / "vae.pth", num_heads=heads).transformer.config
        assert (config.num_heads, config.attn_l2_norm) == (expected, False)


@pytest.mark.parametrize(
    ("transformer", "tokenizer", "words"),
    [
        ("vae", "vae", "expected a VAR transformer"),
        ("var", "var", "expected VAR's image tokenizer"),
        ("no_levels", "vae", "lvl_1L"),
        ("odd_levels", "vae", "square numbers of tokens"),
        ("flat", "vae", "class_emb.weight: expected 2 dimensions above 0"),
        ("missing", "vae", "missing: blocks.1.ffn.fc2.weight"),
        ("more", "vae", "unexpected: blocks.1.ffn.fc3.weight"),
        ("narrow", "vae", "takes latents of 16 channels"),
        ("short", "vae", "pos_1LC"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, transformer: str, tokenizer: str, words: str) -> None:
    state = torch.load(PLAIN / "var.pth", weights_only=True)
    files = {"var": PLAIN / "var.pth", "vae": PLAIN / "vae.pth"}
    if transformer not in files:
        if transformer == "no_levels":
            del state["lvl_1L"]
        elif transformer == "odd_levels":
            state["lvl_1L"] = torch.zeros(1, 66, dtype=torch.int64)
        elif transformer == "flat":
            state["class_emb.weight"] = state["class_emb.weight"].flatten()
        elif transformer == "missing":
            del state["blocks.1.ffn.fc2.weight"]
        elif transformer == "more":
            state["blocks.1.ffn.fc3.weight"] = torch.zeros(3, 3)
        elif transformer == "narrow":
            state["word_embed.weight"] = state["word_embed.weight"][:, :16].clone()
        else:
            state["pos_1LC"] = state["pos_1LC"][:, :60].clone()
        files[transformer] = tmp_path / f"{transformer}.safetensors"
        save_file({k: v.clone() for k, v in state.items()}, files[transformer])
    with pytest.raises(InputError, match=words) as caught:
        load_var(files[transformer], files[tokenizer])
    assert str(files[transformer]) in str(caught.value) or str(files[tokenizer]) in str(caught.value)
