"""What a push takes along, what it looks at again, and what it leaves for who watches."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from support.chains import VM, chain_id
from support.remotes import Host, add_backup, visible

from qbackup.actions import push as module
from qbackup.actions.push import push
from qbackup.actions.transfer import Transfer, TransferOptions
from qbackup.errors import AlreadyPushingError, RemoteDamagedError, RemoteMissingError
from qbackup.formats.configuration import Remote
from qbackup.formats.remote_url import parse_remote_url
from qbackup.remote.opened import OpenedRemote, open_remote
from qbackup.repository.last_push import read_last_push
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory

from ..conftest import RecordingReporter

A, B, C = (chain_id(number) for number in range(3))


class Watching(RecordingReporter):
    """A reporter that does something when a backup has been put."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__()
        self._then = then

    def notice(self, message: str) -> None:
        super().notice(message)
        if message.endswith("is in nas"):
            self._then()


@pytest.fixture
async def here(tmp_path: Path) -> Host:
    """Return a host with a full and an incremental, and a directory as its remote."""
    (tmp_path / "nas").mkdir()
    made = Host(folder=tmp_path / "here", url=str(tmp_path / "nas"))
    made.repository_id = (await Repository.create(made.repository)).id
    add_backup(made, 0, parent=None)
    add_backup(made, 1, parent=0)
    return made


def opened(here: Host) -> OpenedRemote:
    return open_remote(Remote(name="nas", place=parse_remote_url(here.url)))


def state(here: Host) -> StateDirectory:
    return StateDirectory(here.folder / "state", VM)


async def pushed(here: Host, reporter: RecordingReporter) -> Transfer:
    repository = Repository.open(here.repository)
    return await push(repository, VM, opened(here), TransferOptions(), reporter, state=state(here))


async def test_what_is_backed_up_meanwhile_is_put_too(here: Host) -> None:
    def back_up() -> None:
        if not (here.repository / VM / C).exists():
            add_backup(here, 2, parent=1)

    done = await pushed(here, Watching(back_up))
    assert [one.id for one in done.done] == [A, B, C]
    assert await visible(opened(here).store, here.repository_id) == [A, B, C]
    last = read_last_push(state(here), "nas")
    assert last is not None and last.newest == C


async def test_what_is_removed_again_and_again_is_not_put_for_ever(here: Host) -> None:
    folder = Path(here.url) / here.repository_id / VM / A

    def remove() -> None:
        (folder / "manifest.json").unlink(missing_ok=True)

    done = await pushed(here, Watching(remove))
    assert [one.id for one in done.done] == [A, B]
    # Each time under new names.
    assert len(list(folder.glob("data.qcow2*"))) == 4


async def test_after_days_it_is_looked_whether_the_files_are_still_there(
    here: Host, monkeypatch: pytest.MonkeyPatch, reporter: RecordingReporter
) -> None:
    monkeypatch.setattr(module, "BELIEVED_S", -1)
    put_files = module.put_files

    async def put_and_lose(*arguments: object, **keywords: object) -> object:
        ready = await put_files(*arguments, **keywords)  # type: ignore[arg-type] # as it is called
        (Path(here.url) / here.repository_id / VM / A / "data.qcow2").unlink(missing_ok=True)
        return ready

    monkeypatch.setattr(module, "put_files", put_and_lose)
    with pytest.raises(RemoteDamagedError, match="is not there any more"):
        await pushed(here, reporter)
    assert await visible(opened(here).store, here.repository_id) == []
    monkeypatch.undo()
    await pushed(here, reporter)
    assert await visible(opened(here).store, here.repository_id) == [A, B]


async def test_one_at_a_time_pushes_a_vm(here: Host, reporter: RecordingReporter) -> None:
    other = await asyncio.create_subprocess_exec(
        "python3", "-c",
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()",
        str(_lock_file(here)), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert other.stdout is not None
    await other.stdout.readline()
    with pytest.raises(AlreadyPushingError):
        await pushed(here, reporter)
    await other.communicate(b"")
    await pushed(here, reporter)


def _lock_file(here: Host) -> Path:
    state(here).create()
    return state(here).path / ".push-nas"


async def test_how_far_a_push_got_is_kept_if_it_fails_then(
    here: Host, reporter: RecordingReporter
) -> None:
    await pushed(here, reporter)
    add_backup(here, 2, parent=1)
    path = Path(here.url)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(RemoteMissingError):
        await pushed(here, reporter)
    last = read_last_push(state(here), "nas")
    assert last is not None and last.newest == B


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"ended_s": -1, "newest": "x"}', '{"ended_s": 1, "newest": "../x"}']
)
def test_what_is_no_record_of_a_push_is_none(tmp_path: Path, text: str) -> None:
    found = StateDirectory(tmp_path, VM)
    found.create()
    found.last_push("nas").write_text(text)
    assert read_last_push(found, "nas") is None
