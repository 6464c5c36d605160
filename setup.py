"""Packaging entry point; the metadata is in pyproject.toml.

The CPU extension is compiled once per instruction set (AVX-512, AVX2, neither), against the torch that is installed
here: `make setup` installs torch first and then this package with --no-build-isolation, so that there is one torch, the
one that will run the code. An install never fails for want of a compiler or of torch at build time; the package then
runs in plain torch and `trapo_kernels.backends()` says why. TRAPO_KERNELS_BUILD=required makes that an error,
TRAPO_KERNELS_BUILD=none skips compiling.

The CUDA extension is compiled by nvcc (which takes half a minute) where the torch that is installed is one for CUDA, or
TRAPO_KERNELS_CUDA=1 asks for it; TRAPO_KERNELS_CUDA=0 leaves it out. It holds code for sm_80, sm_90a and sm_100a, and
PTX for what is newer, and uses torch through its stable ABI alone, so that one build serves torch 2.10 and newer.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

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
# Without contraction a logit minus the maximum is 0 where it is the maximum; cap · tanh − m, rounded once, is not.
CPU_FLAGS = ["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-ffp-contract=off", "-fno-strict-aliasing"]
WANTED = os.environ.get("TRAPO_KERNELS_BUILD", "optional")

CUDA_NAME = "trapo_kernels._cuda"
CUDA_WANTED = os.environ.get("TRAPO_KERNELS_CUDA")
CUDA_CODE = [
    *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"),
    *("-gencode=arch=compute_100a,code=sm_100a", "-gencode=arch=compute_90,code=compute_90"),
]
STABLE_ABI = (2, 10)  # the oldest torch that the CUDA extension serves


class Wheel(bdist_wheel):
    """A wheel whose tags say what is in it. The extensions are libraries of operators that torch loads, not modules of
    Python's: they serve every Python, and one torch, which the build tag names (213torch). Where none was compiled, the
    wheel serves every machine."""

    def get_tag(self) -> tuple[str, str, str]:
        build = self.get_finalized_command("build")
        if not glob(os.path.join(build.build_lib, "trapo_kernels", "_c*.so")):
            return ("py3", "none", "any")
        import torch

        self.build_number = "".join(torch.__version__.split(".")[:2]) + "torch"
        return ("py3", "none", super().get_tag()[2])


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
    reason = _no_cuda()
    if reason is None:
        # Without sources, or BuildExtension would look for the toolkit in its own way.
        extensions.append(Extension(CUDA_NAME, [], optional=True))
    else:
        print(f"trapo_kernels: without the CUDA extension: {reason}", file=sys.stderr)
    return {"ext_modules": extensions, "cmdclass": {"build_ext": _optional(BuildExtension), "bdist_wheel": Wheel}}


def _no_cuda() -> str | None:
    """Why the CUDA extension is not to be compiled, or None."""
    import torch

    if CUDA_WANTED == "0":
        return "TRAPO_KERNELS_CUDA=0"
    if torch.version.cuda is None and CUDA_WANTED != "1":
        return f"torch {torch.__version__} is not built for CUDA (TRAPO_KERNELS_CUDA=1 compiles it all the same)"
    return None if _nvcc() else "nvcc is neither in CUDA_HOME nor in PATH"


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def nvcc_command(out: str) -> list[str]:
    """Compiles the CUDA extension. The CUDA runtime goes into it, so that it minds no other."""
    import torch

    home = os.path.dirname(torch.__file__)
    target = f"{STABLE_ABI[0] << 56 | STABLE_ABI[1] << 48:#x}"
    return [
        *(_nvcc() or "nvcc", "-shared", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "--threads=0", *CUDA_CODE),
        *("-Xcompiler=-fPIC,-g0", f"-DTORCH_TARGET_VERSION={target}", "-DUSE_CUDA", torch_define(STABLE_ABI)),
        *("-isystem", os.path.join(home, "include"), f"-L{os.path.join(home, 'lib')}", "-ltorch_cpu"),
        *(*sorted(glob("csrc/cuda/*.c*")), "-o", out),
    ]


def torch_define(version: tuple[int, int]) -> str:
    """What csrc/built_for.h writes into a library, for backends/native.py."""
    return "-DTRAPO_TORCH={}.{}".format(*version)


def _cpu_extension(capability: str, flags: list[str]) -> object:
    import torch
    from torch.utils.cpp_extension import CppExtension

    major, minor = torch.__version__.split(".")[:2]

    # The capability names the namespace of the SIMD code in ATen's headers, as torch's own build does.
    define = f"-DCPU_CAPABILITY={capability.upper()}"
    built_for = torch_define((int(major), int(minor)))
    return CppExtension(
        f"trapo_kernels._cpu_{capability}",
        sorted(glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
        extra_compile_args=[*CPU_FLAGS, *QUIET, define, built_for, *flags],
        extra_link_args=["-fopenmp"],
    )


def _optional(build_extension: type) -> type:
    """Compiling that says in one line why it did not happen, instead of failing the install."""

    class Build(build_extension):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "no_python_abi_suffix": True})

        def build_extension(self, extension: Extension) -> None:
            if extension.name != CUDA_NAME:
                return super().build_extension(extension)
            out = self.get_ext_fullpath(extension.name)
            os.makedirs(os.path.dirname(out), exist_ok=True)
            done = subprocess.run(nvcc_command(out), capture_output=True, text=True, check=False)
            if done.returncode != 0:
                lines = (done.stderr or done.stdout).splitlines()
                reason = next((line for line in lines if "error" in line), lines[0] if lines else "nvcc failed")
                print(f"trapo_kernels: without the CUDA extension: compiling it failed: {reason}", file=sys.stderr)

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
