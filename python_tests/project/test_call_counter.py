"""The call counter of `helpers`, on a package of a few lines whose calls are known."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys

import pytest
from helpers.call_counter import CallCounter

FILES = {
    "__init__.py": "",
    "upper.py": """
from . import lower
from .inner import deep

def run(n):
    mapped = map(lambda x: lower.leaf(x), range(1))
    return helper(n) + sum(lower.leaf(i) for i in range(n)) + len([lower.leaf(i) for i in range(n)]) + sum(mapped)

def helper(n):
    return n

def through_outside(call):
    return call(deep.leaf)

def lazily(items):
    return lower.total(lower.leaf(i) for i in items)
""",
    "lower.py": """
def leaf(x):
    return x

def total(items):
    return sum(items)
""",
    "inner/__init__.py": "",
    "inner/deep.py": """
def leaf():
    return again()

def again():
    return 1
""",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of a package ``counted_package``, which can be imported."""
    folder = tmp_path / "counted_package"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "counted_package"]:
        del sys.modules[name]


@pytest.fixture
def upper(package):
    return importlib.import_module("counted_package.upper")


def test_counts_calls_modules_and_crossings(package, upper):
    with CallCounter(package) as counter:
        upper.run(3)
    # run and helper, and three, three and one calls of leaf.
    assert (counter.calls, counter.modules, counter.crossings) == (9, {"upper.py", "lower.py"}, 8)
    assert counter.edges == {("", "", "upper.py", "run"): 1, ("upper.py", "run", "lower.py", "leaf"): 7}


def test_each_entry_from_outside_is_a_crossing(package, upper):
    with CallCounter(package) as counter:
        upper.helper(1)
        upper.helper(1)
    assert (counter.calls, counter.crossings) == (2, 2)


def test_frames_outside_the_package_are_passed_over(package, upper):
    def outside(function):
        return function()

    with CallCounter(package) as counter:
        upper.through_outside(outside)
    assert counter.edges == {
        ("", "", "upper.py", "through_outside"): 1,
        ("upper.py", "through_outside", "inner/deep.py", "leaf"): 1,
    }
    assert counter.calls == 3


def test_a_generator_expression_belongs_to_the_function_that_holds_it(package, upper):
    with CallCounter(package) as counter:
        upper.lazily([1, 2])
    assert counter.edges == {
        ("", "", "upper.py", "lazily"): 1,
        ("upper.py", "lazily", "lower.py", "total"): 1,
        ("upper.py", "lazily", "lower.py", "leaf"): 2,
    }


def test_nothing_is_counted_outside_the_context(package, upper):
    upper.run(1)
    with CallCounter(package) as counter:
        pass
    with contextlib.suppress(ZeroDivisionError), counter:
        upper.helper(1 // 0)
    upper.run(1)
    assert (counter.calls, counter.crossings, sys.getprofile()) == (0, 0, None)


def test_the_report_names_every_edge(package, upper):
    with CallCounter(package) as counter:
        upper.run(3)
    first, *edges = counter.report().splitlines()
    assert first == "9 calls, 2 modules, 8 crossings"
    assert [re.sub(" +", " ", edge).strip() for edge in edges] == [
        "1 outside -> upper.py run",
        "7 upper.py run -> lower.py leaf",
    ]
