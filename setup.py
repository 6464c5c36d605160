"""Packaging entry point; the metadata is in pyproject.toml.

The CPU extension is compiled once per instruction set (AVX-512, AVX2, neither), against the torch that is installed
here: `make setup` installs torch first and then this package with --no-build-isolation, so that there is one torch, the
one that will run the code. An install never fails for want of a compiler or of torch at build time; the package then
runs in plain torch and `trapo_kernels.backends()` says why. TRAPO_KERNELS_BUILD=required makes that an error,
TRAPO_KERNELS_BUILD=none skips compiling.
"""

from __future__ import annotations

import os
import platform
import sys
from glob import glob

from setuptools import setup

CAPABILITIES = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        *("-DCPU_CAPABILITY_AVX512", "-DHAVE_AVX512_CPU_DEFINITION"),
    ],
}
# What g++ 12 says of its own AVX-512 headers.
QUIET = ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
WANTED = os.environ.get("TRAPO_KERNELS_BUILD", "optional")


def build_options() -> dict:
    """ext_modules and cmdclass of `setup`; empty where nothing can be compiled."""
    if WANTED == "none":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        return _without(f"torch cannot be imported at build time ({error}); use --no-build-isolation")
    here = CAPABILITIES if platform.machine() in ("x86_64", "AMD64") else {"default": []}
    extensions = [_cpu_extension(name, flags) for name, flags in here.items()]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": _optional(BuildExtension)}}


def _cpu_extension(capability: str, flags: list[str]) -> object:
    from torch.utils.cpp_extension import CppExtension

    # The capability names the namespace of the SIMD code in ATen's headers, as torch's own build does.
    define = f"-DCPU_CAPABILITY={capability.upper()}"
    return CppExtension(
        f"trapo_kernels._cpu_{capability}",
        sorted(glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
        extra_compile_args=["-O3", "-g0", "-fopenmp", "-fno-math-errno", *QUIET, define, *flags],
        extra_link_args=["-fopenmp"],
    )


def _optional(build_extension: type) -> type:
    """Compiling that says in one line why it did not happen, instead of failing the install."""

    class Build(build_extension):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "no_python_abi_suffix": True})

        def run(self) -> None:
            try:
                super().run()
            except (Exception, SystemExit) as error:
                _without(f"compiling it failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}")

    return Build


def _without(reason: str) -> dict:
    if WANTED == "required":
        sys.exit(f"trapo_kernels: the CPU extension is required, but {reason}")
    print(f"trapo_kernels: without the CPU extension: {reason}", file=sys.stderr)
    return {}


setup(**build_options())
