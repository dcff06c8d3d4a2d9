"""Runs the package on fake CUDA tensors, without a GPU, and records waits and kernel launches.

The device tensors are those of torch's FakeTensorMode: shape, dtype and device without numbers. CPU
tensors stay real, so that host code, such as the tables of a launch, runs as it is. Custom ops run
their bodies and not their fakes. Otherwise a wait inside an op would stay unseen.

What is replaced while a `FakeCuda` is entered, and nothing else:

- the choice of a backend for CUDA tensors, which becomes Triton where an op has it
- ``kernel[grid](...)`` of Triton, and the private CUDA ops, which are only counted; with a CPU
  tensor among their arguments they raise ValueError
- streams, events, device guards and ``pin_memory`` of torch, which need a CUDA build; the guard of
  C++ code is ``device_guard.cpp beside this file``
- ``data_ptr`` of fake tensors, which have no memory: an address that belongs to their storage
- the caches of `DeviceTables`, which start empty and are put back

A number read from the device is 0 or False. Only ``all()``, and what follows from it, is True. A
list of positions read from the device is empty. So checks of values pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.common.device_events import Event, Recording, package_frames, refuse_cpu_tensors
from lift_kernels.ops import dispatch
from lift_kernels.ops.device_tables import DeviceTables

NATIVE = "lift_kernels_native"
OF_TORCH = {"aten", "prim", "prims", "profiler", "inductor", "higher_order"}
"""Namespaces of torch's own ops, which have no Python body to run."""

# Views, allocations and metadata. Every other op of torch on a device tensor counts as one launch.
NOT_LAUNCHING = frozenset(
    "_reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_permuted empty_strided expand "
    "is_pinned is_same_size is_set_to lift_fresh movedim narrow new_empty new_empty_strided permute record_stream "
    "resize_ select set_ size slice split split_with_sizes squeeze stride sym_numel sym_size sym_storage_offset "
    "sym_stride t transpose unbind unfold unsqueeze view view_as_complex view_as_real".split()
)
# Tensors made of True alone stay so.
KEEPS_TRUE = frozenset("_to_copy bitwise_and cat clone logical_and select slice stack unbind view".split())


class FakeCuda:
    """A context in which ``device="cuda"`` makes fake tensors, whose waits and launches count.

    Fake tensors must not be used after it.

    >>> with FakeCuda() as cuda:
    ...     x = torch.ones(3, device="cuda")
    ...     with cuda.recording() as events:
    ...         x.sum().item()
    >>> len(events.waits), len(events.launches)
    (1, 1)
    """

    def __init__(self) -> None:
        self._recordings: list[Recording] = []
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record what happens inside."""
        events = Recording()
        self._recordings.append(events)
        try:
            yield events
        finally:
            self._recordings.remove(events)

    def wait(self, what: str) -> None:
        """Record that the host waits for the device."""
        self._note("waits", what)

    def launch(self, what: str) -> None:
        """Record one launch."""
        self._note("launches", what)

    def _note(self, kind: str, what: str) -> None:
        if self._recordings:
            event = Event(what, package_frames())
            for recording in self._recordings:
                getattr(recording, kind).append(event)

    def __enter__(self) -> FakeCuda:
        with contextlib.ExitStack() as stack:
            for target, name, stub in self._stubs():
                stack.enter_context(mock.patch.object(target, name, stub))
            stack.enter_context(_empty_tables())
            stack.enter_context(_device_guard())
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_Device(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _stubs(self) -> Iterator[tuple[Any, str, Any]]:
        """Object, attribute and what replaces it."""
        from triton.runtime.jit import JITFunction

        def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            refuse_cpu_tensors(kernel.fn.__name__, (arguments, options))
            self.launch(kernel.fn.__name__)

        def choose(requested: str | None, device: torch.device, op: str) -> str:
            if device.type != "cuda":
                return chosen(requested, device, op)
            return requested or ("triton" if "triton" in dispatch.OPS[op] else "reference")

        chosen = dispatch.choose
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "lift_kernels":
                yield from ((module, key, choose) for key, value in list(vars(module).items()) if value is chosen)
        yield JITFunction, "run", run
        event = SimpleNamespace(synchronize=lambda: self.wait("Event.synchronize"), query=lambda: True)
        stream = SimpleNamespace(
            record_event=lambda: event,
            wait_event=lambda event: None,
            wait_stream=lambda stream: None,
            synchronize=lambda: self.wait("Stream.synchronize"),
        )
        yield torch.cuda, "current_stream", lambda device=None: stream
        yield torch.cuda, "synchronize", lambda device=None: self.wait("torch.cuda.synchronize")
        yield torch.cuda, "is_current_stream_capturing", lambda: False
        yield torch.cuda, "current_device", lambda: 0
        yield torch.cuda.tunable, "is_enabled", lambda: False
        yield torch.cuda, "_exchange_device", lambda device: 0
        yield torch.cuda, "_maybe_exchange_device", lambda device: 0
        yield Tensor, "pin_memory", lambda tensor, device=None: tensor.clone()
        yield FakeTensor, "data_ptr", _address
        yield FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()


class _Device(TorchDispatchMode):
    """Sees every op: CPU ops run, those on device tensors are recorded and faked."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":  # an attribute, as the device
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if not any(_on_device(leaf) for leaf in leaves):
            kwargs.update({"pin_memory": False} if kwargs.get("pin_memory") else {})
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace == NATIVE:
            refuse_cpu_tensors(str(func), leaves)
            return self.cuda.launch(str(func))
        if func.namespace not in OF_TORCH:
            with self:  # The body: what the dispatcher would run on real CUDA tensors.
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
        with self:  # Below autograd an op that is made of others arrives whole.
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = func._schema.name.partition("::")[2]
        special = getattr(self, f"_{name.lstrip('_')}", None)
        return self._faked(func, name, args, kwargs) if special is None else special(func, args, kwargs)

    def _faked(self, func, name, args, kwargs):
        """The fake result of an op, which counts as a launch unless it is one of the others."""
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise NotImplementedError(f"{func} reads the device: let fake_cuda know its result") from error
        inputs, results = (
            [leaf for leaf in tree_leaves(x) if isinstance(leaf, FakeTensor)] for x in ((args, kwargs), out)
        )
        if name not in NOT_LAUNCHING and (not results or any(result.numel() for result in results)):
            self.cuda.launch(str(func))
        kept = name in KEEPS_TRUE and all(_is_true(t) for t in inputs)
        inverted = name in ("bitwise_not", "logical_not") and not _is_true(inputs[0])
        if name == "all" or kept or inverted:
            for result in results:
                result._all_true = True
        return out

    # ---- ops that may wait; the name of a method is that of an op --------------------------------

    def _local_scalar_dense(self, func, args, kwargs):
        self.cuda.wait(str(func))
        number, dtype = _is_true(args[0]), args[0].dtype
        return number if dtype == torch.bool else float(number) if dtype.is_floating_point else int(number)

    def _equal(self, func, args, kwargs):
        self.cuda.launch(str(func))
        self.cuda.wait(str(func))
        return True

    def _nonzero(self, func, args, kwargs):
        self.cuda.launch(str(func))
        self.cuda.wait(str(func))
        return args[0].new_empty(0, args[0].dim(), dtype=torch.int64)

    def _masked_select(self, func, args, kwargs):
        self.cuda.launch(str(func))
        self.cuda.wait(str(func))
        return args[0].new_empty(0)

    def _linalg_check_errors(self, func, args, kwargs):
        self.cuda.wait(str(func))

    def _fused_adamw_(self, func, args, kwargs):
        refuse_cpu_tensors(str(func), args[:6])  # Fake tensors let numbers on the CPU pass, which CUDA does not.
        return self._faked(func, "_fused_adamw_", args, kwargs)

    def _index(self, func, args, kwargs):
        indices = self._positions(func, args[1])
        if len(indices) != len(args[1]) or any(a is not b for a, b in zip(indices, args[1])):
            self.cuda.launch(str(func))  # The list is empty here, but not on a device.
        return self._faked(func, "index", (args[0], indices), kwargs)

    def _index_put(self, func, args, kwargs):
        values = args[2]
        by_mask = all(index is None or index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if values.numel() != 1 or not values.is_cpu or not by_mask:  # That would be masked_fill.
            self._positions(func, args[1])
        return self._faked(func, "index_put", args, kwargs)

    def _index_put_(self, func, args, kwargs):
        return self._index_put(func, args, kwargs)

    def _positions(self, func, indices):
        """Indices with empty lists in place of masks, whose positions the host has to count."""
        found = []
        for index in indices:
            masks = index is not None and index.dtype in (torch.bool, torch.uint8)
            if masks or (index is not None and index.is_cpu and index.dim()):
                self.cuda.launch("nonzero of a mask" if masks else "copy of positions to the device")
                self.cuda.wait(f"{func} with {'a mask' if masks else 'positions on the CPU'}")
            empty = [torch.empty(0, dtype=torch.int64, device="cuda") for _ in range(index.dim())] if masks else []
            found += empty or [index]
        return found

    def _to_copy(self, func, args, kwargs):
        source, target = args[0], kwargs.get("device") or args[0].device
        if source.device.type == target.type:
            return self._faked(func, "_to_copy", args, kwargs)
        self._crossed(func, source.device, target, kwargs.get("non_blocking", False))
        dtype = kwargs.get("dtype") or source.dtype
        if target.type == "cuda":
            return torch.empty(source.shape, dtype=dtype, device=target)
        with unset_fake_temporarily():
            return (torch.ones if _is_true(source) else torch.zeros)(source.shape, dtype=dtype)

    def _copy_(self, func, args, kwargs):
        dest, source, *rest = args
        if source.device.type == dest.device.type:
            return self._faked(func, "copy_", args, kwargs)
        self._crossed(func, source.device, dest.device, rest[0] if rest else kwargs.get("non_blocking", False))
        return dest

    def _crossed(self, func, source, dest, non_blocking):
        """A copy between host and device. Without non_blocking CUDA waits in both directions."""
        what = f"{func} {source.type} to {dest.type}"
        self.cuda.launch(what)
        if not non_blocking:
            self.cuda.wait(what)


def _on_device(leaf: object) -> bool:
    device = leaf if isinstance(leaf, torch.device) else leaf.device if isinstance(leaf, FakeTensor) else None
    return device is not None and device.type == "cuda"


def _is_true(tensor: Tensor) -> bool:
    return getattr(tensor, "_all_true", False)


def _address(tensor: Tensor) -> int:
    """A number that is unique to the storage of a fake tensor, plus the offset within it."""
    return (tensor.untyped_storage()._cdata << 14) + tensor.storage_offset() * tensor.element_size()


@contextlib.contextmanager
def _empty_tables() -> Iterator[None]:
    """Let the caches of device tables be empty inside, so that no fake table is found later."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "lift_kernels"]
    tables = {id(x): x for module in modules for x in vars(module).values() if isinstance(x, DeviceTables)}
    before = [(table, dict(vars(table))) for table in tables.values()]
    for table, attributes in before:
        vars(table).update({key: type(value)() for key, value in attributes.items() if isinstance(value, dict)})
    try:
        yield
    finally:
        for table, attributes in before:
            vars(table).clear()
            vars(table).update(attributes)


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    library = _guard_library()
    library.put_in()
    try:
        yield
    finally:
        library.take_out()


@functools.cache
def _guard_library() -> ctypes.CDLL:
    torch_folder = Path(torch.__file__).parent
    source, flags = (
        Path(__file__).with_name("device_guard.cpp"),
        ["-std=c++20", "-shared", "-fPIC", "-L", torch_folder / "lib"],
    )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "device_guard.so"
        command = ["g++", source, *flags, "-I", torch_folder / "include", "-o", target, "-lc10"]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(target))
