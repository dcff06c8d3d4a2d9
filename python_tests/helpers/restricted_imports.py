"""Processes that can import only some of the installed packages and what these need."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIVE = ("torch", "triton", "numpy", "pytest", "ninja")

TARGET = (*FIVE, "transformers", "accelerate", "peft", "safetensors", "hypothesis")
"""The packages of the machines with a card that the suite is made for."""

SITE = """
import importlib.util, sys
blocked = {blocked!r}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in blocked else found(name, *rest)
sys.meta_path.insert(0, Blocked())
"""


def needed(roots: Sequence[str]) -> set[str]:
    """Names of ``roots`` and of the distributions that they need, without extras."""
    seen, left = set(), list(roots)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        left += [re.match(r"[\w.-]+", line).group() for line in required if "extra ==" not in line]
    return seen


@functools.cache
def installed_modules() -> dict[str, list[str]]:
    """The distributions of each module, as a new process sees them.

    A package that this process has imported may have lengthened ``sys.path``.
    """
    program = "import importlib.metadata, json; print(json.dumps(importlib.metadata.packages_distributions()))"
    return json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)


def blocked_by(roots: Sequence[str]) -> set[str]:
    """The installed modules that neither belong to ``roots`` nor are needed by them."""
    allowed = needed(roots)
    return {
        module
        for module, names in installed_modules().items()
        if not {re.sub(r"[-_.]+", "-", name).lower() for name in names} & allowed and module != "lift_kernels"
    }


def only_allowed_imports(folder: Path, roots: Sequence[str]) -> dict[str, str]:
    """An environment for a child process that cannot import any other installed package."""
    blocked = blocked_by(roots)
    assert {"gguf", "trl", "datasets"} <= blocked
    (folder / "sitecustomize.py").write_text(SITE.format(blocked=blocked))
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
