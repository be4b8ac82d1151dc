"""systemd reads the units as they are meant, whatever is in the paths."""

import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from qbackup.formats.units import JOBS, Setting, is_unchanged, make_units

SETTING = Setting(
    program=["/bin/true"],
    configuration=Path("/etc/qbackup/config.toml"),
    written=[Path("/srv/backups"), Path("/var/lib/qbackup")],
    used=[Path("/run/vm1/qmp.sock")],
)
HOSTILE = Path("/srv/100% \"of\" $HOME\\ 'ü'\n[Service]\nUser=nobody/;x")


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("folder", [Path("/srv/backups"), HOSTILE])
def test_systemd_finds_no_fault(tmp_path: Path, folder: Path, user: bool) -> None:
    setting = replace(SETTING, written=[folder], configuration=folder / "c.toml", user=user)
    units = make_units(setting)
    assert sorted(units) == sorted(
        f"qbackup-{job}@.{kind}" for job in JOBS for kind in ("service", "timer")
    )
    for name, text in units.items():
        (tmp_path / name).write_text(text)
    found = subprocess.run(
        ["systemd-analyze", "verify", *(str(tmp_path / name) for name in units)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_a_path_is_one_word_on_one_line() -> None:
    setting = replace(SETTING, written=[HOSTILE], configuration=HOSTILE)
    lines = make_units(setting)["qbackup-prune@.service"].split("\n")
    (command,) = (line for line in lines if line.startswith("ExecStart="))
    assert command.startswith("ExecStart=/bin/true -q -c \"/srv/100%% \\x22of\\x22 $$HOME\\x5c 'ü")
    assert command.endswith('" prune %i --lock-wait 2h')
    assert not [line for line in lines if line.startswith("User=")]


def test_temporary_files_are_private_unless_qbackup_or_qemu_uses_them() -> None:
    def private(setting: Setting) -> bool:
        return "PrivateTmp=yes\n" in make_units(setting)["qbackup-incremental@.service"]

    assert private(SETTING)
    assert not private(replace(SETTING, used=[Path("/tmp/qmp.sock")]))  # noqa: S108 - nothing is made
    assert not private(replace(SETTING, written=[Path("/var/tmp/x")]))  # noqa: S108 - as above


def test_every_change_is_seen() -> None:
    for text in make_units(SETTING).values():
        assert is_unchanged(text)
        for changed in (text + "\n", text.replace("[", "#[", 1), "x" + text, text[1:], ""):
            assert not is_unchanged(changed)
