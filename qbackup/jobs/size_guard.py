"""Notice that a disk was shrunk and grown back.

QEMU cuts a bitmap when its disk shrinks and adds zeroes when it grows: what was cut off reads
as zeroes and counts as unchanged. So beside the bitmaps stands one that records nothing and in
which only the last granule is set. If that bit is gone, the disk was smaller at some time.
(A shrink that stays within the last granule is not seen.)
"""

from pathlib import Path

from qbackup.model.bitmap import Bits
from qbackup.model.names import RESERVED_PREFIX, size_guard_name
from qbackup.qmp import commands
from qbackup.qmp.disks import Disk
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.sidecar import load_bitmap


async def ensure_size_guard(
    monitor: Monitor, disk: Disk, *, prefix: str, granularity_bytes: int, scratch: Path
) -> None:
    """Put a guard on a disk that has none, or whose guard has done its duty.

    `scratch` is where a temporary file may be. Call it before the bitmap that it guards starts.
    """
    name = size_guard_name(prefix)
    guard = disk.bitmap(name)
    if guard is not None and guard.dirty_bytes > 0:
        return
    if guard is not None:
        await monitor.execute(commands.bitmap_remove(node=disk.node, name=name))
    if disk.virtual_size_bytes == 0:
        return
    await load_bitmap(
        monitor,
        disk_node=disk.node,
        name=name,
        bits=Bits.last_granule(
            virtual_size_bytes=disk.virtual_size_bytes, granularity_bytes=granularity_bytes
        ),
        path=scratch,
        prefix=RESERVED_PREFIX,
        into_existing=False,
        recording=False,
    )
