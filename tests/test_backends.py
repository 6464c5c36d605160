"""Which backend does a call."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from kernel_cases import BACKENDS

import trapo_kernels as tk
from trapo_kernels.backends import dispatch, native
from trapo_kernels.backends.cpu import rows as cpu_rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _untouched(monkeypatch):
    monkeypatch.delenv("TRAPO_KERNELS_BACKEND", raising=False)
    yield
    tk.set_backend(None)


def test_the_suite_covers_every_backend_that_takes_cpu_tensors():
    assert set(BACKENDS) == {name for name, backend in tk.backends().items() if backend.device in (None, "cpu")}


def test_the_cuda_backend_says_why_it_is_not_here():
    if torch.version.cuda is None:
        assert str(tk.backends()["cuda"]) == f"cuda: not here: torch {torch.__version__} is not built for CUDA"
    with pytest.raises(ValueError, match=r"^f: backend 'cuda' (does not exist here|takes cuda tensors; got cpu)"):
        dispatch.pick("cuda", "f", CPU)


def test_backends_say_what_they_are():
    for name, backend in tk.backends().items():
        assert backend.name == name
        assert str(backend) == f"{name}: {backend.detail if backend.available else f'not here: {backend.missing}'}"


def test_argument_then_set_backend_then_environment_then_the_fastest(monkeypatch):
    fastest = "cpu" if tk.backends()["cpu"].available else "torch"
    assert dispatch.pick(None, "f", CPU).name == fastest
    monkeypatch.setenv("TRAPO_KERNELS_BACKEND", "reference")
    assert dispatch.pick(None, "f", CPU).name == "reference"
    assert tk.default_backend() == "reference"
    tk.set_backend("torch")
    assert dispatch.pick(None, "f", CPU).name == "torch"
    assert dispatch.pick("reference", "f", CPU).name == "reference"
    tk.set_backend(None)
    assert dispatch.pick(None, "f", CPU).name == "reference"


def test_a_backend_that_is_not_there_is_refused_where_it_was_named(monkeypatch):
    hidden, weight, targets = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
    names = ", ".join(map(repr, tk.backends()))
    with pytest.raises(ValueError, match=f"^set_backend: name must be one of {names} or None; got 'x'$"):
        tk.set_backend("x")
    monkeypatch.setenv("TRAPO_KERNELS_BACKEND", "x")
    with pytest.raises(ValueError, match=r"^linear_logprobs: backend \(TRAPO_KERNELS_BACKEND\) must be one of"):
        tk.linear_logprobs(hidden, weight, targets)


def test_a_backend_that_cannot_be_here_says_why_and_is_not_picked(monkeypatch):
    fast = replace(tk.backends()["torch"], name="fast", look=lambda: "no compiler was found")
    monkeypatch.setattr(dispatch, "_BACKENDS", [fast, tk.backends()["torch"]])
    assert str(tk.backends()["fast"]) == "fast: not here: no compiler was found"
    assert dispatch.pick(None, "f", CPU).name == "torch"
    with pytest.raises(ValueError, match=r"^f: backend 'fast' does not exist here: no compiler was found$"):
        dispatch.pick("fast", "f", CPU)


def test_a_backend_for_other_devices_is_not_picked_and_refused_where_it_was_named():
    meta = torch.device("meta")
    assert dispatch.pick(None, "f", meta).name == "torch"
    if tk.backends()["cpu"].available:
        with pytest.raises(ValueError, match=r"^f: backend 'cpu' takes cpu tensors; got meta$"):
            dispatch.pick("cpu", "f", meta)


def test_an_install_without_the_extension_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_rows, "__file__", str(tmp_path / "backends" / "cpu" / "rows.py"))
    cpu_rows.missing.cache_clear()
    try:
        assert str(tk.backends()["cpu"]) == (
            "cpu: not here: the C++ extension is not compiled; where there is a C++17 compiler, "
            f"`{native.REINSTALL}` does it"
        )
        assert tk.default_backend() == "torch"
        with pytest.raises(ValueError, match=r"^set_backend: name 'cpu' does not exist here: the C\+\+ extension"):
            tk.set_backend("cpu")
    finally:
        cpu_rows.missing.cache_clear()


def test_what_is_no_library_is_missing_with_a_reason(tmp_path):
    library = tmp_path / "_cpu_default.so"
    for content in (b"not a library", b"", b"trapo_kernels_built_for:%d.%d;" % native._numbers(torch.__version__)):
        library.write_bytes(content)
        reason = native.misfit("C++", library, cpu_rows._register_fakes)
        assert reason is not None
        assert reason.startswith(
            f"the C++ extension does not fit torch {torch.__version__} and this version; `pip install "
        )
        assert "\n" not in reason


def test_a_library_of_another_torch_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    library = tmp_path / "_cpu_default.so"
    monkeypatch.setattr(native, "load", lambda *_: pytest.fail("it may crash"))
    monkeypatch.setattr(torch, "__version__", "2.13.1+cpu")
    for built, stable, accepted in (("2.14", False, "2.14"), ("2.9", False, "2.9"), ("2.14", True, "2.14 and newer")):
        library.write_bytes(b"..." + f"trapo_kernels_built_for:{built};".encode() + b"...")
        assert native.misfit("C++", library, cpu_rows._register_fakes, stable) == (
            f"the C++ extension was compiled for torch {accepted}, this is torch 2.13.1+cpu; "
            f"`{native.REINSTALL}` compiles it again"
        )
    loaded = []
    monkeypatch.setattr(native, "load", lambda *arguments: loaded.append(arguments))
    for built, stable in (("2.13", False), ("2.13", True), ("2.9", True)):
        library.write_bytes(f"trapo_kernels_built_for:{built};".encode())
        assert native.misfit("C++", library, cpu_rows._register_fakes, stable) is None
    assert len(loaded) == 3


@pytest.mark.skipif(cpu_rows.library() is None, reason="the C++ extension is not compiled")
def test_the_library_here_says_which_torch_it_is_for():
    assert native.built_for(cpu_rows.library()) == native._numbers(torch.__version__)


def test_without_the_extension_the_first_call_on_a_cpu_says_so_once(monkeypatch):
    others = [b for b in tk.backends().values() if b.name != "cpu"]
    missing = replace(tk.backends()["cpu"], look=lambda: "it was left out")
    monkeypatch.setattr(dispatch, "_BACKENDS", [missing, *others])
    dispatch._say_slower.cache_clear()
    inputs = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert tk.default_backend() == "torch"
            tk.linear_logprobs(*inputs, backend="torch")
            assert not said
            for _ in range(2):
                tk.linear_logprobs(*inputs)
        assert [str(w.message) for w in said] == [
            "trapo_kernels: losses on CPUs take 1.1 to 1.3 times as long in backend 'torch' as in C++: it was left out "
            "(naming a backend silences this)"
        ]
    finally:
        dispatch._say_slower.cache_clear()
