"""The page is well-formed, needs nothing else, runs nothing, and stays small."""

import base64
import hashlib
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from qbackup.actions.report import MAP_CELLS, Changes, DiskReport, Report, VmReport
from qbackup.catalog.survey import Survey
from qbackup.model.backup import Backup
from qbackup.model.retention import Candidate
from qbackup.repository.found import Outline
from qbackup.ui.report.page import make_page
from qbackup.ui.tables import printable

from ...values import ID1, ID2, VM, backups, make_backup, make_disk_backup, texts

NOW = datetime(2026, 11, 25, tzinfo=UTC)
VOID = {"meta"}
"""Ends with its start; of the pictures only what ends in /> does."""
EMPTY = {"rect", "path"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "a", "section"),
    *("div", "span", "table", "thead", "tr", "th", "td", "time", "svg", "rect", "path"),
}
KIB = 1024


class Page(HTMLParser):
    """Reads a page; refuses what is not closed, runs, or comes from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self.text = ""
        self.style = ""
        self.metas: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ALLOWED
        values = dict(attrs)
        assert len(values) == len(attrs)
        assert not [name for name in values if name.startswith("on") or name in ("style", "src")]
        if tag == "meta":
            self.metas.append(values)
        if "href" in values:
            self.links.append(values["href"] or "")
        if "id" in values:
            self.ids.add(values["id"] or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in EMPTY
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
        else:
            self.text += data


def surveyed(made: list[Backup], problem: str | None = None) -> Survey:
    by_id = {backup.id: backup for backup in made}
    return Survey(
        candidates=[
            Candidate(
                id=i, time=by_id[i].moment.astimezone(UTC), parents={}, problem=problem,
                protected=True,
            )
            for i in sorted(by_id)
        ],
        backups=by_id,
        outlines={backup.id: Outline.of(backup, protected=False) for backup in made},
    )  # fmt: skip


def report(*vms: VmReport, repository: str = "/srv/backups") -> Report:
    return Report(repository=repository, made=NOW, free_bytes=1, total_bytes=2, vms=vms)


@given(st.lists(backups(), max_size=3), texts, texts, st.none() | texts)
def test_whatever_is_in_it_it_is_text(
    made: list[Backup], vm: str, repository: str, problem: str | None
) -> None:
    found = surveyed(made, problem)
    page = make_page(report(VmReport(vm=vm, found=found, disks=[]), repository=repository))
    read = Page(page)
    wanted = [vm, repository, *(backup.label or "" for backup in made)]
    wanted += [problem] if problem and made else []
    assert all(printable(text) in read.text for text in wanted)
    page.encode()
    assert all(link.removeprefix("#") in read.ids for link in read.links)


def test_marks_up_nothing_that_was_named_so() -> None:
    evil = "</td></style><script>alert(1)</script><img src=x onerror=y>&amp;\"'"
    disk = make_disk_backup(ID2, "data", parent=ID1)
    backup = make_backup(ID2, label=evil, disks=[disk], parent=ID1)
    changes = [Changes(backup=backup, densities=[0.0, 0.05, 0.5, 0.9, 1.0])]
    vm = VmReport(
        vm=evil, found=surveyed([backup], evil), disks=[DiskReport(disk=disk, changes=changes)]
    )
    page = make_page(report(vm, repository=evil))
    read = Page(page)
    assert read.text.count(evil) == 5 and "<script" not in page and "<img" not in page
    assert all(f'class="m{number}"' in page for number in range(5))


def test_nothing_is_loaded_and_only_its_own_style_counts() -> None:
    read = Page(make_page(report()))
    (policy,) = (m["content"] for m in read.metas if m.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(read.style.encode()).digest()).decode()
    assert policy is not None and "default-src 'none'" in policy
    assert f"style-src 'sha256-{digest}'" in policy
    assert "prefers-color-scheme: dark" in read.style
    assert not re.search(r"url\(|@import|https?:", read.style)
    assert "no backups yet" in read.text


def many(count: int) -> VmReport:
    """Return a VM with many backups in chains of 24, one an hour."""
    made = []
    for number in range(count):
        moment = NOW - timedelta(hours=count - number)
        backup_id = f"{moment:%Y%m%d-%H%M%S}.000-{number & 0xFFFF:04x}"
        chain = backup_id if number % 24 == 0 else made[-1].chain
        parent = None if number % 24 == 0 else made[-1].id
        made.append(make_backup(backup_id, chain=chain, parent=parent))
    rows = [
        Changes(backup=backup, densities=[cell % 5 / 4 for cell in range(MAP_CELLS)])
        for backup in made[-16:]
    ]
    disks = [DiskReport(disk=made[-1].disks[0], changes=rows)] * 8
    return VmReport(vm=VM, found=surveyed(made), disks=disks)


def test_the_page_stays_small_however_many_backups_there_are() -> None:
    large, larger = many(1000), many(10_000)
    pages = [make_page(report(vm)) for vm in (large, larger)]
    assert all(len(Page(page).text) > 1000 for page in pages)
    assert len(pages[1]) < min(320 * KIB, 1.1 * len(pages[0]))


def test_of_many_vms_the_first_are_shown_in_detail() -> None:
    one = many(3)
    page = make_page(report(*[one] * 2000))
    assert "2000 VMs, the first 30 in detail" in Page(page).text
    assert len(page) < 4096 * KIB
