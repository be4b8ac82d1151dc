"""The picture of a bitmap: right places, right shapes, colour only where it is wanted."""

from hypothesis import given
from hypothesis import strategies as st

from qbackup.model.bitmap import Bits, Fill
from qbackup.ui.heat_map import heat_map
from qbackup.ui.terminal import Style

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
PLAIN = Style(columns=80, colour=False, drawing=False)


def one_gibibyte(*dirty: int) -> Bits:
    data = bytearray(GIB // (64 * KIB) // 8)
    for granule in dirty:
        data[granule // 8] |= 1 << granule % 8
    return Bits.from_bytes(data, virtual_size_bytes=GIB, granularity_bytes=64 * KIB)


def rows(bits: Bits, style: Style = PLAIN) -> list[str]:
    return heat_map(bits, style).split("\n\n")[0].split("\n")


def test_every_density_has_a_shape_of_its_own() -> None:
    dirty = [16, *range(32, 36), *range(48, 60), *range(64, 80)]
    first, *others = rows(one_gibibyte(*dirty))
    assert first.split() == ["0", "B", "." + "-+*#" + "." * 59]
    assert all(set(row.split()[-1]) == {"."} for row in others)
    blocks = heat_map(one_gibibyte(*dirty), Style(columns=80, colour=False, drawing=True))
    assert "·░▒▓█·" in blocks


def test_each_row_begins_with_its_offset() -> None:
    offsets = [" ".join(row.split()[:2]) for row in rows(one_gibibyte(GIB // (64 * KIB) - 1))]
    assert offsets[:3] == ["0 B", "64.0 MiB", "128.0 MiB"]
    assert len(offsets) == 16
    assert rows(one_gibibyte(GIB // (64 * KIB) - 1))[-1].endswith(".-")


def test_a_disk_of_one_granule_is_one_character() -> None:
    bits = Bits.from_bytes(b"\1", virtual_size_bytes=512, granularity_bytes=64 * KIB)
    assert [row.split() for row in rows(bits)] == [["0", "B", "#"]]


def test_a_full_disk_is_full() -> None:
    bits = Bits.from_parts([Fill.ONES] * 32, virtual_size_bytes=TIB, granularity_bytes=64 * KIB)
    assert {row.split()[-1] for row in rows(bits)} == {"#" * 64}


def test_colours_change_nothing_but_colours() -> None:
    bits = one_gibibyte(*range(100), 5000)
    coloured = heat_map(bits, Style(columns=80, colour=True, drawing=False))
    assert "\x1b[" in coloured
    for code in ("\x1b[0m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[36m"):
        coloured = coloured.replace(code, "")
    assert coloured == heat_map(bits, PLAIN)


@given(st.integers(1, 300), st.integers(1, 5000))
def test_rows_fit_the_terminal(columns: int, granules: int) -> None:
    bits = Bits.empty(virtual_size_bytes=granules * 64 * KIB, granularity_bytes=64 * KIB)
    style = Style(columns=columns, colour=False, drawing=True)
    assert all(len(row) <= max(columns, 20) for row in rows(bits, style))
