"""UEFI firmware for test VMs (Debian's package ovmf), and variables with a boot entry in them.

The format of the variables is that of EDK II: MdeModulePkg/Include/Guid/VariableFormat.h (the store
and its authenticated variables), and UEFI's `EFI_LOAD_OPTION` in a variable `Boot0000`.
"""

import struct
import uuid
from pathlib import Path

CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
_TEMPLATE = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
_GLOBAL = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c").bytes_le
_HEADER = struct.Struct("<HBBIQ16sIII16s")
_START, _ADDED, _KEPT = 0x55AA, 0x3F, 0x7
_STORE_HEADER_BYTES = 28


def variables_with_entry(title: str) -> bytes:
    """Return variables whose only boot entry has a title; the firmware says it when it tries it."""
    path = "\\EFI\\nothing.efi\0".encode("utf-16-le")
    device = struct.pack("<BBH", 4, 4, 4 + len(path)) + path + b"\x7f\xff\x04\x00"
    option = struct.pack("<IH", 1, len(device)) + f"{title}\0".encode("utf-16-le") + device
    data = bytearray(_TEMPLATE.read_bytes())
    (volume_header_bytes,) = struct.unpack_from("<H", data, 0x30)
    offset = volume_header_bytes + _STORE_HEADER_BYTES
    while (header := _HEADER.unpack_from(data, offset))[0] == _START:
        offset = _aligned(offset + _HEADER.size + header[7] + header[8])
    for name, content in (("Boot0000", option), ("BootOrder", bytes(2))):
        wide = f"{name}\0".encode("utf-16-le")
        variable = (
            _HEADER.pack(
                _START, _ADDED, 0, _KEPT, 0, bytes(16), 0, len(wide), len(content), _GLOBAL
            )
            + wide
            + content
        )
        data[offset : offset + len(variable)] = variable
        offset = _aligned(offset + len(variable))
    return bytes(data)


def _aligned(offset: int) -> int:
    return -(-offset // 4) * 4
