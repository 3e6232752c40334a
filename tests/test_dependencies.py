"""The declared dependencies are the packages that the code imports, no more and no less."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
"""Distributions by the name they are imported by, where the two differ."""
BY_USER = {"IPython", "ipywidgets", "peft"}
"""Packages that the code meets where the user has them: a notebook's own, the reader of adapters
(the extra `lora`), and the widgets of the panel (`notebooks`)."""


def imported() -> set[str]:
    found = set()
    for file in (ROOT / "refusal_lens").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).split(".")[0])
    return found - set(sys.stdlib_module_names) - {"refusal_lens"}


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}


def test_every_import_is_declared_and_every_dependency_is_imported():
    assert {DISTRIBUTIONS.get(name, name) for name in imported() - BY_USER} == declared()
