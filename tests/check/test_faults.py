"""Kills at named points, the quick ones: tests/proof/fault_points.py has them all, and says how each is made."""

from __future__ import annotations

import concurrent.futures
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "proof"))

import fault_points


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    """Side by side: most of the time they wait for a process to start."""
    folder = tmp_path_factory.mktemp("faults")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(fault_points.POINTS[name], fault_points.Stage(folder / name)) for name in fault_points.QUICK}
    fault_points.end_processes(folder)


@pytest.mark.parametrize("name", fault_points.QUICK)
def test_a_kill_at(plays, name):
    plays[name].result(120)
