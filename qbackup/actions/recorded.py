"""What a run leaves for those who watch: how it ended, and the metrics file (`metrics.py`)."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from qbackup.errors import QbackupError
from qbackup.formats.configuration import Configuration
from qbackup.host.tasks import to_its_end
from qbackup.repository.last_run import LastRun, RecordedCommand, read_last_run, write_last_run
from qbackup.repository.state import StateDirectory

_TIMEOUT_S = 60.0
_INTERRUPTED = 130


class Run(msgspec.Struct):
    """A run that goes on; its command says how it ends, unless with an error."""

    exit_code: int = 0


@asynccontextmanager
async def recorded(
    configuration: Configuration,
    vm: str,
    command: RecordedCommand,
    *,
    warn: Callable[[str], None],
) -> AsyncIterator[Run]:
    """Remember how the block ends, for a VM of the configuration.

    If that cannot be kept it is a warning, and changes nothing of how the command ends.
    """
    run, started = Run(), time.monotonic()
    try:
        yield run
    except BaseException as err:
        run.exit_code = _exit_code(err)
        raise
    finally:
        if vm in configuration.vms:  # others have no state directory
            last = LastRun(
                ended_s=round(time.time(), 3),
                seconds=round(time.monotonic() - started, 3),
                exit_code=run.exit_code,
            )
            step = write_last_run(StateDirectory(configuration.state, vm), command, last)
            await to_its_end(
                _attempt(step, f"{vm}: how this run ended cannot be kept for monitoring", warn)
            )


async def recorded_otherwise(
    configuration: Configuration,
    vm: str,
    command: RecordedCommand,
    exit_code: int,
    *,
    warn: Callable[[str], None],
) -> None:
    """Say that a run which is remembered ended with another exit code after all."""
    state = StateDirectory(configuration.state, vm)
    last = read_last_run(state, command)
    if last is not None:
        step = write_last_run(state, command, msgspec.structs.replace(last, exit_code=exit_code))
        await to_its_end(
            _attempt(step, f"{vm}: how this run ended cannot be kept for monitoring", warn)
        )


@asynccontextmanager
async def metrics_after(
    configuration: Configuration, *, warn: Callable[[str], None]
) -> AsyncIterator[None]:
    """Write the metrics when the block has ended, well or not, if a file is configured for them.

    If they cannot be written it is a warning, and changes nothing of how the command ends.
    """
    try:
        yield
    finally:
        await to_its_end(update_metrics(configuration, warn=warn))


async def update_metrics(configuration: Configuration, *, warn: Callable[[str], None]) -> None:
    """Write the metrics as they are now, if a file is configured for them; see `metrics_after`."""
    if configuration.metrics is not None:
        from qbackup.actions.metrics import write_metrics  # noqa: PLC0415 - loads half of qbackup

        step = write_metrics(configuration, configuration.metrics)
        await _attempt(step, "the metrics were not written", warn)


def _exit_code(err: BaseException) -> int:
    if isinstance(err, asyncio.CancelledError):
        return _INTERRUPTED
    return err.exit_code if isinstance(err, QbackupError) else QbackupError.exit_code


async def _attempt(step: Coroutine[Any, Any, None], what: str, warn: Callable[[str], None]) -> None:
    """Do something that nothing depends on, in a limited time; tell why if it fails."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await step
    except TimeoutError:
        warn(f"{what}: nothing moved for {_TIMEOUT_S:.0f} s")
    except OSError as err:
        where = f"{err.filename}: " if err.filename else ""
        warn(f"{what}: {where}{err.strerror or err}")
    except Exception as err:
        # Whatever it is: the backup exists, or failed for a reason of its own.
        warn(f"{what}: {type(err).__name__}: {err}")
