"""The option `--update`: write the transcripts instead of comparing them."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register `--update` (for `pytest` from the top, and for `pytest iotests`)."""
    parser.addoption(
        "--update", action="store_true", help="iotests: rewrite the .out files; review the diff"
    )
