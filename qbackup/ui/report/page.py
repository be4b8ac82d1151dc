"""The page: an overview of all VMs, then each with its timeline, chains, changes and backups.

Everything that is not written here comes from elsewhere and goes through `escape`. What is shown
of each VM has a limit, so that the page stays small however many backups there are.
"""

from collections.abc import Iterator
from datetime import datetime

from qbackup.actions.report import MOST_VMS, DiskReport, Report, VmReport
from qbackup.model.quantities import format_age, format_duration, format_size
from qbackup.model.retention import Candidate
from qbackup.ui.report.charts import Span, escape, heat_row, key, lane, strip
from qbackup.ui.report.style import POLICY, STYLE

MOST_CHAINS = 12
MOST_BACKUPS = 25
MOST_OVERVIEW = 1000
MOST_PROBLEMS = 5


def make_page(report: Report) -> str:
    """Write the whole page."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            "<title>qbackup report</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<h1>Backups</h1>",
            f'<p class="quiet">{escape(report.repository)}, {_time(report.made)}, '
            f"{format_size(report.free_bytes)} of {format_size(report.total_bytes)} free</p>",
            *_overview(report),
            *(
                line
                for number, vm in enumerate(report.vms[:MOST_VMS])
                for line in _vm(vm, number, report.made)
            ),
            "</body>",
            "</html>",
            "",
        ]
    )


def _overview(report: Report) -> Iterator[str]:
    yield '<section><div class="scroll"><table>'
    yield _head("VM", "", "Newest backup", "#Backups", "#Chains", "#Stored")
    for number, vm in enumerate(report.vms[:MOST_OVERVIEW]):
        found = vm.found
        name = escape(vm.vm)
        if number < MOST_VMS:
            name = f'<a href="#vm{number}">{name}</a>'
        newest = found.candidates[-1] if found.candidates else None
        stored = sum(outline.stored_bytes for outline in found.outlines.values())
        yield _row(
            f"<td>{name}</td>",
            f"<td>{_damage(sum(one.problem is not None for one in found.candidates))}</td>",
            f"<td>{_ago(newest, report.made) if newest else 'none'}</td>",
            _number(str(len(found.candidates))),
            _number(str(len(found.chains()))),
            _number(format_size(stored)),
        )
    yield "</table></div>"
    if not report.vms:
        yield "<p>There are no backups yet.</p>"
    if (count := len(report.vms)) > MOST_VMS:
        yield (
            f'<p class="quiet">{count} VMs, the first {MOST_VMS} in detail; '
            "name others on the command line to see them.</p>"
        )
    yield "</section>"


def _damage(count: int) -> str:
    return f'<span class="bad">{count} damaged</span>' if count else '<span class="good">ok</span>'


def _vm(vm: VmReport, number: int, now: datetime) -> Iterator[str]:
    found = vm.found
    yield f'<section id="vm{number}">'
    yield f"<h2>{escape(vm.vm)}</h2>"
    if not found.candidates:
        yield "<p>No backups yet.</p></section>"
        return
    problems = list(dict.fromkeys(one.problem for one in found.candidates if one.problem))
    for problem in problems[:MOST_PROBLEMS]:
        yield f'<p class="bad">{escape(problem)}</p>'
    if len(problems) > MOST_PROBLEMS:
        yield f'<p class="bad">and {len(problems) - MOST_PROBLEMS} more problems</p>'
    times = [one.time for one in found.candidates]
    span = Span(min(times), max(times))
    yield from _timeline(vm, span)
    yield from _chain_table(vm, span, now)
    for disk in vm.disks:
        yield from _heat_map(disk)
    yield from _backup_table(vm, now)
    yield "</section>"


def _timeline(vm: VmReport, span: Span) -> Iterator[str]:
    yield "<h3>Stored over time</h3>"
    for kind in ("incremental", "full"):
        made = [
            (one.time, outline.stored_bytes)
            for one in vm.found.candidates
            if (outline := vm.found.outlines.get(one.id)) and outline.kind == kind
        ]
        drawn, largest = lane(span, made, style=kind)
        yield (
            f'<p class="quiet">{key(kind)} {len(made)} {kind}, '
            f"up to {format_size(largest)} in a bar</p>"
        )
        yield drawn
    yield f'<p class="ends"><span>{_time(span.first)}</span><span>{_time(span.last)}</span></p>'


def _chain_table(vm: VmReport, span: Span, now: datetime) -> Iterator[str]:
    chains = vm.found.chains()
    yield f"<h3>Chains{_newest_of(len(chains), MOST_CHAINS)}</h3>"
    yield '<div class="scroll"><table class="chains">'
    for members in reversed(chains[-MOST_CHAINS:]):
        outlines = [vm.found.outlines.get(one.id) for one in members]
        stored = sum(outline.stored_bytes for outline in outlines if outline)
        yield _row(
            f"<td>{_ago(members[0], now)}</td>",
            _number(str(len(members))),
            _number(format_size(stored)),
            f'<td class="wide">{strip(span, members)}</td>',
        )
    yield "</table></div>"


def _heat_map(report: DiskReport) -> Iterator[str]:
    if not report.changes:
        return
    size = format_size(report.disk.virtual_size_bytes)
    yield f"<h3>Where {escape(report.disk.name)} changed</h3>"
    yield '<div class="scroll"><table class="maps">'
    for change in report.changes:
        yield _row(
            f"<td>{_time(change.backup.moment)}</td>",
            f'<td class="wide">{heat_row(change.densities)}</td>',
        )
    yield f'<tr><td></td><td class="wide"><div class="ends"><span>0</span><span>{size}</span></div>'
    yield "</td></tr></table></div>"
    words = ("nothing", "up to 10 %", "up to 50 %", "more", "all")
    keys = " ".join(f"{key(f'm{number}')} {word}" for number, word in enumerate(words))
    yield f'<p class="quiet">{keys}</p>'


def _backup_table(vm: VmReport, now: datetime) -> Iterator[str]:
    yield f"<h3>Backups{_newest_of(len(vm.found.candidates), MOST_BACKUPS)}</h3>"
    yield '<div class="scroll"><table>'
    yield _head("ID", "Age", "Kind", "#Copied", "#Stored", "#Took", "Label")
    for one in reversed(vm.found.candidates[-MOST_BACKUPS:]):
        backup = vm.found.backups.get(one.id)
        marks = ['<span class="bad">damaged</span>'] if one.problem else []
        marks += ['<span class="good">protected</span>'] if one.protected else []
        if backup is None:
            cells = ["<td>?</td>", *map(_number, "???")]
        else:
            copied = sum(disk.copied_bytes for disk in backup.disks)
            cells = [
                f"<td>{backup.kind}</td>",
                _number(format_size(copied)),
                _number(format_size(backup.stored_bytes)),
                _number(format_duration(backup.seconds)),
            ]
            marks += [escape(backup.label)] if backup.label else []
        yield _row(
            f"<td>{one.id}</td>",
            f"<td>{_ago(one, now)}</td>",
            *cells,
            f'<td class="text">{" ".join(marks)}</td>',
        )
    yield "</table></div>"


def _newest_of(count: int, shown: int) -> str:
    return f", the newest {shown} of {count}" if count > shown else ""


def _ago(one: Candidate, now: datetime) -> str:
    age = format_age((now - one.time).total_seconds())
    return f'<time datetime="{one.time.isoformat()}" title="{_local(one.time)}">{age}</time>'


def _time(moment: datetime) -> str:
    return f'<time datetime="{moment.isoformat()}">{_local(moment)}</time>'


def _local(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def _head(*names: str) -> str:
    """Write a table's head; the columns whose names begin with # are numbers."""
    cells = (
        f'<th class="number">{name[1:]}</th>' if name.startswith("#") else f"<th>{name}</th>"
        for name in names
    )
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _row(*cells: str) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _number(text: str) -> str:
    return f'<td class="number">{text}</td>'
