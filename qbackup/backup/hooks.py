"""The user's programs before and after a backup.

`before` runs when the VM's lock is held and nothing has been begun, `after` in any case, also when
`before` failed or the backup was interrupted; where the lock cannot be had, neither does. If
`before` fails, there is no backup; if `after` fails, the backup is degraded. Neither can last
longer than `hook_timeout`.

They are told what is done by their environment, which holds nothing that QEMU said.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Literal

from qbackup.errors import (
    EXIT_DEGRADED,
    HookError,
    InterruptedByUserError,
    as_reported,
)
from qbackup.formats.configuration import Vm
from qbackup.host.command import DeadlineError, run_command
from qbackup.host.tasks import to_its_end
from qbackup.model.backup import Kind
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_duration

_When = Literal["before", "after"]
_VARIABLES = ("HOOK", "VM", "COMMAND", "RESULT", "EXIT_CODE", "BACKUP_ID")


class Hooks:
    """One VM's hooks around one backup. `backup_id` and `degraded` are told to `after`."""

    def __init__(self, vm: Vm, command: Kind, reporter: Reporter) -> None:
        self._vm, self._command, self._reporter = vm, command, reporter
        self.backup_id: str | None = None
        self.degraded: tuple[str, ...] = ()

    async def before(self) -> None:
        """Run the first hook.

        Raises:
            HookError: it failed.
        """
        if why := await self._run("before", self._vm.hooks.before, {}):
            raise HookError(self._vm.name, why)

    async def after(self, exit_code: int) -> None:
        """Run the last hook. If it fails, that is told, and the backup is degraded."""
        results = {
            0: "done",
            EXIT_DEGRADED: "degraded",
            InterruptedByUserError.exit_code: "interrupted",
        }
        facts = {
            "RESULT": results.get(exit_code, "failed"),
            "EXIT_CODE": str(exit_code),
            "BACKUP_ID": self.backup_id or "",
        }
        if why := await self._run("after", self._vm.hooks.after, facts):
            self._reporter.warning(f"{self._vm.name}: {why}")
            self.degraded += (why,)

    def tell_of_after(self) -> None:
        """Say to whoever interrupted us that the last hook is run all the same, if there is one."""
        if command := self._vm.hooks.after:
            most = format_duration(self._vm.hook_timeout_s)
            self._reporter.notice(
                f"{self._vm.name}: waiting for the hook after ({command[0]}), at most {most} "
                "(hook_timeout)"
            )

    async def _run(
        self, when: _When, command: Sequence[str], facts: Mapping[str, str]
    ) -> str | None:
        """Run a hook, if there is one; return why it failed, None if it did not."""
        if not command:
            return None
        last = ""

        def on_line(line: str) -> None:
            nonlocal last
            last = line or last
            self._reporter.notice(f"{self._vm.name}: {when}: {line}")

        told = {"HOOK": when, "VM": self._vm.name, "COMMAND": self._command, **facts}
        timeout_s = self._vm.hook_timeout_s
        try:
            status = await run_command(
                command, environment=_environment(told), timeout_s=timeout_s, on_line=on_line
            )
        except DeadlineError:
            why = f"killed after {format_duration(timeout_s)} (hook_timeout)"
        except (OSError, ValueError) as err:
            why = f"cannot be started: {getattr(err, 'strerror', None) or err}"
        else:
            if status == 0:
                return None
            why = f"exit status {status}" if status > 0 else f"killed by signal {-status}"
        said = f'; it said "{last}"' if last else ""
        return f"the hook {when} ({command[0]}) failed: {why}{said}"


@asynccontextmanager
async def hooks_around(vm: Vm, command: Kind, reporter: Reporter) -> AsyncIterator[Hooks]:
    """Run a VM's hooks before and after the block.

    Raises:
        HookError: the one before failed; the block is not entered.
    """
    hooks = Hooks(vm, command, reporter)
    try:
        await hooks.before()
        yield hooks
    except asyncio.CancelledError:
        hooks.tell_of_after()
        await to_its_end(hooks.after(InterruptedByUserError.exit_code))
        raise
    except Exception as err:
        exit_code = as_reported(err).exit_code
        await to_its_end(hooks.after(exit_code), on_cancel=hooks.tell_of_after)
        raise
    exit_code = EXIT_DEGRADED if hooks.degraded else 0
    await to_its_end(hooks.after(exit_code), on_cancel=hooks.tell_of_after)


def _environment(facts: Mapping[str, str]) -> dict[str, str]:
    """Return our environment with these facts, and no others of their kind."""
    ours = {f"QBACKUP_{name}" for name in _VARIABLES}
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return inherited | {f"QBACKUP_{name}": value for name, value in facts.items()}
