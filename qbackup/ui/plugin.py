"""A VM's health in the words of monitoring plug-ins: Nagios, Icinga, Naemon, Checkmk.

    QBACKUP WARNING - vm1: newest backup was 30 h ago | 'vm1/age'=108000s;93600;180000;0
    WARNING: vm1: newest backup was 30 h ago
    …

The first line is what a person gets by message; after the bar come the numbers that are drawn
(Monitoring Plugins Development Guidelines, "Performance data"); everything else is below.
"""

from typing import Any

from qbackup.model.health import Grade, Health, Measure
from qbackup.ui.tables import printable

EXIT_UNKNOWN = int(Grade.UNKNOWN)

_MOST_TOLD = 3
_MOST_CHARACTERS = 400


def plugin_output(health: Health) -> str:
    """Write the first line, then a line for each finding and each fact."""
    numbers = " ".join(map(_number, health.measures))
    first = _first_line(health.grade, _plain(headline(health))[:_MOST_CHARACTERS])
    return "\n".join(
        [
            f"{first} | {numbers}" if numbers else first,
            *(f"{finding.grade.name}: {_plain(str(finding))}" for finding in health.findings),
            *map(_plain, health.facts),
        ]
    )


def unknown(message: str) -> str:
    """Write what is said if nothing could be found out."""
    return _first_line(Grade.UNKNOWN, _plain(message)[:_MOST_CHARACTERS])


def health_document(health: Health) -> dict[str, Any]:
    """Return the document of `--json`."""
    return {
        "grade": health.grade.name,
        "code": health.grade.value,
        "message": headline(health),
        "findings": [
            {"grade": finding.grade.name, "vm": finding.vm, "text": finding.text}
            for finding in health.findings
        ],
        "measures": [
            {
                "name": measure.name,
                "value": measure.value,
                "unit": measure.unit,
                "warn": measure.warn,
                "critical": measure.critical,
            }
            for measure in health.measures
        ],
    }


def headline(health: Health) -> str:
    """Say the worst first, and not more than a few things."""
    worst = sorted(health.findings, key=lambda finding: -finding.grade)
    if not worst:
        return "; ".join(health.facts[:_MOST_TOLD]) + _more(len(health.facts))
    return "; ".join(map(str, worst[:_MOST_TOLD])) + _more(len(worst))


def _more(count: int) -> str:
    return f"; and {count - _MOST_TOLD} more" if count > _MOST_TOLD else ""


def _first_line(grade: Grade, text: str) -> str:
    return f"QBACKUP {grade.name} - {text}"


def _number(measure: Measure) -> str:
    # "10:" is the range from 10 on, "10" the one from 0 to 10: outside of it is the alarm.
    colon = ":" if measure.low_is_bad else ""
    warn, critical = (
        "" if limit is None else f"{limit:.0f}{colon}" for limit in (measure.warn, measure.critical)
    )
    return f"'{measure.name}'={measure.value:.0f}{measure.unit};{warn};{critical};0"


def _plain(text: str) -> str:
    """Keep what came from elsewhere from ending the line or beginning the numbers."""
    return printable(text).replace("|", "/")
