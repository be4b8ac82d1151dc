"""Which variants of the tests with a real QEMU are run; the Ceph that tests share."""

import os
from collections import defaultdict

import pytest
from support.ceph import Ceph, shared_ceph
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


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Ceph:
    """Return the Ceph of this test run, which all its processes share; it ends with the run."""
    folder, pid = tmp_path_factory.getbasetemp(), os.getpid()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder, pid = folder.parent, os.getppid()
    return shared_ceph(folder / "ceph", until_pid=pid)
