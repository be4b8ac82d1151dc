"""Only firmware is taken for firmware, wherever a name leads."""

from pathlib import Path

import pytest

from qbackup.images.firmware import empty_variables, find_firmware


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """Return a directory of firmware, beside which there is a secret."""
    folder = tmp_path / "share"
    folder.mkdir()
    names = ("OVMF_CODE.fd", "OVMF_VARS.fd", "OVMF_CODE.secboot.fd", "OVMF_CODE.ms.fd", "bios.bin")
    for name in (*names, "OVMF_VARS.ms.fd"):
        (folder / name).touch()
    (tmp_path / "secret").touch()
    return folder


def test_what_is_in_the_directory_is_found_also_by_a_link_to_it(share: Path) -> None:
    code = share / "OVMF_CODE.fd"
    link = share.parent / "link"
    link.symlink_to(code)
    for name in (str(code), str(link), f"{share}/../share/OVMF_CODE.fd"):
        assert find_firmware(name, directories=[share]) == code


def test_what_leads_elsewhere_is_not(share: Path) -> None:
    (share / "evil").symlink_to(share.parent / "secret")
    (share / "circle").symlink_to(share / "circle")
    for name in ("evil", "circle", "../secret", "missing", "", "bios.bin\0", "/etc/passwd"):
        assert find_firmware(f"{share}/{name}", directories=[share]) is None
    assert find_firmware("/etc/passwd", directories=[share]) is None
    assert find_firmware("", directories=[share / "missing"]) is None


@pytest.mark.parametrize(
    ("code", "variables"),
    [
        ("OVMF_CODE.fd", "OVMF_VARS.fd"),
        ("OVMF_CODE.secboot.fd", "OVMF_VARS.fd"),
        ("OVMF_CODE.ms.fd", "OVMF_VARS.ms.fd"),
        ("bios.bin", None),
    ],
)
def test_the_variables_belong_to_the_code(share: Path, code: str, variables: str | None) -> None:
    found = empty_variables(share / code)
    assert (found.name if found else None) == variables
