"""Run every scenario against a real QEMU and compare its transcript with `<scenario>.out`."""

import difflib
import importlib
from pathlib import Path

import pytest
from transcript import Transcript, filtered

HERE = Path(__file__).parent
SCENARIOS = sorted(
    path.stem
    for path in HERE.glob("*.py")
    if path.stem not in {"conftest", "transcript"} and not path.stem.startswith("test_")
)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_the_user_sees(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    module = importlib.import_module(name)
    transcript = Transcript(tmp_path, title=module.__doc__)
    try:
        await module.scenario(transcript)
    finally:
        await transcript.vm.close()
    _compare(HERE / f"{name}.out", transcript.text(), update=pytestconfig.getoption("--update"))


def test_filters_replace_only_what_varies(tmp_path: Path) -> None:
    first, second = "20261123-090000.123-ab12", "20261123-090000.124-ab12"
    printed = [
        f"ID                           SIZE      STORED  CHAIN                     {tmp_path}",
        f"{second}  1.0 MiB  1000.0 KiB  {first}  in 12:03",
        "",
        f"{first} in 0.4 s, 3 in 4, bitmap qbackup-0123456789ab-{second}",
        '{"stored_bytes": 4096, "seconds": 0.25, "copied_bytes": 4096}',
    ]
    assert filtered(printed, folder=tmp_path) == [
        "ID                           SIZE  STORED  CHAIN                     DIR",
        "ID1                       1.0 MiB    SIZE  ID2                       in TIME",
        "",
        "ID2 in TIME, 3 in 4, bitmap qbackup-OWNER-ID1",
        '{"stored_bytes": N, "seconds": N, "copied_bytes": 4096}',
    ]


def test_every_transcript_has_its_scenario() -> None:
    assert sorted(path.stem for path in HERE.glob("*.out")) == SCENARIOS


def _compare(reference: Path, text: str, *, update: bool) -> None:
    if update:
        reference.write_text(text)
        return
    before = reference.read_text() if reference.exists() else ""
    difference = difflib.unified_diff(
        before.splitlines(), text.splitlines(), reference.name, "this run", lineterm="", n=4
    )
    if before != text:
        pytest.fail(
            "\n".join([*difference, "", "If that is what a user should see: pytest --update"]),
            pytrace=False,
        )
