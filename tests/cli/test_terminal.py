"""What the commands print: wrapped, in the user's words, with nothing left behind."""

import re
from dataclasses import fields, replace
from importlib.metadata import version

import pytest

from refusal_lens import Config
from refusal_lens.cli import show
from refusal_lens.cli.main import Run, main
from refusal_lens.experiment.wording import effects

COMMANDS = (
    "demo",
    "run",
    "tokens",
    "compare",
    "convert",
    "report",
    "sensitivity",
    "select",
    "atlas",
    "cache",
)


def printed(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main([*arguments])
    shown = capsys.readouterr()
    return shown.out + shown.err


def test_the_version_is_told(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"refusal-lens {version('refusal_lens')}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_of_a_flag_what_it_does_and_no_truth_value(command, capsys):
    shown = printed(capsys, command, "--help")
    assert "usage: refusal-lens" in shown
    assert not re.search(r"default:\s+(True|False|None)", " ".join(shown.split()))


def test_a_command_s_defaults_are_python_s():
    shared = [f.name for f in fields(Run) if f.name in vars(Config) and f.name != "interventions"]
    assert {"controls", "seed", "confidence", "refusal"} <= {*shared}
    assert {n: getattr(Run, n) for n in shared} == {n: getattr(Config, n) for n in shared}


def test_help_tells_where_finished_work_lies_and_what_a_negative_flag_leaves_out(capsys):
    for command in ("demo", "run", "sensitivity", "atlas", "cache"):
        assert "$REFUSAL_LENS_CACHE" in printed(capsys, command, "--help")
    shown = printed(capsys, "tokens", "--help")
    assert "Leave out the header" in shown
    assert "(default: )" not in shown


def test_the_same_option_has_the_same_name_in_every_command(capsys):
    for command in ("run", "sensitivity"):
        shown = printed(capsys, command, "--help")
        for option in ("--target", "--against-baseline", "--keep-duplicates", "--max-prompts"):
            assert option in shown
    assert "--target" in printed(capsys, "select", "--help")
    assert "--max-prompts" in printed(capsys, "demo", "--help")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--max-prompts", "0"], "--max-prompts is 0: at least one"),
        (["--resamples", "1"], "--resamples is 1: "),
        (["--date", "x"], "--date is 'x': write it as 2024-07-26"),
        (["--position", "0"], "--position has 0: positions count from the end"),
    ],
)
def test_an_error_names_the_option_and_not_an_argument_of_python(options, line, capsys):
    shown = printed(capsys, "run", "--model", "organism:specific", *options)
    assert shown.startswith(f"refusal-lens: {line}")
    assert not re.search(r"None|Protocol\.|\b(?!last_)\w+_", shown)


@pytest.mark.parametrize("command", ["run", "sensitivity", "select"])
def test_a_run_that_fails_before_it_began_leaves_nothing_behind(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shown = printed(capsys, command, "--model", str(tmp_path / "none"), "--quiet")
    assert "refusal-lens: " in shown
    assert list(tmp_path.iterdir()) == []


def test_results_wrap_at_the_terminal_s_width_and_names_stay_text(
    quick_results, capsys, monkeypatch
):
    results = quick_results("specific")
    odd = replace(results.contrasts["negativity"], name="[red]odd[/red]")
    results = replace(results, contrasts=results.contrasts | {"negativity": odd})
    monkeypatch.setattr(show, "PIPE_WIDTH", 60)
    show.show(*show.findings(results), "end")
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 60
    assert "[red]odd" in shown
    assert f"verdict: {results.verdict.answer}" in shown
    assert "a random direction" in shown
    assert "\n\n\n" not in shown
    assert "\033" not in shown


def test_what_chance_does_or_that_nothing_was_done_stands_beside_every_effect(quick_results):
    results = quick_results("specific")
    beside = {row[0]: row[2] for row in effects(results.verdict, results.names)}
    assert len(beside) == len(effects(results.verdict, results.names))  # no two rows read alike
    assert beside.pop("negative prompts refused, beyond neutral ones") == "no intervention"
    assert all(re.fullmatch(r"-?\d+ %|not measurable", x) for x in beside.values())
    # Both are of the same random drop: over the fall under refusal, and over the gap of statements.
    e = results.verdict.evidence
    assert (e.chance_statement_ablation > 0) == (e.chance_statements > 0)
    assert e.chance_statement_ablation != e.chance_statements


def test_the_rule_can_be_read_without_a_run_or_a_model(capsys):
    main(["--explain"])
    shown = capsys.readouterr().out
    assert "Inconclusive comes first:" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(("n", "told"), [("15", True), ("16", False)])
def test_too_few_prompts_for_a_verdict_are_said_before_the_run_begins(n, told, tmp_path, capsys):
    shown = printed(capsys, "run", "--model", str(tmp_path / "none"), "--max-prompts", n)
    first = f"The smallest set has {n} prompts: below 16 the verdict will be inconclusive."
    assert (first == shown.splitlines()[0]) == told


def test_columns_of_numbers_stand_to_the_right_and_words_to_the_left():
    rows = [["a", "shared", "-1 % [-2, 3]"], ["b", "partly shared", ""]]
    columns = show.table(["x", "y", "z"], rows).columns
    assert [column.justify for column in columns] == ["left", "left", "right"]


def test_without_interventions_the_reasons_stand_instead_of_effects(quick_results, capsys):
    show.show(*show.findings(replace(quick_results("specific"), causal=None)))
    assert "a random direction" not in capsys.readouterr().out


def test_sensitivity_says_its_time_first_and_writes_the_cosines_before_it_intervenes(
    tmp_path, monkeypatch, capsys
):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("refusal_lens.multiverse.run.measure_responses", stopped)
    command = ["sensitivity", "--model", "organism:specific", "--max-prompts", "16"]
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--out", str(tmp_path)])
    assert "about 2 minutes" in capsys.readouterr().err
    rows = (tmp_path / "sensitivity.csv").read_text().splitlines()
    assert len(rows) > 32
    assert "inconclusive" in rows[1]
