"""Configurations, tokenizers and other text of a checkpoint: what is wrong is said, by file and key."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hart_runtime.common.checkpoint import Network, find_checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.export.cli import main
from hart_runtime.export.request import Request
from hart_runtime.export.system_prompt import read_system_prompt
from hart_runtime.export.vocabulary import read_vocabulary
from hart_runtime.hart.demo import DEMO_CHECKPOINT

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3310000000\n"
LLM, IMAGE, TEXT = "llm/config.json", "tokenizer/config.json", "text_encoder/config.json"
TOKENS = "text_encoder/tokenizer.json"
SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SECTIONS = {"mrope_section": [4, 6, 6]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_CHECKPOINT, tmp_path / "checkpoint"))


def edit(file: Path, **changes: object) -> None:
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def check(root: Path) -> None:
    Request(find_checkpoint(root), "fp32").check()


def refused(root: Path) -> str:
    """What a dry run says, which is what an export says."""
    done = CliRunner().invoke(main, [str(root), "--dry-run"])
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 600
    with pytest.raises(InputError):
        check(root)
    return done.stderr


@pytest.mark.parametrize("name", [LLM, IMAGE, TEXT, "sampling.json", TOKENS])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"depth": 1' + "0" * 5000 + "}", "not a readable JSON file"),
        ('{"guidance": NaN}', "NaN is no number"),
        ('{"norm_eps": -Infinity}', "-Infinity is no number"),
        ('{"mlp_ratio": 1e400}', "'1e400' is beyond"),
        ('{"depth": 1, "depth": 2}', "'depth' is given twice"),
        ("[]", "expected a JSON object, found a list"),
        ("", "not a readable JSON file"),
        (POINTER, "is a git-lfs pointer and not the file itself (3,310.0 MB); run: git lfs pull"),
        ("\ufeff\n<!-- saved --><html>", "is a web page"),
    ],
)
def test_files_that_are_no_json(root: Path, name: str, content: str, words: str) -> None:
    (root / name).write_text(content, encoding="utf-8")
    said = refused(root)
    assert name in said
    assert words in said


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFO")
@pytest.mark.parametrize("thing", [os.mkfifo, Path.mkdir, lambda file: file.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", [LLM, IMAGE, TEXT, "sampling.json", TOKENS])
def test_configurations_that_have_no_end(root: Path, name: str, thing: Callable[[Path], None]) -> None:
    (root / name).unlink()
    thing(root / name)
    assert Path(name).name in refused(root)


def test_a_byte_order_mark_is_no_text(root: Path, tmp_path: Path) -> None:
    for name in (LLM, IMAGE, TEXT, TOKENS, "sampling.json"):
        file = root / name
        file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    check(root)
    (root / LLM).write_text((root / LLM).read_text(encoding="utf-8-sig"), encoding="utf-16")
    assert "UTF-16" in refused(root)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((LLM, "norm_eps", value) for value in (0, -1e-6, 1e-60, "1e-6", True, 10**400)),
        *((LLM, "mlp_ratio", value) for value in (0, -4, 1e300)),
        (LLM, "mlp_ratio", [4.0]),
        *((LLM, "depth", value) for value in (0, -1, 10**9, 2.0, "2")),
        *((LLM, "patch_nums", value) for value in ([], [1], [2, 3], [1, 0], [1, 2.0], [1] * 101)),
        *((LLM, "patch_nums", value) for value in ("1_2", 5)),
        (LLM, "context_token", 10**9),
        (LLM, "disable_aln", "false"),
        (LLM, "num_sampling_steps", ["x"]),
        *((IMAGE, "ch_mult", value) for value in ([], [1, -1], [1] * 40, [10**12], "12")),
        *((IMAGE, "quant_resi", value) for value in ("0.5", 7, False)),
        (IMAGE, "z_channels", 0),
        (IMAGE, "vocab_size", 1 << 40),
        *((TEXT, "rms_norm_eps", value) for value in (0, -1, "x")),
        *((TEXT, "rope_theta", value) for value in (0, -5, "1e6", [1])),
        (TEXT, "num_hidden_layers", 10**9),
        (TEXT, "num_attention_heads", 0),
        *((name, "quantization_config", {"quant_method": "awq"}) for name in (LLM, IMAGE, TEXT)),
    ],
)
def test_numbers_that_make_no_model(root: Path, name: str, key: str, value: object) -> None:
    edit(root / name, **{key: value})
    said = refused(root)
    assert name in said
    assert key in said or key == "num_sampling_steps"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {**SCALED, **SECTIONS}}, "rope_scaling: rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, **SECTIONS}}, "rope_scaling: type"),
        ({"rope_scaling": {"rope_type": "default", "type": "dynamic", **SECTIONS}}, "rope_scaling: type"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling: factor"),
        ({"rope_scaling": {**SECTIONS, "long_factor": [1.0]}}, "rope_scaling: long_factor"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_parameters: rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": SCALED}, "rope_scaling: rope_type"),
        ({"text_config": {"rope_scaling": {**SCALED, **SECTIONS}}}, "text_config.rope_scaling: rope_type"),
        ({"text_config": {"rope_parameters": {"type": "su"}}}, "text_config.rope_parameters: type"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta: given as"),
        ({"text_config": {"hidden_size": 64}}, "hidden_size: given as"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected rotary positions without scaling"),
        ({"rotary_pct": 0.25}, "rotary_pct: expected rotary positions without scaling"),
        ({"text_config": {"rope_type": "yarn"}}, "text_config.rope_type: expected 'default'"),
        ({"rope_scaling": "yarn"}, "rope_scaling: expected an object, found 'yarn'"),
        ({"rope_parameters": ["yarn"]}, "rope_parameters: expected an object"),
        ({"text_config": [1]}, "text_config: expected an object"),
        ({"text_config": {"rope_scaling": 4}}, "rope_scaling: expected an object"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling: type"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"model_type": 5}, "model_type"),
        ({"use_sliding_window": "no"}, "use_sliding_window"),
        ({"head_dim": 64}, "head_dim"),
    ],
)
def test_text_encoders_of_another_kind(root: Path, changes: dict[str, Any], words: str) -> None:
    published = {"model_type": "qwen2_vl", "rope_scaling": {"type": "mrope", **SECTIONS}}
    edit(root / TEXT, **(published | changes))
    said = refused(root)
    assert TEXT in said
    assert words in said


def test_sections_alone_scale_nothing(root: Path) -> None:
    both = {"rope_type": "default", "type": "mrope", **SECTIONS, "rope_theta": 1_000_000.0, "factor": None}
    edit(root / TEXT, model_type="qwen2_vl", rope_scaling=both, text_config={"rope_parameters": both})
    check(root)


@pytest.mark.parametrize("name", [LLM, IMAGE, TEXT])
@pytest.mark.parametrize(("key", "hint"), [("patch_num", "patch_nums"), ("deptth", "depth"), ("rope", "")])
def test_unknown_keys_are_told_of(
    root: Path, name: str, key: str, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    edit(root / name, **{key: [1]})
    check(root)
    (record,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert record.startswith(f"{root / name}: unknown keys, not read: {key}")
    if name == LLM and hint:
        assert f"did you mean {hint}?" in record


def test_published_configurations_tell_nothing(caplog: pytest.LogCaptureFixture) -> None:
    golden = Path(__file__).parent / "golden"
    for variant in ("t2i_main", "t2i_adaln"):
        check(golden / variant)
    check(DEMO_CHECKPOINT)
    assert caplog.records == []


def vocabulary_with(token: str, number: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        values["model"]["vocab"][token] = number
        (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")

    return change


def tokenizer_with(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer.json", **changes)


def settings_with(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer_config.json", **changes)


def older_tokens(**added: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "added_tokens.json", **added)


def pairs_with(words: dict[str, int], merges: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
        (folder / "merges.txt").write_text(merges, encoding="utf-8")

    return change


ADDED: dict[str, Any] = {"content": "<|new|>", "special": True}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (settings_with(added_tokens_decoder={"339": ADDED}), "'<|new|>' has number 339"),
        (settings_with(added_tokens_decoder={"99999999999999999999": ADDED}), "number of a token"),
        (tokenizer_with(added_tokens=[{**ADDED, "id": 339}]), "has number 339, the text encoder's embedding"),
        (vocabulary_with("late", 339), "'late' has number 339"),
        (vocabulary_with("late", 2147483648), "'late' has number 2147483648"),
        (vocabulary_with("late", -1), "'late' has number -1"),
        (vocabulary_with("late", True), "'late' has number True"),
        (tokenizer_with(padding={"pad_id": 500, "pad_token": "<|pad|>"}), "'<|pad|>' has number 500"),
        (
            tokenizer_with(post_processor={"type": "BertProcessing", "sep": ["x", 900], "cls": ["y", 1]}),
            "900",
        ),
        (pairs_with({"a": 1 << 31}, ""), "'a' has number 2147483648"),
        (older_tokens(late=339), "added_tokens.json: token 'late' has number 339, the text encoder's"),
        (older_tokens(late="5"), "added_tokens.json: token 'late' has number '5'"),
        (older_tokens(late=330, later=330), "added_tokens.json: 'late' and 'later' have one number, 330"),
        (older_tokens(late=5), "added_tokens.json: 'late' has number 5, the vocabulary gives it 339"),
    ],
)
def test_tokens_beyond_the_embedding(root: Path, change: Callable[[Path], None], words: str) -> None:
    change(root / "text_encoder")
    assert words in refused(root)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (settings_with(added_tokens_decoder=[{"content": "x"}]), "added_tokens_decoder: expected an object"),
        (settings_with(added_tokens_decoder={"x": ADDED}), "expected the number of a token, found 'x'"),
        (settings_with(added_tokens_decoder={"0": "x"}), "0: expected an object with its content, found 'x'"),
        (settings_with(added_tokens_decoder={"0": {"content": 5}}), "expected an object with its content"),
        (settings_with(added_tokens_decoder={"0": {**ADDED, "special": "no"}}), "special: expected true or"),
        (settings_with(padding_side=["left"]), "padding_side"),
        (settings_with(padding_side=1), "padding_side"),
        (settings_with(pad_token={"content": ["x"]}), "names no padding"),
        (settings_with(pad_token=7), "names no padding"),
        (tokenizer_with(model="BPE"), "not a tokenizer file"),
        (
            tokenizer_with(model={"type": "BPE", "vocab": {"a": 300}, "merges": ["a b"]}),
            "not a tokenizer file",
        ),
        (tokenizer_with(added_tokens={"id": 1}), "not a tokenizer file"),
        (pairs_with({"a": 0, "b": 1}, "a c\n"), "not a tokenizer file"),
        (pairs_with({"a": 0, "b": 1}, "a\n"), "merges.txt: expected two tokens a line"),
        (pairs_with({"a": 0}, POINTER), "merges.txt: is a git-lfs pointer"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "expected tokenizer.json"),
    ],
)
def test_tokenizers_that_cannot_be_used(root: Path, change: Callable[[Path], None], words: str) -> None:
    change(root / "text_encoder")
    assert words in refused(root)


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_are_told_in_two_files(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(DEMO_CHECKPOINT / "text_encoder", tmp_path / "text"))
    change = (
        older_tokens(**{ADDED["content"]: 339})
        if name == "added_tokens.json"
        else settings_with(added_tokens_decoder={"339": ADDED})
    )
    change(folder)
    encoded = read_vocabulary(folder, 400).encode(f"a {ADDED['content']} circle")
    assert 339 in encoded.ids


def test_a_vocabulary_smaller_than_its_embedding_is_normal(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_CHECKPOINT / "text_encoder", tmp_path / "text"))
    settings_with(added_tokens_decoder={"339": ADDED})(folder)
    assert read_vocabulary(folder, 400).token_to_id("<|new|>") == 339
    rows = Network(folder).text_config.vocab_size
    with pytest.raises(InputError, match="rows 0 to 338"):
        read_vocabulary(folder, rows)


@pytest.mark.parametrize("name", ["constants.py.txt", "constants.PY", "constants", "constants.py"])
@pytest.mark.parametrize("start", ["", "\ufeff", "import os\r\n", "llm_system_prompt: str = 'old'\n"])
def test_source_is_source_by_any_name(tmp_path: Path, name: str, start: str) -> None:
    file = tmp_path / name
    file.write_bytes(f'{start}llm_system_prompt = "Draw."\n'.encode())
    assert read_system_prompt(str(file), True) == ("old" if "old" in start else "Draw.")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>", "is a web page"),
        (POINTER.encode(), "git-lfs pointer"),
        ("Draw.".encode("utf-16"), "UTF-16"),
        (b"D\0r\0a\0w\0", "NUL"),
        (b"llm_system_prompt = 'Draw.\n", "not Python source"),
        (b"\xff\xfd", "UTF-8"),
    ],
)
def test_system_prompts_that_are_none(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_system_prompt(str(file), True)
    assert str(file) in str(caught.value)
    file.write_bytes("\ufeffDraw.\r\n".encode())
    assert read_system_prompt(str(file), True) == "Draw.\r\n"
