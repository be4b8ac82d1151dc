"""Numbers for Prometheus, in its text format (prometheus.io, "Exposition formats").

Each field below with a help text is a metric, `qbackup_` and the field's name. Names follow
Prometheus's rules: base units, the unit last. All are gauges: what is so now, or was at the newest
backup. A value that is None is not written. Pure: the values come from `actions.metrics`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import Metric

_HELP = "help"


def _metric(text: str) -> Any:
    return field(metadata={_HELP: text})


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskMetrics:
    """One disk in its newest backup; the length of a broken chain is None."""

    disk: str
    disk_last_backup_timestamp_seconds: float = _metric("When the disk's newest backup was made.")
    disk_virtual_size_bytes: int = _metric("Size of the disk at its newest backup.")
    disk_last_backup_copied_bytes: int = _metric("What the disk's newest backup copied.")
    disk_last_backup_stored_bytes: int = _metric(
        "What the disk's newest backup takes in the repository."
    )
    disk_chain_backups: int | None = _metric(
        "Backups that are read to restore the disk's newest one."
    )
    disk_bitmap_trusted: bool = _metric(
        "0 if the disk's newest backup is a full one because its bitmap was not trusted, else 1."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetrics:
    """The last run of a command, whatever came of it."""

    command: str
    last_run_timestamp_seconds: float = _metric("When the command's last run ended, well or not.")
    last_run_duration_seconds: float = _metric("How long the command's last run took.")
    last_run_exit_code: int = _metric("The exit code of the command's last run; 0 is well.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushMetrics:
    """How far the backups have got into a remote."""

    remote: str
    last_push_timestamp_seconds: float = _metric("When the last push to the remote ended.")
    last_pushed_backup_timestamp_seconds: float = _metric(
        "When the newest backup that is in the remote was made."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class VmMetrics:
    """One VM. Of the newest backup nothing is known if there is none."""

    vm: str
    disks: Sequence[DiskMetrics]
    runs: Sequence[RunMetrics]
    pushes: Sequence[PushMetrics] = ()
    backups: int = _metric("Backups of the VM in the repository.")
    chain_max_backups: int = _metric("Backups that a chain of the VM may have (max_chain).")
    last_backup_timestamp_seconds: float | None = _metric(
        "When the VM's newest usable backup was made."
    )
    last_backup_duration_seconds: float | None = _metric(
        "How long the VM's newest usable backup took."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryMetrics:
    """Everything at one time."""

    vms: Sequence[VmMetrics]
    repository_free_bytes: int = _metric("Free for backups on the repository's file system.")
    repository_size_bytes: int = _metric("Size of the repository's file system.")


def encode_metrics(metrics: RepositoryMetrics) -> bytes:
    """Write the whole file."""
    # prometheus_client takes time to load, and only this needs it.
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415
    from prometheus_client.registry import Collector  # noqa: PLC0415

    class All(Collector):
        def collect(self) -> Iterator["Metric"]:
            return _families(metrics)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(All())
    return generate_latest(registry)


def _families(metrics: RepositoryMetrics) -> Iterator["Metric"]:
    vms = metrics.vms
    yield from _gauges(RepositoryMetrics, [], [([], metrics)])
    yield from _gauges(VmMetrics, ["vm"], [([vm.vm], vm) for vm in vms])
    of_disks = [([vm.vm, disk.disk], disk) for vm in vms for disk in vm.disks]
    yield from _gauges(DiskMetrics, ["vm", "disk"], of_disks)
    of_runs = [([vm.vm, run.command], run) for vm in vms for run in vm.runs]
    yield from _gauges(RunMetrics, ["vm", "command"], of_runs)
    of_pushes = [([vm.vm, push.remote], push) for vm in vms for push in vm.pushes]
    yield from _gauges(PushMetrics, ["vm", "remote"], of_pushes)


def _gauges(
    kind: type[Any], labels: Sequence[str], values: Sequence[tuple[list[str], object]]
) -> Iterator["Metric"]:
    """Yield a metric for each field of `kind` that is one, with all its values."""
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415 - as above

    for entry in fields(kind):
        if _HELP not in entry.metadata:
            continue
        family = GaugeMetricFamily(f"qbackup_{entry.name}", entry.metadata[_HELP], labels=labels)
        for names, holder in values:
            value = getattr(holder, entry.name)
            if value is not None:
                family.add_metric(names, float(value))
        yield family
