"""The safety model, on a tiny Gemma 2 whose answers are known."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.install import install
from hart_runtime.hart import safety
from hart_runtime.runtime.cli import main as run_main

transformers = pytest.importorskip("transformers", reason="part of the safety extra")


def test_yes_is_refused_and_no_is_not(shield: Path) -> None:
    safety.refuse_unsafe(["a blue flower", "a red flower"], str(shield))
    scores = safety.SafetyModel(str(shield))(["a flower", "a weapon"])
    assert scores[0] < 0.4
    assert scores[1] > 0.6
    with pytest.raises(InputError, match=r"^prompt 2 \([01]\.\d\d\), prompt 3 \([01]\.\d\d\) refused"):
        safety.refuse_unsafe(["a flower", "a weapon", "weapon"], str(shield))


def test_the_scores_are_those_of_a_question_asked_by_hand(shield: Path) -> None:
    """The guideline is in the question, and Yes is weighed against No alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(shield)
    model = transformers.Gemma2ForCausalLM.from_pretrained(shield, dtype=torch.bfloat16).eval()
    question = f"<bos> {safety.GUIDELINE} : a red weapon"
    with torch.no_grad():
        logits = model(**tokenizer(question, return_tensors="pt")).logits[0, -1].float()
    expected = float(logits[[2, 3]].softmax(-1)[0])
    assert safety.SafetyModel(str(shield))(["a red weapon"]) == [pytest.approx(expected, abs=1e-6)]


def test_nan_is_no_permission(shield: Path) -> None:
    with pytest.raises(RunError, match="prompt 2 with NaN"):
        safety.refuse_unsafe(["a flower", "broken"], str(shield))


def run(bundle: Path, output: Path, *arguments: object) -> Result:
    given = ["--engine", bundle, "--output", output, "--device", "cpu", *arguments]
    return CliRunner().invoke(run_main, [str(a) for a in given])


def test_hart_run_asks_before_it_draws(demo_bundle: Path, shield: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.png"
    refused = run(demo_bundle, output, "a flower", "a weapon", "--safety-model", shield)
    assert refused.exit_code == 2
    assert "error: prompt 2 (" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    assert run(demo_bundle, output, "a red flower", "--safety-model", shield).exit_code == 0
    assert output.is_file()


def test_what_is_no_safety_model(shield: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`source=.*nowhere'`: cannot be loaded"):
        safety.refuse_unsafe(["a flower"], str(tmp_path / "nowhere"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(shield)
    model = transformers.AutoModelForCausalLM.from_pretrained(shield)
    for template in (None, "{{ messages[0]['content'] }}"):  # a plain chat model
        tokenizer.chat_template = template
        folder = tmp_path / f"chat-{template is None}"
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        with pytest.raises(InputError, match="no chat template that takes a guideline"):
            safety.refuse_unsafe(["a flower"], str(folder))


def test_without_the_extra(shield: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=re.escape(install("safety"))):
        safety.refuse_unsafe(["a flower"], str(shield))
