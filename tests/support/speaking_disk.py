"""A boot sector that says one line on the serial console: what a disk is known by that boots."""

_SAY = bytes.fromhex(
    "fc 31c0 8ed8 be407c"  # ds = 0, si = where the text is
    "ac 84c0 7412 88c4"  # each byte, up to a zero
    "bafd03 ec a820 74f8"  # COM1: wait until it takes one
    "88e0 baf803 ee ebe9"
    "f4 ebfd"  # hlt, again and again
)
_TEXT_OFFSET, _SIGNATURE_OFFSET = 0x40, 510


def boot_sector(text: str) -> bytes:
    """Return the 512 bytes with which the BIOS starts."""
    said = f"{text}\r\n".encode() + b"\0"
    sector = _SAY.ljust(_TEXT_OFFSET, b"\0") + said
    return sector.ljust(_SIGNATURE_OFFSET, b"\0") + b"\x55\xaa"
