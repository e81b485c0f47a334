"""Sampling settings: what decides a picture beside its prompt and its seed.

Each is declared here and nowhere else. Its type and range are checked, the command line has an
option for it, and a PNG carries it and brings it back, because it is a field.
"""

import math
import types
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypedDict, get_args, get_origin

from hart_runtime.common.errors import InputError, in_range, known_names, one_of, plain, shown, told_of

MOST_THREADS = 256
"""Of the CPU: every graph has threads of its own, and more than cores only wait for each other."""
DEFAULT_MAX_BATCH, MOST_MAX_BATCH = 8, 64
"""Pictures that a bundle draws at once: unless asked for otherwise, and at the most."""


class Limits(NamedTuple):
    """What is said of a setting beside its type and default."""

    help: str
    low: float | None = None
    high: float | str | None = None
    """A number, or the size of the model that it must not be over, by the name of the manifest."""


def _setting(default: Any, help: str, low: float | None = None, high: float | str | None = None) -> Any:  # noqa: A002
    return field(default=default, metadata={"limits": Limits(help, low, high)})


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample. The defaults are those of the published sampler."""

    guidance: float = _setting(4.5, "Classifier-free guidance weight.", 0, 1000)
    """Classifier-free guidance weight, reached (almost) at the last scale."""
    top_k: int | None = _setting(None, "Codes kept per token.", 1, "vocab_size")
    """Codes kept per token; ``None`` is the published rule, see
    :func:`hart_runtime.common.schedule.published_top_k`."""
    top_p: float = _setting(0.0, "Probability mass kept per token; 0 keeps all.", 0, 1)
    """Nucleus mass kept after top-k; 0 keeps everything."""
    smooth: bool = _setting(True, "Mix codes instead of drawing one.")
    """Feed a Gumbel-softmax mixture of codes instead of the drawn code."""
    residual: bool = _setting(True, "Add the continuous residual.")
    """Add the continuous residual predicted by the diffusion head."""
    steps: str = _setting("8", "Denoising steps of the residual.")
    """Denoising steps of the residual, in the published respacing notation; a number will do."""
    prune: bool = _setting(False, "Leave tokens out of the last two scales: faster, other pictures.")
    """Leave tokens out of the largest scales, see :mod:`hart_runtime.common.pruning`."""
    keep: str = _setting("0.5,0.25", "Shares of tokens that take part in the pruned scales.")
    """Of tokens at the pruned scales, what takes part."""
    unguided_scales: int = _setting(
        0, "Last scales without guidance: half their work, other pictures.", 0, "num_scales"
    )
    """The last scales of which the unconditional half is left out, and with it that of the residual."""
    iterations: int | None = _setting(None, "Steps in which masked tokens are drawn.", 1, "num_tokens")
    """Of models that draw masked tokens (MAR): how many steps it takes until all are there."""
    guidance_schedule: str = _setting("linear", "How guidance grows with the tokens drawn, or does not.")
    """One of :data:`GUIDANCE_SCHEDULES`, of models that draw masked tokens."""
    temperature: float = _setting(1.0, "Factor of the noise of each denoising step.", 0, 10)
    """Of models that draw masked tokens; the noise that denoising begins with is not multiplied."""

    @property
    def exact(self) -> bool:
        """Whether everything is computed, as by the published sampler."""
        return not (self.prune or self.unguided_scales)

    def __post_init__(self) -> None:
        """Settings come from files too, so their types are checked."""
        for name, kinds in KINDS.items():
            value = plain(getattr(self, name))
            if str in kinds and isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            object.__setattr__(self, name, value)
            fine = isinstance(value, (*kinds, int) if float in kinds else kinds)
            if not fine or (isinstance(value, bool) and bool not in kinds):
                raise InputError(f"`{name}`: expected {_words(kinds)}, found {shown(value)}")


class Overrides(TypedDict, total=False):
    """Settings of one call, for editors and type checkers; those left out or None are the bundle's."""

    guidance: float | None
    top_k: int | None
    top_p: float | None
    smooth: bool | None
    residual: bool | None
    steps: str | int | None
    prune: bool | None
    keep: str | None
    unguided_scales: int | None
    iterations: int | None
    guidance_schedule: str | None
    temperature: float | None


def _kinds(hint: Any) -> tuple[type, ...]:
    return get_args(hint) if get_origin(hint) is types.UnionType else (hint,)


def _words(kinds: tuple[type, ...]) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text or a whole number"}
    return " or ".join(words.get(kind, "None") for kind in kinds)


SPEEDS: dict[str, Overrides] = {
    "exact": {"prune": False, "unguided_scales": 0},
    "balanced": {"prune": False, "unguided_scales": 1},
    "fast": {"prune": True, "unguided_scales": 2},
}
"""Names for how much is left out, and so for how far pictures are from those of the published sampler. A
checkpoint may mean its own by all but the first, see :func:`speeds_of`."""
EXACT = "exact"
LESS = frozenset({"prune", "keep", "unguided_scales"})
"""Settings that leave something out."""
LATER = LESS | {"iterations", "guidance_schedule", "temperature"}
"""Settings that pictures of earlier versions do not tell of: they were drawn with the defaults."""
LINEAR, CONSTANT = GUIDANCE_SCHEDULES = ("linear", "constant")
"""Guidance that grows with the share of tokens that are there, and guidance that does not."""

KINDS = {f.name: _kinds(f.type) for f in fields(SamplingSettings)}
"""The types that each setting can have."""
LIMITS: dict[str, Limits] = {f.name: f.metadata["limits"] for f in fields(SamplingSettings)}

VAR_DEMO = SamplingSettings(guidance=4.0, top_k=900, top_p=0.95, smooth=False, residual=False, steps="0")
"""Of VAR's published demo; it has no residual, and takes no steps for one."""
VAR_FID = replace(VAR_DEMO, guidance=1.5, top_p=0.96)
"""Those that VAR's published distances (FID) were measured with."""

MAR_PUBLISHED = SamplingSettings(guidance=2.9, smooth=False, residual=False, steps="100")
"""Of MAR's published results: as many iterations as there are tokens, and the smallest model's guidance."""
MAR_FAST = replace(MAR_PUBLISHED, iterations=64)
"""Its published fast choice."""


def parse_keep(text: str) -> tuple[float, float]:
    """Shares of tokens kept at two scales, such as ``0.5,0.25``.

    Raises:
        InputError: not two numbers over 0 and up to 1.
    """
    try:
        first, last = (float(part) if part.isascii() else math.nan for part in text.split(","))
    except ValueError:
        first = last = math.nan
    if not (0 < first <= 1 and 0 < last <= 1):
        raise InputError(
            "`keep`: expected the shares of tokens kept at the last two scales, two numbers over 0 and up to "
            f"1 such as 0.5,0.25, found {shown(text)}"
        )
    return first, last


def settings_of(values: dict[str, Any], source: str) -> SamplingSettings:
    """Settings by name, as files carry them.

    Raises:
        InputError: a name that there is not, or a value of another type; begins with ``source``.
    """
    known_names(source, values, LIMITS)
    with told_of(source):
        return SamplingSettings(**values)


def whole_settings_of(values: dict[str, Any], source: str) -> SamplingSettings:
    """Those of a file that this project wrote, which names all that there were then.

    Raises:
        InputError: as :func:`settings_of`, or one is missing, which is no default then but damage.
    """
    if missing := sorted(LIMITS.keys() - LATER - values.keys()):
        raise InputError(f"{source}: no {', '.join(missing)} among its settings")
    return settings_of(values, source)


def speeds_of(
    values: object, usual: SamplingSettings, sizes: object, source: str
) -> dict[str, SamplingSettings]:
    """What a checkpoint means by the names of :data:`SPEEDS`, such as ``{"fast": {"keep": "1,0.75"}}``.

    Args:
        usual: its settings.
        sizes: as for :func:`check_ranges`.
        source: begins messages.

    Raises:
        InputError: another name, a setting that leaves nothing out, or a value out of range.
    """
    if not isinstance(values, dict):
        raise InputError(f"{source}: expected an object, found {shown(values)}")
    known_names(source, values, SPEEDS.keys() - {EXACT})
    found = {}
    for name, choice in values.items():
        place = f"{source}.{name}"
        if not isinstance(choice, dict):
            raise InputError(f"{place}: expected an object, found {shown(choice)}")
        known_names(place, choice, LESS)
        with told_of(place):
            found[name] = replace(usual, **{**SPEEDS[name], **choice})
            check_ranges(found[name], sizes)
    return found


def check_ranges(settings: SamplingSettings, sizes: object) -> None:
    """Refuse values out of range, shares of tokens that are none, and words that there are not.

    Args:
        sizes: what holds the sizes of the model as attributes; without one, its settings are not the model's.

    Raises:
        InputError: with the setting and both limits.
    """
    for name, limits in LIMITS.items():
        value, high = getattr(settings, name), limits.high
        if isinstance(high, str):
            high = getattr(sizes, high, None)
        if value is not None and limits.low is not None and high is not None:
            in_range(name, value, limits.low, high)
    parse_keep(settings.keep)
    one_of("guidance_schedule", settings.guidance_schedule, GUIDANCE_SCHEDULES)
