"""Writes, compiles and lays out the libraries that an installed ``onnxruntime-gpu`` wants to load.

Which functions they need is read from its CUDA provider. Those that do more than succeed stand in the C files
here, one for each library; every other is a line that returns success, and a handle where it makes something.
"""

from __future__ import annotations

import collections
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
DRIVER, CUDNN = "libcuda.so.1", "libcudnn.so.9"
VERSIONED = re.compile(r"\bUND (\w+)@(lib\w+\.so\.\d+)")
PLAIN = re.compile(r"\bUND (cu[A-Z]\w+)\s")
NEEDED = re.compile(r"\(NEEDED\).*\[(lib(?:cu|nv)\w+\.so\.\d+)\]")
LOOKED_UP = re.compile(rb"\x00(cudnn[A-Z]\w+)(?=\x00)")

SIMPLE = """__attribute__((weak)) int {name}(void) {{ return 0; }}"""
MAKES = """__attribute__((weak)) int {name}(void **made) {{ *made = calloc(1, 4096); return 0; }}"""


def build(onnxruntime: Path, folder: Path) -> Path:
    """Make the libraries for an installed package, unless they are there; returns their folder.

    Args:
        onnxruntime: the package's own folder.

    Raises:
        FileNotFoundError: gcc, readelf or the CUDA provider is missing.
    """
    provider = onnxruntime / "capi" / "libonnxruntime_providers_cuda.so"
    folder.mkdir(parents=True, exist_ok=True)
    for library, (functions, versioned) in wanted(provider).items():
        _compile(library, functions, versioned, folder)
    link = folder / CUDNN.removesuffix(".9")
    link.unlink(missing_ok=True)
    link.symlink_to(CUDNN)
    return folder


def wanted(provider: Path) -> dict[str, tuple[set[str], bool]]:
    """Functions by library, and whether the provider asks for them by the library's version."""
    symbols, dynamic = (_readelf(option, provider) for option in ("--dyn-syms", "--dynamic"))
    functions: dict[str, set[str]] = collections.defaultdict(set)
    for name, library in VERSIONED.findall(symbols):
        functions[library].add(name)
    versioned = set(functions)
    for library in NEEDED.findall(dynamic):
        functions[library] |= set()
    functions[DRIVER] |= set(PLAIN.findall(symbols))
    # cuDNN is opened by name with the first node that needs it, and its functions are looked up.
    functions[CUDNN] = {name.decode() for name in LOOKED_UP.findall(provider.read_bytes())}
    return {library: (functions[library], library in versioned) for library in sorted(functions)}


def _readelf(option: str, file: Path) -> str:
    return subprocess.run(["readelf", option, "-W", file], check=True, capture_output=True, text=True).stdout


def _compile(library: str, functions: set[str], versioned: bool, folder: Path) -> None:
    name = library.partition(".")[0]
    lines = [(MAKES if "Create" in f else SIMPLE).format(name=f) for f in sorted(functions)]
    rest, script = folder / f"{name}-rest.c", folder / f"{name}.map"
    rest.write_text("#include <stdlib.h>\n" + "\n".join(lines) + "\n", encoding="utf-8")
    script.write_text(f"{library if versioned else ''} {{ global: *; }};\n", encoding="utf-8")
    sources = [rest, *HERE.glob(f"{name}.c")]
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{library}"]
    command += [f"-Wl,--version-script={script}", "-o", str(folder / library), *map(str, sources)]
    subprocess.run([*command, "-lpthread"], check=True)
