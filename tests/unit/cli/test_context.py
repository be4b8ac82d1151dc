"""Which configuration file is read."""

import os
import shutil
from pathlib import Path

import pytest

from qbackup.cli.context import (
    find_configuration,
    new_configuration_path,
    read_configuration,
    user_configuration,
)
from qbackup.errors import ConfigurationError
from qbackup.formats.configuration import MAX_CONFIGURATION_BYTES


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be a user with an empty home and no variables."""
    for name in ("QBACKUP_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def touch(path: Path) -> Path:
    """Make a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_the_command_line_comes_before_the_environment_before_the_home(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = touch(home / ".config/qbackup/config.toml")
    assert find_configuration(None) == own == user_configuration()
    monkeypatch.setenv("QBACKUP_CONFIG", "/env.toml")
    assert find_configuration(None) == Path("/env.toml")
    assert find_configuration("/given.toml") == Path("/given.toml")
    monkeypatch.setenv("QBACKUP_CONFIG", "")
    assert find_configuration(None) == own


def test_xdg_config_home_is_honoured(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(home / ".config/qbackup/config.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "xdg"))
    own = touch(home / "xdg/qbackup/config.toml")
    assert find_configuration(None) == own


def test_none_at_all_is_told_with_every_place_that_was_looked_at(home: Path) -> None:
    assert not Path("/etc/qbackup/config.toml").exists(), "this machine has qbackup installed"
    with pytest.raises(ConfigurationError) as caught:
        find_configuration(None)
    for place in (home / ".config/qbackup/config.toml", "/etc/qbackup/config.toml"):
        assert str(place) in caught.value.message
    assert caught.value.hint is not None and "qbackup init" in caught.value.hint


def test_init_writes_where_the_others_would_look(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert new_configuration_path("x.toml") == Path("x.toml")
    own = touch(home / ".config/qbackup/config.toml")
    assert new_configuration_path(None) == own
    monkeypatch.setenv("QBACKUP_CONFIG", "/env.toml")
    assert new_configuration_path(None) == Path("/env.toml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"#" * (MAX_CONFIGURATION_BYTES + 1), "larger than"),
        (b"", "the key repository is missing"),
    ],
    ids=["missing", "no text", "huge", "empty"],
)
def test_a_file_that_cannot_be_read_is_named(home: Path, content: bytes | None, said: str) -> None:
    path = home / "config.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=said) as caught:
        read_configuration(path)
    assert caught.value.message.startswith(f"{path}: ")


def test_a_folder_is_no_configuration(home: Path) -> None:
    with pytest.raises(ConfigurationError, match="a directory, not a regular file"):
        read_configuration(home)
    shutil.rmtree(home)
    with pytest.raises(ConfigurationError, match="No such file"):
        read_configuration(home)


def test_a_link_to_a_configuration_is_followed(home: Path) -> None:
    (home / "real.toml").write_text('repository = "repo"\nstate = "state"\n')
    (home / "config.toml").symlink_to("real.toml")
    assert read_configuration(home / "config.toml").repository == home / "repo"


@pytest.mark.parametrize("target", ["fifo", "/dev/zero", "/dev/stdin"])
def test_what_is_no_file_is_no_configuration_and_not_waited_for(home: Path, target: str) -> None:
    os.mkfifo(home / "fifo")
    (home / "config.toml").symlink_to(target)
    with pytest.raises(ConfigurationError, match="not a regular file"):
        read_configuration(home / "config.toml")


VM_TABLE = '[vm.{name}]\nqmp = "{name}.sock"\n'


def write_main(home: Path, text: str = "") -> Path:
    """Write a configuration with one VM, `first`, and make an empty `conf.d` beside it."""
    main = home / "config.toml"
    top = 'repository = "repo"\nstate = "state"\n'
    main.write_text(top + text + VM_TABLE.format(name="first"))
    (home / "conf.d").mkdir()
    return main


def test_conf_d_adds_vms_in_the_order_of_its_files(home: Path) -> None:
    main = write_main(home, '[defaults]\ngranularity = "4K"\n')
    (home / "conf.d/20.toml").write_text(VM_TABLE.format(name="third"))
    (home / "conf.d/10.toml").write_text(VM_TABLE.format(name="second"))
    (home / "elsewhere").write_text(VM_TABLE.format(name="linked") + 'granularity = "8K"\n')
    (home / "conf.d/30.toml").symlink_to(home / "elsewhere")
    for ignored in ("README", "40.toml~", ".50.toml"):
        (home / "conf.d" / ignored).write_text("not TOML")
    vms = read_configuration(main).vms
    assert list(vms) == ["first", "second", "third", "linked"]
    assert [vm.granularity_bytes for vm in vms.values()] == [4096, 4096, 4096, 8192]
    # As in the main file: relative to the folder of the file.
    assert vms["second"].qmp == home / "conf.d/second.sock"


def test_a_vm_that_is_there_twice_is_told_with_both_files(home: Path) -> None:
    main = write_main(home)
    (home / "conf.d/a.toml").write_text(VM_TABLE.format(name="vm1"))
    (home / "conf.d/b.toml").write_text(VM_TABLE.format(name="vm1"))
    with pytest.raises(ConfigurationError) as caught:
        read_configuration(main)
    assert caught.value.message == f"{home}/conf.d/b.toml: [vm.vm1] is in {home}/conf.d/a.toml, too"
    (home / "conf.d/b.toml").write_text(f'[vm.vm2]\nqmp = "{home}/first.sock"\n')
    with pytest.raises(ConfigurationError) as caught:
        read_configuration(main)
    assert f"vm.first in {main} and vm.vm2 have the same monitor" in caught.value.message


@pytest.mark.parametrize("text", ['repository = "x"', "[keep]\nlast = 3", "[defaults]", "vms = 1"])
def test_only_vms_belong_into_conf_d(home: Path, text: str) -> None:
    main = write_main(home)
    (home / "conf.d/a.toml").write_text(f"{text}\n")
    with pytest.raises(ConfigurationError, match=r"conf\.d/a\.toml: unknown key") as caught:
        read_configuration(main)
    assert caught.value.hint is not None and "main file" in caught.value.hint


def test_what_cannot_be_read_in_conf_d_is_not_passed_over(home: Path) -> None:
    main = write_main(home)
    (home / "conf.d/a.toml").mkdir()
    with pytest.raises(ConfigurationError, match=r"a\.toml: cannot be read: this is a directory"):
        read_configuration(main)
    (home / "conf.d/a.toml").rmdir()
    os.mkfifo(home / "conf.d/a.toml")
    with pytest.raises(ConfigurationError, match=r"a\.toml: cannot be read: this is a FIFO"):
        read_configuration(main)
    (home / "conf.d/a.toml").unlink()
    (home / "conf.d/a.toml").write_bytes(b"#" * (MAX_CONFIGURATION_BYTES + 1))
    with pytest.raises(ConfigurationError, match=r"a\.toml: cannot be read: larger"):
        read_configuration(main)
    (home / "conf.d/a.toml").unlink()
    (home / "conf.d").rmdir()
    (home / "conf.d").touch()
    with pytest.raises(ConfigurationError, match=r"conf\.d: cannot be read: Not a directory"):
        read_configuration(main)
