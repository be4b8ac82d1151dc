"""The arguments of every command. Kept free of slow imports, so that `--help` is quick."""

import argparse
import re
from collections.abc import Callable
from typing import TypeVar

from qbackup import __version__
from qbackup.cli.examples import EXAMPLES
from qbackup.cli.parser import Parser
from qbackup.errors import UsageError
from qbackup.model.health import parse_free_limit
from qbackup.model.limits import MAX_PARALLEL, MIN_LIMIT_RATE_BYTES
from qbackup.model.quantities import parse_duration_s, parse_size_bytes

T = TypeVar("T")

SHELLS = ("bash", "zsh", "fish")
"""Those that `qbackup completion` knows."""

_EXIT_CODES = """\
exit codes:
  0 done   1 failed   2 usage   3 done, but degraded   4 refused (--no-fallback)
  10 no repository   11 locked   12 QEMU cannot be reached
  13 verification failed   14 a remote cannot be used   130 interrupted
"""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UsageError: it is wrong.
    """
    arguments = make_parser().parse(argv)
    if getattr(arguments, "all", False) and arguments.vms:
        mistake = "--all and names of VMs exclude each other"
    elif getattr(arguments, "host", None) and not (arguments.remote or arguments.name == "pull"):
        mistake = "--host goes with --remote"
    elif getattr(arguments, "vms_required", False) and not (arguments.vms or arguments.all):
        mistake = "the following arguments are required: VM (or --all)"
    else:
        return arguments
    raise UsageError(mistake, hint=f"see qbackup {arguments.name} --help")


def make_parser() -> Parser:
    """Make the parser of every command: what help, completion and the manual page are made from."""
    parser = Parser(
        prog="qbackup",
        description="Back up the disks of running QEMU virtual machines: in full, then only what\n"
        "changed. qbackup COMMAND --help tells about one command.",
        epilog=f"{EXAMPLES['qbackup']}\n\n{_EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"qbackup {__version__}")
    _add_common(parser, defaults=True)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str, *, module: str = "", aliases: tuple[str, ...] = ()) -> Parser:
        sub: Parser = commands.add_parser(
            name, help=text, description=text, aliases=list(aliases), epilog=EXAMPLES.get(name)
        )
        _add_common(sub, defaults=False)
        sub.set_defaults(module=module or name, name=name)
        return sub

    init = command("init", "create the repository and state directories, and a configuration")
    init.add_argument("--repository", metavar="DIR", help="where backups go (new configuration)")
    init.add_argument("--state", metavar="DIR", help="where bitmap files go (new configuration)")

    full = command("full", "back up every disk in full; starts a new chain", module="backup")
    _add_backup_arguments(full)
    incremental = command(
        "incremental", "back up what changed since the last backup", module="backup",
        aliases=("inc",),
    )  # fmt: skip
    _add_backup_arguments(incremental)
    _add_incremental_arguments(incremental)

    listing = command("list", "list backups, the newest last; P marks protected ones")
    _add_vms(listing)
    _add_from_remote(listing)

    show = command("show", "show one backup")
    show.add_argument("vm", metavar="VM")
    show.add_argument("id", metavar="ID", help="a backup id, or the beginning of one")
    _add_from_remote(show)

    restore = command(
        "restore",
        "restore disks into a directory, onto a block device, or into the VM's own images",
    )
    _add_point(restore)
    where = restore.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", metavar="DIR", help="directory or block device")
    where.add_argument(
        "--in-place", action="store_true",
        help="overwrite the disks of the VM, which is off; needs --force",
    )  # fmt: skip
    restore.add_argument(
        "-i", "--interactive", action="store_true", help="choose the backup from a list"
    )
    restore.add_argument("--format", choices=("raw", "qcow2"), help="default: as the source was")
    restore.add_argument("--force", action="store_true", help="replace what is there")
    restore.add_argument(
        "--with-vm", action="store_true", help="write start.sh, which starts the VM on them"
    )
    _add_from_remote(restore)
    _add_limit_rate(restore)

    _add_bad_day_commands(command)

    _add_verify_command(command)
    _add_retention_commands(command)

    _add_remote_commands(command)
    _add_watching_commands(command)
    _add_bitmap_command(command)
    _add_key_command(command)

    _add_status_command(command)
    _add_units_command(command)
    _add_report_command(command)

    completion = command("completion", "print what lets a shell complete the command line")
    completion.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS))
    return parser


def _add_watching_commands(command: Callable[..., Parser]) -> None:
    run = command("run", "start QEMU, and keep its bitmaps beyond its end")
    run.add_argument("vm", metavar="VM")
    run.add_argument(
        "qemu", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="QEMU and its arguments"
    )

    watch = command("watch", "keep the bitmaps of a QEMU that something else started")
    watch.add_argument("vm", metavar="VM")
    watch.add_argument(
        "--connect-timeout", type=_argument(parse_duration_s), default=30, metavar="30s",
        help="wait so long for QEMU's monitor",
    )  # fmt: skip

    stop = command("stop", "power the guest down, save its bitmaps, end QEMU")
    stop.add_argument("vm", metavar="VM")
    stop.add_argument(
        "--timeout", type=_argument(parse_duration_s), default=60, metavar="60s",
        help="a guest that has not powered off by then is paused, saved and ended",
    )  # fmt: skip


def _add_units_command(command: Callable[..., Parser]) -> None:
    units = command(
        "install-units", "write systemd timers and services for VMs", module="install_units"
    )
    _add_vms(units)
    units.add_argument("--user", action="store_true", help="for your own systemd")
    units.add_argument("--root", metavar="DIR", help="below this directory instead of /")
    units.add_argument("--dry-run", action="store_true", help="only print them")
    units.add_argument(
        "--force", action="store_true", help="replace units that somebody has changed"
    )


def _add_report_command(command: Callable[..., Parser]) -> None:
    report = command("report", "write an HTML page about backups, chains and changes")
    _add_vms(report)
    report.add_argument("--html", required=True, metavar="FILE", help="where to write the page")


def _add_status_command(command: Callable[..., Parser]) -> None:
    status = command("status", "show bitmaps, changes and what interrupted runs left")
    _add_vms(status)
    status.add_argument(
        "--check", action="store_true",
        help="answer as a monitoring plug-in: exit with 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN",
    )  # fmt: skip
    for grade, age, free in (("warn", "26h", "10%"), ("critical", "50h", "5%")):
        status.add_argument(
            f"--{grade}-age", type=_argument(_parse_age), metavar=age,
            help="if the newest backup of a disk is so old",
        )  # fmt: skip
        status.add_argument(
            f"--{grade}-free", type=_argument(parse_free_limit), metavar=free,
            help="if less is free for backups, a part or a size",
        )  # fmt: skip
    status.add_argument(
        "--timeout", type=_argument(parse_duration_s), metavar="30s",
        help="do not wait longer for a repository or a QEMU that hangs",
    )  # fmt: skip


def _add_incremental_arguments(incremental: argparse.ArgumentParser) -> None:
    incremental.add_argument(
        "--no-fallback", action="store_true",
        help="fail with exit code 4 where a disk would need a full backup",
    )  # fmt: skip
    incremental.add_argument(
        "--no-compare", action="store_true",
        help="back up a disk whose bitmap is not trusted in full, instead of comparing it",
    )  # fmt: skip
    incremental.add_argument(
        "--strict", action="store_true", help="exit with 3 if a disk got a full backup instead"
    )


def _add_verify_command(command: Callable[..., Parser]) -> None:
    verify = command("verify", "compare every byte of the backups with what was written")
    _add_vms(verify)
    _add_parallel(verify)
    verify.add_argument("--at", metavar="ID|TIME", help="only this backup and what it needs")
    _add_lock_wait(verify)
    verify.add_argument(
        "--boot", action="store_true",
        help="verify the newest backup, or --at, and start a throw-away VM from it",
    )  # fmt: skip
    verify.add_argument(
        "--expect", metavar="REGEX", help="with --boot: what the serial console has to say"
    )
    verify.add_argument(
        "--boot-timeout", type=_argument(parse_duration_s), default=120, metavar="2m",
        help="with --boot: wait so long for that, or for the guest agent",
    )  # fmt: skip
    _add_boot_options(verify)
    _add_from_remote(verify)
    _add_limit_rate(verify)


def _add_bad_day_commands(command: Callable[..., Parser]) -> None:
    nbd = command("nbd", "serve a backup's disks, read-only, on a UNIX socket until Ctrl-C")
    _add_point(nbd)
    nbd.add_argument("--socket", metavar="PATH", help="default: one in a private directory")

    mount = command("mount", "show the files in a backup, read-only, until Ctrl-C or umount")
    _add_point(mount)
    mount.add_argument("dir", metavar="DIR", help="an empty directory")
    mount.add_argument("--images", action="store_true", help="show each disk as a raw file instead")
    mount.add_argument(
        "--partition", metavar="DEVICE",
        help="show this file system, for example /dev/sda1, where there is no operating system",
    )  # fmt: skip

    boot = command("boot", "start a throw-away VM, without network, from a backup")
    _add_point(boot)
    _add_boot_options(boot)
    screen = boot.add_mutually_exclusive_group()
    screen.add_argument("--vnc", metavar="ADDRESS", help="its screen by VNC, for example :0")
    screen.add_argument("--window", action="store_true", help="its screen in a window")


def _add_boot_options(parser: argparse.ArgumentParser) -> None:
    """Add what a throw-away VM may have otherwise than the backup tells."""
    parser.add_argument(
        "--memory", type=_argument(parse_size_bytes), metavar="2G", help="default: as the VM had"
    )
    parser.add_argument(
        "--accel", choices=("tcg", "kvm"), help="default: boot_accel of the configuration, or tcg"
    )
    parser.add_argument("--machine", metavar="TYPE", help="a machine type of QEMU's")
    for name, text in (
        ("bios", "firmware"),
        ("kernel", "start this kernel of the host's"),
        ("initrd", "with this initial file system"),
    ):
        parser.add_argument(f"--{name}", metavar="FILE", help=text)
    parser.add_argument("--append", metavar="TEXT", help="and this command line")


def _add_point(parser: argparse.ArgumentParser) -> None:
    """Add what says which backup and which of its disks."""
    parser.add_argument("vm", metavar="VM")
    parser.add_argument(
        "--at", metavar="ID|TIME", help="this backup, or the newest not after a time"
    )
    parser.add_argument(
        "--disk", action="append", default=[], metavar="NAME", help="only this disk (repeatable)"
    )
    _add_lock_wait(parser)


def _add_retention_commands(command: Callable[..., Parser]) -> None:
    prune = command("prune", "remove the backups that no rule keeps")
    _add_vms(prune, required=True)
    _add_parallel(prune)
    _add_keep_rules(prune)
    prune.add_argument(
        "--dry-run", action="store_true", help="only show what is kept, and why, and what not"
    )
    merging = prune.add_mutually_exclusive_group()
    merging.add_argument(
        "--consolidate", choices=("always", "worthwhile", "never"), metavar="WHEN",
        help="merge what no rule keeps, but is needed, into what needs it: always, never, or "
        "worthwhile (default: a full is not copied to free little)",
    )  # fmt: skip
    merging.add_argument(
        "--no-consolidate", dest="consolidate", action="store_const", const="never",
        help="the same as never: keep what is needed",
    )  # fmt: skip
    _add_from_remote(prune)
    _add_lock_wait(prune)

    for name, text in (
        ("protect", "let prune never remove a backup"),
        ("unprotect", "let the rules of prune decide on a backup again"),
    ):
        marking = command(name, text, module="protect")
        marking.add_argument("vm", metavar="VM")
        marking.add_argument("id", metavar="ID", help="a backup id, or the beginning of one")
        _add_from_remote(marking)
        _add_lock_wait(marking)


def _add_remote_commands(command: Callable[..., Parser]) -> None:
    push = command("push", "put backups into a remote: those that are newer than what is there")
    _add_vms(push, required=True)
    _add_parallel(push)
    push.add_argument(
        "--remote", metavar="NAME", help="default: as configured (push), else the only one"
    )
    push.add_argument("--at", metavar="ID|TIME", help="only this backup and what it needs")
    _add_limit_rate(push)
    _add_lock_wait(push)

    pull = command("pull", "bring backups of a remote back into the repository")
    _add_vms(pull, required=True)
    _add_parallel(pull)
    pull.add_argument("--at", metavar="ID|TIME", help="only this backup and what it needs")
    _add_from_remote(pull)
    _add_limit_rate(pull)
    _add_lock_wait(pull)


def _add_from_remote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--remote", metavar="NAME", help="what is in this remote, not what is here")
    parser.add_argument(
        "--host", metavar="HOST",
        help="with --remote: whose VM, if several hosts have one of that name; its name, or the "
        "beginning of its repository's id",
    )  # fmt: skip


def _add_limit_rate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit-rate", type=_argument(_parse_rate), metavar="20M",
        help="bytes per second to or from a remote, for all VMs together",
    )  # fmt: skip


def _parse_rate(text: str) -> int:
    rate = parse_size_bytes(text)
    if rate < MIN_LIMIT_RATE_BYTES:
        raise ValueError(f"{text!r} is too little; at least 1K")
    return rate


def _add_bitmap_command(command: Callable[..., Parser]) -> None:
    _add_file_actions(
        command("bitmap", "look at a bitmap file"),
        show="show what a bitmap file says, and a heat map of the disk",
        check="exit with 0 if a bitmap file is intact and clean, else with 1",
    )


def _add_key_command(command: Callable[..., Parser]) -> None:
    _add_file_actions(
        command("key", "make or show a secret key for remotes that are encrypted"),
        new="make a key in a new file, and print its recipient for the configuration",
        show="print the recipients that belong to the secret keys in a file",
    )


def _add_file_actions(parser: argparse.ArgumentParser, **actions: str) -> None:
    """Add what can be done with a file, by name, each with its help."""
    added = parser.add_subparsers(dest="action", metavar="|".join(actions))
    for name, text in actions.items():
        action = added.add_parser(name, help=text, description=text)
        _add_common(action, defaults=False)
        action.add_argument("file", metavar="FILE")


def _add_common(parser: argparse.ArgumentParser, *, defaults: bool) -> None:
    """Add what is understood before and after the command; only one place sets defaults."""

    def default(value: object) -> object:
        return value if defaults else argparse.SUPPRESS

    parser.add_argument(
        "-c", "--config", metavar="FILE", default=default(None), help="configuration file"
    )
    parser.add_argument(
        "--json", action="store_true", default=default(False), help="JSON on stdout"
    )
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument(
        "-q", "--quiet", action="store_true", default=default(False), help="only warnings"
    )
    loudness.add_argument(
        "-v", "--verbose", action="store_true", default=default(False), help="more about errors"
    )


def _add_vms(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the names of VMs; none of them means all, unless they are `required`."""
    parser.add_argument(
        "vms", nargs="*", metavar="VM", help="a name, or a pattern in quotes, such as 'web*'"
    )
    parser.add_argument(
        "--all", action="store_true", help="every VM" + ("" if required else " (the default)")
    )
    parser.set_defaults(vms_required=required)


def _add_parallel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parallel", type=_argument(_parse_parallel), metavar="N",
        help="how many VMs at once (default: as configured, else 2)",
    )  # fmt: skip


def _add_backup_arguments(parser: argparse.ArgumentParser) -> None:
    _add_vms(parser, required=True)
    _add_parallel(parser)
    parser.add_argument(
        "--disk", action="append", default=[], metavar="NAME", help="only this disk (repeatable)"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="NAME", help="not this disk"
    )
    parser.add_argument("--label", metavar="TEXT", help="shown by list")
    parser.add_argument(
        "--speed-limit", type=_argument(parse_size_bytes), default=0, metavar="50M",
        help="bytes per second, for all disks of a VM together",
    )  # fmt: skip
    _add_lock_wait(parser)
    parser.add_argument("--compress", action="store_true", help="compress with zstd")
    parser.add_argument(
        "--no-push", action="store_true", help="do not push it now, whatever the configuration says"
    )


def _add_lock_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lock-wait", type=_argument(parse_duration_s), default=0, metavar="10m",
        help="wait for another run to end",
    )  # fmt: skip


def _add_keep_rules(parser: argparse.ArgumentParser) -> None:
    """Add the rules; if any is given, those of the configuration do not count."""
    for period, text in (
        ("last", "the newest N backups"),
        ("hourly", "the newest backup of each of N hours that have one"),
        ("daily", "the same for days"),
        ("weekly", "the same for weeks, which begin on a Monday"),
        ("monthly", "the same for months"),
        ("yearly", "the same for years"),
    ):
        parser.add_argument(
            f"--keep-{period}", type=_argument(_parse_count), metavar="N", help=f"keep {text}"
        )
    parser.add_argument(
        "--keep-within", type=_argument(_parse_age), metavar="30d",
        help="keep everything that is not older",
    )  # fmt: skip


def _parse_age(text: str) -> int:
    seconds = parse_duration_s(text)
    if seconds == 0:
        raise ValueError("no backup is younger than nothing; write for example 12h or 30d")
    return seconds


def _parse_count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise ValueError(f"{text!r} is not a number from 1 on")
    return int(text)


def _parse_parallel(text: str) -> int:
    number = _parse_count(text)
    if number > MAX_PARALLEL:
        raise ValueError(f"{text} are too many at once; at most {MAX_PARALLEL}")
    return number


def _argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return convert
