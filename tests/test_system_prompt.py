"""The text side as published: a system prompt, the user's prompt padded, one Qwen2."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from compare.capture import Checkpoint
from compare.reference import check_fits
from export import system_prompt
from export.cli import main as export_main
from export.graphs import text_encoder_graph
from export.system_prompt import read_system_prompt
from export.vocabulary import read_vocabulary
from export.writer import WeightFile, write_graph
from hart.checkpoint import load_text_encoder, read_text_config
from hart.errors import InputError
from hart.text_encoder import TextEncoder
from hart.text_tokenizer import PromptTokenizer
from runtime import Pipeline
from tests.golden_runs import HERE

Array = NDArray[Any]

transformers = pytest.importorskip("transformers", reason="part of the dev extra")

PAD = "<|endoftext|>"
TEXT = "Draw what the user describes: colours, shapes, light. It's 1024 by 1024 pixels.\n\nUser:\n"
TOKENS = 300
PROMPTS = [
    "a red circle",
    "!",
    "  Two\tcats, it's 1987;\r\n\n  naïve e\u0301clair 東京 ½ 🎨 they'LL see   ",
    f"before {PAD} after",
    "a long story of circles and squares " * 60,
]


def write_qwen2(folder: Path, side: str, width: int) -> Path:
    """A random Qwen2 with a tokenizer of its own, in the files of a published folder."""
    torch.manual_seed(1)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator([TEXT, *PROMPTS], trainer)
    folder.mkdir()
    trained.model.save(str(folder))
    number = trained.get_vocab_size()
    added = {"content": PAD, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": PAD,
        "padding_side": side,
        "added_tokens_decoder": {str(number): added | {"single_word": False}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = transformers.Qwen2Config(
        vocab_size=number + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def published_context(folder: Path, text: str | None) -> dict[str, Array]:
    """What the published sampler makes of PROMPTS, with transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = tokenizer(
        PROMPTS, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    mask = ids != tokenizer.pad_token_id
    system = tokenizer([text], return_tensors="pt").input_ids if text else ids[:1, :0]
    rows = torch.cat([system.expand(len(ids), -1), ids], dim=1)
    seen = torch.cat([torch.ones(len(ids), system.shape[1], dtype=torch.bool), mask], dim=1)
    with torch.no_grad():
        hidden = model(rows, attention_mask=seen, output_hidden_states=True).hidden_states[-1]
    return {
        "ids": ids.numpy(),
        "mask": mask.numpy(),
        "positions": (mask.cumsum(1) - 1).numpy(),
        "features": hidden[:, system.shape[1] :].numpy(),
    }


def run_exported(encoder: TextEncoder, folder: Path, ids: Array, mask: Array) -> Array:
    """Features from the exported graph alone, on ONNX Runtime."""
    with WeightFile(folder) as weights:
        write_graph(text_encoder_graph(encoder, TOKENS), folder, weights)
    session = onnxruntime.InferenceSession(folder / "text_encoder.onnx")
    (features,) = session.run(None, {"input_ids": ids, "mask": mask})
    return features


@pytest.mark.parametrize("text", [None, TEXT], ids=["alone", "system prompt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_prompt_in_context_out(tmp_path: Path, side: str, text: str | None) -> None:
    folder = write_qwen2(tmp_path / "qwen2", side, width=32)
    expected = published_context(folder, text)
    prompts = PromptTokenizer(read_vocabulary(folder), TOKENS)
    ids, mask = prompts(PROMPTS)
    assert np.array_equal(ids, expected["ids"])
    assert np.array_equal(mask, expected["mask"])
    assert mask.sum(1).tolist()[-1] == TOKENS  # the long one, cut
    assert not mask[3, mask[3].argmax() : TOKENS - mask[3, ::-1].argmax()].all()  # its own pad token
    encoder = load_text_encoder(folder, system_prompt=prompts.system_prompt(text) if text else ())
    with torch.no_grad():
        found = encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    assert np.abs(found - expected["features"]).max() < 1e-4  # at every position, padded or not
    assert np.abs(run_exported(encoder, tmp_path, ids, mask) - expected["features"]).max() < 1e-4


def test_rows_that_see_something_do_not_depend_on_the_attention_implementation(tmp_path: Path) -> None:
    """Only padding on the left without a system prompt leaves rows that see nothing."""
    folder = write_qwen2(tmp_path / "qwen2", "left", width=32)
    default = transformers.AutoModel.from_pretrained(folder).eval()
    assert default.config._attn_implementation == "sdpa"
    ids, mask = map(torch.from_numpy, PromptTokenizer(read_vocabulary(folder), TOKENS)(PROMPTS))
    with torch.no_grad():
        expected = default(ids, attention_mask=mask).last_hidden_state
        found = load_text_encoder(folder)(ids, mask)
    sees = mask.cumsum(1) > 0
    assert (found - expected)[sees].abs().max() < 1e-4
    assert found.isfinite().all()


def test_the_prefix_of_a_half_precision_encoder_is_computed_in_float32(tmp_path: Path) -> None:
    folder = write_qwen2(tmp_path / "qwen2", "right", width=32)
    tokens = PromptTokenizer(read_vocabulary(folder), TOKENS).system_prompt(TEXT)
    half = load_text_encoder(folder, torch.float16, tokens)
    rounded = load_text_encoder(folder, torch.float16).float()
    rounded.set_prefix(tokens)
    for ours, exact in zip(prefixes(half), prefixes(rounded), strict=True):
        assert ours.dtype == torch.float16
        assert torch.equal(ours, exact.half())


def prefixes(encoder: TextEncoder) -> list[torch.Tensor]:
    """Keys and values of the system prompt in every layer."""
    buffers = [tensor for name, tensor in encoder.named_buffers() if "prefix" in name]
    assert len(buffers) == 2 * encoder.config.num_hidden_layers
    return buffers


def test_from_the_command_to_the_context(tmp_path: Path) -> None:
    """A whole bundle of a tiny checkpoint: what is drawn from is what the published code draws from."""
    qwen2 = write_qwen2(tmp_path / "qwen2", "left", width=24)
    checkpoint = tmp_path / "tiny"
    shutil.copytree(HERE / "t2i_main" / "llm", checkpoint / "llm")
    shutil.copytree(HERE / "t2i_main" / "tokenizer", checkpoint / "tokenizer")
    config = json.loads((checkpoint / "llm" / "config.json").read_text())
    (checkpoint / "llm" / "config.json").write_text(json.dumps(config | {"context_token": TOKENS}))
    (tmp_path / "system.txt").write_bytes(TEXT.encode())
    output = tmp_path / "bundle"
    arguments = ["--text-encoder", qwen2, "--system-prompt", tmp_path / "system.txt", "--output", output]
    arguments += ["--precision", "fp32", "--backend", "onnx"]
    done = CliRunner().invoke(export_main, [str(checkpoint / "llm"), *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert "warning: the published system prompt has sha256" in done.stderr
    pipeline = Pipeline.load(output, device="cpu")
    manifest = pipeline.bundle.manifest
    assert manifest.checkpoint["source"] == "tiny"
    assert manifest.checkpoint["system_prompt"]["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()

    expected = published_context(qwen2, TEXT)
    features, mask = pipeline.encode(PROMPTS)
    features = pipeline.backend.to_host(features)
    assert np.abs(features - expected["features"]).max() < 1e-4
    assert np.array_equal(mask, expected["mask"])
    context = pipeline.backend.run("context", {"features": features, "mask": mask})
    angles = pipeline.backend.to_host(context["angles"])  # the first channel turns by one a position
    assert np.array_equal(angles[: len(PROMPTS), :, 0], expected["positions"])

    source = Checkpoint(checkpoint, qwen2, manifest)  # hart-compare's reference follows the bundle
    check_fits(source.weights, manifest, "--checkpoint")
    _, text = source.load(torch.float32, "cpu")
    assert text is not None
    with torch.no_grad():
        again = text(torch.from_numpy(expected["ids"]), torch.from_numpy(mask)).numpy()
    assert np.abs(again - expected["features"]).max() < 1e-4
    with pytest.raises(InputError, match="system_prompt"):
        check_fits(source.weights | {"system_prompt": {}}, manifest, "--reference")


@pytest.mark.parametrize("name", ["whole", "pairs"])
def test_vocabularies_in_either_form(tmp_path: Path, name: str) -> None:
    """vocab.json and merges.txt give the tokens that transformers' tokenizer.json gives."""
    folder = write_qwen2(tmp_path / "qwen2", "left", width=32)
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    if name == "whole":
        expected.save_pretrained(folder)
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    found = read_vocabulary(folder)
    assert found.padding["direction"] == "left"
    for prompt in (*PROMPTS, TEXT):
        assert found.encode(prompt).ids == expected(prompt).input_ids


def test_vocabularies_that_cannot_be_used(tmp_path: Path) -> None:
    folder = write_qwen2(tmp_path / "qwen2", "right", width=32)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for change, words in (
        ({"padding_side": "middle"}, "padding_side"),
        ({"pad_token": "<none>"}, "pad_token"),
        ({"added_tokens_decoder": {"7": {"content": PAD}}}, "number 7"),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=words):
            read_vocabulary(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(InputError, match=r"expected tokenizer\.json"):
        read_vocabulary(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"rope_theta": None}, "rope_theta"),
    ],
)
def test_text_encoders_that_would_be_computed_wrongly(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    values = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    published = {"model_type": "qwen2_vl", "rope_theta": 5.0, "rope_scaling": {"mrope_section": [1, 1, 1]}}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values | published))
    assert read_text_config(tmp_path).use_llm_system_prompt
    file.write_text(json.dumps(values | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}))
    assert read_text_config(tmp_path).rope_theta == 5.0
    file.write_text(json.dumps(values | published | change))
    with pytest.raises(InputError, match=words):
        read_text_config(tmp_path)


CODE = f'import os\nllm_system_prompt = """{TEXT}"""\nraise SystemExit("ran")\n'


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A server in place of the published repository; it sends what the list holds, else 404."""
    sent: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if sent else 404)
            self.end_headers()
            self.wfile.write(b"".join(sent))

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(system_prompt, "FILE_URL", f"http://127.0.0.1:{server.server_port}/constants.py")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield sent
        server.shutdown()


def test_the_published_text_is_fetched_and_checked(
    answers: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"could not be fetched .*--system-prompt constants\.py.*none"):
        read_system_prompt(None, wanted=True)
    answers.append(CODE.encode())
    found = hashlib.sha256(TEXT.encode()).hexdigest()
    with pytest.raises(InputError, match=f"{found}.*{system_prompt.SHA256}"):
        read_system_prompt(None, wanted=True)
    monkeypatch.setattr(system_prompt, "SHA256", found)
    assert read_system_prompt(None, wanted=True) == TEXT
    assert read_system_prompt(None, wanted=False) is None
    assert read_system_prompt("none", wanted=True) is None
    answers[:] = [b"llm_system_prompt = open('/etc/passwd').read()"]
    with pytest.raises(InputError, match="sets llm_system_prompt to a string"):
        read_system_prompt(None, wanted=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        read_system_prompt(None, wanted=True)


def test_files_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, code = tmp_path / "own.txt", tmp_path / "constants.py"
    plain.write_bytes(b" two\r\nlines\n\n")
    assert read_system_prompt(str(plain), wanted=False) == " two\r\nlines\n\n"
    code.write_text(CODE)
    assert read_system_prompt(str(code), wanted=True) == TEXT
    monkeypatch.setattr(system_prompt, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    plain.write_bytes(TEXT.encode())
    assert read_system_prompt(str(plain), wanted=True) == TEXT
    plain.write_bytes(TEXT.rstrip().encode())  # as an editor or a copy may leave it
    with pytest.raises(InputError, match="white space"):
        read_system_prompt(str(plain), wanted=True)
    code.write_text("llm_system_prompt = (")
    with pytest.raises(InputError, match="not Python source"):
        read_system_prompt(str(code), wanted=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_system_prompt(str(tmp_path / "nothing"), wanted=True)


@pytest.mark.parametrize("text", ["", "word " * 400])
def test_a_system_prompt_has_a_length(tmp_path: Path, text: str) -> None:
    prompts = PromptTokenizer(read_vocabulary(write_qwen2(tmp_path / "qwen2", "left", 32)), TOKENS)
    with pytest.raises(InputError, match="1 to 300 tokens"):
        prompts.system_prompt(text)
