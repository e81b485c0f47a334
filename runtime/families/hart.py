"""HART: text, a transformer over scales, and a residual diffusion (arXiv 2410.10812, section 3).

The loop of :mod:`hart_runtime.hart.generate`, cut where the host has a decision to make.
"""

from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.families.combination import combined
from hart_runtime.runtime.families.hybrid import HYBRID
from hart_runtime.runtime.families.text import TEXT

NAME = "hart"
HART = combined(NAME, TEXT, HYBRID, SamplingSettings())
GRAPHS, describe_model = HART.graphs, HART.describe
