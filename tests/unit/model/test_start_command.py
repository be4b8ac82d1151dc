"""A VM's command line with other paths in it, as a script that a shell reads back the same."""

import json
import subprocess

import pytest

from qbackup.model.start_command import start_command, start_script

OLD, NEW = "/images/a.raw", "/restored/a,b.raw"
PATHS = {OLD: NEW}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (OLD, NEW),
        (f"file={OLD},if=none", "file=/restored/a,,b.raw,if=none"),
        (f"driver=raw,file.filename={OLD}", "driver=raw,file.filename=/restored/a,,b.raw"),
        (f'{{"driver": "raw", "file": {{"filename": "{OLD}"}}}}', None),
        (f"file={OLD}.bak", f"file={OLD}.bak"),
        (f"path=/x{OLD}", f"path=/x{OLD}"),
        ("{not JSON", "{not JSON"),
        ("a,,b=c,,d", "a,,b=c,,d"),
    ],
)
def test_a_path_is_replaced_where_it_is_a_whole_value(argument: str, expected: str | None) -> None:
    found = start_command(["qemu", "-x", argument], PATHS).arguments[2]
    if expected is None:
        assert json.loads(found) == {"driver": "raw", "file": {"filename": NEW}}
    else:
        assert found == expected


def test_a_comma_in_the_old_path_is_two_in_an_option() -> None:
    command = start_command(["qemu", "-drive", "file=/a,,b,if=none"], {"/a,b": "/c"})
    assert command.arguments == ("qemu", "-drive", "file=/c,if=none")
    assert command.unused == ()


def test_what_is_for_another_occasion_is_left_out_and_what_is_not_named_is_told() -> None:
    line = ["qemu", "-S", "-incoming", "tcp:0:1", "-m", "32", "-loadvm", "x", "-S", "-hda", OLD]
    command = start_command(line, {OLD: "/new", "/other": "/b"})
    assert command.arguments == ("qemu", "-m", "32", "-hda", "/new")
    assert command.left_out == ("-S", "-incoming", "tcp:0:1", "-loadvm", "x", "-S")
    assert command.unused == ("/other",)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("secret,id=s,data=REDACTED", "Secrets are not kept"),
        ("tap,fd=3", "open files"),
        ("file=/dev/fdset/1", "open files"),
        ("tap,ifname=fd0", ""),
    ],
)
def test_what_to_look_at_is_in_the_comments(argument: str, said: str) -> None:
    command = start_command(["qemu", "-x", argument], {})
    text = start_script(command, title="t", remarks=["a\nb"])
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    assert comments[:2] == ["# t", "# a?b"]
    assert (said in comments[2]) if said else len(comments) == 2


def test_a_shell_reads_every_argument_back() -> None:
    nasty = ["a b", "'", '"', "$HOME", " \\\n    ", "\n", "é", "-x y", "`id`", "", "#", "!!", "*"]
    command = start_command(["printf", "%s\\0", *nasty], {})
    text = start_script(command, title="$(touch x)", remarks=["`touch x`"])
    output = subprocess.run(["/bin/sh", "-c", text], capture_output=True, check=True).stdout
    assert output.decode().split("\0") == [*nasty, ""]
