"""What holds for the package as a whole: the order of its steps, cheap imports, sizes."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import refusal_lens

PACKAGE = Path(refusal_lens.__file__).parent
STEPS = [
    *("prompts", "models", "activations", "directions", "uncertainty", "interventions"),
    *("attribution", "experiment", "multiverse", "report", "cli", "organisms"),
]
"""The folders in the order in which data flows; `plotting` imports none of them, all may use it."""


def upward_imports(package: Path) -> list[str]:
    """Imports of a later step by an earlier one, inside functions too."""
    found = []
    for file in sorted(package.rglob("*.py")):
        step, *inside = file.relative_to(package).parts
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and inside and node.level == len(inside) + 1:
                for other in [node.module] if node.module else [name.name for name in node.names]:
                    other = other.split(".")[0]
                    allowed = STEPS[: STEPS.index(step) + 1] if step in STEPS else []
                    if other not in (*allowed, "errors", "plotting"):
                        found.append(f"{file.relative_to(package)} imports {other}")
    return found


def test_a_step_imports_only_from_steps_before_it():
    assert upward_imports(PACKAGE) == []


def test_the_floor_test_sees_an_upward_import(tmp_path):
    for step in ("prompts", "plotting", "experiment"):
        (tmp_path / step).mkdir()
    (tmp_path / "prompts" / "a.py").write_text("def f():\n    from ..experiment.run import g")
    (tmp_path / "plotting" / "b.py").write_text("from .. import prompts")
    (tmp_path / "experiment" / "c.py").write_text("from ..prompts import a\nfrom .. import errors")
    assert upward_imports(tmp_path) == [
        "plotting/b.py imports prompts",
        "prompts/a.py imports experiment",
    ]


def test_only_plotting_imports_plotly():
    users = {
        file.relative_to(PACKAGE).parts[0]
        for file in sorted(PACKAGE.rglob("*.py"))
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
def test_modules_and_functions_can_be_followed(file):
    source = file.read_text()
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_package_can_be_read_in_a_day():
    # 14,000 held until verdicts had controls, a choice of layers and dose-response.
    assert sum(file.read_text().count("\n") for file in PACKAGE.rglob("*.py")) <= 14_760


def test_the_version_is_the_installed_one():
    assert version("refusal_lens")
