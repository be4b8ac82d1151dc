"""What this QEMU understands, asked of itself instead of guessed from its version."""

import msgspec

from qbackup.qmp import commands
from qbackup.qmp.monitor import Monitor


class _Member(msgspec.Struct):
    name: str | None = None  # a variant of an alternate has none


class _Entity(msgspec.Struct, rename="kebab"):
    name: str
    meta_type: str
    arg_type: str | None = None
    members: list[_Member] = []


async def has_argument(monitor: Monitor, command: str, argument: str) -> bool:
    """Tell whether a QMP command takes an argument of that name (QAPI introspect)."""
    schema = await monitor.query(commands.query("qmp-schema"), list[_Entity])
    kinds = {entity.name: entity for entity in schema if entity.meta_type in ("command", "object")}
    described = kinds.get(command)
    argument_type = kinds.get(described.arg_type or "") if described else None
    return argument_type is not None and any(m.name == argument for m in argument_type.members)
