"""What is encrypted is read with `age` and `qemu-img` alone, by the steps of decision 15."""

import asyncio
import re
import textwrap
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from pathlib import Path

from support.chains import DISK, VM, make_chain

from qbackup.remote.encryption import AgeCipher
from qbackup.remote.keys import read_own_recipients, write_new_key

DECISION = Path(__file__).parents[2] / "docs" / "decisions" / "0015-encryption.md"
REPOSITORY_ID = "0123456789abcdef0123456789abcdef"


def steps() -> str:
    """Return the commands of the decision, with what the reader is to put in."""
    after = DECISION.read_text().split("<!-- restore-without-qbackup", 1)[1]
    lines = after.split("-->", 1)[1].lstrip("\n").split("\n\n", 1)[0]
    return textwrap.dedent(lines)


async def pieces_of(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(100_000):
            yield piece


async def put_encrypted(repository: Path, bucket: Path, cipher: AgeCipher) -> None:
    """Put a repository into a directory as a remote has it."""
    for path in sorted(one for one in repository.rglob("*") if one.is_file()):
        target = bucket / f"{path.relative_to(repository)}{cipher.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            async for piece in cipher.encrypt(pieces_of(path)):
                file.write(piece)


async def run_steps(folder: Path, script: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        "bash", "-euo", "pipefail", "-c", script, cwd=folder, stdout=PIPE, stderr=STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_a_backup_is_restored_with_age_and_qemu_img_alone(tmp_path: Path) -> None:
    made = make_chain(tmp_path / "repo", REPOSITORY_ID, 4)
    recipient = await write_new_key(tmp_path / "remote.key")
    escrow = await write_new_key(tmp_path / "escrow.key")
    cipher = AgeCipher.from_files(recipients=[recipient, escrow])
    bucket = tmp_path / "bucket" / "PREFIX" / "REPOSITORY_ID"
    await put_encrypted(tmp_path / "repo", bucket, cipher)

    # Only what fetches differs: there is no store here.
    fetch = f'cp -r "{bucket}/{VM}" store/{VM}'
    script, count = re.subn(r"^aws s3 cp .*$", fetch, steps(), flags=re.MULTILINE)
    assert count == 1
    script = script.replace("BACKUP_ID", made.ids[-1]).replace("data", DISK)
    script = f"mkdir store\n{script.replace('vm1', VM)}"
    for key in ("remote.key", "escrow.key"):
        code, output = await run_steps(tmp_path, script.replace("remote.key", key))
        assert code == 0, output
        assert sum(line.endswith("manifest.json") for line in output.splitlines()) == 4
        assert (tmp_path / f"{DISK}.raw").read_bytes() == made.content
        await run_steps(tmp_path, f"rm -r store {DISK}.raw")

    # A key that is none of the recipients', and an object that was cut: age says so, too.
    await write_new_key(tmp_path / "other.key")
    code, output = await run_steps(tmp_path, script.replace("remote.key", "other.key"))
    assert code and "no identity matched" in output
    await run_steps(tmp_path, "rm -r store")
    image = bucket / VM / made.ids[0] / f"{DISK}.qcow2.age"
    image.write_bytes(image.read_bytes()[:-1])
    code, output = await run_steps(tmp_path, script)
    assert code and "failed to decrypt" in output


async def test_what_age_encrypted_is_decrypted(tmp_path: Path) -> None:
    key = tmp_path / "key"
    await write_new_key(key)
    (recipient,) = read_own_recipients(key)
    plain = bytes(range(256)) * 3000
    (tmp_path / "plain").write_bytes(plain)
    code, output = await run_steps(tmp_path, f"age -r {recipient} -o plain.age plain")
    assert code == 0, output
    cipher = AgeCipher.from_files(identity=key)
    found = [piece async for piece in cipher.decrypt(pieces_of(tmp_path / "plain.age"))]
    assert b"".join(found) == plain
    least, most = cipher.size_bounds(len(plain))
    assert least <= (tmp_path / "plain.age").stat().st_size <= most
