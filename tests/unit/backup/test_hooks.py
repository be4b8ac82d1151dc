"""Hooks before and after a backup: what they are told, and what becomes of those that go wrong."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from qbackup.backup.hooks import hooks_around
from qbackup.errors import DiskError, HookError
from qbackup.formats.configuration import HookCommands, Vm
from qbackup.host.process import HostProcess

from ..conftest import RecordingReporter
from ..values import ID1, make_vm

SHELL = ("/bin/sh", "-c")
WAIT_S = 30.0


def vm_with(folder: Path, *, before: str = "", after: bool = False, timeout_s: float = 60) -> Vm:
    """Return a VM with a shell script before a backup, and the facts written down after it."""
    write = (
        "import json,os;json.dump({n:v for n,v in os.environ.items() if n.startswith('QBACKUP_')},"
        f"open({str(folder / 'facts')!r},'w'))"
    )
    return make_vm(
        hooks=HookCommands(
            before=(*SHELL, before) if before else (),
            after=(sys.executable, "-c", write) if after else (),
        ),
        hook_timeout_s=timeout_s,
    )


def facts(folder: Path) -> dict[str, str]:
    """Return what the hook after the backup was told."""
    told: dict[str, str] = json.loads((folder / "facts").read_text())
    return told


async def test_a_hook_is_told_what_is_done_and_its_output_is_shown_with_the_name_of_the_vm(
    tmp_path: Path, reporter: RecordingReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QBACKUP_RESULT", "of another one")
    script = 'echo "$QBACKUP_HOOK $QBACKUP_VM $QBACKUP_COMMAND ${QBACKUP_RESULT-none}"; echo x >&2'
    vm = vm_with(tmp_path, before=script, after=True)
    async with hooks_around(vm, "incremental", reporter) as hooks:
        assert reporter.notices == ["vm1: before: before vm1 incremental none", "vm1: before: x"]
        hooks.backup_id = ID1
    assert facts(tmp_path) == {
        "QBACKUP_HOOK": "after",
        "QBACKUP_VM": "vm1",
        "QBACKUP_COMMAND": "incremental",
        "QBACKUP_RESULT": "done",
        "QBACKUP_EXIT_CODE": "0",
        "QBACKUP_BACKUP_ID": ID1,
    }
    assert reporter.warnings == []


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo no room; exit 7", 'exit status 7; it said "no room"'),
        ("kill -TERM $$", "killed by signal 15"),
    ],
)
async def test_a_hook_before_that_fails_stops_the_backup_and_the_one_after_runs(
    tmp_path: Path, reporter: RecordingReporter, script: str, why: str
) -> None:
    with pytest.raises(HookError) as caught:
        async with hooks_around(vm_with(tmp_path, before=script, after=True), "full", reporter):
            pytest.fail("the backup began")
    assert caught.value.message == f"vm1: the hook before (/bin/sh) failed: {why}"
    told = facts(tmp_path)
    assert (told["QBACKUP_RESULT"], told["QBACKUP_EXIT_CODE"]) == ("failed", "1")
    assert told["QBACKUP_BACKUP_ID"] == ""


async def test_a_program_that_is_not_there_is_a_hook_that_fails(
    tmp_path: Path, reporter: RecordingReporter
) -> None:
    vm = make_vm(hooks=HookCommands(before=(str(tmp_path / "absent"),)))
    with pytest.raises(HookError, match="cannot be started: No such file"):
        async with hooks_around(vm, "full", reporter):
            pytest.fail("the backup began")


async def test_at_the_deadline_a_hook_is_killed_with_what_it_has_started(
    tmp_path: Path, reporter: RecordingReporter
) -> None:
    child = "sleep 1000 & echo $!; exec sleep 1000"
    vm = vm_with(tmp_path, before=child, timeout_s=1.0)
    with pytest.raises(HookError, match=r"killed after 1.0 s \(hook_timeout\)"):
        async with hooks_around(vm, "full", reporter):
            pytest.fail("the backup began")
    (line,) = reporter.notices
    process = HostProcess.open(int(line.rpartition(" ")[2]))
    if process is not None:  # killed, and perhaps not yet reaped
        with process:
            async with asyncio.timeout(WAIT_S):
                await process.ended()


@pytest.mark.parametrize(
    ("error", "result", "code"),
    [
        (asyncio.CancelledError(), "interrupted", "130"),
        (DiskError("gone"), "failed", "1"),
        (OSError(28, "No space left on device"), "failed", "1"),
    ],
)
async def test_the_hook_after_is_told_of_every_failure_which_goes_on_as_it_was(
    tmp_path: Path, reporter: RecordingReporter, error: BaseException, result: str, code: str
) -> None:
    with pytest.raises(type(error)) as caught:
        async with hooks_around(vm_with(tmp_path, after=True), "full", reporter):
            raise error
    assert caught.value is error
    told = facts(tmp_path)
    assert (told["QBACKUP_RESULT"], told["QBACKUP_EXIT_CODE"]) == (result, code)


async def test_an_interruption_kills_the_hook_before_and_the_one_after_runs(
    tmp_path: Path, reporter: RecordingReporter
) -> None:
    os.mkfifo(tmp_path / "fifo")
    vm = vm_with(tmp_path, before=f"echo > {tmp_path / 'fifo'}; exec sleep 1000", after=True)

    async def back_up() -> None:
        async with hooks_around(vm, "full", reporter):
            pytest.fail("the backup began")

    task = asyncio.create_task(back_up())
    # Opening a FIFO waits for its other end: then the hook is at work.
    await asyncio.to_thread((tmp_path / "fifo").read_bytes)
    task.cancel()
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert facts(tmp_path)["QBACKUP_RESULT"] == "interrupted"
    assert any("waiting for the hook after" in notice for notice in reporter.notices)


async def test_who_interrupts_the_hook_after_is_told_what_is_waited_for(
    tmp_path: Path, reporter: RecordingReporter
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    commands = HookCommands(before=(), after=(*SHELL, f"cat {pipe}"))
    vm = make_vm(hooks=commands, hook_timeout_s=60)

    async def back_up() -> str:
        async with hooks_around(vm, "full", reporter):
            pass
        return "done"

    task = asyncio.create_task(back_up())
    # Opening a FIFO waits for its other end: then the hook is at work. It ends with the closing.
    fd = await asyncio.to_thread(os.open, pipe, os.O_WRONLY)
    task.cancel()
    os.close(fd)
    async with asyncio.timeout(WAIT_S):
        assert await task == "done"
    assert reporter.notices == [
        "vm1: waiting for the hook after (/bin/sh), at most 1:00 (hook_timeout)"
    ]


async def test_a_hook_after_that_fails_leaves_a_degraded_backup(
    reporter: RecordingReporter,
) -> None:
    vm = make_vm(hooks=HookCommands(after=("/bin/false",)))
    async with hooks_around(vm, "full", reporter) as hooks:
        assert hooks.degraded == ()
    why = "the hook after (/bin/false) failed: exit status 1"
    assert (hooks.degraded, reporter.warnings) == ((why,), [f"vm1: {why}"])


async def test_what_a_hook_leaves_running_holds_up_nothing(
    tmp_path: Path, reporter: RecordingReporter
) -> None:
    vm = vm_with(tmp_path, before="sleep 1000 & echo $!")
    async with asyncio.timeout(WAIT_S):
        async with hooks_around(vm, "full", reporter):
            (line,) = reporter.notices
    process = HostProcess.open(int(line.rpartition(" ")[2]))
    assert process is not None
    with process:
        assert not process.has_ended()
        process.kill()
