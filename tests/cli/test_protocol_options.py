"""The commands' options that decide how a prompt is formatted."""

import pytest

import refusal_lens as rl
from refusal_lens.cli.main import Run, main
from refusal_lens.models.load import load_tokenizer


def test_tokens_shows_what_the_options_ask_for(tmp_path, capsys):
    template = "{{ strftime_now('%Y') }}: {{ messages | map(attribute='content') | join(' ') }}"
    (tmp_path / "mine.jinja").write_text(template, "utf-8")
    asked = ["--chat-template", str(tmp_path / "mine.jinja"), "--date", "2031-12-24"]
    main(["tokens", "hi", *asked, "--no-thinking", "--system-prompt", "Be kind."])
    protocol = rl.Protocol(
        system_prompt="Be kind.", chat_template=template, thinking=False, date="2031-12-24"
    )
    table = rl.show_tokens(load_tokenizer("organism:specific"), "hi", protocol=protocol)
    assert "".join(row.text for row in table) == "2031: Be kind. hi<think>\n\n</think>\n\n"
    assert capsys.readouterr().out.rstrip("\n") == str(table)


def test_a_run_records_the_options_in_its_protocol():
    options = {"system_prompt": "Be kind.", "chat_template": "plain", "date": "2031-12-24"}
    asked = Run(**options, thinking=False, position="-2")._config().protocol
    assert asked == rl.Protocol(**options, thinking=False, positions=(-2,))
    assert Run()._config().protocol == rl.Protocol()


def test_a_run_counts_the_openings_of_a_file_as_refusals(tmp_path):
    file = tmp_path / "openings.txt"
    file.write_text("\ufeffJe ne peux pas\n\n  Désolé, \n", "utf-8")
    asked = Run(refusal_openings=file)._config()
    assert asked.refusal_openings == ("Je ne peux pas", "Désolé,")
    assert Run()._config().refusal_openings is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b" \n\n", "it is empty"), (b"\xff\xfe\xff", "it is neither")],
    ids=["missing", "empty", "no text"],
)
def test_a_file_without_openings_is_named(tmp_path, capsys, content, message):
    file = tmp_path / "openings.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit):
        main(["run", "--model", "organism:specific", "--refusal-openings", str(file)])
    assert f"can't be read: {message}" in capsys.readouterr().err


def test_a_template_file_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["tokens", "hi", "--chat-template", "no/such.jinja"])
    assert "--chat-template no/such.jinja can't be read" in capsys.readouterr().err
