"""No secret of a VM is in its repository, or in what qbackup says of it."""

from pathlib import Path

from support.lab import VM, lab
from support.storage import disk_specs

SAID = "correct,horse,battery"
ARGUMENTS = [
    *("-object", f"secret,id=s0,data={SAID.replace(',', ',,')}"),
    *("-object", f'{{"qom-type": "secret", "id": "s1", "data": "{SAID}"}}'),
    *("-fw_cfg", f"name=opt/test/config,string=token {SAID.replace(',', ',,')}"),
    *("-smbios", f"type=11,value=io.systemd.credential:root={SAID.replace(',', ',,')}"),
]


async def test_no_file_of_a_repository_and_no_answer_holds_a_secret_of_the_vm(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), qemu_arguments=ARGUMENTS) as it:
        full = await it.back_up("full")
        await it.incremental()
        files = [path for path in it.repository.rglob("*") if path.is_file()]
        assert {"manifest.json", "a.qcow2"} <= {path.name for path in files}
        for path in files:
            assert b"horse" not in path.read_bytes(), path
        for arguments in (("show", VM, full["id"]), ("--json", "show", VM, full["id"])):
            shown = (await it.qbackup.ok(*arguments)).stdout
            # What is no secret is there: the VM can be started again.
            assert "horse" not in shown and "data=REDACTED" in shown and "opt/test/config" in shown
