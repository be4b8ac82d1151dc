"""What of a VM is restored beside its disks: its small files, and a script that starts it."""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from qbackup.catalog.vm_files import stored_files
from qbackup.errors import RestoreError
from qbackup.host import durable
from qbackup.host.tasks import in_thread
from qbackup.model.backup import LEFT_OUT_UNWRITTEN, Backup
from qbackup.model.start_command import start_command, start_script
from qbackup.repository.repository import Repository

FILES_DIRECTORY = "files"
SCRIPT_FILE = "start.sh"
_SCRIPT_MODE = 0o700


class VmToRestore(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be written, and where, by the path that it had; nothing is written yet."""

    backup: Backup
    contents: Mapping[str, bytes]
    paths: Mapping[str, Path]
    script: Path | None

    async def write_files(self) -> None:
        """Write the small files.

        Raises:
            RestoreError: one cannot be written.
        """
        for name, path in self.paths.items():
            await _write(path, self.contents[name])

    async def write_script(self, disks: Mapping[str, tuple[Path, str]]) -> None:
        """Write the script, if one was asked for; `disks` are the restored ones, by name.

        Raises:
            RestoreError: it cannot be written.
        """
        if self.script is not None:
            text = _script(self.backup, disks, self.paths)
            await _write(self.script, text.encode(errors="surrogateescape"))
            self.script.chmod(_SCRIPT_MODE)


async def vm_to_restore(
    repository: Repository, backup: Backup, to: Path, *, with_script: bool, force: bool
) -> VmToRestore:
    """Read a VM's small files, and make sure that they and the script can go below `to`.

    Raises:
        ManifestDamagedError: they are not what was backed up.
        RestoreError: something is there already; or nothing is known of how the VM was started.
    """
    if with_script and not backup.vm_configuration.command_line:
        raise RestoreError(
            f"backup {backup.id} does not hold QEMU's command line",
            hint="qbackup could not look at QEMU's process; qbackup show tells what it knows",
        )
    found = await in_thread(stored_files, repository, backup)
    folder = to / FILES_DIRECTORY
    planned = VmToRestore(
        backup=backup,
        contents={file.path: content for file, content in found},
        paths={file.path: folder / file.path.removeprefix("/") for file, _ in found},
        script=to / SCRIPT_FILE if with_script else None,
    )
    for path in (*planned.paths.values(), *((planned.script,) if planned.script else ())):
        if os.path.lexists(path) and not force:
            raise RestoreError(
                f"{path}: exists already", hint="use --force to replace it, or another directory"
            )
    return planned


def _script(
    backup: Backup, disks: Mapping[str, tuple[Path, str]], files: Mapping[str, Path]
) -> str:
    sources = {disk.name: disk.source for disk in backup.disks}
    places = {name: str(place.absolute()) for name, place in files.items()}
    places |= {sources[name].filename: str(p.absolute()) for name, (p, _) in disks.items()}
    command = start_command(backup.vm_configuration.command_line or (), places)
    remarks = []
    for name, (place, image_format) in disks.items():
        source = sources[name]
        if source.filename in command.unused:
            remarks.append(f"Disk {name} is not in the command: add {place.absolute()}.")
        elif source.format != image_format or source.encrypted:
            remarks.append(f"Disk {name} was {source.format}, and is {image_format} now: say so.")
    remarks += [
        f"Drive {name} is not in the backup ({why}), and as it was in the command."
        for name, why in backup.left_out.items()
        if why not in LEFT_OUT_UNWRITTEN
    ]
    return start_script(
        command, title=f"Starts {backup.vm} on what was restored of {backup.id}.", remarks=remarks
    )


async def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(mode=durable.DIRECTORY_MODE, parents=True, exist_ok=True)
        await durable.replace_file(path, content)
    except OSError as err:
        raise RestoreError(f"{path}: {err.strerror}") from err
