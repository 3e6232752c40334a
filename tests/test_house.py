"""The house rules that code can hold: floors, cheap imports, one list of public names."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import refusal_lens

PACKAGE = Path(refusal_lens.__file__).parent
FLOORS = [
    {"errors"},
    {"shapes"},
    {"covariance"},
    {"tables", "template", "token_table", "hub", "hooked", "distributed"},
    {"contrasts", "directions", "similarity", "plotting", "artifacts", "faults"},
    {"model", "chat", "formats", "statistics", "cache", "verdict"},
    {"forward", "config", "protocols", "lazy_model"},
    {"residual_stream", "interventions", "selection_rule", "specifications"},
    {"activations"},
    {"causal", "measures"},
    {"results", "selection", "readings", "judgements"},
    {"experiment"},
    {"report", "sensitivity", "commands_directions"},
    {"commands_results"},
    {"cli"},
]
"""From the ground up: a module imports only from floors below its own."""
OUTSIDE = {"__init__", "__main__", "organisms"}
"""The door, the command's name, and the trainer, which uses the house as anyone else does."""


def rooms() -> dict[str, list[Path]]:
    found = {p.stem: [p] for p in PACKAGE.glob("*.py")}
    found |= {p.parent.name: sorted(p.parent.glob("*.py")) for p in PACKAGE.glob("*/__init__.py")}
    return {name: files for name, files in found.items() if name not in OUTSIDE}


def imported_rooms(file: Path) -> set[str]:
    """Rooms that a file imports from, inside functions too, but not for type checkers alone."""
    inside = len(file.relative_to(PACKAGE).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == inside + 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refusal_lens."):
            names = [node.module.removeprefix("refusal_lens.")]
        elif isinstance(node, ast.Import):
            names = [
                alias.name.removeprefix("refusal_lens.")
                for alias in node.names
                if alias.name.startswith("refusal_lens.")
            ]
        else:
            continue
        found |= {name.split(".")[0] for name in names}
    return found


def test_every_room_is_on_a_floor():
    assert set(rooms()) == set.union(*FLOORS)


def test_a_room_imports_only_from_floors_below_its_own():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upward = [
        f"{name} (floor {floor[name]}) imports {other} (floor {floor[other]})"
        for name, files in rooms().items()
        for file in files
        for other in imported_rooms(file)
        if floor[other] >= floor[name]
    ]
    assert upward == []


def test_the_reader_of_imports_sees_imports():
    # The control: without this the test above would pass on an empty set.
    assert {"artifacts", "config", "verdict", "plotting"} <= imported_rooms(PACKAGE / "results.py")


def test_plotly_is_imported_by_plotting_alone():
    users = {
        name
        for name, files in rooms().items()
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import)
        and any(alias.name.startswith("plotly") for alias in node.names)
        and not _for_type_checkers(file, node)
    }
    assert users == {"plotting"}


def _for_type_checkers(file: Path, wanted: ast.Import) -> bool:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return any(getattr(child, "lineno", 0) == wanted.lineno for child in ast.walk(node))
    return False


def in_a_fresh_process(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_package_pulls_in_nothing_heavy():
    code = "import sys, refusal_lens; print(*(m for m in sys.modules if '.' not in m))"
    loaded = set(in_a_fresh_process(code).split())
    assert "refusal_lens" in loaded
    assert loaded.isdisjoint({"transformer_lens", "transformers", "plotly", "torch", "datasets"})


def test_every_public_name_can_be_had_and_none_drags_transformer_lens_in():
    code = (
        "import sys, refusal_lens as rl\n"
        "for name in rl.__all__: getattr(rl, name)\n"
        "print('transformer_lens' in sys.modules, len(rl.__all__))"
    )
    dragged_in, count = in_a_fresh_process(code).split()
    assert dragged_in == "False"
    assert int(count) > 20


def test_public_names_have_docstrings():
    bare = [name for name in refusal_lens.__all__ if not getattr(refusal_lens, name).__doc__]
    assert bare == []


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_no_module_outgrows_its_room(file):
    assert file.read_text().count("\n") <= 450


def test_the_version_is_the_installed_one():
    assert version("refusal_lens")
