"""The README says what is so: its code runs, its commands exist, its links lead somewhere."""

import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from refusal_lens.cli import main as cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
BLOCKS = {kind: [text for k, text in FENCES if k == kind] for kind in ("python", "sh")}
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.S))


def commands(program: str) -> list[list[str]]:
    """Every call of a program that the README shows, in words."""
    lines = [line for block in BLOCKS["sh"] for line in block.splitlines()] + INLINE
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part.startswith(program)]


def shown_help(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_python_shown_runs_and_gives_a_figure_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(BLOCKS["python"])
    for shown, instead in (
        ('"meta-llama/Meta-Llama-3-8B-Instruct"', '"organism:specific"'),
        ("rl.plotting.cosine_by_layer(", "figure = rl.plotting.cosine_by_layer("),
        ('Config(model="organism:specific")', "Config(**quick)"),
    ):
        assert code.count(shown) == 1
        code = code.replace(shown, instead)
    quick = {"model": "organism:specific", "max_prompts": 16, "interventions": False}
    ran: dict = {"quick": quick | {"n_resamples": 1000}}
    exec(compile(code, "README.md", "exec"), ran)
    curve = ran["figure"].data[0].y
    assert len(curve) == 32
    assert curve[20] == pytest.approx(float(ran["cosine"][20]), abs=1e-3)
    assert "layer 20" in str(ran["figure"].layout.annotations)
    assert (tmp_path / "runs" / "specific" / "directions.safetensors").is_file()


def test_the_first_block_is_five_lines():
    assert len([line for line in BLOCKS["python"][0].splitlines() if line.strip()]) == 5


def test_what_comes_before_the_reference_is_read_in_a_few_minutes():
    assert len(README.split("\n## Reference\n")[0].split()) <= 900


def test_the_citation_names_the_version_that_is_here():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == version("refusal_lens")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_results_that_the_readme_points_to_link_to_files():
    page = ROOT / "tests" / "benchmarks" / "results" / "README.md"
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("words", commands("refusal-lens"), ids=" ".join)
def test_every_command_shown_exists_with_its_options(words, capsys):
    shown = shown_help(capsys, words[1])
    named = [] if words[1].startswith("-") else [words[1]]
    assert " ".join(["usage: refusal-lens", *named, "["]) in shown
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", shown), option


def test_a_command_that_does_not_exist_would_be_noticed(capsys):
    assert "usage: refusal-lens no-such-command " not in shown_help(capsys, "no-such-command")


@pytest.mark.parametrize("words", commands("python"), ids=" ".join)
def test_every_script_shown_exists(words):
    module = {
        "venv": None,
        "pip": None,
        "pytest": None,
    }
    file = module[words[2]] if words[1] == "-m" else ROOT / words[1]
    assert file is None or file.is_file()


def test_every_link_to_a_file_leads_there():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
    assert "notebooks/figures/cosine_across_depth.png" in links


def test_every_notebook_is_linked():
    notebooks = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    assert [name for name in notebooks if f"](notebooks/{name})" not in README] == []


def test_the_figure_is_small():
    assert (ROOT / "notebooks" / "figures" / "cosine_across_depth.png").stat().st_size < 150_000


def test_the_test_command_is_marked_once_and_runs_pytest():
    marked = re.findall(r"<!-- test command -->\n```sh\n(.*?)```\n<!-- end -->", README, re.S)
    assert len(marked) == 1
    assert marked[0].strip().endswith("python3 -m pytest")


def test_nothing_is_left_to_be_filled_in():
    assert re.findall(r"(?i)\b(todo|tbd|fixme|xxx|lorem|placeholder|to be filled)\b", README) == []


@pytest.mark.slow
def test_the_table_of_verdicts_is_what_the_demo_prints(tmp_path, capsys):
    folders = ["--out", str(tmp_path / "demo"), "--cache", str(tmp_path / "cache")]
    cli.main(["demo", "--quiet", *folders])
    printed = capsys.readouterr().out
    rows = re.findall(r"\| `(\w+)` \|[^|]*\| ([+-][\d.]+) \| ([\w -]+) \| ([\w ]+) \|", README)
    assert [row[0] for row in rows] == ["specific", "entangled", "oblivious"]
    for name, cosine, rule, verdict in rows:
        assert re.search(rf"{name} +{verdict} +{re.escape(cosine)} +{rule}", printed), name
