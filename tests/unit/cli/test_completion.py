"""Tab: asked in bash, zsh and fish with the code that `qbackup completion` prints for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli import Qbackup

from qbackup.cli.arguments import SHELLS, make_parser
from qbackup.cli.completers import _COMPLETERS
from qbackup.repository.repository import Repository

from ..values import ID1, ID2, VM

END = "end of the offers"

# Each defines `ask LINE`, which prints what the shell would offer, one a line.
ASK = {
    "bash": """
        eval "$(qbackup completion bash)"
        ask() {
            COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
            _python_argcomplete qbackup 2>/dev/null
            printf '%s\\n' "${COMPREPLY[@]}"
        }
    """,
    "zsh": """
        compdef() { }
        eval "$(qbackup completion zsh)"
        _describe() { print -l -- ${${(P)2}%%:*} }
        ask() { BUFFER=$1 CURSOR=${#1} words=(qbackup); _python_argcomplete }
    """,
    "fish": """
        qbackup completion fish | source
        function ask; complete -C $argv[1] | string split -f 1 \\t; end
    """,
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Return a folder with the command `qbackup`."""
    folder = tmp_path / "programs"
    folder.mkdir()
    program = folder / "qbackup"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qbackup "$@"\n')
    program.chmod(0o755)
    return folder


def offered(shell: str, *lines: str, programs: Path, configuration: Path) -> list[set[str]]:
    """Return what a shell offers at the end of each line."""
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "QBACKUP_CONFIG": str(configuration),
        "XDG_CONFIG_HOME": str(programs),
        "XDG_DATA_HOME": str(programs),
    }
    options = {"bash": "--norc", "zsh": "-f", "fish": "--no-config"}[shell]
    questions = "".join(f"ask '{line}'\necho {END}\n" for line in lines)
    done = subprocess.run(
        [shell, options, "-c", ASK[shell] + questions],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    answers = done.stdout.split(f"{END}\n")[:-1]
    return [{word.strip() for word in answer.splitlines() if word.strip()} for answer in answers]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_offers_commands_options_vms_and_backups(
    shell: str, programs: Path, repository: Repository, qbackup: Qbackup
) -> None:
    for backup_id in (ID1, ID2, f"{ID2}.partial"):
        (repository.path / VM / backup_id).mkdir(parents=True)
    asked = {
        "qbackup inc": {"incremental", "inc"},
        "qbackup incremental --no": {"--no-compare", "--no-fallback", "--no-push"},
        "qbackup full ": {VM},
        f"qbackup show {VM} ": {ID1, ID2},
    }
    answers = offered(shell, *asked, programs=programs, configuration=qbackup.configuration)
    assert answers == list(asked.values())


@pytest.mark.parametrize("shell", SHELLS)
def test_what_cannot_be_looked_up_is_not_offered_and_not_told(
    shell: str, programs: Path, qbackup: Qbackup
) -> None:
    qbackup.configuration.write_text("no TOML")
    lines = ("qbackup full ", "qbackup full --la")
    answers = offered(shell, *lines, programs=programs, configuration=qbackup.configuration)
    assert answers == [set(), {"--label"}]


def test_everything_that_has_names_offers_them() -> None:
    values = {
        str(action.metavar) for one in make_parser().with_all_below() for action in one._actions
    }
    assert set(_COMPLETERS) <= values
    names = {"VM", "ID", "FILE", "DIR"}
    missed = {value for value in values if names & set(value.replace("|", " ").split())}
    assert missed <= set(_COMPLETERS)
