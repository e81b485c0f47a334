"""Small, real models: coloured shapes, drawn, learned and checked by the project itself."""

from pathlib import Path

DEMO_CHECKPOINT = Path(__file__).parent / "checkpoint"
"""A HART that draws texts, in the published layout."""
CLASS_DEMO = Path(__file__).parent / "classes"
"""A HART that draws classes; its image tokenizer is the same."""
CLASS_VAR = CLASS_DEMO / "var"
"""A VAR of equal width and depth, to compare it with."""
CLASS_MAR = CLASS_DEMO / "mar"
"""A MAR of equal width over a tokenizer of its own, to compare them with."""
DEMOS = {"text": DEMO_CHECKPOINT, "classes": CLASS_DEMO}
"""Checkpoints that ship with the package, by what they draw."""
