"""Which variants of the tests with a real QEMU are run."""

from collections import defaultdict

import pytest
from support.sweeps import EVERYTHING, sampled


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out variants where everything is tested at once, which has to be done in time.

    Who names tests, or wants every step and variant (support/sweeps.py), gets what was asked for.
    """
    if EVERYTHING or config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    variants: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.parent == config.rootpath / "tests/integration":
            variants[item.nodeid.partition("[")[0]].append(item)
    left_out: set[pytest.Item] = set()
    for name, same in variants.items():
        left_out |= set(same) - set(sampled(name, same))
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
