"""A small, real HART: coloured shapes, drawn, learned and checked by the project itself."""

from pathlib import Path

DEMO_CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The checkpoint that ships with the package, in the published layout."""
