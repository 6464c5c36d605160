"""Whether a wheel may leave the machine that built it: what it holds, and what its libraries need of a machine.

    python release/check_wheel.py dist/trapo_kernels-*.whl

Prints the oldest glibc that it runs on. It says what `auditwheel show` says, with the one difference that libraries of
torch and the OpenMP that torch brings are to come from torch: they must not be in the wheel.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# The system's, of every manylinux; torch's; and what torch brings or asks for.
ALLOWED = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "libpthread.so.0"}
ALLOWED |= {"ld-linux-aarch64.so.1", "libdl.so.2"}
OF_TORCH = {"libc10.so", "libtorch.so", "libtorch_cpu.so", "libgomp.so.1"}
CAPABILITIES = {"x86_64": ("default", "avx2", "avx512")}
MOST_MB = 20


def check(wheel: Path) -> str:
    """Raises AssertionError for what is wrong; returns a line on what is right."""
    assert re.fullmatch(r"trapo_kernels-[^-]+(-\d[^-]*)?-py3-none-\w+\.whl", wheel.name), f"{wheel.name}: not py3-none"
    machine = next((m for m in ("x86_64", "aarch64") if wheel.stem.endswith(m)), "any")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        strays = [n for n in names if not n.startswith(("trapo/", "trapo_kernels/")) and ".dist-info/" not in n]
        assert not strays, f"{wheel.name}: holds {strays[:3]}"
        wanted = {f"trapo_kernels/_cpu_{c}.so" for c in CAPABILITIES.get(machine, ("default",))}
        assert wanted <= set(names), f"{wheel.name}: lacks {sorted(wanted - set(names))}"
        size = wheel.stat().st_size / 1e6
        assert size <= MOST_MB, f"{wheel.name}: {size:.1f} MB, more than {MOST_MB}"
        libraries = [Path(archive.extract(n, folder)) for n in names if n.endswith(".so")]
        oldest = max(glibc(library) for library in libraries)
    return f"{wheel.name}: {len(libraries)} libraries, {size:.1f} MB, glibc {oldest[0]}.{oldest[1]} and newer"


def glibc(library: Path) -> tuple[int, int]:
    """Returns the newest glibc whose symbols a library needs. Raises AssertionError where it needs other libraries than
    the system's and torch's, or a symbol of one Python."""

    def said(*command: str) -> str:
        return subprocess.run([*command, str(library)], capture_output=True, text=True, check=True).stdout

    needed = set(re.findall(r"NEEDED.*\[(.*)\]", said("readelf", "-d")))
    assert needed <= ALLOWED | OF_TORCH, f"{library.name}: needs {sorted(needed - ALLOWED - OF_TORCH)}"
    assert "RUNPATH" not in said("readelf", "-d"), f"{library.name}: has a path of the machine that built it"
    symbols = said("readelf", "-W", "--dyn-syms")
    of_python = re.findall(r"UND (_?Py\w+)", symbols)
    assert not of_python, f"{library.name}: needs {of_python[0]}, of one Python"
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", symbols)
    return max((int(major), int(minor)) for major, minor in versions)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(check(Path(name)))
