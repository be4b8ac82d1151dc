"""What monitoring reads: one first line with numbers behind one bar, whatever the texts are."""

import re

from hypothesis import given
from hypothesis import strategies as st

from qbackup.model.health import Finding, Grade, Health, Measure
from qbackup.ui.plugin import plugin_output, unknown

from ..values import safe_names, texts

FIRST = re.compile(r"QBACKUP (OK|WARNING|CRITICAL) - [^|\n]*(?: \| [^|\n]+)?\Z")
NUMBER = re.compile(r"'[^'=]+'=\d+(s|B|);(\d+:?)?;(\d+:?)?;0\Z")

numbers = st.floats(0, 2**63)
measures = st.builds(
    Measure,
    name=safe_names.map(lambda name: f"{name}/age"),
    value=numbers,
    unit=st.sampled_from(["s", "B", ""]),
    warn=st.none() | numbers,
    critical=st.none() | numbers,
    low_is_bad=st.booleans(),
)
findings = st.builds(
    Finding,
    grade=st.sampled_from([Grade.WARNING, Grade.CRITICAL]),
    vm=st.none() | safe_names,
    text=texts,
)
healths = st.builds(
    Health,
    findings=st.lists(findings, max_size=6),
    measures=st.lists(measures, max_size=3),
    facts=st.lists(texts, max_size=5),
)


@given(healths)
def test_no_text_ends_the_line_or_begins_the_numbers(health: Health) -> None:
    first, *below = plugin_output(health).split("\n")
    match = FIRST.match(first)
    assert match and match.group(1) == health.grade.name
    assert len(below) == len(health.findings) + len(health.facts)
    assert not any("|" in line for line in below)
    shown = first.partition(" | ")[2]
    if health.measures:
        assert all(NUMBER.match(number) for number in shown.split(" "))
        assert len(shown.split(" ")) == len(health.measures)


def test_the_worst_comes_first_and_the_rest_is_counted() -> None:
    warnings = [Finding(grade=Grade.WARNING, vm=f"vm{n}", text="old") for n in range(4)]
    health = Health(findings=[*warnings, Finding(grade=Grade.CRITICAL, vm="db", text="lost")])
    first, *below = plugin_output(health).split("\n")
    assert first == "QBACKUP CRITICAL - db: lost; vm0: old; vm1: old; and 2 more"
    assert below[-1] == "CRITICAL: db: lost"


def test_a_lower_limit_is_a_range_from_it_on() -> None:
    free = Measure(name="free", value=7, unit="B", warn=10, critical=5, low_is_bad=True)
    age = Measure(name="age", value=7, unit="s", warn=10)
    first = plugin_output(Health(measures=[free, age], facts=["all is well"]))
    assert first.startswith("QBACKUP OK - all is well | 'free'=7B;10:;5:;0 'age'=7s;10;;0\n")


def test_what_is_not_known_is_one_line() -> None:
    assert unknown("a|b\nc") == "QBACKUP UNKNOWN - a/b\\x0ac"
