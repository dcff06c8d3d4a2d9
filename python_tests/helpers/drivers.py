"""The CPU kernels as a program of their own, on this machine or on an emulated one.

`Driver` has the ops of `torch.ops.lift_kernels_native` for CPU tensors. The program is
``drivers/driver.cpp``, which needs no torch.
"""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers.bits import HANG_S
from torch import Tensor

from bench.kernels import cpu

SOURCE = Path(__file__).parents[1] / "drivers" / "driver.cpp"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 4}  # DType of launchers.h


@dataclass(frozen=True)
class Machine:
    """A CPU that runs the driver, by an emulator unless it is this machine's.

    ``levels`` are those that it must have.
    """

    name: str
    architecture: str
    levels: tuple[str, ...]
    emulator: tuple[str, ...] = ()


X86 = tuple(cpu.LEVELS["x86_64"])
EMULATED = (
    Machine("qemu64", "x86_64", (), ("qemu-x86_64", "-cpu", "qemu64")),
    Machine("Nehalem", "x86_64", X86[:1], ("qemu-x86_64", "-cpu", "Nehalem")),
    Machine("Haswell", "x86_64", X86[:2], ("qemu-x86_64", "-cpu", "Haswell")),
    Machine("aarch64", "aarch64", ("aarch64",), ("qemu-aarch64",)),
)


def unavailable(machine: Machine) -> str:
    """Return why a machine cannot be emulated here, or an empty string."""
    if machine.emulator and shutil.which(machine.emulator[0]) is None:
        return f"{machine.emulator[0]} is not on PATH"
    return cpu.missing(machine.architecture)


def link(objects: dict[str, Path], folder: Path, architecture: str) -> Path:
    """Return the driver, linked with the objects of the kernels.

    Emulated programs of another architecture are static, so they need none of its libraries.
    """
    target = folder / f"driver.{architecture}"
    kernels = [file for name, file in objects.items() if name != "bindings"]
    static = ["-static"] if architecture != platform.machine() else []
    own = cpu.compile_object(SOURCE, folder, architecture)
    command = [cpu.tool(architecture, "g++"), *static, own, *kernels, "-pthread", "-o", target]
    subprocess.run(command, check=True)
    return target


def is_split(master: Tensor | None) -> bool:
    """Whether masters are low halves."""
    return master is not None and master.dtype == torch.int16


class Driver:
    """The private native ops, in the driver at one level. Tensors are changed in place."""

    def __init__(self, program: Path, machine: Machine, level: str, folder: Path):
        self.program, self.machine, self.level, self.folder = program, machine, level, folder

    def levels(self) -> tuple[str, ...]:
        """Return the levels that the machine has."""
        return tuple(self._run().stdout.split())

    def sparse_adamw_(
        self,
        *arguments,
        master: Tensor | None = None,
        births: Tensor | None = None,
        bias: Tensor | None = None,
        exp_avg_scale: Tensor | None = None,
        exp_avg_sq_scale: Tensor | None = None,
        inv_scale: float = 1.0,
        packed: bool = False,
        packed_weights: bool = False,
        maximize: bool = False,
        stochastic: bool = False,
        seed: int = 0,
    ) -> None:
        weights, grads, indices, offsets, counts, exp_avg, exp_avg_sq, steps, *scalars = arguments
        dtypes = [DTYPES[tensor.dtype] for tensor in (weights[0], grads[0], exp_avg)]
        settings = [len(weights), *dtypes, packed, stochastic, seed, is_split(master), packed_weights]
        numbers = [*scalars, -inv_scale if maximize else inv_scale]
        arrays = [settings, numbers, offsets, counts, steps, indices, exp_avg, exp_avg_sq, master, births, bias]
        self._call("sparse_adamw", *arrays, exp_avg_scale, exp_avg_sq_scale, *weights, *grads)

    def packed_gather(self, source: Tensor, indices: Tensor, out: Tensor) -> None:
        settings = [DTYPES[source.dtype], DTYPES[out.dtype], indices.numel()]
        self._call("packed_gather", settings, source, indices, out)

    def packed_scatter_(self, dest: Tensor, indices: Tensor, values: Tensor) -> None:
        settings = [DTYPES[dest.dtype], DTYPES[values.dtype], indices.numel()]
        self._call("packed_scatter", settings, dest, indices, values)

    def packed_migrate(self, values: Tensor, old: Tensor, new: Tensor, out: Tensor) -> None:
        settings = [values.element_size(), old.numel(), new.numel()]
        self._call("packed_migrate", settings, values, old, new, out)

    def packed_square_sums(self, grads: list[Tensor], indices: Tensor, offsets, counts, packed: bool) -> Tensor:
        settings = [len(grads), DTYPES[grads[0].dtype], packed]
        sums = torch.empty(sum(-(-count // 8192) for count in counts), dtype=torch.float64)
        self._call("packed_square_sums", settings, offsets, counts, indices, sums, *grads)
        return sums

    def arena_migrate_(
        self, weights, new, indices, offsets, counts, exp_avg, exp_avg_sq, steps, master, births, *scales
    ) -> Tensor:
        settings = [len(weights), DTYPES[weights[0].dtype], DTYPES[exp_avg.dtype], is_split(master)]
        kept = torch.empty(len(weights), dtype=torch.int64)
        arenas = [indices, exp_avg, exp_avg_sq, master, births, *(scales or (None, None))]
        self._call("arena_migrate", settings, offsets, counts, steps, *arenas, kept, *weights, *new)
        return kept

    def lowrank_topk(self, left: Tensor, right: Tensor, low: float, high: float, indices: Tensor) -> float:
        settings = [*left.shape[:1], *right.shape, indices.numel()]
        threshold = torch.empty(1)
        self._call("lowrank_topk", settings, torch.tensor([low, high]), left, right, indices, threshold)
        return threshold.item()

    def panels(self, m: int, n: int, width: int, indices: Tensor) -> list[int]:
        """Return the rows of a panel, then first entry and number of entries of every panel."""
        out = torch.full((2 * m + 1,), -1, dtype=torch.int64)
        self._call("panels", [m, n, width], indices, out)
        return [number for number in out.tolist() if number >= 0]

    def _call(self, op: str, *arguments) -> None:
        """Run one op. Lists are sent as int64, or as float64 if they hold a float."""
        tensors = [
            torch.empty(0)
            if argument is None
            else argument
            if isinstance(argument, Tensor)
            else torch.tensor(
                argument, dtype=torch.float64 if any(isinstance(x, float) for x in argument) else torch.int64
            )
            for argument in arguments
        ]
        problem, results = self.folder / "problem", self.folder / "results"
        with problem.open("wb") as file:
            file.write(struct.pack("<q", len(op)) + op.encode() + struct.pack("<q", len(tensors)))
            for tensor in tensors:
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                file.write(struct.pack("<q", len(data)) + data)
        self._run(self.level, str(problem), str(results))
        data, at = bytearray(results.read_bytes()), 0
        for tensor in tensors:
            (size,) = struct.unpack_from("<q", data, at)
            assert size == tensor.numel() * tensor.element_size()
            if size:
                found = torch.frombuffer(data, dtype=tensor.dtype, count=tensor.numel(), offset=at + 8)
                tensor.copy_(found.view(tensor.shape))
            at += 8 + size
        assert at == len(data)

    def _run(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [*self.machine.emulator, str(self.program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
        assert done.returncode == 0, f"{self.machine.name}: {' '.join(command)}\n{done.stderr}"
        return done
