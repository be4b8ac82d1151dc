"""The guest agent: the guest may say anything, and all it can do is degrade a backup."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qbackup.qmp.agent import FREEZE_TIMEOUT_S, SYNC_TIMEOUT_S, AgentError, connected

from ..conftest import Clock
from ..fake_qemu import FakeAgent, HangUp, Raw, Refusal, Silence

Start = Callable[..., Awaitable[FakeAgent]]


async def freeze(fake: FakeAgent) -> int:
    """Freeze in a session of its own and return how many file systems were frozen."""
    async with connected(fake.path) as agent:
        return await agent.freeze()


async def test_file_systems_are_frozen_and_thawed(fake_agent: Start) -> None:
    fake = await fake_agent({"guest-fsfreeze-freeze": 3, "guest-fsfreeze-thaw": 2})
    async with connected(fake.path) as agent:
        assert (await agent.freeze(), await agent.thaw()) == (3, 2)
    assert [message["execute"] for message in fake.received] == [
        "guest-sync-delimited",
        "guest-fsfreeze-status",
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-thaw",
    ]


async def test_what_an_earlier_run_left_frozen_is_thawed_first(fake_agent: Start) -> None:
    fake = await fake_agent(
        {
            "guest-fsfreeze-status": "frozen",
            "guest-fsfreeze-freeze": 1,
            "guest-fsfreeze-thaw": 1,
        }
    )
    assert await freeze(fake) == 1
    assert [message["execute"] for message in fake.received][-2:] == [
        "guest-fsfreeze-thaw",
        "guest-fsfreeze-freeze",
    ]


@pytest.mark.parametrize(
    "stale",
    [
        b'{"return": 99}\n',
        b'{"return": {"half an ans',
        b'\xff{"return": 12345}\n',
        b"\xffgarbage\n",
        b"\xff{}\n",
        b"\xff[1]\n",
        b"\xff5\n",
        b"\xffnull\n",
        b"\xff\xff\xff\n",
        b"\xff" + b"[" * 100_000 + b"\n",
        b"\xff" + b"9" * 5000 + b"\n",
        b"x" * 300_000 + b"\n",
    ],
    ids=lambda stale: repr(stale[:25]),
)
async def test_what_the_channel_holds_of_earlier_sessions_is_thrown_away(
    fake_agent: Start, stale: bytes
) -> None:
    fake = await fake_agent({"guest-fsfreeze-freeze": 2}, stale=stale)
    assert await freeze(fake) == 2


async def test_an_answer_to_somebody_else_s_greeting_is_not_ours(fake_agent: Start) -> None:
    def sync(number: int) -> bytes:
        wrong, right = (json.dumps({"return": n}).encode() for n in (number + 1, number))
        return b"\xff" + wrong + b"\n\xff" + right

    fake = await fake_agent({"guest-fsfreeze-freeze": 2}, sync=sync)
    assert await freeze(fake) == 2


async def test_an_agent_that_never_answers_is_told_in_time(fake_agent: Start, clock: Clock) -> None:
    fake = await fake_agent(deaf=True)
    freezing = asyncio.create_task(freeze(fake))
    await fake.silent.wait()
    clock.advance(SYNC_TIMEOUT_S + 1)
    with pytest.raises(AgentError, match="no answer to guest-sync-delimited in 5 s"):
        await freezing


async def test_an_agent_that_hangs_while_it_freezes_is_told_in_time(
    fake_agent: Start, clock: Clock
) -> None:
    fake = await fake_agent({"guest-fsfreeze-freeze": Silence()})
    freezing = asyncio.create_task(freeze(fake))
    await fake.silent.wait()
    clock.advance(SYNC_TIMEOUT_S + 1)
    await asyncio.sleep(0)
    assert not freezing.done()  # a guest may take its time to write everything out
    clock.advance(FREEZE_TIMEOUT_S)
    with pytest.raises(AgentError, match="no answer to guest-fsfreeze-freeze in 20 s"):
        await freezing


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Refusal(description="disabled in the configuration"), "disabled in the configuration"),
        (HangUp(), "the connection ended during guest-fsfreeze-freeze"),
        (Raw(b'{"return": '), None),
        (Raw(b"garbage\n"), None),
        (Raw(b"\xff\xfe\n"), None),
        (Raw(b"[]\n"), None),
        (Raw(b"5\n"), None),
        (Raw(b"null\n"), None),
        (Raw(b"{}\n"), None),
        (Raw(b'{"error": "no"}\n'), None),
        (Raw(b'{"error": null}\n'), None),
        (Raw(b'{"error": {"desc": 5}}\n'), None),
        (Raw(b'{"return": null}\n'), None),
        (Raw(b'{"return": {}}\n'), None),
        (Raw(b'{"return": "many"}\n'), None),
        (Raw(b'{"return": [1]}\n'), None),
        (Raw(b'{"return": 1e999}\n'), None),
        (Raw(b"x" * (2 * 1024 * 1024) + b"\n"), None),
        (Raw(b"[" * 100_000 + b"\n"), None),
        (Raw(b'{"return": ' + b"9" * 5000 + b"}\n"), None),
    ],
    ids=lambda value: repr(value)[:50],
)
async def test_whatever_the_guest_answers_is_at_worst_an_agent_error(
    fake_agent: Start, reply: object, said: str | None
) -> None:
    def answer(_: dict[str, Any]) -> object:
        if isinstance(reply, Raw) and not reply.data.endswith(b"\n"):
            asyncio.get_running_loop().call_soon(fake.hang_up)  # closed in the middle of a reply
        return reply

    fake = await fake_agent({"guest-fsfreeze-freeze": answer})
    with pytest.raises(AgentError) as caught:
        await freeze(fake)
    assert caught.value.message.startswith("guest agent: ")
    assert said is None or said in caught.value.message


async def test_a_channel_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match=r"nowhere\.sock: No such file"):
        async with connected(tmp_path / "nowhere.sock"):
            pass


async def test_a_channel_that_closes_at_once_is_told(fake_agent: Start) -> None:
    fake = await fake_agent(sync=lambda number: b"")
    connecting = asyncio.create_task(freeze(fake))
    await fake.connected.wait()
    fake.hang_up()
    with pytest.raises(AgentError, match="the connection ended"):
        await connecting
