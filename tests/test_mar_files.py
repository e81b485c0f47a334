"""The two files of a MAR checkpoint as people have them: what is wrong is said by file and tensor."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hart_runtime.common.errors import InputError
from hart_runtime.hart import checkpoints
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.hart.find import VarCheckpoint, find, finder
from hart_runtime.hart.mar_checkpoint import load_mar
from hart_runtime.hart.mar_files import MarCheckpoint, find_mar, parse_heads
from tests.mar_models import HEADS, SMALL, VARIANTS, MarShape, varied, write_random_mar

State = dict[str, Tensor]
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1660000000\n"
MAR, KL = "checkpoint-last.pth", "kl16.ckpt"
QKV, CONV, CLASSES = "encoder_blocks.0.attn.qkv.weight", "decoder.conv_out.weight", "class_emb.weight"
PLACES, KNOWN, CODES = "diffusion_pos_embed_learned", "encoder_pos_embed_learned", "post_quant_conv.weight"
SPLIT = "decoder.mid.attn_1.q.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mar") / "mar_small"
    write_random_mar(SMALL, folder, published=True)
    return folder


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """Links to both files; what is changed is written in their place."""
    for name in (MAR, KL):
        (tmp_path / name).symlink_to(written / name)
    return tmp_path


def both_of(root: Path, name: str) -> dict[str, State]:
    return torch.load(root / name, weights_only=True)


def state_of(root: Path, name: str) -> State:
    """Of the transformer the averaged ones."""
    return both_of(root, name)["model_ema" if name == MAR else "model"]


def put(file: Path, content: Any) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)


def put_state(root: Path, name: str, change: Callable[[State], Any]) -> None:
    """Both sets of the transformer, changed alike, or the tokenizer's one."""
    sets = both_of(root, name)
    put(root / name, {key: change(state) for key, state in sets.items()})


def refused(root: Path, name: str, words: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        load_mar(root / MAR, root / KL, dtype, **{"heads": HEADS, **options})
    said = str(caught.value)
    assert words in said
    assert said.startswith(f"{root / name}: ")
    assert said.isprintable()
    assert len(said) < 500


def first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


FINITE, HALF, KIND, SIZES = (
    "holds NaN or infinity, 1 of",
    "beyond the 65504 of float16",
    "expected float64, float32,",
    "dimensions above 0, found",
)


@pytest.mark.parametrize(
    ("name", "key", "change", "words"),
    [
        (MAR, QKV, first(float("nan")), FINITE),
        (MAR, "fake_latent", first(float("inf")), FINITE),
        (MAR, "diffloss.net.input_proj.bias", first(float("nan")), FINITE),
        (KL, CONV, first(-float("inf")), FINITE),
        (MAR, QKV, first(7e4), HALF),
        (KL, CONV, first(65520.0), HALF),
        (MAR, QKV, lambda t: t.to(torch.int8), KIND),
        (MAR, QKV, lambda t: t.to_sparse(), KIND),
        (MAR, QKV, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), KIND),
        (KL, CONV, lambda t: t.to("meta"), KIND),
        (KL, CODES, lambda t: t.to(torch.int64), KIND),
        (MAR, PLACES, lambda t: t[:, :15], f"{PLACES}: expected a square number of tokens, found 15"),
        (MAR, PLACES, lambda t: t[0], f"{PLACES}: expected 3 {SIZES}"),
        (MAR, KNOWN, lambda t: t[:, :16], "buffer: expected 1 to 65536, found 0"),
        (MAR, KNOWN, lambda t: t[:, :18], "decoder_pos_embed_learned [1, 19, 48] instead of [1, 18, 48]"),
        (MAR, CLASSES, lambda t: t[:0], f"{CLASSES}: expected 2 {SIZES}"),
        (
            MAR,
            "z_proj.weight",
            lambda t: t[:, :3],
            "has tokens of 3 channels, which are no square of cells of",
        ),
        (MAR, "mask_token", lambda t: t[..., :5], "mask_token [1, 1, 5] instead of [1, 1, 48]"),
        (KL, CODES, lambda t: t.flatten(), f"{CODES}: expected 4 {SIZES}"),
        (KL, "encoder.conv_in.weight", lambda t: t[:20], "ch must be a multiple of 32"),
        (KL, "quant_conv.weight", lambda t: t[:4], "quant_conv.weight [4, 8, 1, 1] instead of [8, 8, 1, 1]"),
    ],
)
def test_tensors_that_cannot_be(
    root: Path, name: str, key: str, change: Callable[[Tensor], Tensor], words: str
) -> None:
    put_state(root, name, lambda state: {**state, key: change(state[key].clone())})
    refused(root, name, words, torch.float16 if words == HALF else torch.float32)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (MAR, lambda s: {k: v for k, v in s.items() if k != "mask_token"}, "(missing: mask_token)"),
        (MAR, lambda s: {k: v for k, v in s.items() if k != PLACES}, f"has one {PLACES}, found none"),
        (MAR, lambda s: {k: v for k, v in s.items() if k != CLASSES}, f"{CLASSES}: expected 2 {SIZES}"),
        (MAR, lambda s: {**s, "head.weight": s[QKV]}, "unexpected: model_ema.head.weight"),
        (MAR, lambda s: {**s, f"module.{QKV}": s[QKV]}, "is stored twice, also as"),
        (
            MAR,
            lambda s: {**s, "encoder_blocks.2.norm1.weight": s["fake_latent"][0]},
            "missing: encoder_blocks.2",
        ),
        (MAR, lambda s: {**s, f"encoder_blocks.{'9' * 5000}.x": s[QKV]}, "unexpected: 'model_ema.encoder_b"),
        (KL, lambda s: {k: v for k, v in s.items() if k != CONV}, f"(missing: {CONV})"),
        (KL, lambda s: {k: v for k, v in s.items() if k != SPLIT}, f"has one {SPLIT}, found none"),
        (
            KL,
            lambda s: {k: v for k, v in s.items() if not k.startswith("encoder.down")},
            "1 to 10 levels, found 0",
        ),
        (KL, lambda s: {"a": s, "b": s}, f"has one {SPLIT}, found 2, below 'model.a' and 'model.b'"),
    ],
)
def test_names_that_cannot_be(root: Path, name: str, change: Callable[[State], Any], words: str) -> None:
    put_state(root, name, change)
    refused(root, name, words)


def test_what_the_tokenizer_has_beside_is_told_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The published code loads it with ``strict=False``, so such files are about."""
    extra = {"decoder.strange.weight": torch.ones(3), "loss.discriminator.main.0.weight": torch.ones(3)}
    put_state(root, KL, lambda state: {**state, **extra})
    with caplog.at_level(logging.WARNING):
        load_mar(root / MAR, root / KL, heads=HEADS)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == f"{root / KL}: holds tensors that are not read: model.decoder.strange.weight"


def test_both_sets_of_weights(root: Path) -> None:
    """The averaged ones by default, as the published code draws with them; the others when asked for."""
    sets = both_of(root, MAR)
    for ema, key in ((None, "model_ema"), (True, "model_ema"), (False, "model")):
        model = load_mar(root / MAR, root / KL, heads=HEADS, ema=ema)
        assert torch.equal(model.transformer.get_parameter(QKV), sets[key][QKV])
    assert not torch.equal(sets["model"][QKV], sets["model_ema"][QKV])
    put(root / MAR, {"model": sets["model"]})
    model = load_mar(root / MAR, root / KL, heads=HEADS)
    assert torch.equal(model.transformer.get_parameter(QKV), sets["model"][QKV])
    refused(root, MAR, "`ema`: expected averaged weights", ema=True)
    put(root / MAR, {"one": sets["model"], "other": sets["model"]})
    refused(root, MAR, f"has one {PLACES}, found 2, below 'one' and 'other'")


def test_a_file_of_the_training_script(root: Path) -> None:
    """With its options, optimizer and parameters in the place of tensors."""
    sets = both_of(root, MAR)
    averaged = {key: torch.nn.Parameter(value) for key, value in sets["model_ema"].items()}
    options = argparse.Namespace(lr=1e-4, epochs=400, model="mar_base", online_eval=True)
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}},
        "param_groups": [{"lr": 1}],
    }
    beside = {"optimizer": optimizer, "epoch": 399, "scaler": {"scale": 65536.0}, "args": options}
    put(root / MAR, {"model": sets["model"], "model_ema": averaged, **beside})
    for ema, key in ((None, "model_ema"), (False, "model")):
        model = load_mar(root / MAR, root / KL, heads=HEADS, ema=ema)
        assert torch.equal(model.transformer.get_parameter(QKV), sets[key][QKV])


class Strange:
    """What no weight file may hold."""


def test_no_other_class_is_allowed(root: Path) -> None:
    put(root / MAR, {**both_of(root, MAR), "args": Strange()})
    refused(root, MAR, "it holds more than tensors, and pickled code is never run")
    put(root / MAR, {**both_of(root.parent / root.name, KL), "args": argparse.Namespace(a=Strange())})
    refused(root, MAR, "it holds more than tensors, and pickled code is never run")


@pytest.mark.parametrize("name", [MAR, KL])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: POINTER.encode(), "run: git lfs pull"),
        (lambda _: b"<!DOCTYPE html>", "is a web page"),
        (lambda _: b"", "is empty"),
        (lambda raw: raw[: len(raw) // 2], "is cut off, at least "),
        (lambda raw: raw[:-10], "is cut off, its end is missing"),
        (
            lambda raw: raw[: len(raw) // 2] + bytes(512) + raw[len(raw) // 2 + 512 :],
            "is not as it was written",
        ),
    ],
)
def test_files_that_are_something_else(
    root: Path, name: str, change: Callable[[bytes], bytes], words: str
) -> None:
    put(root / name, change((root / name).read_bytes()))
    refused(root, name, words)


@pytest.mark.parametrize("name", [MAR, KL])
def test_files_that_are_none(root: Path, name: str) -> None:
    (root / name).unlink()
    refused(root, name, "no such file")
    (root / name).mkdir()
    refused(root, name, "is no regular file")


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither FIFOs nor such devices")
@pytest.mark.parametrize("name", [MAR, KL])
def test_files_that_have_no_end(root: Path, name: str) -> None:
    (root / name).unlink()
    os.mkfifo(root / name)
    refused(root, name, "is no regular file")


@pytest.mark.parametrize("name", [MAR, KL])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: s,
        lambda s: {f"module.{key}": value for key, value in s.items()},
        lambda s: {"state_dict": {f"net.{key}": value for key, value in s.items()}, "epoch": 3},
        lambda s: {"trainer": {"model_ema": s}, "step": torch.tensor(3)},
        lambda s: {key: value.double() for key, value in s.items()},
    ],
)
def test_wrapped_state_dicts(root: Path, name: str, wrapped: Callable[[State], Any]) -> None:
    state = state_of(root, name)
    put(root / name, wrapped(state))
    model = load_mar(root / MAR, root / KL, heads=HEADS)
    found = model.transformer if name == MAR else model.tokenizer
    key = QKV if name == MAR else CONV
    assert torch.equal(found.get_parameter(key), state[key])


@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_size_is_read_from_the_tensors(shape: MarShape, tmp_path: Path) -> None:
    write_random_mar(shape, tmp_path / "x")
    model = load_mar(tmp_path / "x" / MAR, tmp_path / "x" / KL, heads=HEADS)
    assert model.transformer.config == shape.transformer
    assert model.tokenizer.config == shape.tokenizer


def test_half_precision_is_of_the_products(root: Path) -> None:
    model = load_mar(root / MAR, root / KL, torch.float16, HEADS)
    kinds = {name: p.dtype for name, p in model.transformer.named_parameters()}
    assert kinds[QKV] == kinds["decoder_embed.weight"] == kinds["z_proj.bias"] == torch.float16
    for name in (
        "diffloss.net.cond_embed.weight",
        "fake_latent",
        CLASSES,
        KNOWN,
        "mask_token",
        "encoder_norm.weight",
        "z_proj_ln.bias",
    ):
        assert kinds[name] == torch.float32
    assert model.tokenizer.decoder.conv_in.weight.dtype == torch.float16
    assert model.tokenizer.decoder.norm_out.weight.dtype == torch.float32


# ---- heads, which no tensor tells


def test_heads(root: Path) -> None:
    refused(
        root, MAR, "is 32 wide, and no tensor says how many heads that is; widths with a known", heads=None
    )
    refused(root, MAR, "encoder_heads must divide encoder_dim, found 5 and 32", heads=(5, 2))
    refused(root, MAR, "decoder_heads must divide decoder_dim, found 5 and 48", heads=(2, 5))
    refused(root, MAR, "encoder_heads: expected 1 to 1.04858e+06, found 0", heads=(0, 2))
    assert load_mar(root / MAR, root / KL, heads=(2, 4)).transformer.config.encoder_heads == 2
    assert parse_heads("16") == (16, 16)
    assert parse_heads("12,16") == (12, 16)
    for text in ("", "a", "1,2,3", "-1", "1.5", "12,", "0", "4,0", "٣", "9" * 50):
        with pytest.raises(InputError, match=r"^`heads`: expected "):
            parse_heads(text)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16)])
def test_heads_of_published_widths(width: int, heads: int, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "encoder_dim": width,
        "encoder_depth": 1,
        "encoder_heads": heads,
        "encoder_hidden": 8,
    }
    shape = varied(**sizes, decoder_heads=4)
    write_random_mar(shape, tmp_path / "x")
    with pytest.raises(InputError, match="is 48 wide, and no tensor says"):
        load_mar(tmp_path / "x" / MAR, tmp_path / "x" / KL)
    same: dict[str, Any] = {name.replace("encoder", "decoder"): value for name, value in sizes.items()}
    write_random_mar(varied(**sizes, **same), tmp_path / "y")
    config = load_mar(tmp_path / "y" / MAR, tmp_path / "y" / KL).transformer.config
    assert (config.encoder_heads, config.decoder_heads) == (heads, heads)


# ---- which files are a checkpoint


def test_where_the_files_lie(root: Path, tmp_path: Path) -> None:
    """Beside each other, the tokenizer one folder above, or elsewhere; by folder or by file."""
    for place in (root, root / MAR):
        found = find(place, heads="4,2")
        assert isinstance(found, MarCheckpoint)
        assert (found.transformer_file.name, found.tokenizer_file.name) == (MAR, KL)
        assert found.llm_config.tokens == 16
    folder = tmp_path / "models" / "mar_base"
    folder.mkdir(parents=True)
    (root / MAR).rename(folder / MAR)
    with pytest.raises(
        InputError, match=re.escape(f"{folder / MAR}: expected the image tokenizer kl16.ckpt")
    ):
        find(folder)
    assert find(folder, tokenizer=root / KL).tokenizer.file == root / KL
    (root / KL).rename(folder.parent / KL)
    found = find(folder, heads="4,2")
    assert (found.name, found.source) == ("mar-base", f"mar_base/{MAR}")
    assert found.root == folder
    assert checkpoints.stored_sets(found) == ("model_ema", "model")
    checkpoints.check(found)
    save_file(state_of(folder.parent, KL), folder / "kl16.safetensors")
    assert find(folder).tokenizer.file == folder / "kl16.safetensors"


def test_a_checkpoint_of_the_hub(root: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--mar" / "snapshots" / ("0" * 40)
    (snapshot / "mar_large").mkdir(parents=True)
    for file, name in ((MAR, f"mar_large/{MAR}"), (KL, KL)):
        (root / file).rename(snapshot / name)
    found = find(snapshot / "mar_large" / MAR)
    assert (found.name, found.source) == ("mar-large", f"someone/mar@{'0' * 40}/mar_large/{MAR}")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "no such checkpoint file"),
        (
            ["checkpoint-1.pth", "checkpoint-2.pth", KL],
            "2 transformers and no rule says which: checkpoint-1.pth",
        ),
        ([MAR, "kl8.ckpt", "kl4.ckpt"], "2 image tokenizers and no rule says which: kl4.ckpt, kl8.ckpt"),
    ],
)
def test_folders_without_a_rule(tmp_path: Path, names: list[str], words: str) -> None:
    folder = tmp_path / "x"
    if names:
        folder.mkdir()
    for name in names:
        (folder / name).touch()
    with pytest.raises(InputError, match=re.escape(words)):
        find(folder)


def test_a_bundle_tells_how_many_heads(root: Path) -> None:
    looked_for = finder({"llm": find(root, heads="4,2").describe()["llm"]})
    found = looked_for(root, None, False).llm_config
    assert (found.encoder_heads, found.decoder_heads) == HEADS  # type: ignore[union-attr]
    assert looked_for(root, None, False).llm.ema is False
    assert not isinstance(finder({"llm": {}})(DEMO_CHECKPOINT, None, None), MarCheckpoint)


def test_options_of_other_families(root: Path) -> None:
    with pytest.raises(InputError, match=r"^`text_encoder=.*`: MAR draws classes and has no text encoder"):
        find(root, text_encoder=root)
    with pytest.raises(InputError, match=r"^`heads='4'`: only MAR's files do not tell how many there are"):
        find(DEMO_CHECKPOINT, heads="4")
    with pytest.raises(InputError, match="no such image tokenizer file"):
        find(root, tokenizer=root / "nothing")
    with pytest.raises(InputError, match=r"expected a transformer such as checkpoint-last\.pth, found none"):
        find_mar(root / "..")
    (root / "var_d4.pth").touch()
    (root / "vae_x.pth").touch()
    assert isinstance(find(root / "var_d4.pth"), VarCheckpoint)
    assert isinstance(find(root), MarCheckpoint)


def test_settings_of_a_checkpoint(root: Path) -> None:
    found = find(root, heads="4,2").sampling
    assert (found.guidance, found.iterations, found.steps) == (2.9, None, "100")
    assert (found.guidance_schedule, found.temperature) == ("linear", 1.0)
    for text, words in (
        ('{"iterations": 17}', "iterations: expected 1 to 16, found 17"),
        ('{"steps": "1"}', "needs at least 2 steps"),
        ('{"guidance_schedule": "cosine"}', "guidance_schedule='cosine': expected linear or constant"),
    ):
        (root / "sampling.json").write_text(text)
        with pytest.raises(InputError, match=re.escape(words)):
            _ = find(root, heads="4,2").sampling


def test_a_tokenizer_of_another_size(root: Path, tmp_path: Path) -> None:
    write_random_mar(varied({"z_channels": 3}, token_channels=3), tmp_path / "other")
    (root / KL).unlink()
    (root / KL).symlink_to(tmp_path / "other" / KL)
    refused(root, MAR, "has tokens of 4 channels, which are no square of cells of")
    assert f"of {root / KL}, whose latents have 3" in str(_error(root))
    put(root / KL, {"model": state_of(root, MAR)})
    refused(root, KL, "expected MAR's image tokenizer")


def _error(root: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load_mar(root / MAR, root / KL, heads=HEADS)
    return caught.value
