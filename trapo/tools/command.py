"""The command `trapo` starts here, as it is installed: the package of losses alone has it too, and says there what it
lacks."""

from __future__ import annotations

import sys

# Packages of the extra `train`, as modules.
_TRAIN = {"accelerate", "gguf", "jinja2", "math_verify", "matplotlib", "numpy", "omegaconf", "plotly", "pyarrow"}
_TRAIN |= {"rich", "transformers", "typer"}


def main() -> None:
    """Runs the command line; without the packages of the extra `train` one line says how to get them."""
    try:
        from trapo.cli import main as run

        run()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _TRAIN:
            raise
        print(f"trapo: needs {missing}: pip install 'trapo-kernels[train]'", file=sys.stderr)
        sys.exit(2)
