"""Of a manifest's command line only what is known gets through; the rest is named, or nothing."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from qbackup.formats.machine import Machine, read_machine, split_options
from qbackup.model.backup import DiskBackup, VmConfiguration

from ..values import make_backup

CONFIGURATION = VmConfiguration(
    name="vm1", uuid=None, machine="pc-q35-7.2", cpu_count=2, memory_bytes=2**30, command_line=None
)


def disk(name: str, **source: str) -> DiskBackup:
    """Return a disk of that name, as QEMU may have told it."""
    made = make_backup().disks[0]
    return replace(made, name=name, source=replace(made.source, **{"node": name, **source}))


def read(*arguments: str, disks: Sequence[str] = ("data",), **facts: Any) -> Machine:
    """Read a command line."""
    line = ["/usr/bin/qemu-system-x86_64", *arguments]
    configuration = replace(CONFIGURATION, **{"command_line": line, **facts})
    return read_machine(configuration, [disk(name, device="") for name in disks])


def test_without_a_command_line_the_facts_are_taken() -> None:
    uuid = "12345678-1234-1234-1234-123456789abc"
    machine = read_machine(replace(CONFIGURATION, uuid=uuid), [disk("data", device="")])
    assert machine == Machine(
        machine="pc-q35-7.2",
        cpu_count=2,
        memory_bytes=2**30,
        uuid=uuid,
        disks={"data": {"driver": "virtio-blk-pci"}},
    )


def test_the_machine_as_the_guest_sees_it_is_kept() -> None:
    machine = read(
        *("-machine", "q35,accel=kvm,smm=on,dump-guest-core=on,vmport=off,pflash0=code"),
        *("-cpu", "host,+vmx,-svm,hv_time=on,enforce,model-id=x y"),
        *("-rtc", "base=localtime,clock=host"),
        *("-global", "driver=cfi.pflash01,property=secure,value=on"),
        *("-device", "virtio-rng-pci,rng=r"),
        *("-append", "-root=/dev/vda console=ttyS0", "-kernel", "/boot/vmlinuz"),
        *("-initrd", "/boot/initrd"),
    )
    assert machine.architecture == "x86_64"
    assert (machine.machine, machine.machine_options) == ("q35", ("smm=on", "vmport=off"))
    assert machine.cpu == ("host", "+vmx", "-svm", "hv_time=on")
    assert machine.rtc_base == "localtime"
    assert machine.secure_flash and machine.random_numbers
    assert machine.append == "-root=/dev/vda console=ttyS0"
    assert machine.kernel == "/boot/vmlinuz"
    assert machine.left_out == ()


@pytest.mark.parametrize(
    "flash",
    [
        ("-drive", "if=pflash,unit=1,file=/v", "-drive", "if=pflash,unit=0,file=/c,readonly=on"),
        ("-pflash", "/c", "-pflash", "/v"),
        (
            *("-blockdev", "driver=file,filename=/c,node-name=cf", "-blockdev"),
            *("driver=raw,file=cf,node-name=code", "-machine", "q35,pflash1=vars,pflash0=code"),
            *("-blockdev", json.dumps({"node-name": "vars", "file": {"filename": "/v"}})),
        ),
    ],
)
def test_firmware_is_found_however_it_was_given(flash: tuple[str, ...]) -> None:
    assert read(*flash).pflash == ("/c", "/v")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ({"device": "pflash1"}, True),
        ({"device": "", "qdev": "/machine/system.flash1"}, True),
        ({"device": "", "filename": "/v"}, True),
        ({"device": "", "filename": "/c"}, False),
        ({"device": "pflash0"}, False),
    ],
)
def test_the_disk_with_the_firmwares_variables_is_no_other_disk(
    source: dict[str, str], found: bool
) -> None:
    line = ["qemu-system-x86_64", "-pflash", "/c", "-pflash", "/v"]
    disks = [disk("data", device=""), disk("vars", **source)]
    machine = read_machine(replace(CONFIGURATION, command_line=line), disks)
    assert (machine.variables, "vars" in machine.disks) == ("vars" if found else None, not found)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-device", "virtio-blk-pci,drive=data,serial=S1,bootindex=1,iothread=io"),
         {"driver": "virtio-blk-pci", "serial": "S1", "bootindex": 1}),
        (("-device", json.dumps({"driver": "ide-hd", "drive": "data", "bus": "ide.3"})),
         {"driver": "ide-hd"}),
        (("-device", "nvme,drive=data,logical_block_size=4096,physical_block_size=4096"),
         {"driver": "nvme", "serial": "disk", "logical_block_size": 4096,
          "physical_block_size": 4096}),
        (("-device", "virtio-blk-pci,drive=data,serial=a b,bootindex=-1,logical_block_size=7"),
         {"driver": "virtio-blk-pci"}),
        (("-device", "vfio-pci,host=01:00.0,id=data"), {"driver": "virtio-blk-pci"}),
        (("-drive", "if=virtio,id=data,file=/x"), {"driver": "virtio-blk-pci"}),
        (("-drive", "id=data,file=/x"), {"driver": "ide-hd"}),
        (("-machine", "virt", "-drive", "id=data,file=/x"), {"driver": "virtio-blk-pci"}),
    ],
)  # fmt: skip
def test_a_disk_is_what_it_was(arguments: tuple[str, ...], expected: dict[str, Any]) -> None:
    assert read(*arguments).disks == {"data": expected}


def test_names_that_qemu_invents_tell_the_interface() -> None:
    machine = read(disks=["virtio0", "ide0-hd1", "scsi0-hd0", "other"])
    assert [device["driver"] for device in machine.disks.values()] == [
        *("virtio-blk-pci", "ide-hd", "scsi-hd", "virtio-blk-pci")
    ]


def test_scsi_disks_are_on_the_controllers_that_they_were_on() -> None:
    machine = read(
        *("-device", "lsi,id=old", "-device", "virtio-scsi-pci,id=new,iothread=io"),
        *("-device", "scsi-hd,drive=a,bus=old.0,scsi-id=3,lun=0"),
        *("-device", "scsi-hd,drive=b,bus=new.0,lun=7", "-device", "scsi-hd,drive=c,bus=new.0"),
        disks=["a", "b", "c"],
    )
    assert machine.controllers == (
        {"driver": "lsi", "id": "controller0"},
        {"driver": "virtio-scsi-pci", "id": "controller1"},
    )
    assert machine.disks == {
        "a": {"driver": "scsi-hd", "scsi-id": 3, "lun": 0, "bus": "controller0.0"},
        "b": {"driver": "scsi-hd", "lun": 7, "bus": "controller1.0"},
        "c": {"driver": "scsi-hd", "bus": "controller1.0"},
    }


HOSTILE = (
    *("-netdev", "tap,id=n,script=/opt/evil", "-device", "virtio-net-pci,netdev=n"),
    *("-chardev", "file,id=c,path=/etc/passwd", "-serial", "file:/etc/passwd"),
    *("-device", "vfio-pci,host=01:00.0", "-fsdev", "local,path=/,id=f"),
    *("-object", "memory-backend-file,id=m,mem-path=/etc/shadow,share=on"),
    *("-monitor", "tcp:0.0.0.0:4444", "-incoming", "exec:evil", "-plugin", "/opt/evil.so"),
    *("-readconfig", "/opt/evil", "-D", "/etc/passwd", "-pidfile", "/etc/passwd"),
    *("-fw_cfg", "name=opt/x,file=/etc/shadow", "-tpmdev", "passthrough,id=t,path=/dev/tpm0"),
    *("-M", "q35,memory-backend=m,dtb=/etc/shadow", "--sandbox", "off", "-cpu", "/etc/shadow"),
    *("-drive", "if=none,id=data,file=/etc/shadow", "-virtfs", "local,path=/"),
    *("-\n-netdev", "user", "-device", "\x1b[2J"),
)


def test_what_would_reach_the_host_is_left_out_and_named() -> None:
    machine = read(*HOSTILE, machine="evil,accel=x")
    assert machine == Machine(
        architecture="x86_64",
        machine="q35",
        cpu_count=2,
        memory_bytes=2**30,
        disks={"data": {"driver": "virtio-blk-pci"}},
        left_out=machine.left_out,
    )
    shown = " ".join(machine.left_out)
    for word in ("-netdev", "virtio-net-pci", "vfio-pci", "-object", "-plugin", "-readconfig"):
        assert word in shown
    assert shown.isprintable()


def test_a_program_is_never_taken_from_a_manifest() -> None:
    for program in ("/opt/evil", "qemu-system-x86_64;evil", "/x/qemu-system-../../evil", ""):
        line = [program, "-machine", "q35"]
        assert read_machine(replace(CONFIGURATION, command_line=line), []).architecture is None


SAFE = r"[A-Za-z0-9._:=+-]{1,80}"


@given(
    st.lists(
        st.one_of(
            st.text(max_size=30),
            st.sampled_from(
                [*HOSTILE, "-machine", "-cpu", "-device", "-drive", "-rtc", "-uuid", "-M"]
            ),
            st.from_regex(r"(q35|scsi-hd|nvme|host),(smm|serial|drive|bus|lun)=[^,]{0,9}"),
        ),
        max_size=12,
    )
)
def test_whatever_stands_there_only_harmless_words_come_out(arguments: list[str]) -> None:

    machine = read(*arguments)
    words = [machine.machine or "q35", *machine.machine_options, *machine.cpu]
    for device in (*machine.controllers, *machine.disks.values()):
        assert set(device) <= {
            *("driver", "id", "serial", "bootindex", "bus", "lun", "scsi-id"),
            *("logical_block_size", "physical_block_size"),
        }
        words += [str(value) for value in device.values()]
    assert all(re.fullmatch(SAFE, word) for word in words), words
    assert not any("," in word or "/" in word for word in words)


def test_options_are_read_as_qemu_reads_them() -> None:
    assert split_options("q35,file=/a,,b,x=") == {"q35": "", "file": "/a,b", "x": ""}
    assert split_options('{"a": {"b": true, "c": 1}, "d": "e", "f": [1]}') == {
        "a.b": "on",
        "a.c": "1",
        "d": "e",
    }
    assert split_options("{not json") == {}
