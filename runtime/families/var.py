"""VAR: a class, and the same loop over scales with codes alone (arXiv 2404.02905)."""

from hart_runtime.common.settings import VAR_DEMO, VAR_FID
from hart_runtime.runtime.families.classes import CLASS
from hart_runtime.runtime.families.combination import combined
from hart_runtime.runtime.families.discrete import DISCRETE

NAME = "var"
VAR = combined(NAME, CLASS, DISCRETE, VAR_DEMO, {"demo": VAR_DEMO, "fid": VAR_FID})
