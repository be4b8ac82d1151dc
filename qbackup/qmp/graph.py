"""The block graph: which files hold a disk, and who else writes to them inside QEMU.

A printed name does not tell: QEMU prints `json:{…}` for a node that has options, and only the
first of several files. The edges come from `x-debug-query-block-graph`, which is no stable
interface: where QEMU does not have it, or answers otherwise than expected, there is no graph, and
`disks` makes do with names. This module knows nodes; it must not look at files.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from qbackup.errors import MonitorError, MonitorLostError, QmpCommandError
from qbackup.qmp import commands
from qbackup.qmp.monitor import Looker

LOCAL_DRIVERS = frozenset({"file", "host_device", "host_cdrom"})
"""Protocol drivers whose file name is one of QEMU's host."""

UNKNOWN_DRIVER = ""
"""Of a name that QEMU printed without saying what opened it."""

_NODE, _USER, _JOB = "block-driver", "block-backend", "block-job"
_BACKING, _FILE = "backing", "file"
_WRITE = "write"


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What `query-named-block-nodes` says of one node."""

    driver: str
    filename: str
    read_only: bool


class NodeFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file, device or network image that a node has open, by the name that QEMU has for it.

    The disk has what is from `offset_bytes` on, `length_bytes` long (None: to its end).
    `locked` says that QEMU writes to it and so has locked it, unless it was told not to.
    `descriptors` are QEMU's, where it was handed the file open.
    """

    node: str
    driver: str
    name: str
    offset_bytes: int = 0
    length_bytes: int | None = None
    written: bool = False
    locked: bool = False
    descriptors: tuple[int, ...] = ()

    @property
    def may_be_local(self) -> bool:
        """Whether the name is one of QEMU's host, as far as is known."""
        return self.driver in LOCAL_DRIVERS or self.driver == UNKNOWN_DRIVER


class _Edge(msgspec.Struct, frozen=True, kw_only=True):
    parent: int
    child: int
    role: str
    writes: bool
    shares_writing: bool


class _Vertex(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    name: str


class _Visit(msgspec.Struct, frozen=True, kw_only=True):
    """A node to look at. `own`: the guest's writes reach it; `window`: the part that is used."""

    number: int
    own: bool
    window: tuple[int, int | None]


class _RawVertex(msgspec.Struct):
    id: int
    type: str
    name: str


class _RawEdge(msgspec.Struct, rename="kebab"):
    parent: int
    child: int
    name: str
    perm: list[str]
    shared_perm: list[str]


class _RawGraph(msgspec.Struct):
    nodes: list[_RawVertex]
    edges: list[_RawEdge]


class BlockGraph:
    """Nodes, what uses them, and the edges between them."""

    def __init__(self, vertices: Mapping[int, _Vertex], edges: list[_Edge]) -> None:
        self._vertices = vertices
        self._ids = {v.name: number for number, v in vertices.items() if v.kind == _NODE}
        self._below: dict[int, list[_Edge]] = {}
        self._above: dict[int, list[_Edge]] = {}
        for edge in edges:
            self._below.setdefault(edge.parent, []).append(edge)
            self._above.setdefault(edge.child, []).append(edge)
        for children in self._below.values():
            # The same order at every start, the image itself first: stamps depend on it.
            children.sort(key=lambda edge: (edge.role != _FILE, edge.role))

    @property
    def has_jobs(self) -> bool:
        """Whether any block job is there."""
        return any(vertex.kind == _JOB for vertex in self._vertices.values())

    def __contains__(self, node: str) -> bool:
        return node in self._ids

    def child(self, node: str, *roles: str) -> str | None:
        """Return the node below `node` in the first of these roles that there is."""
        edges = self._below.get(self._ids.get(node, -1), [])
        found = {edge.role: self._vertices[edge.child].name for edge in edges}
        return next((found[role] for role in roles if role in found), None)

    def nodes_below(self, node: str) -> frozenset[str]:
        """Return `node` and every node below it."""
        return frozenset(self._vertices[number].name for number in self._reach(node))

    def files_below(self, node: str, facts: Mapping[str, NodeFacts]) -> tuple[NodeFile, ...] | None:
        """Return every file that `node` reads or writes; None if the graph is not complete."""
        if node not in self._ids:
            return None
        files: dict[str, NodeFile] = {}
        seen: set[int] = set()
        waiting = [_Visit(number=self._ids[node], own=True, window=(0, None))]
        while waiting:
            visit = waiting.pop()
            vertex = self._vertices[visit.number]
            known = facts.get(vertex.name)
            if known is None or vertex.kind != _NODE:
                return None
            if visit.number in seen:
                continue
            seen.add(visit.number)
            children = self._below.get(visit.number, [])
            if not children:
                written = self._is_written(visit.number)
                files[vertex.name] = _node_file(
                    vertex.name,
                    known,
                    written=written or (visit.own and not known.read_only),
                    locked=written,
                    window=visit.window,
                )
            waiting += [
                _Visit(
                    number=edge.child,
                    own=visit.own and edge.role != _BACKING,
                    window=_window(known),
                )
                for edge in reversed(children)
            ]
        return tuple(files.values())

    def written_files(self, facts: Mapping[str, NodeFacts]) -> tuple[NodeFile, ...]:
        """Return every local file that anything in this QEMU may write to."""
        return tuple(
            _node_file(name, facts[name], written=True, locked=True, window=(0, None))
            for name, number in self._ids.items()
            if name in facts and facts[name].driver in LOCAL_DRIVERS and self._is_written(number)
        )

    def other_writers(self, node: str) -> tuple[str, ...]:
        """Return who writes to what is below `node` without going through it.

        A job that moves data between a disk's own layers changes nothing that the disk shows.
        """
        if node not in self._ids:
            return ()
        reach = self._reach(node)
        found = []
        for number in reach - {self._ids[node]}:
            above = self._above.get(number, [])
            if any(self._vertices[edge.parent].kind == _JOB for edge in above):
                continue
            for edge in above:
                parent = self._vertices[edge.parent]
                if edge.writes and edge.parent not in reach:
                    found.append(parent.name or "an export")
        return tuple(sorted(set(found)))

    def is_shared(self, user: str) -> bool:
        """Tell whether a device that writes lets others write to its image, too (`share-rw`)."""
        return any(
            edge.writes and edge.shares_writing
            for number, vertex in self._vertices.items()
            if vertex.kind == _USER and vertex.name == user
            for edge in self._below.get(number, [])
        )

    def jobs_on(self, node: str, filters: frozenset[str]) -> tuple[str, ...]:
        """Return the block jobs that use a node, or one of these filters on top of it."""
        waiting, seen, jobs = [self._ids.get(node, -1)], set(), set()
        while waiting:
            number = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            for edge in self._above.get(number, []):
                parent = self._vertices[edge.parent]
                if parent.kind == _JOB:
                    jobs.add(parent.name)
                elif parent.kind == _NODE and parent.name in filters:
                    waiting.append(edge.parent)
        return tuple(sorted(jobs))

    def _reach(self, node: str) -> set[int]:
        waiting, seen = [self._ids[node]] if node in self._ids else [], set[int]()
        while waiting:
            number = waiting.pop()
            if number not in seen:
                seen.add(number)
                waiting += [edge.child for edge in self._below.get(number, [])]
        return seen

    def _is_written(self, number: int) -> bool:
        return any(edge.writes for edge in self._above.get(number, []))


async def query_graph(monitor: Looker) -> BlockGraph | None:
    """Ask for the block graph; None if QEMU does not tell it, or not as we know it.

    Raises:
        MonitorLostError: QEMU went away.
    """
    try:
        raw = await monitor.query(commands.block_graph(), _RawGraph)
    except MonitorLostError:
        raise
    except (QmpCommandError, MonitorError):
        return None
    vertices = {node.id: _Vertex(kind=node.type, name=node.name) for node in raw.nodes}
    names = [vertex.name for vertex in vertices.values() if vertex.kind == _NODE]
    sound = (
        len(vertices) == len(raw.nodes)
        and len(set(names)) == len(names)
        and all(edge.parent in vertices and edge.child in vertices for edge in raw.edges)
    )
    if not sound:
        return None
    edges = [
        _Edge(
            parent=edge.parent,
            child=edge.child,
            role=edge.name,
            writes=_WRITE in edge.perm,
            shares_writing=_WRITE in edge.shared_perm,
        )
        for edge in raw.edges
    ]
    return BlockGraph(vertices, edges)


def json_options(filename: str) -> dict[str, Any]:
    """Return the options in a name of the form `json:{…}`, none if it is not or is cut off."""
    if not filename.startswith("json:"):
        return {}
    try:
        options = json.loads(filename.removeprefix("json:"))
    except (ValueError, RecursionError):
        return {}
    return options if isinstance(options, dict) else {}


def chain_files(names: Iterator[str]) -> tuple[NodeFile, ...] | None:
    """Return files by the names of a disk's layers, where there is no graph."""
    found = tuple(names)
    if not all(found) or any(name.startswith("json:") for name in found):
        return None
    return tuple(NodeFile(node="", driver=UNKNOWN_DRIVER, name=name) for name in found)


def _node_file(
    node: str, known: NodeFacts, *, written: bool, locked: bool, window: tuple[int, int | None]
) -> NodeFile:
    name = known.filename
    if known.driver in LOCAL_DRIVERS:
        path = json_options(name).get("filename")
        name = path if isinstance(path, str) else name
    return NodeFile(
        node=node,
        driver=known.driver,
        name=name,
        offset_bytes=window[0],
        length_bytes=window[1],
        written=written,
        locked=locked,
    )


def _window(known: NodeFacts) -> tuple[int, int | None]:
    """Return which part of its file a raw node uses (QAPI block-core, "BlockdevOptionsRaw")."""
    if known.driver != "raw":
        return 0, None
    options = json_options(known.filename)
    offset, size = _number(options.get("offset")), _number(options.get("size"))
    return offset or 0, size


def _number(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:20])
    is_size = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if is_size and isinstance(value, int) else None
