"""The configuration file: TOML in, checked values out.

Every mistake is told with the file, the key and what is allowed there. This module does not
open files: it is given the texts, and the folders that relative paths are relative to.
"""

import math
import re
import tomllib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast

import msgspec
from msgspec.structs import FieldInfo, fields, replace

from qbackup.errors import ConfigurationError, UsageError
from qbackup.formats.documents import DocumentError, convert
from qbackup.formats.remote_url import Place, parse_endpoint, parse_remote_url
from qbackup.model.backup import (
    DEFAULT_GRANULARITY_BYTES,
    MAX_GRANULARITY_BYTES,
    MIN_GRANULARITY_BYTES,
)
from qbackup.model.chain import DEFAULT_MAX_CHAIN, LARGEST_MAX_CHAIN
from qbackup.model.consolidation import When
from qbackup.model.health import (
    DEFAULT_CRITICAL_FREE,
    DEFAULT_WARN_FREE,
    FreeLimit,
    age_limits,
    parse_free_limit,
)
from qbackup.model.limits import MAX_PARALLEL, MIN_LIMIT_RATE_BYTES
from qbackup.model.names import check_name
from qbackup.model.quantities import parse_duration_s, parse_size_bytes
from qbackup.model.retention import NO_RULES, Rules
from qbackup.model.selection import did_you_mean, shown

T = TypeVar("T")
_Table: TypeAlias = type[msgspec.Struct]

Engine = Literal["snapshot", "direct", "drive-backup"]
"""How the bytes get into the repository: docs/architecture.md, "Engines"."""

Accelerator = Literal["tcg", "kvm"]

DEFAULT_STALL_TIMEOUT_S = 300.0
DEFAULT_CONSOLIDATE: When = "worthwhile"
MIN_STALL_TIMEOUT_S = 1.0

DEFAULT_HOOK_TIMEOUT_S = 300.0
DEFAULT_PARALLEL = 2

DEFAULT_REMOTE_PARALLEL = 4
DEFAULT_REMOTE_TIMEOUT_S = 300.0

MAX_CONFIGURATION_BYTES = 1024 * 1024
MAX_KEEP = 999_999_999
KEEP_PERIODS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


class HookCommands(msgspec.Struct, frozen=True, kw_only=True):
    """What runs before and after a backup: a program and its arguments; empty means nothing."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


class Vm(msgspec.Struct, frozen=True, kw_only=True):
    """One `[vm.NAME]` table.

    `qmp` is a path or (host, port); `disks` None means every writable disk.
    """

    name: str
    qmp: Path | tuple[str, int]
    agent: Path | None
    disks: tuple[str, ...] | None
    granularity_bytes: int
    engine: Engine
    snapshot: "SnapshotSettings"
    keep: Rules | None = None
    """The VM's own rules of retention, in place of the global ones; None means these."""
    max_chain: int = DEFAULT_MAX_CHAIN
    chain_age_s: int | None = None
    """How old a chain's full may be for an incremental to build on it; None: as old as it is."""
    consolidate: When = DEFAULT_CONSOLIDATE
    """When backups may be merged; a chain that is full begins anew from its images, or never."""
    compare: bool = True
    """Whether digests are kept, and a disk whose bitmap is not trusted is compared by them."""
    trust_block_devices: bool | None = None
    """As `Configuration.trust_block_devices`."""
    images: Mapping[str, "ConfiguredImage"] = msgspec.field(default_factory=dict)
    """Where disks are while the VM is off, by their names; others where the last backup says."""
    warn_age_s: int | None = None
    critical_age_s: int | None = None
    """For `status --check`; None means the default: see `model.health`."""
    files: tuple[Path, ...] = ()
    """Files, and directories with files, that are backed up beside the disks."""
    hooks: HookCommands = msgspec.field(default_factory=HookCommands)
    hook_timeout_s: float = DEFAULT_HOOK_TIMEOUT_S
    push: str | None = None
    """The remote to which each backup is pushed, None: to none."""


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """One `[remote.NAME]` table: a second home for backups, and how to get there.

    Secrets are never in the file: they are in the environment, in AWS's own files (`profile`) or in
    one like them (`credentials`).
    """

    name: str
    place: Place
    endpoint: str | None = None
    """Where S3 is, if not at AWS: `https://…`, or `http://…` if that is what was written."""
    region: str | None = None
    profile: str | None = None
    credentials: Path | None = None
    ca: Path | None = None
    """Certificates in PEM that are trusted beside the system's."""
    parallel: int = DEFAULT_REMOTE_PARALLEL
    """How many objects are on their way at once."""
    limit_rate_bytes: int | None = None
    """Bytes a second, for all objects of a command together."""
    timeout_s: float = DEFAULT_REMOTE_TIMEOUT_S
    """Given up is what gets no further for so long."""
    keep: Rules = NO_RULES
    recipients: tuple[str, ...] = ()
    recipients_file: Path | None = None
    """Whom new objects are encrypted to, as age has them; without any, they are not."""
    identity: Path | None = None
    """The key file with which objects are decrypted."""

    @property
    def is_encrypted(self) -> bool:
        """Whether what is put there is encrypted."""
        return bool(self.recipients) or self.recipients_file is not None

    @property
    def is_plain(self) -> bool:
        """Whether nothing there is known to be encrypted, or could be read if it were."""
        return not self.is_encrypted and self.identity is None


class ConfiguredImage(msgspec.Struct, frozen=True, kw_only=True):
    """One `[vm.NAME.images.DISK]` table."""

    file: Path
    format: Literal["raw", "qcow2"]


class SnapshotSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how long the guest's overwritten data may be kept, and how long nothing may move.

    `scratch` None means the VM's state directory; `scratch_limit_bytes` None means no limit.
    """

    scratch: Path | None = None
    scratch_limit_bytes: int | None = None
    stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file."""

    path: Path
    repository: Path
    state: Path
    trust_block_devices: bool | None
    """True: a fingerprint is enough. False: never. None: if the kernel proves that nobody wrote."""
    vms: dict[str, Vm]
    keep: Rules = NO_RULES
    boot_accel: Accelerator = "tcg"
    """What throw-away VMs run with; nothing else is chosen by itself."""
    parallel: int = DEFAULT_PARALLEL
    """How many VMs are worked on at once."""
    consolidate: When = DEFAULT_CONSOLIDATE
    max_chain: int = DEFAULT_MAX_CHAIN
    metrics: Path | None = None
    """Where the metrics for Prometheus go, None: nowhere."""
    warn_free: FreeLimit = DEFAULT_WARN_FREE
    critical_free: FreeLimit = DEFAULT_CRITICAL_FREE
    remotes: Mapping[str, Remote] = msgspec.field(default_factory=dict)
    push: str | None = None
    """The remote of VMs that are not in the file (any more)."""

    def remote(self, name: str | None = None) -> Remote:
        """Return the remote of that name, or the only one there is.

        Raises:
            UsageError: there is none of that name, or there are none or several.
        """
        if name is not None and name not in self.remotes:
            known = f" (there: {shown(self.remotes)})" if self.remotes else ""
            raise UsageError(
                f"remote {name!r} is not in {self.path}{known}",
                hint=f"{did_you_mean(name, self.remotes)}add a table [remote.NAME] with its url",
            )
        if name is not None:
            return self.remotes[name]
        if len(self.remotes) == 1:
            return next(iter(self.remotes.values()))
        if not self.remotes:
            raise UsageError(
                f"there is no remote in {self.path}", hint="add a table [remote.NAME] with its url"
            )
        raise UsageError(
            f"there are several remotes: {shown(self.remotes)}", hint="choose with --remote NAME"
        )

    def push_target(self, vm: str) -> str | None:
        """Return the remote to which backups of a VM go; it need not be in the file."""
        found = self.vms.get(vm)
        return self.push if found is None else found.push

    def consolidation(self, name: str) -> tuple[When, int]:
        """Return when a VM's backups are merged, and how many a chain may have.

        The VM need not be in the file.
        """
        vm = self.vms.get(name, self)
        return vm.consolidate, vm.max_chain

    def rules(self, name: str) -> Rules:
        """Return what of a VM's backups is kept; the VM need not be in the file (any more)."""
        vm = self.vms.get(name)
        return self.keep if vm is None or vm.keep is None else vm.keep

    def vm(self, name: str) -> Vm:
        """Return the VM of that name.

        Raises:
            UsageError: the file has no such VM.
        """
        check_name("VM", name)
        if name not in self.vms:
            question = did_you_mean(name, self.vms)
            raise UsageError(
                f"VM {name!r} is not in {self.path} (there: {shown(self.vms)})",
                hint=f"{question and f'{question}if not, '}add a table [vm.{name}] with its "
                "qmp socket",
            )
        return self.vms[name]


class _VmTable(msgspec.Struct, frozen=True, kw_only=True):
    qmp: str
    agent: str | None = None
    disks: list[str] | None = None
    granularity: str | int = "64K"
    engine: Literal["snapshot", "direct", "drive-backup", "blockdev-backup"] = "snapshot"
    max_chain: int | None = None
    chain_age: str | None = None
    consolidate: When | None = None
    compare: bool = True
    warn_age: str | None = None
    critical_age: str | None = None
    keep: dict[str, Any] | None = None
    images: dict[str, Any] | None = None
    files: list[str] | None = None
    hooks: dict[str, Any] | None = None
    hook_timeout: str | int | float | None = None
    push: str | Literal[False] | None = None


class _RemoteTable(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    credentials: str | None = None
    ca: str | None = None
    parallel: int = DEFAULT_REMOTE_PARALLEL
    limit_rate: str | int | None = None
    timeout: str | int | float | None = None
    keep: dict[str, Any] | None = None
    recipients: list[str] | None = None
    recipients_file: str | None = None
    identity: str | None = None


class _HooksTable(msgspec.Struct, frozen=True, kw_only=True):
    before: list[str] | None = None
    after: list[str] | None = None


class _ImageTable(msgspec.Struct, frozen=True, kw_only=True):
    file: str
    format: Literal["raw", "qcow2"]


class _KeepTable(msgspec.Struct, frozen=True, kw_only=True):
    within: str | None = None
    last: int | None = None
    hourly: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    yearly: int | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True):
    repository: str
    state: str
    trust_block_devices: bool | None = None
    max_chain: int | None = None
    chain_age: str | None = None
    parallel: int = DEFAULT_PARALLEL
    scratch: str | None = None
    scratch_limit: str | int | None = None
    stall_timeout: str | int | float | None = None
    metrics: str | None = None
    warn_free: str | None = None
    critical_free: str | None = None
    boot_accel: Accelerator = "tcg"
    push: str | None = None
    keep: dict[str, Any] | None = None
    hooks: dict[str, Any] | None = None
    remote: dict[str, Any] = msgspec.field(default_factory=dict)
    defaults: dict[str, Any] = msgspec.field(default_factory=dict)
    vm: dict[str, Any] = msgspec.field(default_factory=dict)


class _IncludedFile(msgspec.Struct, frozen=True, kw_only=True):
    vm: dict[str, Any] = msgspec.field(default_factory=dict)


class _Shared(msgspec.Struct, frozen=True, kw_only=True):
    """What a VM has unless its own table says otherwise."""

    defaults: Mapping[str, Any]
    max_chain: int
    chain_age_s: int | None
    snapshot: SnapshotSettings
    hooks: HookCommands
    trust_block_devices: bool | None
    push: str | None
    remotes: Mapping[str, Remote]


_OWN_TABLES = frozenset({"keep", "hooks"})
"""What a VM has in a table of its own, which replaces the one for all."""

_OF_ONE_VM = frozenset({"qmp", "agent", "files", "images"}) | _OWN_TABLES
"""Keys of a VM's table that [defaults] cannot have: two VMs cannot share a socket, or a TPM."""

_EXPECTED = {
    "repository": 'a directory, such as repository = "/srv/backups"',
    "state": 'a directory, such as state = "/var/lib/qbackup"',
    "trust_block_devices": "true or false",
    "compare": "true or false",
    "max_chain": f"a number of backups from 1 to {LARGEST_MAX_CHAIN}, such as max_chain = 100",
    "chain_age": 'a time, such as chain_age = "14d"',
    "consolidate": '"always", "worthwhile" or "never"',
    "boot_accel": '"tcg" or "kvm"',
    "parallel": f"how many VMs at once, a number from 1 to {MAX_PARALLEL}",
    "defaults": "a table [defaults] with keys that every VM has",
    "vm": "tables such as [vm.vm1]",
    "qmp": "QEMU's monitor, a socket's path or tcp:HOST:PORT",
    "agent": 'the guest agent\'s socket, such as agent = "/run/vm1/qga.sock"',
    "disks": 'a list of names, such as disks = ["system", "data"]',
    "granularity": 'a power of two from 4K to 2M, such as granularity = "64K"',
    "engine": '"snapshot", "direct" or "drive-backup"',
    "scratch": 'a directory on a local disk, such as scratch = "/var/tmp/qbackup"',
    "scratch_limit": 'a size, such as scratch_limit = "20G"',
    "stall_timeout": 'a time, such as stall_timeout = "5m"',
    "metrics": 'a file, such as metrics = "/var/lib/node_exporter/textfile/qbackup.prom"',
    "warn_age": 'a time, such as warn_age = "26h", and not more than critical_age',
    "critical_age": 'a time, such as critical_age = "50h", and not less than warn_age',
    "warn_free": 'a part or a size, such as warn_free = "10%"',
    "critical_free": 'a part or a size, such as critical_free = "50G"',
    "keep": "a table, such as [keep] or [vm.vm1.keep]",
    "images": "a table for each disk, such as [vm.vm1.images.data]",
    "file": 'an image or device, such as file = "/var/lib/vm1/data.qcow2"',
    "format": '"raw" or "qcow2"',
    "files": 'a list of files and directories, such as files = ["/var/lib/swtpm/vm1"]',
    "hooks": "a table, such as [hooks] or [vm.vm1.hooks]",
    "before": 'a program and its arguments, such as before = ["/usr/local/sbin/quiesce", "db"]',
    "after": 'a program and its arguments, such as after = ["/usr/local/sbin/resume", "db"]',
    "hook_timeout": 'a time, such as hook_timeout = "5m"',
    "within": 'a time, such as within = "30d"',
    "push": 'the name of a remote, such as push = "offsite", or for one VM push = false',
    "remote": "tables such as [remote.offsite]",
    "url": 'a place, such as url = "s3://BUCKET/PREFIX", "gs://…", "az://…" or "/mnt/nas"',
    "endpoint": 'where S3 is, such as endpoint = "https://s3.example.org"',
    "region": 'a region, such as region = "eu-central-1"',
    "profile": 'a profile in AWS\'s files, such as profile = "backup"',
    "credentials": 'a file like AWS\'s, such as credentials = "/etc/qbackup/offsite.credentials"',
    "ca": 'a file of certificates (PEM), such as ca = "/etc/ssl/ceph.pem"',
    "limit_rate": 'bytes a second, at least 1K, such as limit_rate = "20M"',
    "timeout": 'a time of a second or more, such as timeout = "5m"',
    "recipients": 'a list of public keys, such as recipients = ["age1…"]',
    "recipients_file": 'a file with public keys, such as recipients_file = "/etc/qbackup/age.pub"',
    "identity": 'a file with a private key, such as identity = "/etc/qbackup/age.key"',
} | dict.fromkeys(KEEP_PERIODS, "how many to keep, a number from 1 on")
"""What each key takes, for the hint of every error about it."""


def parse_configuration(
    text: str, *, path: Path, included: Sequence[tuple[Path, str]] = ()
) -> Configuration:
    """Read a configuration; `included` are further files, with VMs only, and their texts.

    Relative paths are relative to the folder of the file that they stand in.

    Raises:
        ConfigurationError: something in one of them is wrong.
    """
    top = _table(_document(text, path=path), _File, path=path, where="")
    shared = _shared(top, path=path)
    if not 1 <= top.parallel <= MAX_PARALLEL:
        raise ConfigurationError(
            f"{path}: parallel: {top.parallel} is not allowed",
            hint=f"expected {_EXPECTED['parallel']}",
        )
    tables = [(path, name, table) for name, table in top.vm.items()]
    for file, content in included:
        found = _table(_document(content, path=file), _IncludedFile, path=file, where="")
        tables += [(file, name, table) for name, table in found.vm.items()]
    folder = path.absolute().parent
    return Configuration(
        path=path,
        repository=folder / top.repository,
        state=folder / top.state,
        trust_block_devices=top.trust_block_devices,
        vms=_vms(tables, shared),
        keep=_rules(top.keep or {}, path=path, where="keep"),
        consolidate=top.defaults.get("consolidate", DEFAULT_CONSOLIDATE),
        max_chain=top.defaults.get("max_chain", shared.max_chain),
        parallel=top.parallel,
        metrics=None if top.metrics is None else folder / top.metrics,
        **{
            key: _read(parse_free_limit, value, where=f"{path}: {key}", key=key)
            for key in ("warn_free", "critical_free")
            if (value := getattr(top, key)) is not None
        },
        boot_accel=top.boot_accel,
        remotes=shared.remotes,
        push=_push(top.defaults.get("push"), shared, where=f"{path}: defaults.push"),
    )


def _document(text: str, *, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as err:
        raise ConfigurationError(f"{path}: not TOML: {err}") from err


def _shared(top: _File, *, path: Path) -> _Shared:
    """Return what all VMs have; [defaults] is checked here, whether a VM uses it or not."""
    for key in ("max_chain", "chain_age", "push"):
        if getattr(top, key) is not None and key in top.defaults:
            raise ConfigurationError(
                f"{path}: {key} is at the top and in [defaults]", hint="leave one of them out"
            )
    remotes = _remotes(top.remote, path=path)
    if top.push is not None:
        _known_remote(top.push, remotes, where=f"{path}: push")
    shared = _Shared(
        defaults={},
        max_chain=(
            DEFAULT_MAX_CHAIN
            if top.max_chain is None
            else _max_chain(top.max_chain, where=f"{path}: max_chain")
        ),
        chain_age_s=_chain_age_s(top.chain_age, where=f"{path}: chain_age"),
        snapshot=_snapshot(top, path=path, folder=path.absolute().parent),
        hooks=_hooks(top.hooks or {}, path=path, where="hooks"),
        trust_block_devices=top.trust_block_devices,
        push=top.push,
        remotes=remotes,
    )
    _check(top.defaults, _VmTable, path=path, where="defaults", without=_OF_ONE_VM)
    unused = _VmTable(qmp="-", **top.defaults)
    _vm("defaults", unused, path=path, where="defaults", shared=shared)
    return replace(shared, defaults=top.defaults)


def _vms(tables: Iterable[tuple[Path, str, Any]], shared: _Shared) -> dict[str, Vm]:
    vms: dict[str, Vm] = {}
    files: dict[str, Path] = {}
    monitors: dict[Path | tuple[str, int], str] = {}
    for path, name, table in tables:
        where = f"vm.{name}"
        try:
            check_name("VM", name)
        except UsageError as err:
            raise ConfigurationError(f"{path}: [vm.{name}]: {err.message}", hint=err.hint) from err
        if not isinstance(table, dict):
            raise ConfigurationError(f"{path}: {where}: expected a table [{where}]")
        if name in vms:
            raise ConfigurationError(
                f"{path}: [{where}] is in {files[name]}, too", hint="leave one of them out"
            )
        own = _table(table, _VmTable, path=path, where=where)
        parsed = replace(own, **{k: v for k, v in shared.defaults.items() if k not in table})
        vms[name], files[name] = _vm(name, parsed, path=path, where=where, shared=shared), path
        other = monitors.setdefault(vms[name].qmp, name)
        if other != name:
            also = "" if files[other] == path else f" in {files[other]}"
            raise ConfigurationError(
                f"{path}: vm.{other}{also} and {where} have the same monitor {parsed.qmp!r}",
                hint="give each VM a qmp of its own",
            )
    return vms


def _snapshot(top: _File, *, path: Path, folder: Path) -> SnapshotSettings:
    limit = stall = None
    try:
        where = "scratch_limit"
        if (value := top.scratch_limit) is not None:
            limit = parse_size_bytes(value) if isinstance(value, str) else value
            if limit < 1:
                raise ValueError(f"{value!r} is no size")  # noqa: TRY301 - told like the others
        where = "stall_timeout"
        if (time := top.stall_timeout) is not None:
            stall = parse_duration_s(time) if isinstance(time, str) else float(time)
            if not MIN_STALL_TIMEOUT_S <= stall < math.inf:
                raise ValueError(f"{time!r} is less than a second")  # noqa: TRY301 - as above
    except ValueError as err:
        raise ConfigurationError(
            f"{path}: {where}: {err}", hint=f"expected {_EXPECTED[where]}"
        ) from err
    return SnapshotSettings(
        scratch=None if top.scratch is None else folder / top.scratch,
        scratch_limit_bytes=limit,
        stall_timeout_s=DEFAULT_STALL_TIMEOUT_S if stall is None else stall,
    )


def _vm(name: str, table: _VmTable, *, path: Path, where: str, shared: _Shared) -> Vm:
    folder, place = path.absolute().parent, f"{path}: {where}"
    if table.disks is not None:
        if not table.disks:
            raise ConfigurationError(
                f"{place}.disks: the list is empty", hint="leave the key out to mean every disk"
            )
        for disk in table.disks:
            if table.disks.count(disk) > 1:
                raise ConfigurationError(f"{place}.disks: {disk!r} is there twice")
    warn_age_s, critical_age_s = _ages(table, where=place)
    return Vm(
        name=name,
        qmp=_qmp_address(table.qmp, where=f"{place}.qmp", folder=folder),
        agent=None if table.agent is None else folder / table.agent,
        disks=None if table.disks is None else tuple(table.disks),
        granularity_bytes=_granularity(table.granularity, where=f"{place}.granularity"),
        # The old word for the direct engine, from when there were only jobs that write.
        engine="direct" if table.engine == "blockdev-backup" else table.engine,
        snapshot=shared.snapshot,
        keep=None if table.keep is None else _rules(table.keep, path=path, where=f"{where}.keep"),
        images=_images(table.images or {}, path=path, folder=folder, where=f"{where}.images"),
        trust_block_devices=shared.trust_block_devices,
        max_chain=(
            shared.max_chain
            if table.max_chain is None
            else _max_chain(table.max_chain, where=f"{place}.max_chain")
        ),
        chain_age_s=(
            shared.chain_age_s
            if table.chain_age is None
            else _chain_age_s(table.chain_age, where=f"{place}.chain_age")
        ),
        consolidate=table.consolidate or DEFAULT_CONSOLIDATE,
        warn_age_s=warn_age_s,
        critical_age_s=critical_age_s,
        files=tuple(
            _file(text, where=f"{place}.files", folder=folder) for text in table.files or ()
        ),
        hooks=(
            shared.hooks
            if table.hooks is None
            else _hooks(table.hooks, path=path, where=f"{where}.hooks")
        ),
        hook_timeout_s=(
            DEFAULT_HOOK_TIMEOUT_S
            if table.hook_timeout is None
            else _duration_s(table.hook_timeout, key="hook_timeout", where=place)
        ),
        compare=table.compare,
        push=_push(table.push, shared, where=f"{place}.push"),
    )


def _push(given: str | Literal[False] | None, shared: _Shared, *, where: str) -> str | None:
    """Return the remote that backups go to: the one that is named here, or for all VMs."""
    if given is None:
        return shared.push
    return _known_remote(given, shared.remotes, where=where) if given else None


def _known_remote(name: str, remotes: Mapping[str, Remote], *, where: str) -> str:
    if name not in remotes:
        raise ConfigurationError(
            f"{where}: there is no remote {name!r}",
            hint=f"{did_you_mean(name, remotes)}add a table [remote.{name}] with its url",
        )
    return name


def _remotes(document: dict[str, Any], *, path: Path) -> dict[str, Remote]:
    remotes = {}
    for name, content in document.items():
        where = f"remote.{name}"
        try:
            check_name("remote", name)
        except UsageError as err:
            raise ConfigurationError(f"{path}: [{where}]: {err.message}", hint=err.hint) from err
        if not isinstance(content, dict):
            raise ConfigurationError(
                f"{path}: {where}: expected a table", hint=f"expected {_EXPECTED['remote']}"
            )
        table = _table(content, _RemoteTable, path=path, where=where)
        remotes[name] = _remote(name, table, path=path, where=where)
    return remotes


def _remote(name: str, table: _RemoteTable, *, path: Path, where: str) -> Remote:
    folder, at = path.absolute().parent, f"{path}: {where}"
    place = _read(parse_remote_url, table.url, where=f"{at}.url", key="url")
    for key in ("endpoint", "region", "profile", "credentials"):
        if getattr(table, key) is not None and place.kind != "s3":
            raise ConfigurationError(
                f"{at}.{key}: this is for S3 only, and the url is {table.url!r}",
                hint="leave it out; what other stores need is in the environment",
            )
    if not 1 <= table.parallel <= MAX_PARALLEL:
        raise ConfigurationError(
            f"{at}.parallel: {table.parallel} is not allowed",
            hint=f"expected how many objects at once, a number from 1 to {MAX_PARALLEL}",
        )
    files = {
        key: None if (text := getattr(table, key)) is None else folder / text
        for key in ("credentials", "ca", "recipients_file", "identity")
    }
    return Remote(
        name=name,
        place=place,
        endpoint=(
            None
            if table.endpoint is None
            else _read(parse_endpoint, table.endpoint, where=f"{at}.endpoint", key="endpoint")
        ),
        region=table.region,
        profile=table.profile,
        parallel=table.parallel,
        limit_rate_bytes=_limit_rate(table.limit_rate, where=f"{at}.limit_rate"),
        timeout_s=_remote_timeout_s(table.timeout, where=at),
        keep=_rules(table.keep or {}, path=path, where=f"{where}.keep"),
        recipients=tuple(table.recipients or ()),
        **files,
    )


def _limit_rate(value: str | int | None, *, where: str) -> int | None:
    if value is None:
        return None
    rate = _read(parse_size_bytes, str(value), where=where, key="limit_rate")
    if rate < MIN_LIMIT_RATE_BYTES:
        raise ConfigurationError(
            f"{where}: {value!r} is too little", hint=f"expected {_EXPECTED['limit_rate']}"
        )
    return rate


def _remote_timeout_s(value: str | float | None, *, where: str) -> float:
    if value is None:
        return DEFAULT_REMOTE_TIMEOUT_S
    seconds = _duration_s(value, key="timeout", where=where)
    if seconds < 1:
        raise ConfigurationError(
            f"{where}.timeout: {value!r} is less than a second",
            hint=f"expected {_EXPECTED['timeout']}",
        )
    return seconds


def _images(
    document: dict[str, Any], *, path: Path, folder: Path, where: str
) -> dict[str, ConfiguredImage]:
    images = {}
    for name, content in document.items():
        try:
            check_name("disk", name)
        except UsageError as err:
            raise ConfigurationError(f"{path}: {where}: {err.message}", hint=err.hint) from err
        if not isinstance(content, dict):
            raise ConfigurationError(
                f"{path}: {where}.{name}: expected a table", hint=f"expected {_EXPECTED['images']}"
            )
        table = _table(content, _ImageTable, path=path, where=f"{where}.{name}")
        images[name] = ConfiguredImage(file=folder / table.file, format=table.format)
    return images


def _ages(table: _VmTable, *, where: str) -> tuple[int | None, int | None]:
    """Return warn_age and critical_age in seconds."""
    warn_s, critical_s = (
        None if text is None else _read(_age_s, text, where=f"{where}.{key}", key=key)
        for key, text in (("warn_age", table.warn_age), ("critical_age", table.critical_age))
    )
    try:
        age_limits(warn_s, critical_s)
    except ValueError as err:
        raise ConfigurationError(f"{where}.warn_age: {err}") from err
    return warn_s, critical_s


def _age_s(text: str) -> int:
    seconds = parse_duration_s(text)
    if seconds == 0:
        raise ValueError(f"{text!r} is no age")
    return seconds


def _read(parse: Callable[[str], T], text: str, *, where: str, key: str) -> T:
    try:
        return parse(text)
    except ValueError as err:
        raise ConfigurationError(f"{where}: {err}", hint=f"expected {_EXPECTED[key]}") from err


def _file(text: str, *, where: str, folder: Path) -> Path:
    if not text or "\0" in text:
        raise ConfigurationError(
            f"{where}: {text!r} is not allowed", hint=f"expected {_EXPECTED['files']}"
        )
    return folder / text


def _hooks(document: dict[str, Any], *, path: Path, where: str) -> HookCommands:
    """Read a table of hooks. A program with a `/` in it is relative to the file's folder."""
    table = _table(document, _HooksTable, path=path, where=where)
    commands = {}
    for key in ("before", "after"):
        command = getattr(table, key) or []
        if any("\0" in argument for argument in command) or (
            key in document and not any(command[:1])
        ):
            raise ConfigurationError(
                f"{path}: {where}.{key}: {command!r} is not allowed",
                hint=f"expected {_EXPECTED[key]}",
            )
        program = [str(path.absolute().parent / one) if "/" in one else one for one in command[:1]]
        commands[key] = (*program, *command[1:])
    return HookCommands(**commands)


def _duration_s(value: str | float, *, key: str, where: str) -> float:
    try:
        seconds = parse_duration_s(value) if isinstance(value, str) else float(value)
        if not 0 < seconds < math.inf:
            raise ValueError(f"{value!r} is no time")  # noqa: TRY301 - told like the others
    except ValueError as err:
        raise ConfigurationError(
            f"{where}.{key}: {err}", hint=f"expected {_EXPECTED[key]}"
        ) from err
    return seconds


def _rules(document: dict[str, Any], *, path: Path, where: str) -> Rules:
    table = _table(document, _KeepTable, path=path, where=where)
    for key in KEEP_PERIODS:
        number = getattr(table, key)
        if number is not None and not 1 <= number <= MAX_KEEP:
            raise ConfigurationError(
                f"{path}: {where}.{key}: {number} is not allowed", hint=f"expected {_EXPECTED[key]}"
            )
    within_s = None
    if table.within is not None:
        try:
            within_s = parse_duration_s(table.within)
        except ValueError as err:
            raise ConfigurationError(
                f"{path}: {where}.within: {err}", hint=f"expected {_EXPECTED['within']}"
            ) from err
        if within_s == 0:
            raise ConfigurationError(
                f"{path}: {where}.within: {table.within!r} would keep nothing",
                hint=f"expected {_EXPECTED['within']}",
            )
    return Rules(within_s=within_s, **{key: getattr(table, key) for key in KEEP_PERIODS})


def _table(document: dict[str, Any], target: _Table, *, path: Path, where: str) -> Any:
    """Return a table as the dataclass `target`, its keys and types checked."""
    _check(document, target, path=path, where=where)
    _require(document, target, path=path, where=where)
    return target(**document)


def _check(
    document: dict[str, Any],
    target: _Table,
    *,
    path: Path,
    where: str,
    without: frozenset[str] = frozenset(),
) -> None:
    """Check a table's keys and types against the struct `target`, but for the keys `without`."""
    allowed = [entry.name for entry in _fields(target) if entry.name not in without]
    prefix = f"{where}." if where else ""
    for key in document:
        if key not in allowed:
            raise ConfigurationError(
                f"{path}: unknown key {prefix}{key}", hint=_place_of(key, allowed, target)
            )
    for key, value in document.items():
        try:
            convert(value, _key_type(target, key))
            _require_text(value)
        except DocumentError as err:
            raise ConfigurationError(
                f"{path}: {prefix}{key}: {value!r} is not allowed",
                hint=f"expected {_EXPECTED[key]}",
            ) from err


@cache
def _fields(target: Hashable) -> tuple[FieldInfo, ...]:
    """Return the fields of a table; each of a hundred VMs' tables asks for them."""
    return fields(cast("_Table", target))


def _place_of(key: str, allowed: Sequence[str], target: _Table) -> str:
    """Say where a key belongs, or what is allowed where it stands."""
    if target is _IncludedFile:
        return "a file in conf.d holds tables such as [vm.vm1] only; the rest is in the main file"
    if target is not _File and key in {entry.name for entry in _fields(_File)}:
        return f"write [{key}]" if key in _OWN_TABLES else f"{key} belongs before the first table"
    return f"allowed here: {', '.join(allowed)}"


def _require(document: dict[str, Any], target: _Table, *, path: Path, where: str) -> None:
    for entry in _fields(target):
        if entry.required and entry.name not in document:
            raise ConfigurationError(
                f"{path}: the key {where}{'.' if where else ''}{entry.name} is missing",
                hint=f"expected {_EXPECTED[entry.name]}",
            )


def _require_text(value: object) -> None:
    """Refuse what is no name and no path, whatever the key."""
    if isinstance(value, str) and (not value or "\0" in value):
        raise DocumentError("empty, or with a NUL in it")


def _key_type(target: _Table, key: str) -> Any:
    annotations: Iterable[Any] = (entry.type for entry in _fields(target) if entry.name == key)
    return next(iter(annotations))


def _qmp_address(text: str, *, where: str, folder: Path) -> Path | tuple[str, int]:
    if not text.startswith("tcp:"):
        socket = text.removeprefix("unix:")
        if not socket:
            raise ConfigurationError(
                f"{where}: {text!r} is not an address", hint=f"expected {_EXPECTED['qmp']}"
            )
        return folder / socket
    host, _, port = text.removeprefix("tcp:").rpartition(":")
    if not (host and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise ConfigurationError(
            f"{where}: {text!r} is not an address", hint='write for example "tcp:127.0.0.1:4444"'
        )
    return host.strip("[]"), int(port)


def _granularity(value: str | int, *, where: str) -> int:
    allowed = "a power of two from 4K to 2M"
    try:
        size = parse_size_bytes(value) if isinstance(value, str) else value
    except ValueError as err:
        raise ConfigurationError(f"{where}: {err}", hint=f"allowed is {allowed}") from err
    if not MIN_GRANULARITY_BYTES <= size <= MAX_GRANULARITY_BYTES or size & (size - 1):
        raise ConfigurationError(f"{where}: {value!r} is not {allowed}")
    return size


def _max_chain(value: int, *, where: str) -> int:
    if not 1 <= value <= LARGEST_MAX_CHAIN:
        raise ConfigurationError(
            f"{where}: {value} is not allowed", hint=f"expected {_EXPECTED['max_chain']}"
        )
    return value


def _chain_age_s(text: str | None, *, where: str) -> int | None:
    return None if text is None else _read(_age_s, text, where=where, key="chain_age")


def example_configuration(*, repository: Path, state: Path) -> str:
    """Return the commented file that `qbackup init` writes."""
    granularity = f"{DEFAULT_GRANULARITY_BYTES // 1024}K"
    return f"""\
# qbackup configuration (TOML). Relative paths are relative to this file's folder.

repository = {_quoted(repository)}
state = {_quoted(state)}
# trust_block_devices = true          # see docs/how-to-lose-a-backup.md; must be before any table
# max_chain = {DEFAULT_MAX_CHAIN}                     # backups in a chain; before any table
# chain_age = "14d"                   # a disk gets a full backup when its chain is so old; for a
#                                     # remote whose objects are locked: see docs/security.md
# scratch = "/var/tmp/qbackup"        # local disk for what the guest overwrites during a backup;
#                                     # default: the state directory
# scratch_limit = "20G"               # a backup that would need more is given up; default: none
# stall_timeout = "5m"                # so is one that gets no further for so long
# metrics = "/var/lib/prometheus/node-exporter/qbackup.prom"  # for Prometheus's node exporter
# warn_free = "10%"                   # for qbackup status --check: of the room for backups
# critical_free = "5%"
# boot_accel = "kvm"                  # what qbackup boot runs with; default: "tcg"
# parallel = {DEFAULT_PARALLEL}                        # how many VMs at once (--all)
# push = "offsite"                    # where each backup goes, too; a VM can have another, or false

# What qbackup prune keeps: the newest backup of each of so many periods that have one. A table
# [vm.vm1.keep] replaces this one for vm1. Without any rule, nothing is ever removed.
#
# [keep]
# hourly = 24
# daily = 7                           # also: last, weekly, monthly, yearly
# within = "2d"                       # and everything that is not older

# What every VM has unless its own table says otherwise: any key but qmp and agent.
#
# [defaults]
# granularity = "{granularity}"

# Programs that run before and after each backup; a table [vm.vm1.hooks] replaces this one.
#
# [hooks]
# before = ["/usr/local/sbin/quiesce", "db"]     # if it fails, nothing is backed up
# after = ["/usr/local/sbin/resume", "db"]       # in any case; see QBACKUP_RESULT

# A second home for backups: qbackup push, list --remote, restore --remote, pull. Secrets are not
# here, but in the environment (AWS_ACCESS_KEY_ID, …) or in a file that only its owner may read.
#
# [remote.offsite]
# url = "s3://bucket/prefix"          # or "gs://bucket/…", "az://container/…", "/mnt/nas/backups"
# endpoint = "https://s3.example.org" # where S3 is, if not at AWS
# region = "eu-central-1"
# profile = "backup"                  # in ~/.aws/credentials and ~/.aws/config
# credentials = "offsite.credentials" # a file like ~/.aws/credentials, mode 0600
# ca = "/etc/ssl/ceph.pem"            # certificates that are trusted beside the system's
# parallel = {DEFAULT_REMOTE_PARALLEL}                        # how many objects at once
# limit_rate = "20M"                  # bytes a second
# timeout = "5m"                      # give up what gets no further for so long
# recipients = ["age1…"]              # encrypt to these public keys, or to those in a file:
# recipients_file = "offsite.pub"
# identity = "offsite.key"            # the private key, only where backups are read
#
# [remote.offsite.keep]               # what prune --remote keeps there, as [keep]
# daily = 30

# One table for each VM, here or in files conf.d/*.toml beside this one. Start QEMU with
# for example
#   -qmp unix:/run/vm1/qmp.sock,server=on,wait=off
# and give every disk a name: -blockdev node-name=… or -drive id=…
#
# [vm.vm1]
# qmp = "/run/vm1/qmp.sock"           # or "tcp:127.0.0.1:4444"
# agent = "/run/vm1/qga.sock"         # guest agent: freeze file systems for the instant
# disks = ["system", "data"]          # default: every writable disk
# granularity = "{granularity}"                 # bytes per bit of the dirty bitmap, 4K to 2M
# compare = true                      # after a crash, store what differs from the last backup;
#                                     # false: keep no digests, and back up in full
# engine = "snapshot"                 # or "direct": QEMU writes the backup itself, and a slow
#                                     # repository slows the guest; "drive-backup" is like it
# max_chain = {DEFAULT_MAX_CHAIN}                     # for this VM alone; so chain_age
# consolidate = "worthwhile"          # merge backups that no rule keeps into those that need them:
#                                     # "always", "worthwhile" (copy no full for little), "never"
# warn_age = "26h"                    # for qbackup status --check: how old the newest backup may be
# critical_age = "50h"
# hook_timeout = "5m"                 # after which a hook is killed
# files = ["/var/lib/swtpm/vm1"]      # small files and directories that belong to the VM, such as
#                                     # the state of its TPM
#
# [vm.vm1.images.data]                # where a disk is while the VM is off, if its last backup
#                                     # cannot tell: there is none yet, or the disk has moved
# file = "/var/lib/vm1/data.qcow2"
# format = "qcow2"                    # or "raw"
"""


def _quoted(path: Path) -> str:
    """Write a path as a TOML basic string."""
    return '"' + "".join(map(_escaped, str(path))) + '"'


def _escaped(character: str) -> str:
    if character.isprintable() and character not in '"\\':
        return character
    return f"\\U{ord(character):08x}"
