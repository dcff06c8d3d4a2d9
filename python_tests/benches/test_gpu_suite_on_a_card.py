"""The branches of the GPU suite that a card takes, run on the CPU.

Stand-ins replace torch.cuda's clock, memory and properties. Nothing can be said about a card's
results here. But a name that does not exist, a wrong argument or a forgotten column is found.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import types
import weakref

import pytest
import torch

from bench.gpu_parts import factorizations, preflight, shard_plugin, training
from bench.gpu_parts.models import LLAMA_2_7B, LLAMA_3_8B
from bench.gpu_parts.runner import Run
from bench.gpu_parts.step import BYTES_FP32, fitting_layers


class Event:
    """A CUDA event on the host's clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other) -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Makes a `Run` that takes the branches of a card, on CPU tensors of the tiny shapes."""

    class OnCard(Run):
        dry = False

        def found(self) -> list[dict]:
            return [json.loads(line) for line in self.rows.read_text().splitlines()]

    asleep: list[int] = []
    stand_ins = {
        "Event": Event,
        "_sleep": asleep.append,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 2_001_000,
        "mem_get_info": lambda: (2 * 2**30, 80 * 2**30),
        "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=2**20),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    (tmp_path / "rows").touch()
    run = OnCard("it", "cpu", tmp_path / "rows", time.monotonic() + 1e6, 4, {"copy": 1e9, "bf16": 1e9, "tf32": 1e9})
    run.asleep = asleep
    return run


def statuses(run) -> dict[str, int]:
    words = [row["status"].partition(":")[0] for row in run.found()]
    return {word: words.count(word) for word in words}


def test_calls_take_turns_behind_a_waiting_kernel(card):
    called = []
    card.time("three", [lambda i=i: called.append(i) for i in range(3)], repeats=5)
    assert called == [0, 1, 2] + [0, 1, 2, 0, 1]  # each once to warm up
    assert len(card.asleep) == 5
    card.time("waits", lambda: called.append(9), waits=True, repeats=2)
    assert len(card.asleep) == 5 and called[8:] == [9] * 4
    made = []
    card.time("ready", ready=lambda: made.append(1) or (lambda: None), repeats=3)
    assert len(made) == 5 and [row["repeats"] for row in card.found()] == [5, 2, 3]


def test_tensors_beyond_three_times_the_l2_take_turns(card):
    assert (card.sets(2**20), card.sets(2**19), card.sets(2**30), card.sets(10)) == (3, 6, 1, 64)


def test_a_call_that_raises_is_a_row(card):
    def broken():
        raise RuntimeError("out of memory")

    assert card.time("broken", broken, problem="") is None
    assert card.found()[0]["status"] == "failed: RuntimeError: out of memory"


@pytest.mark.native
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("step.llama2", {"ok": 14}),
        ("packed_ops.work", {"not usable": 2, "ok": 10}),  # Triton and native CUDA
        ("weight_grads.work", {"ok": 12, "refused, it is wrong": 3}),  # the fused product is a Triton kernel
        ("masks.selection", {"ok": 8}),
        ("masks.refresh", {"ok": 4}),
    ],
)
def test_the_branches_of_a_card(card, target, expected):
    module, function = target.split(".")
    getattr(importlib.import_module(f"bench.gpu_parts.{module}"), function)(card)
    assert statuses(card) == expected
    rows = [row for row in card.found() if "median_ms" in row]
    assert all(row["host_ms"] > 0 for row in rows)
    for row in rows:
        if row["op"] == "backward":
            assert row["peak_mb"] == 2.0 and "kept_mb" in row
        if row["op"] == "principal_masks":
            assert 0 < row["eigh_share"] < 1


@pytest.mark.native
def test_training_reports_memory_and_frees_each_model(card, monkeypatch):
    # What peft imports when it is used first may log an error. Pytest keeps that, and with it the
    # frames that led there and their model.
    training.METHODS[training.LORA](training.Llama(training.TINY))
    made = []

    class Seen(training.Llama):
        def __init__(self, size):
            assert not [model for model in made if model() is not None]
            super().__init__(size)
            made.append(weakref.ref(self))

    monkeypatch.setattr(training, "SIZE", training.TINY)
    monkeypatch.setattr(training, "Llama", Seen)
    training.work(card)
    rows = card.found()
    assert statuses(card) == {"ok": 6} and [row["variant"] for row in rows] == list(training.METHODS)
    assert all(row["peak_gb"] == 0.002 and row["tokens_per_s"] > 0 for row in rows)
    full, linear, lora, shira, dense, packed = (row["trained"] for row in rows)
    assert full == linear + 2 * 97 * 64 + 5 * 64  # embedding, head and norms
    assert lora == shira and dense == packed and lora == pytest.approx(linear / 20, rel=0.3)
    assert ["ratio" in row for row in rows] == [False] + 5 * [True]


@pytest.mark.native
def test_training_of_the_larger_model_leaves_two_methods_out(card, monkeypatch):
    monkeypatch.setattr(training, "LARGE", training.TINY)
    training.large(card)
    names = [training.methods.FULL, training.LORA, training.methods.MATRIX, training.methods.PACKED]
    assert statuses(card) == {"ok": 4} and [row["variant"] for row in card.found()] == names
    assert [row.get("baseline") for row in card.found()] == [None] + 3 * [names[0]]


def test_training_counts_the_products_of_each_method():
    counted = {name: training.flops(name, 100, 10, 7) for name in training.METHODS}
    assert counted.pop(training.methods.FULL) == 6 * 110 and counted.pop(training.LORA) == 4 * 110 + 6 * 7
    assert set(counted.values()) == {6 * 100 + 4 * 10}


def test_shira_has_the_masks_of_peft():
    """Those that peft draws for each layer by itself."""
    found = []
    for build in (training.shira, training.methods.adapter("ShiraConfig", random_seed=0)):
        model = training.Llama(training.TINY)
        build(model)
        found.append([m.shira_indices["default"] for m in model.modules() if hasattr(m, "shira_indices")])
    assert len(found[0]) == 14 and all(map(torch.equal, *found))


def test_eigenproblems_and_rates(card, monkeypatch):
    solve = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: solve(gram[:, :8, :8]))
    monkeypatch.setattr(factorizations, "symmetric_eigen", lambda gram: solve(gram))
    factorizations.eigenproblems(card)
    shapes = ["1 of 512 x 512", "1 of 256 x 256", "32 of 256 x 256", "32 of 128 x 128"]
    assert [(row["variant"], row["shape"]) for row in card.found()] == [
        ("torch.linalg.eigh", "1 of 4096 x 4096"),
        *((name, shape) for shape in shapes for name in ("torch.linalg.eigh", "symmetric_eigen")),
    ]
    assert all(row["eigh_cost"] > 0 for row in card.found()) and statuses(card) == {"ok": 9}
    assert Run.dry.fget(card) and not card.dry


def test_wrong_eigenvectors_are_seen():
    gram = torch.randn(3, 20, 40) @ torch.randn(3, 40, 20)
    gram = gram @ gram.mT
    values, vectors = torch.linalg.eigh(gram)
    assert factorizations.not_eigen(gram, values, vectors) == ""
    assert factorizations.not_eigen(gram, values, vectors.flip(-1)).startswith("off by ")
    assert factorizations.not_eigen(gram, values, 2 * vectors).startswith("off by 3")


def test_fp32_takes_the_layers_that_fit(card, monkeypatch):
    free = 78 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    for model in (LLAMA_2_7B, LLAMA_3_8B):
        layers = fitting_layers(card, model)
        assert 15 <= layers < 32 and layers * model.layer_entries * BYTES_FP32 <= 0.9 * free
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * free, 2 * free))
    assert fitting_layers(card, LLAMA_2_7B) == 32


SANITIZER = """#!/bin/sh
for op in "$@"; do :; done
case "$*" in *racecheck*packed_gather)
    echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"; exit 9;;
*memcheck*gaussian_sketch_) exit 0;; esac
echo "$op: right"
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_sanitizer_found_and_read(card, monkeypatch, tmp_path):
    """Each op has a process of its own.

    What races is named, and so is a process that ends without a word.
    """
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    tool = home / "bin" / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert preflight.sanitizer_path() == str(tool)
    preflight.sanitizer(card)
    memory, race = card.found()
    ops = len(preflight.cases())
    assert memory["status"] == "failed: gaussian_sketch_: " and memory["correct"] == "no"
    assert memory["shape"] == f"{ops - 1} of {ops} ops right, 1 with findings"
    assert race["status"] == "failed: packed_gather: RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    assert race["correct"] == "no"
    tool.write_text(SANITIZER.replace("racecheck*packed_gather", "nothing").replace("*memcheck*", "nothing"))
    preflight.sanitizer(card)
    assert [row["status"] for row in card.found()[2:]] == ["ok", "ok"]
    assert all(row["shape"] == f"{ops} of {ops} ops right, 0 with findings" for row in card.found()[2:])


def test_a_missing_sanitizer_is_named(card, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    preflight.sanitizer(card)
    assert card.found()[0]["status"].startswith("missing: neither in CUDA_HOME/bin nor on PATH")


def test_the_build_names_what_is_missing(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    given = {}

    def child(arguments, **environment):
        given.update(environment, arguments=arguments[1:])
        return real([sys.executable, "-c", "print('built')"])

    real = preflight.child
    monkeypatch.setattr(preflight, "child", child)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    preflight.build(card)
    assert given == {
        "LIFT_CUDA_ARCHS": "90",
        "LIFT_REQUIRE_NATIVE": "1",
        "arguments": ["setup.py", "build_ext", "--inplace"],
    }
    rows = {row["variant"]: row["status"] for row in card.found() if "variant" in row}
    assert rows["backend native-cuda"].startswith("not usable: ") and rows["backend reference"] == "ok"


def test_shards_are_disjoint_and_complete(card, monkeypatch):
    found = []
    for i in range(3):
        monkeypatch.setenv("LIFT_SHARD", f"{i}/3")
        items = list("abcdefgh")
        shard_plugin.pytest_collection_modifyitems(items)
        found.append("".join(items))
    assert found == ["adg", "beh", "cf"]


def test_a_failing_file_in_a_folder_is_named():
    output = "FAILED python_tests/ops/test_packed_ops.py::test_a[x] - E\nERROR python_tests/nn/test_linear.py\n1 failed"
    assert preflight.failed_files(output) == ["ops/test_packed_ops.py", "nn/test_linear.py"]
