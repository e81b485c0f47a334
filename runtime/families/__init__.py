"""The model families there are. What differs between them is told here and nowhere else."""

from hart_runtime.runtime.families.family import Family
from hart_runtime.runtime.families.hart import HART

FAMILIES: dict[str, Family] = {family.name: family for family in (HART,)}
