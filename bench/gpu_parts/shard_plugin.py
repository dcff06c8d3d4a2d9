"""pytest plugin: runs every n-th of the collected tests.

``LIFT_SHARD=i/n`` starts at the i-th one. The processes share the compiled kernels.
"""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(trylast=True)  # behind the choice by marks
def pytest_collection_modifyitems(items):
    first, count = map(int, os.environ.get("LIFT_SHARD", "0/1").split("/"))
    items[:] = items[first::count]
