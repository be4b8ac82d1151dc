"""systemd units: timers for each VM, and the services that they start.

A unit's first line says who wrote it and holds a hash of the rest, so that a file that somebody
has changed is told from one that is only old. Pure: knows no file and no systemd.

The services are as confined as a backup allows. What is not there on purpose: PrivateDevices= and
ProtectClock=, which would hide block devices (systemd.exec(5)), and ProtectProc=, which would hide
QEMU, whose open files qbackup looks at.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
from blake3 import blake3

_HEAD = re.compile(r"# qbackup install-units ([0-9a-f]{32}): .*")

_RESOURCES = """\
Nice=10
IOSchedulingClass=best-effort
IOSchedulingPriority=7
"""

_WITHOUT_PRIVILEGES = """\
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
"""

_CONFINED = """\
# Sockets, images and open files of a QEMU that is another user's.
CapabilityBoundingSet=CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_SYS_PTRACE
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=read-only
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
"""

_SHARED_TEMPORARY = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - what PrivateTmp= hides


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What the units are for: how qbackup is called, and where it reads and writes.

    `program` is an absolute path and its arguments. `written` are the directories that must be
    writable, `used` what must be visible. `user`: for a user's own systemd, which can confine less.
    """

    program: Sequence[str]
    configuration: Path
    written: Sequence[Path]
    used: Sequence[Path]
    user: bool = False


class _Job(msgspec.Struct, frozen=True, kw_only=True):
    """A command that a timer runs for each VM."""

    name: str
    what: str
    arguments: str
    calendar: str
    delay: str


INCREMENTAL, VERIFY, PRUNE = JOBS = ("incremental", "verify", "prune")
"""What there are timers for: qbackup-JOB@VM.timer."""

_JOBS = (
    _Job(
        name=INCREMENTAL,
        what="back up VM %i",
        arguments="incremental %i --lock-wait 30m",
        calendar="hourly",
        delay="10m",
    ),
    _Job(
        name=VERIFY,
        what="verify the backups of VM %i",
        arguments="verify %i --lock-wait 2h",
        calendar="Sun 05:00",
        delay="1h",
    ),
    _Job(
        name=PRUNE,
        what="remove old backups of VM %i",
        arguments="prune %i --lock-wait 2h",
        calendar="04:00",
        delay="30m",
    ),
)


def make_units(setting: Setting) -> dict[str, str]:
    """Return the units by file name."""
    units = {}
    for job in _JOBS:
        units[f"qbackup-{job.name}@.service"] = _signed(_service(job, setting))
        units[f"qbackup-{job.name}@.timer"] = _signed(_timer(job))
    return units


def is_unchanged(text: str) -> bool:
    """Tell whether a unit is as some version of qbackup wrote it."""
    head, _, rest = text.partition("\n")
    match = _HEAD.fullmatch(head)
    return match is not None and match.group(1) == _hash(rest)


def _signed(text: str) -> str:
    return (
        f"# qbackup install-units {_hash(text)}: "
        f"change a copy, or use systemctl edit; then it stays\n{text}"
    )


def _hash(text: str) -> str:
    return blake3(text.encode()).hexdigest()[:32]


def _service(job: _Job, setting: Setting) -> str:
    program = [*setting.program, "-q", "-c", str(setting.configuration)]
    command = " ".join(_argument(word) for word in program)
    lines = f"[Unit]\nDescription=qbackup: {job.what}\nAfter=qbackup-watch@%i.service\n"
    if not setting.user:
        lines += f"RequiresMountsFor={_paths(setting.written)}\n"
    lines += (
        f"\n[Service]\nType=oneshot\nExecStart={command} {job.arguments}\n"
        # qbackup itself ends its writer, when the guest is thawed and QEMU tidied up.
        f"KillMode=mixed\nTimeoutStopSec=180\n{_RESOURCES}\n{_WITHOUT_PRIVILEGES}"
    )
    if setting.user:
        return lines
    lines += f"{_CONFINED}ReadWritePaths={_paths(setting.written, prefix='-')}\n"
    if not any(map(_is_temporary, (*setting.written, *setting.used))):
        lines += "PrivateTmp=yes\n"
    return lines


def _timer(job: _Job) -> str:
    return (
        f"[Unit]\nDescription=qbackup: timer: {job.what}\n\n"
        f"[Timer]\nOnCalendar={job.calendar}\n"
        # Many VMs on one host, each at its own time, the same every day.
        f"RandomizedDelaySec={job.delay}\nFixedRandomDelay=yes\n"
        "# What was missed while the host was off is done when it is back.\nPersistent=yes\n\n"
        "[Install]\nWantedBy=timers.target\n"
    )


def _is_temporary(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _SHARED_TEMPORARY)


def _paths(paths: Sequence[Path], prefix: str = "") -> str:
    return " ".join(_quoted(f"{prefix}{path}") for path in paths)


def _argument(word: str) -> str:
    """Write a word of ExecStart=, where `$` begins a variable (systemd.service(5))."""
    return _quoted(word.replace("$", "$$"))


def _quoted(word: str) -> str:
    r"""Write a word so that systemd reads it as it is: `%` begins a specifier, `\` an escape."""
    word = word.replace("%", "%%")
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./$-]+", word):
        return word
    escaped = "".join(
        c if c.isprintable() and c not in '"\\' else "".join(f"\\x{b:02x}" for b in c.encode())
        for c in word
    )
    return f'"{escaped}"'
