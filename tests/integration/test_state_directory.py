"""Whatever stands in the state directory, the guest runs and what is good is used."""

import os
from pathlib import Path

from support.lab import VM
from support.storage import disk_specs
from support.summaries import methods, reasons
from support.watching import KeptLab, kept_lab

from qbackup.formats import qbm

MIB = 2**20


async def test_what_does_not_belong_there_hinders_nothing(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.power_off()
        (path,) = it.bitmap_files("a")
        outside = tmp_path / "outside.qbm"
        outside.write_bytes(path.read_bytes())
        litter(it, path, outside)
        exhaust_generation(path)
        await it.run()
        await it.incremental()
        await it.write("b", MIB, 512, 2)
        await it.cycle()
        (path,) = (found for found in it.bitmap_files("a") if found.is_file())
        await it.incremental()
        await it.power_off()
        assert qbm.decode(outside.read_bytes()).clean
        assert outside.stat().st_nlink == 1
        await it.check_restores()


def litter(it: KeptLab, path: Path, outside: Path) -> None:
    """Put all kinds of things where files of ours may be."""
    folder, owner = path.parent, path.name[: len("qbackup-0123456789ab-")]
    old = [folder / f"{owner}2020010{n}-000000.000-0000.qbm" for n in range(1, 5)]
    os.mkfifo(old[0])
    old[1].mkdir()
    old[2].symlink_to(outside)
    old[3].symlink_to("/dev/zero")
    for name in (b"qbackup-\xff\xfe.qbm", b"qbackup-\n.qbm"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"QBM")
    (folder / f".{path.name}.qcow2").mkdir()
    (folder / f".{path.name}.new").mkdir()
    (it.state / ".scratch").mkdir()
    (it.state / "verdicts.json").unlink(missing_ok=True)
    os.mkfifo(it.state / "verdicts.json")
    (it.state / "c").symlink_to(folder)
    (it.state / "d").touch()


def exhaust_generation(path: Path) -> None:
    """Count as far as a file can."""
    data = path.read_bytes()
    header = qbm.decode_header(data[:512])
    path.write_bytes(
        qbm.with_clean(data[:512], clean=header.clean, generation=qbm.MAX_GENERATION) + data[512:]
    )


async def test_a_disk_that_cannot_be_saved_does_not_take_the_others_with_it(
    tmp_path: Path,
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.run()
        await it.back_up("full")
        (it.state / "a").symlink_to(tmp_path)
        await it.power_off()
        assert "disk a: its bitmap could not be saved" in it.keeper_said()
        await it.run()
        result = await it.qbackup.run("incremental", VM, "--no-compare", "--no-fallback")
        assert result.code == 4 and "missing" in result.stderr
        (status,) = (await it.qbackup.ok("--json", "status", VM)).document
        detail = next(d["bitmap"]["detail"] for d in status["disks"] if d["name"] == "a")
        assert "could not be saved" in detail
        summary = await it.back_up()
        assert methods(summary) == {"a": "compare", "b": "bitmap"}
        assert reasons(summary)["a"] == "missing"
        await it.check_restores()


async def test_verdicts_that_are_nested_deeply_stop_nothing(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        for text in ("[" * 200_000, '[{"disk": [], "bitmap": {}, "reason": "unclean"}]'):
            (it.state / "verdicts.json").write_text(text)
            await it.qbackup.ok("--json", "status", VM)
            await it.incremental()
