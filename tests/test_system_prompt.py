"""The text side as published: a system prompt, the user's prompt padded, one Qwen2."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants

from hart_runtime import Pipeline
from hart_runtime.common.checkpoint import Network, find_checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.common.text_tokenizer import PromptTokenizer
from hart_runtime.compare.record import Source, describe
from hart_runtime.compare.reference import check_fits
from hart_runtime.export import system_prompt
from hart_runtime.export.cli import main as export_main
from hart_runtime.export.system_prompt import read_system_prompt
from hart_runtime.export.vocabulary import read_vocabulary
from hart_runtime.export.writer import WeightFile, write_graph
from hart_runtime.hart.checkpoint import load_text_encoder
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.runtime.program import Run
from tests.golden_runs import HERE
from tests.qwen2 import PROMPTS, TEXT, TOKENS, Array, graph_for, published_context, write_qwen2

transformers = pytest.importorskip("transformers", reason="part of the dev extra")


def run_exported(encoder: TextEncoder, folder: Path, ids: Array, mask: Array) -> Array:
    """Features from the exported graph alone, on ONNX Runtime."""
    with WeightFile(folder) as weights:
        write_graph(graph_for(encoder), folder, weights, ())
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
    encoder = load_text_encoder(Network(folder), system_prompt=prompts.system_prompt(text) if text else ())
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
        found = load_text_encoder(Network(folder))(ids, mask)
    sees = mask.cumsum(1) > 0
    assert (found - expected)[sees].abs().max() < 1e-4
    assert found.isfinite().all()


def test_the_prefix_of_a_half_precision_encoder_is_computed_in_float32(tmp_path: Path) -> None:
    folder = write_qwen2(tmp_path / "qwen2", "right", width=32)
    tokens = PromptTokenizer(read_vocabulary(folder), TOKENS).system_prompt(TEXT)
    half = load_text_encoder(Network(folder), torch.float16, tokens)
    rounded = load_text_encoder(Network(folder), torch.float16).float()
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
    averaged = torch.load(checkpoint / "llm" / "ema_model.bin", weights_only=True)
    tables = ("lvl_1L", "attn_bias_for_masking")  # made for fewer tokens
    torch.save({k: v for k, v in averaged.items() if k not in tables}, checkpoint / "llm" / "ema_model.bin")
    (tmp_path / "system.txt").write_bytes(TEXT.encode())
    output = tmp_path / "bundle"
    arguments = ["--text-encoder", qwen2, "--system-prompt", tmp_path / "system.txt", "--output", output]
    arguments += ["--precision", "fp32", "--backend", "onnxruntime"]
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
    context = pipeline.backend.run(Run("context", ""), {"features": features, "mask": mask})
    angles = pipeline.backend.to_host(context["angles"])  # the first channel turns by one a position
    assert np.array_equal(angles[: len(PROMPTS), :, 0], expected["positions"])

    found = find_checkpoint(checkpoint, qwen2)
    source = Source.of(found, manifest)  # hart-compare's reference follows the bundle
    reference = describe(found, manifest, manifest.sampling, [], "cpu")
    check_fits(reference, manifest, "here")
    _, text = source.load(torch.float32, "cpu")
    assert text is not None
    with torch.no_grad():
        again = text(torch.from_numpy(expected["ids"]), torch.from_numpy(mask)).numpy()
    assert np.abs(again - expected["features"]).max() < 1e-4
    other = replace(reference, weights={**reference.weights, "system_prompt": {}})
    with pytest.raises(InputError, match="another system prompt"):
        check_fits(other, manifest, "here")


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
    with pytest.raises(InputError, match=r"could not be fetched .*`system_prompt='constants\.py'`.*none"):
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
    with pytest.raises(InputError, match="no such file"):
        read_system_prompt(str(tmp_path / "nothing"), wanted=True)


@pytest.mark.parametrize("text", ["", "word " * 400])
def test_a_system_prompt_has_a_length(tmp_path: Path, text: str) -> None:
    prompts = PromptTokenizer(read_vocabulary(write_qwen2(tmp_path / "qwen2", "left", 32)), TOKENS)
    with pytest.raises(InputError, match="1 to 300 tokens"):
        prompts.system_prompt(text)
