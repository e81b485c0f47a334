"""HART of a class: VAR's conditioning, HART's residual diffusion as in its
comparison with VAR on classes (arXiv 2410.10812).
"""

from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.families.classes import CLASS
from hart_runtime.runtime.families.combination import combined
from hart_runtime.runtime.families.hybrid import HYBRID

NAME = "class-hart"
CLASS_HART = combined(NAME, CLASS, HYBRID, SamplingSettings())
