"""The system prompt that a checkpoint was trained with, which its weights do not contain.

The published one is a string in the published code. It is taken from there, or from a file.
"""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from huggingface_hub import constants

from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.text_files import decoded, read_text

NONE = "none"
"""What is given for text encoders that are to run without one."""
NAME = "llm_system_prompt"
SOURCE = re.compile(rf"^{NAME}\s*(:\s*\w+\s*)?=", re.MULTILINE)
"""A line of source that sets it."""
SHA256 = "424f7aa7b1119f8ed1e329140e5941dfe308183bea0af59041dad5527a9b8f20"
"""Of the published system prompt in UTF-8."""
FILE_URL = (
    "https://raw.githubusercontent.com/mit-han-lab/hart/"
    "e28a41fe15025baf3d48ab004f5d3727c88d8fc7/hart/utils/constants.py"
)
TIMEOUT = 20
LARGEST = 1 << 20
"""Bytes; the file has a few thousand."""


def read_system_prompt(given: str | None, wanted: bool) -> str | None:
    """The text in front of every prompt, None for no text.

    Args:
        given: a file, "none", or None to follow the checkpoint.
        wanted: whether the checkpoint was trained with one; then the published one is fetched.

    Raises:
        InputError: the file cannot be used, or the published text cannot be had. A file that is
            the published text but for white space at its ends is refused: it would draw, only
            worse. Any other text is the user's to choose.
    """
    if given is None:
        return fetch_published() if wanted else None
    return None if given == NONE else _from_file(Path(given))


def sha256_of_system_prompt(given: str | None, wanted: bool) -> str | None:
    """Of the text that :func:`read_system_prompt` would return; nothing is fetched."""
    if given is None and wanted:
        return SHA256
    text = read_system_prompt(given, wanted)
    return None if text is None else sha256_of_text(text)


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fetch_published() -> str:
    """The published system prompt, from the repository it was published in."""
    ways = (
        f"download {FILE_URL} elsewhere and give it as {parameter('system_prompt', 'constants.py')}, or, "
        f"for a text encoder trained without one, give {parameter('system_prompt', NONE)}"
    )
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"the published system prompt cannot be fetched with HF_HUB_OFFLINE set; {ways}")
    try:
        with urlopen(FILE_URL, timeout=TIMEOUT) as response:
            source = decoded(response.read(LARGEST), FILE_URL)
    except (URLError, OSError, InputError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"the published system prompt could not be fetched ({reason}); {ways}") from None
    text = _literal(source, FILE_URL)
    if sha256_of_text(text) != SHA256:
        raise InputError(
            f"{FILE_URL}: {NAME} has sha256 {sha256_of_text(text)}, expected {SHA256}; it is not used; {ways}"
        )
    return text


def _from_file(file: Path) -> str:
    """Every character of a text file, or the string constant of Python source, by whatever name."""
    said = parameter("system_prompt", file)
    text = read_text(file, said)
    if file.suffix.lower() == ".py" or SOURCE.search(text):  # browsers call it constants.py.txt, too
        text = _literal(text, said)
    stripped = text.strip().replace("\r\n", "\n")
    near = (stripped, f"{stripped}\n")
    if sha256_of_text(text) != SHA256 and SHA256 in map(sha256_of_text, near):
        raise InputError(
            f"{said}: is the published text except for white space at its ends or of its lines "
            f"(sha256 {sha256_of_text(text)}, expected {SHA256}); it must end in one line feed, "
            f"better give the published constants.py itself"
        )
    return text


def _literal(source: str, name: str) -> str:
    """The value of the constant in Python source, which is parsed and never run."""
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{name}: not Python source ({error})") from None
    for statement in statements:
        if (
            isinstance(statement, ast.Assign | ast.AnnAssign)
            and any(isinstance(target, ast.Name) and target.id == NAME for target in _targets(statement))
            and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str)
        ):
            return statement.value.value
    raise InputError(f"{name}: expected a line that sets {NAME} to a string, found none")


def _targets(statement: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return statement.targets if isinstance(statement, ast.Assign) else [statement.target]
