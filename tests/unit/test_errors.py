"""The exit codes are a promise to other programs (docs/interfaces.md)."""

import importlib
import pkgutil

import pytest

import qbackup
from qbackup.errors import QbackupError, RefusedError, VerificationError

EXIT_CODES = {
    "QbackupError": 1,
    "UsageError": 2,
    "ConfigurationError": 2,
    "NoKeyError": 2,
    "RefusedError": 4,
    "RepositoryError": 10,
    "LockedError": 11,
    "MonitorError": 12,
    "MonitorBusyError": 12,
    "MonitorLostError": 12,
    "VerificationError": 13,
    "DecryptionError": 13,
    "BootError": 13,
    "RemoteError": 14,
    "RemoteUnreachableError": 14,
    "RemoteDeniedError": 14,
    "RemoteMissingError": 14,
    "RemoteDamagedError": 13,
    "ObjectMissingError": 13,
    "InterruptedByUserError": 130,
    "QmpCommandError": 1,
    "VmStateError": 1,
    "DiskError": 1,
    "JobFailedError": 1,
    "SnapshotError": 1,
    "WriterError": 1,
    "NoSpaceError": 1,
    "ManifestDamagedError": 1,
    "ChainBrokenError": 1,
    "BackupNotFoundError": 1,
    "RemovalError": 1,
    "ConsolidationError": 1,
    "ChainsFullError": 1,
    "RestoreError": 1,
    "ExportError": 1,
    "ProgramError": 1,
    "VmStartedError": 1,
    "HookError": 1,
    "UnitChangedError": 1,
}


def all_errors() -> set[type[QbackupError]]:
    """Return every error class of the package."""
    for module in pkgutil.walk_packages(qbackup.__path__, "qbackup."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, waiting = set(), [QbackupError]
    while waiting:
        error = waiting.pop()
        found.add(error)
        waiting += error.__subclasses__()
    return found


def test_every_error_class_has_the_exit_code_that_was_promised() -> None:
    tree = {e.__name__: e.exit_code for e in all_errors() if e.__module__ == "qbackup.errors"}
    assert tree == EXIT_CODES


def test_an_error_of_one_module_has_an_exit_code_of_the_tree() -> None:
    elsewhere = {e.__name__: e.exit_code for e in all_errors() if e.__module__ != "qbackup.errors"}
    assert elsewhere["AgentError"] == 1
    assert set(elsewhere.values()) <= set(EXIT_CODES.values())


@pytest.mark.parametrize(
    ("problems", "said"), [(["a"], "1 problem"), (["a", "b"], "2 problems"), ([], "0 problems")]
)
def test_a_verification_error_counts_its_problems(problems: list[str], said: str) -> None:
    error = VerificationError(problems)
    assert error.message == f"verification found {said}"
    assert error.problems == tuple(problems)


def test_a_refusal_names_every_disk_with_its_reason() -> None:
    error = RefusedError("vm1", [("system", "missing"), ("data", "new-disk")])
    assert "system (missing), data (new-disk)" in error.message
    assert error.hint is not None and "qbackup full vm1" in error.hint
