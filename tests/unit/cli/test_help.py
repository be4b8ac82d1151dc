"""What `--help` shows, of every command there is: it fits a terminal, and its examples work."""

import shlex

import pytest

from qbackup.cli.arguments import make_parser, parse_arguments
from qbackup.cli.examples import EXAMPLES

WIDTH = 80


PARSERS = {parser.prog: parser for parser in make_parser().with_all_below()}
COMMANDS = {prog for prog in PARSERS if prog.count(" ") < 2}


@pytest.mark.parametrize("prog", PARSERS)
def test_help_fits_80_columns(prog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    lines = PARSERS[prog].format_help().splitlines()
    assert [line for line in lines if len(line) > WIDTH] == []


def test_every_command_has_examples() -> None:
    names = {prog.removeprefix("qbackup ") for prog in COMMANDS}
    assert names == set(EXAMPLES)
    for prog in COMMANDS:
        assert EXAMPLES[prog.removeprefix("qbackup ")] in PARSERS[prog].format_help()


@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_are_understood(command: str) -> None:
    lines = [shlex.split(line, comments=True) for line in EXAMPLES[command].splitlines()[1:]]
    own = [words[1:] for words in lines if words[0] == "qbackup" and "|" not in words]
    own = [words[: words.index("&&")] if "&&" in words else words for words in own]
    for words in own:
        arguments = parse_arguments(words)
        assert command in ("qbackup", arguments.name)
    assert own or command == "completion"


@pytest.mark.parametrize("argv", [[], ["-v"], ["bitmap"]])
def test_help_that_nobody_asked_for_is_no_answer_and_no_success(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(argv)
    shown = capsys.readouterr()
    assert (caught.value.code, shown.out) == (2, "")
    assert "usage: qbackup" in shown.err and "examples:" in shown.err
