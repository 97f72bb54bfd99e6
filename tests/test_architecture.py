"""The plan of the rooms: data goes one way, and no room reaches back up. docs/architecture.md draws the picture."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "flexolmo_jax"

MAY_IMPORT = {
    # the ground floor
    "errors": set(),
    "memory": set(),
    "terminal": set(),
    "parallel": set(),
    "products": {"parallel"},
    "moe": {"parallel", "products"},
    "model": {"moe", "parallel", "products"},
    "data": {"terminal"},
    # the jobs
    "store": {"model"},
    "train": {"moe", "model", "parallel", "products", "data", "store", "terminal"},
    "domain": {"model", "parallel", "data", "store", "terminal"},
    "merge": {"store", "model"},
    "infer": {"model", "store", "parallel", "data"},
    "hf": {"store", "model", "infer", "data", "terminal"},
    "evaluate": {"products", "infer", "data", "terminal"},
    "plan": {"model", "parallel", "data", "store", "train", "infer", "terminal"},
    # the doors
    "configuration": set(),
    "flags": set(),
    "stages": {"flags"},
    "commands": {"merge", "infer", "hf", "evaluate", "store", "data", "terminal"},
    "demo": {"confine", "configuration", "train", "merge", "infer", "hf", "evaluate", "store", "data", "terminal"},
    "confine": {"cli", "memory"},
    "cli": {"stages", "configuration", "terminal"},
    "__main__": {"cli", "memory"},
    "lint_gin": {"stages", "configuration"},
}
"""Which rooms each room may import, besides itself and `errors`, which every room may."""

AT_HOME = {
    "apache_beam": {"data"},
    "array_record": {"data"},
    "datasketch": {"data"},
    "fsspec": {"data"},
    "gin": {"configuration"},
    "pyarrow": {"data"},
    "rich": {"terminal"},
    "sentencepiece": {"data"},
    "seqio": {"data"},
    "tensorflow": {"data"},
    "tokamax": {"moe"},
    "torch": {"hf"},
    "transformers": {"hf"},
    "sentence_transformers": {"domain"},
    "sklearn": {"domain"},
    "matplotlib": {"evaluate", "plan"},
    "orbax": {"store"},
    "cryptography": {"store"},
}
"""Libraries that only these rooms may import."""

LAZY = {
    "apache_beam",
    "datasketch",
    "pyarrow",
    "sentence_transformers",
    "seqio",
    "sklearn",
    "tensorflow",
    "tokamax",
    "torch",
    "transformers",
}
"""Libraries that take seconds to import, or that an extra installs: never imported when our modules are."""

IMPORTS_TENSORFLOW = "data.tasks"
"""The one module that imports SeqIO at its top; so it is itself imported only inside functions."""

SAYS_NOTHING = {"utils", "util", "helpers", "helper", "misc", "common", "tools", "stuff"}


class Import(NamedTuple):
    """An import statement: the module's dotted name, and whether it runs when the importing module is imported."""

    module: str
    at_once: bool


def imports(source: str) -> Iterator[Import]:
    """Every import of a module. `from flexolmo_jax import data` counts as an import of `flexolmo_jax.data`."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = at_once and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    yield Import("." * child.level, at_once)
                else:
                    yield from (Import(f"{child.module}.{alias.name}", at_once) for alias in child.names)
            else:
                yield from walk(child, inner)

    return walk(ast.parse(source), True)


def violations(module: str, source: str) -> list[str]:
    """What a module, named without `flexolmo_jax.`, imports against the plan."""
    room = module.split(".")[0]
    found = []
    if room not in MAY_IMPORT:
        return [f"{room} is not on the plan: give it a line in MAY_IMPORT and in docs/architecture.md"]
    for imported, at_once in imports(source):
        top, *below = imported.split(".")
        if imported.startswith("."):
            found.append("imports relatively: write the whole name")
        elif top == "flexolmo_jax" and below:
            if below[0] not in MAY_IMPORT[room] | {room, "errors", "__version__"}:
                found.append(f"imports {imported}, but {room} may not import {below[0]}")
            if ".".join(below).startswith(IMPORTS_TENSORFLOW) and at_once:
                found.append(f"imports {imported} at its top, and TensorFlow with it")
        elif top in AT_HOME:
            if room not in AT_HOME[top]:
                found.append(f"imports {top}, which only {', '.join(AT_HOME[top])} may")
            if top in LAZY and at_once and module != IMPORTS_TENSORFLOW:
                found.append(f"imports {top} at its top, not inside the function that needs it")
    return [f"{module} {each}" for each in found]


def modules() -> dict[str, Path]:
    named = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in sorted(named.items()) if name != "__init__"}


@pytest.mark.parametrize("module", modules())
def test_module_keeps_to_the_plan(module):
    assert violations(module, modules()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("model.block", "from flexolmo_jax.train import step", "model may not import train"),
        ("model.block", "def f():\n    import flexolmo_jax.store.manifest", "model may not import store"),
        ("store.checkpoint", "from flexolmo_jax import merge", "store may not import merge"),
        ("moe.dense", "from flexolmo_jax import terminal", "moe may not import terminal"),
        ("train.loop", "import gin", "only configuration may"),
        ("train.loop", "import rich.table", "only terminal may"),
        ("data.reading", "from flexolmo_jax.data.tasks import text_task", "TensorFlow with it"),
        ("data.reading", "import seqio", "not inside the function"),
        ("infer.sampling", "def f():\n    import torch", "only hf may"),
        ("hf.verify", "from transformers import AutoModel", "not inside the function"),
        ("hf.verify", "from . import names", "relatively"),
        ("attic", "", "not on the plan"),
    ],
)
def test_breach_is_noticed(module, source, complaint):
    (found,) = violations(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.prepare", "def f():\n    from flexolmo_jax.data.tasks import text_task"),
        ("data.tasks", "import seqio"),
        ("train.loop", "from flexolmo_jax.errors import UserError\nfrom flexolmo_jax.model import PUBLIC"),
        ("hf.verify", "def f():\n    import torch"),
    ],
)
def test_what_the_plan_allows_is_let_through(module, source):
    assert violations(module, source) == []


def test_rooms_have_no_cycle():
    settled: set[str] = set()
    while len(settled) < len(MAY_IMPORT):
        free = {room for room, below in MAY_IMPORT.items() if below <= settled} - settled
        assert free, f"a cycle among {sorted(MAY_IMPORT.keys() - settled)}"
        settled |= free


def test_every_file_has_a_name_that_says_something():
    everything = [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]
    assert [file.name for file in everything if SAYS_NOTHING & set(file.stem.split("_"))] == []


def test_training_host_starts_without_tensorflow():
    code = (
        "import sys, flexolmo_jax.train.pretrain, flexolmo_jax.data.prepare;"
        "print(sorted({'tensorflow', 'seqio', 'torch', 'transformers', 'gin'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
