"""A real guest during a backup to a slow repository: its writes take as long as ever."""

from pathlib import Path

from support.faulty_fs import faulty_fs
from support.guests import latencies_during_backup


async def test_a_guest_does_not_notice_a_backup_to_a_slow_repository(tmp_path: Path) -> None:
    async with faulty_fs(tmp_path) as fs:
        took = await latencies_during_backup(tmp_path, fs)
    took.assert_unnoticed()
