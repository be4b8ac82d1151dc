"""A VM with firmware, its variables and the state of a TPM: backed up, restored, started again."""

import json
import os
import shlex
import shutil
from asyncio.subprocess import PIPE, STDOUT, create_subprocess_exec
from pathlib import Path

import pytest
from qemu.qmp import QMPClient
from support.lab import Lab, lab
from support.qemu import until_connected
from support.storage import disk_specs

SECRET = "hunter2"  # noqa: S105 - of the VM under test
FLASH_BYTES = 256 * 1024


def with_firmware(folder: Path) -> list[str]:
    """Make firmware and the state of a TPM; return QEMU's arguments, a secret among them."""
    (folder / "code.fd").write_bytes(b"code".ljust(FLASH_BYTES, b"\xff"))
    (folder / "vars.fd").write_bytes(b"variables".ljust(FLASH_BYTES, b"\xff"))
    (folder / "tpm" / "more").mkdir(parents=True)
    (folder / "tpm" / "tpm2-00.permall").write_bytes(b"state of the TPM")
    (folder / "tpm" / "more" / "empty").touch()
    (folder / "tpm" / "link").symlink_to("/etc/hostname")
    code, variables = folder / "code.fd", folder / "vars.fd"
    return [
        *("-drive", f"if=pflash,format=raw,readonly=on,file={code}"),
        *("-drive", f"if=pflash,format=raw,file={variables}"),
        *("-object", f"secret,id=s0,data={SECRET}"),
    ]


@pytest.mark.parametrize("engine", ["snapshot", "direct"])
async def test_the_whole_vm_comes_back_and_starts_on_what_was_restored(
    tmp_path: Path, engine: str
) -> None:
    arguments = with_firmware(tmp_path)
    extra = f'engine = "{engine}"\nfiles = ["tpm", "absent"]\n'
    async with lab(
        tmp_path, disk_specs(tmp_path, "a"), extra=extra, qemu_arguments=arguments
    ) as it:
        result = await it.qbackup.run("--json", "full", "vm1")
        assert result.code == 3  # a file that was asked for is missing
        assert f"file {tmp_path}/absent: No such file" in result.stderr
        out = tmp_path / "out"
        restored = await it.qbackup.summary("restore", "vm1", "--to", str(out), "--with-vm")
        names = [
            f"{tmp_path}/{name}" for name in ("tpm/more/empty", "tpm/tpm2-00.permall", "code.fd")
        ]
        assert [file["name"] for file in restored["files"]] == names
        for file in restored["files"]:
            assert Path(file["path"]) == out / "files" / file["name"][1:]
            assert Path(file["path"]).read_bytes() == Path(file["name"]).read_bytes()
        assert (out / "pflash1.raw").read_bytes() == (tmp_path / "vars.fd").read_bytes()
        assert restored["start_script"] == str(out / "start.sh")
        await it.stop()
        # Whatever the script starts can only be on what was restored.
        shutil.rmtree(tmp_path / "tpm")
        for name in ("code.fd", "vars.fd", "a.raw"):
            (tmp_path / name).unlink()
        await check_start(it, out)


async def check_start(it: Lab, out: Path) -> None:
    """Start the VM with the script and look at what it has open."""
    text = (out / "start.sh").read_text()
    assert SECRET not in text and "REDACTED" in text and "# Left out: -S" in text
    assert "not in the backup" not in text
    # A user would put the secret back, and look at the VM before it runs.
    paused = text.replace("REDACTED", SECRET).rstrip() + " -S\n"
    (out / "start.sh").write_text(paused)
    (it.folder / "control.sock").unlink(missing_ok=True)
    process = await create_subprocess_exec(str(out / "start.sh"), stdout=PIPE, stderr=STDOUT)
    control = QMPClient("test")
    try:
        await until_connected(control, it.folder / "control.sock", process)
        drives = json.loads(json.dumps(await control.execute("query-block")))
        files = {drive["inserted"]["file"] for drive in drives if "inserted" in drive}
        code = out / "files" / str(it.folder / "code.fd")[1:]
        assert files == {str(path) for path in (code, out / "pflash1.raw", out / "a.raw")}
        await control.disconnect()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_what_is_damaged_is_told_and_disks_can_be_had_without_it(tmp_path: Path) -> None:
    arguments = with_firmware(tmp_path)
    async with lab(
        tmp_path, disk_specs(tmp_path, "a"), extra='files = ["tpm"]\n', qemu_arguments=arguments
    ) as it:
        summary = await it.qbackup.summary("full", "vm1")
        archive = it.repository / "vm1" / summary["id"] / "files.tar.gz"
        os.truncate(archive, archive.stat().st_size // 2)
        found = await it.qbackup.run("--json", "verify", "vm1")
        assert found.code == 13 and str(archive) in found.last["problems"][0]
        out = tmp_path / "out"
        refused = await it.qbackup.run("--json", "restore", "vm1", "--to", str(out))
        assert (refused.code, refused.last["class"]) == (1, "ManifestDamagedError")
        assert "--disk" in refused.last["hint"] and not out.exists()
        await it.qbackup.summary("restore", "vm1", "--to", str(out), "--disk", "a")
        assert shlex.join(sorted(path.name for path in out.iterdir())) == "a.raw"
        # Whatever is in the archive goes with the backup.
        await it.qbackup.summary("full", "vm1")
        pruned = await it.qbackup.ok("prune", "vm1", "--keep-last", "1")
        assert pruned.stderr == "" and not archive.parent.exists()
        assert not list((it.repository / "vm1").glob("*.removed"))
