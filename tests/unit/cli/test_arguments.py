"""The command line: what is understood, and that mistakes are ordinary errors."""

import re
import subprocess
import sys

import pytest

from qbackup.cli.arguments import parse_arguments
from qbackup.errors import UsageError

HEAVY = ("asyncio", "rich", "qemu", "blake3", "aiofiles", "argcomplete", "difflib")


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["full", "--help"], ["incremental", "--help"]]
)
def test_help_comes_without_slow_imports(argv: list[str]) -> None:
    program = (
        "import sys\nfrom qbackup.cli.main import run\n"
        "try:\n    run(sys.argv[1:])\nexcept SystemExit as err:\n    code = err.code\n"
        f"print('loaded:', code, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: 0 []"
    assert "qbackup" in done.stdout


def test_help_tells_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    # Design, section 4.
    commands = ["init", "full", "incremental", "list", "show", "restore", "verify", "status"]
    commands += ["prune", "protect", "unprotect", "nbd", "mount", "boot"]
    codes = ["0 done", "1 failed", "2 usage", "3 done, but degraded", "4 refused", "10 no", "11 lo"]
    codes += ["12 QEMU", "13 verification", "130 interrupted"]
    assert [word for word in commands + codes if word not in text] == []


@pytest.mark.parametrize("name", ["incremental", "inc"])
def test_a_backup_takes_everything_that_is_documented(name: str) -> None:
    arguments = parse_arguments(
        f"{name} vm1 --disk a --disk b --exclude c --label x --speed-limit 50M --lock-wait 10m"
        " --no-fallback --no-compare --strict --compress".split()
    )
    assert (arguments.name, arguments.module, arguments.vms) == ("incremental", "backup", ["vm1"])
    assert (arguments.disk, arguments.exclude, arguments.label) == (["a", "b"], ["c"], "x")
    assert (arguments.speed_limit, arguments.lock_wait) == (50 * 2**20, 600)
    assert arguments.no_fallback and arguments.no_compare
    assert arguments.strict and arguments.compress


def test_prune_takes_every_rule_and_they_need_not_be_given() -> None:
    periods = ("last", "hourly", "daily", "weekly", "monthly", "yearly", "within")
    assert [getattr(parse_arguments(["prune", "vm1"]), f"keep_{p}") for p in periods] == [None] * 7
    given = [f"--keep-{period}={number}" for number, period in enumerate(periods, 1)]
    arguments = parse_arguments(["prune", "vm1", "--dry-run", "--lock-wait", "1m", *given])
    numbers = [getattr(arguments, f"keep_{period}") for period in periods]
    assert numbers == [1, 2, 3, 4, 5, 6, 7]
    assert (arguments.dry_run, arguments.lock_wait) == (True, 60)


@pytest.mark.parametrize(
    "argv", [["restore", "vm1", "--to", "x"], ["verify"], ["protect", "v", "i"]]
)
def test_readers_can_wait_for_a_prune(argv: list[str]) -> None:
    assert parse_arguments(argv).lock_wait == 0
    assert parse_arguments([*argv, "--lock-wait", "10m"]).lock_wait == 600


def test_two_command_lines_do_not_share_their_lists() -> None:
    assert parse_arguments(["full", "vm1", "--disk", "a"]).disk == ["a"]
    assert parse_arguments(["full", "vm1"]).disk == []


@pytest.mark.parametrize(
    "argv", [["-c", "f", "--json", "-q", "list"], ["list", "-c", "f", "--json", "-q"]]
)
def test_common_arguments_stand_before_or_after_the_command(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    assert (arguments.config, arguments.json, arguments.quiet) == ("f", True, True)
    assert not arguments.verbose


def test_what_is_not_given_has_its_default() -> None:
    arguments = parse_arguments(["list"])
    assert (arguments.config, arguments.json, arguments.quiet) == (None, False, False)
    assert arguments.vms == [] and not arguments.all


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--json"], "required: COMMAND"),
        (["--json", "bitmap"], "required: show|check"),
        (["explode"], "there is no command 'explode'"),
        (["full"], "required: VM"),
        (["full", "vm1", "--all"], "--all and names of VMs exclude each other"),
        (["full", "vm1", "--no-fallback"], "unrecognized arguments: --no-fallback"),
        (["full", "vm1", "--lab", "x"], "unrecognized arguments: --lab"),
        (["full", "vm1", "--speed-limit", "fast"], "'fast' is not a size"),
        (["full", "vm1", "--lock-wait", "-1"], "--lock-wait"),
        (["inc", "vm1", "--lock-wait", "10 parsecs"], "is not a duration"),
        (["restore", "vm1"], "--to --in-place is required"),
        (["restore", "vm1", "--to", "x", "--format", "vmdk"], "'vmdk' is none of raw, qcow2"),
        (["show", "vm1"], "required: ID"),
        (["protect", "vm1"], "required: ID"),
        (["prune"], "required: VM"),
        (["prune", "vm1", "--keep-last", "0"], "'0' is not a number from 1 on"),
        (["prune", "vm1", "--keep-daily", "-1"], "--keep-daily"),
        (["prune", "vm1", "--keep-yearly", "1e3"], "is not a number from 1 on"),
        (["prune", "vm1", "--keep-weekly", "9" * 5000], "is not a number from 1 on"),
        (["prune", "vm1", "--keep-within", "0d"], "younger than nothing"),
        (["prune", "vm1", "--keep-within", "1 month"], "is not a duration"),
        (["prune", "vm1", "--keep", "3"], "unrecognized arguments: --keep"),
        (["-q", "-v", "list"], "not allowed with argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_with_where_to_read(argv: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        parse_arguments(argv)
    assert caught.value.hint is not None and "--help" in caught.value.hint


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["ful", "vm1"], "did you mean full? see qbackup --help"),
        (["bitmap", "shwo", "x"], "did you mean show? see qbackup bitmap --help"),
        (["full", "vm1", "--exlude=x"], "did you mean --exclude? see qbackup full --help"),
        (["bitmap", "show", "x", "--jso"], "did you mean --json? see qbackup bitmap show --help"),
        (["restore", "vm1", "--to", "x", "--format", "qcow"], "did you mean qcow2? see"),
        (["--verbos", "list"], "did you mean --verbose? see qbackup list --help"),
        (["full", "vm1", "--zzz"], "see qbackup full --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_who_mistypes_is_asked_what_was_meant(argv: list[str], hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_arguments(argv)
    assert caught.value.hint is not None and caught.value.hint.startswith(hint)
