"""How to add what is missing to this copy of the package."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from hart_runtime.common.errors import InputError

DISTRIBUTION = "hart-runtime"


def clone() -> Path | None:
    """The working copy of the repository that this package runs from, if it does."""
    root = Path(__file__).absolute().parents[3]
    return root if (root / "pyproject.toml").is_file() and (root / "src").is_dir() else None


def pip() -> str:
    """The pip of the Python that runs."""
    import shlex
    import shutil

    found = shutil.which("pip")
    same = found is not None and Path(found).parent == Path(sys.executable).parent
    return "pip" if same else f"{shlex.quote(sys.executable)} -m pip"


def install(extra: str) -> str:
    """The command that installs one of this project's extras.

    From a clone it keeps the installation editable, and torch the one that constraints.txt names.
    """
    from shlex import quote

    root = clone()
    if root is None:
        return f"{pip()} install {quote(f'{DISTRIBUTION}[{extra}]')}"
    constraints = quote(str(root / "constraints.txt"))
    return f"{pip()} install -c {constraints} -e {quote(f'{root}[{extra}]')}"


def installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # somebody's finder, or a module without a spec
        return False


def require(who: str, extra: str, *modules: str) -> None:
    """Refuse to start without libraries; they are looked for and not imported.

    Args:
        who: needs them: begins the message.

    Raises:
        InputError: one of ``modules`` is missing; with the command that installs ``extra``.
    """
    if missing := [name for name in modules if not installed(name)]:
        raise InputError(f"{who} needs {', '.join(missing)}; install it with: {install(extra)}")
