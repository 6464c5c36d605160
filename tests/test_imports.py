"""Who imports whom, read from the sources: neither package has a circle, and `trapo_kernels` knows nothing of `trapo`.

An import inside a function counts like any other: it opens a circle for Python, not for a reader. An import for typing
alone (`if TYPE_CHECKING:`) does not count.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("trapo_kernels", "trapo")

# Documented paths of what lives in `trapo`: an import on access, which only those meet who ask for the name.
FORWARDS = {("trapo_kernels.integrations.trl", "trapo.integrations.trl")}

# What importing an adapter needs beside torch and the standard library.
ADAPTERS: dict[str, set[str]] = {
    "grpo_terms": set(),
    "heads": {"transformers"},
    "liger": set(),
    "ms_swift": {"swift"},
    "nemo_rl": {"nemo_rl"},
    "prime_rl": set(),
    "prime_rl_head": set(),
    "skyrl": {"skyrl"},
    "slime": {"slime"},
    "torchtitan": {"torchtitan"},
    "transformers": {"transformers"},
    "trinity": {"trinity"},
    "trl": {"trl", "transformers"},
    "verl": {"verl"},
    "verl_distillation": {"verl"},
    "verl_head": {"verl"},
}


class Imports(NamedTuple):
    """What a module imports, as dotted names."""

    at_import: set[str]
    late: set[str]  # inside functions


@cache
def modules() -> dict[str, Path]:
    """Every module of both packages, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> Imports:
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = Imports(set(), set())

    def visit(node: ast.AST, late: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, late)
            return
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            (found.late if late else found.at_import).update(imported(node, package))
        inside = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), False)
    return found


def imported(node: ast.Import | ast.ImportFrom, package: str) -> set[str]:
    """The modules that an import names: `from . import a` is `a` where that is a module."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    base = node.module or ""
    if node.level:
        parents = package.split(".")
        base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
    return {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names}


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name in modules()}


def edges(package: str) -> set[tuple[str, str]]:
    """(module, a module that it imports), inside of one package."""
    here = {name for name in modules() if name.split(".")[0] == package}
    every = {(name, other) for name in here for other in ours(imports(name).at_import | imports(name).late)}
    return {(name, other) for name, other in every if other in here and other != name}


def reachable(start: str, graph: set[tuple[str, str]]) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        for other in (b for a, b in graph if a == name and b not in seen):
            seen.add(other)
            waiting.append(other)
    return seen


def in_circles(graph: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The imports that are part of a circle."""
    return {(a, b) for a, b in graph if a in reachable(b, graph)}


def test_a_circle_is_found_through_other_files() -> None:
    graph = {("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "a")}
    assert in_circles(graph) == {("a", "b"), ("b", "c"), ("c", "a")}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_of_a_package_imports_in_a_circle(package: str) -> None:
    found = in_circles(edges(package))
    assert found == set(), "\n".join(f"{a} imports {b}" for a, b in sorted(found))


def test_the_fused_losses_know_nothing_of_the_trainer() -> None:
    named = {(name, other) for name in modules() for other in imports(name).at_import | imports(name).late}
    found = {(a, b) for a, b in named if a.split(".")[0] == "trapo_kernels" and b.split(".")[0] == "trapo"}
    assert found == FORWARDS
    assert all(b in imports(a).late - imports(a).at_import for a, b in FORWARDS)


def needed(module: str) -> set[str]:
    """Top-level names from elsewhere that importing a module imports, its packages' `__init__` files included."""
    seen, waiting, found = set(), [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        parents = (".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1))
        waiting += [*parents, *ours(imports(name).at_import)]
        found |= {other.split(".")[0] for other in imports(name).at_import if other not in modules()}
        found |= {other.split(".")[0] for other in ours(imports(name).at_import)}
    return found - set(sys.stdlib_module_names) - {"torch", "trapo_kernels"}


def test_one_file_asks_whether_a_graph_is_being_made() -> None:
    """What torch.compile needs done differently follows from there, and from the path that a call takes."""
    found = {name for name, path in modules().items() if "is_compiling" in path.read_text()}
    assert found == {"trapo_kernels.arguments.graph"}


def test_the_fused_losses_need_torch_alone() -> None:
    assert needed("trapo_kernels") == set()


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_an_adapter_needs_its_framework_and_nothing_else(adapter: str) -> None:
    assert needed(f"trapo_kernels.integrations.{adapter}") <= ADAPTERS[adapter]


def test_every_adapter_is_on_the_list() -> None:
    folder = ROOT / "trapo_kernels" / "integrations"
    names = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert names - {"__init__"} == set(ADAPTERS)


# What nothing but the trainer, or one framework, may bring in.
ELSEWHERE = {"pebble", "omegaconf", "math_verify", "typer", "matplotlib", "plotly", "gguf", "liger_kernel", "trapo"}
ELSEWHERE |= {"cut_cross_entropy", "trl", "verl", "peft", "datasets", "transformers", "accelerate", "pyarrow"}
# What a framework imports itself.
BROUGHT = {"transformers": {"accelerate", "peft", "pyarrow"}, "verl": {"omegaconf", "pyarrow", "peft", "accelerate"}}
BROUGHT["trl"] = {*BROUGHT["transformers"], "datasets", "matplotlib", "liger_kernel"}

IMPORTS_WITH_LITTLE_ELSE = """
import importlib, importlib.util, sys
class Blocked:
    names = ()
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError("blocked: " + name)
stages = {stages!r}
stages = [each for each in stages if all(importlib.util.find_spec(name) for name in each[0])]
sys.meta_path.insert(0, Blocked())
for frameworks, blocked, adapters in stages:
    Blocked.names = blocked
    for adapter in adapters:
        importlib.import_module("trapo_kernels.integrations." + adapter)
        print(adapter)
"""


def test_an_adapter_is_imported_where_little_else_is_installed() -> None:
    """In one fresh interpreter, those of fewest frameworks first: an import of anything else fails."""
    stages = []
    for frameworks in sorted({tuple(sorted(names)) for names in ADAPTERS.values()}, key=len):
        names = [name for name, needed in ADAPTERS.items() if needed == set(frameworks)]
        allowed = set(frameworks).union(*(BROUGHT.get(name, set()) for name in frameworks))
        stages.append((list(frameworks), sorted(ELSEWHERE - allowed), names))
    assert sum(len(names) for *_, names in stages) == len(ADAPTERS)
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS_WITH_LITTLE_ELSE.format(stages=stages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {"liger", "prime_rl"} <= set(done.stdout.split())


def test_guided_rollouts_need_no_part_of_the_command_line() -> None:
    """TrapoGRPOTrainer is in `trapo`, but imports neither its configuration nor its rewards."""
    assert needed("trapo.integrations.trl") <= {"trl", "transformers", "trapo"}
    brings = {"numpy", "tensordict"}  # verl does
    assert needed("trapo.integrations.verl") <= {"verl", "transformers", "trapo", *brings}
