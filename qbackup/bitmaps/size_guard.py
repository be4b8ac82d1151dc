"""Notice that a disk was shrunk and grown back.

QEMU cuts a bitmap when its disk shrinks and adds zeroes when it grows: what was cut off reads
as zeroes and counts as unchanged. So beside the bitmaps stands one that records nothing, in
which only the last granule is set, and whose name tells the size. If that bit is gone, or there is
none for the disk's size, the disk had another size at some time, and no bitmap of it is
trusted. (A shrink that stays within the last granule is not seen.)
"""

from pathlib import Path

from qbackup.model.bitmap import Bits
from qbackup.model.names import ANY_OWNER, Owner
from qbackup.qmp import commands
from qbackup.qmp.disks import Disk
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.sidecar import load_bitmap


def is_guarded(disk: Disk, owner: Owner) -> bool:
    """Tell whether the disk has had this size ever since its bitmaps began to record.

    An empty disk has nothing that could have been cut off, and no granule to mark.
    """
    if disk.virtual_size_bytes == 0:
        return True
    guard = disk.bitmap(owner.size_guard(disk.virtual_size_bytes))
    return guard is not None and guard.dirty_bytes > 0


async def ensure_size_guard(
    monitor: Monitor, disk: Disk, *, owner: Owner, granularity_bytes: int, scratch: Path
) -> bool:
    """Put a guard on a disk that has none for its size; return whether that was necessary.

    What was recorded without a guard may have been cut off. It is removed first: with the new
    guard it would look trusted, also if the backup that comes now fails.
    `scratch` is where a temporary file may be. Call it before the bitmap that it guards starts.
    """
    if is_guarded(disk, owner):
        return False
    name = owner.size_guard(disk.virtual_size_bytes)
    ours = [bitmap.name for bitmap in disk.bitmaps if owner.owns(bitmap.name)]
    if ours:
        removals = [commands.bitmap_remove(node=disk.node, name=old) for old in ours]
        await monitor.execute(commands.transaction(removals))
    await load_bitmap(
        monitor,
        disk_node=disk.node,
        name=name,
        bits=Bits.last_granule(
            virtual_size_bytes=disk.virtual_size_bytes, granularity_bytes=granularity_bytes
        ),
        path=scratch,
        owner=ANY_OWNER,
        into_existing=False,
        recording=False,
    )
    return True
