"""Whether an installed trapo_kernels works, in the venv that runs this and from outside of the sources.

    python release/smoke.py cpu      # the C++ backend must be there and is used
    python release/smoke.py torch    # it is not there: the first call says so, and what mends it

It imports nothing but what was installed; torch is all that it needs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from importlib import resources
from pathlib import Path

import torch

import trapo_kernels as tk


def values_and_gradients(backend: str | None) -> list[torch.Tensor]:
    """A TRAPO loss with every kind of token, its log-probabilities and its gradients, in fp32."""
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 33, 48, generator=make).requires_grad_()
    weight = torch.randn(1003, 48, generator=make).mul_(0.2).requires_grad_()
    targets = torch.randint(0, 1003, (2, 33), generator=make)
    targets[0, :3] = -100
    expert = torch.arange(33) < torch.tensor([[10], [0]])
    given = {"advantages": torch.tensor([1.0, -0.5]), "expert_mask": expert, "backend": backend}
    out = tk.linear_policy_loss(hidden, weight, targets, tk.Objective.trapo(entropy_coef=0.01), **given)
    out.loss.backward()
    return [out.loss.detach(), out.logprobs, out.entropy, hidden.grad, weight.grad]


def check(expected: str) -> None:
    sources = Path(__file__).resolve().parents[1]
    assert sources not in Path(tk.__file__).resolve().parents[1:2], f"{tk.__file__} is the sources, not an install"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = values_and_gradients(None)
    assert tk.default_backend() == expected, f"got {tk.default_backend()}: {tk.backends()['cpu'].missing}"
    for value, wanted in zip(found, values_and_gradients("reference"), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    mine = [str(w.message) for w in said if "trapo_kernels" in str(w.message)]
    assert len(mine) == (expected == "torch"), mine
    assert all("pip install" in line and "\n" not in line for line in mine), mine

    trapo = resources.files("trapo")
    for file in ("py.typed", "presets/demo.yaml", "report/page.html.j2"):
        assert (trapo / file).is_file(), f"{file} is not in the package"
    assert resources.files("trapo_kernels").joinpath("py.typed").is_file()

    command = shutil.which("trapo", path=str(Path(sys.executable).parent))
    assert command, "there is no command trapo"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    if done.returncode:
        assert done.stderr.count("\n") == 1, done.stderr
        assert "pip install 'trapo-kernels[train]'" in done.stderr, done.stderr
    else:
        assert done.stdout.strip() == f"trapo {tk.__version__}"
    about = subprocess.run([sys.executable, "-m", "trapo_kernels"], capture_output=True, text=True, check=True).stdout
    assert f"trapo-kernels {tk.__version__}" in about
    print(f"smoke: trapo-kernels {tk.__version__}, torch {torch.__version__}, backend {expected}: right")


if __name__ == "__main__":
    check(sys.argv[1])
