"""Runs the package on fake CUDA tensors, without a GPU, and records waits and kernel launches.

The device tensors are those of torch's FakeTensorMode: shape, dtype and device without numbers. CPU
tensors stay real, so that host code, such as the tables of a launch, runs as it is. Custom ops run
their bodies and not their fakes. Otherwise a wait inside an op would stay unseen.

What is replaced while a `FakeCuda` is entered, and nothing else:

- the choice of a backend for CUDA tensors, which becomes Triton where an op has it, or what
  ``backends`` names
- ``kernel[grid](...)`` of Triton, and the private CUDA ops, which are only counted; with a CPU
  tensor among their arguments they raise ValueError
- streams, events, device guards and ``pin_memory`` of torch, which need a CUDA build; the guard of
  C++ code is ``device_guard.cpp beside this file``
- ``data_ptr`` of fake tensors, which have no memory: an address that belongs to their storage
- the batched solver of cuSOLVER, which is only counted
- the caches of `DeviceTables`, which start empty and are put back

A number read from the device is 0 or False. Only ``all()``, ``<=`` a number that is not negative,
and what follows from them, is True. A list of positions read from the device is empty. So checks of
values pass, and an iteration that stops where growth is small stops.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
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

from bench.common.device_events import Call, Event, Recording, package_frames, refuse_cpu_tensors
from bench.common.device_stubs import Solvers, device_guard, empty_tables
from lift_kernels.ops import dispatch, symmetric_eigen

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

    Args:
        backends: of ops of the package, by name, in place of Triton.

    Raises RuntimeError where a CUDA op is named and the compiled extension, which has its schema,
    cannot be loaded.
    """

    def __init__(self, backends: Mapping[str, str] | None = None) -> None:
        self._backends = backends or {}
        if "native-cuda" in self._backends.values() and (problem := dispatch._load_native()):
            raise RuntimeError(problem)
        self._recordings: list[Recording] = []
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def recording(self, events: Recording | None = None) -> Iterator[Recording]:
        """Record what happens inside, in ``events`` where it is given."""
        events = events or Recording()
        self._recordings.append(events)
        try:
            yield events
        finally:
            self._recordings.remove(events)

    def wait(self, what: str) -> None:
        """Record that the host waits for the device."""
        if self._recordings:
            event = Event(what, package_frames())
            for recording in self._recordings:
                recording.waited(event)

    def launch(self, what: str, call: Call) -> None:
        """Record one launch."""
        if self._recordings:
            event = Event(what, package_frames())
            for recording in self._recordings:
                recording.launched(event, call)

    def __enter__(self) -> FakeCuda:
        with contextlib.ExitStack() as stack:
            for target, name, stub in self._stubs():
                stack.enter_context(mock.patch.object(target, name, stub))
            stack.enter_context(empty_tables())
            stack.enter_context(device_guard())
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
            named = dict(zip(kernel.arg_names, arguments)) | options
            self.launch(kernel.fn.__name__, Call(kernel, (), named))

        def choose(requested: str | None, device: torch.device, op: str) -> str:
            if device.type != "cuda":
                return chosen(requested, device, op)
            usual = "triton" if "triton" in dispatch.OPS[op] else "reference"
            return requested or self._backends.get(op, usual)

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
            cuda_stream=0,
        )
        yield torch.cuda, "current_stream", lambda device=None: stream
        yield torch.cuda, "Stream", lambda device=None: stream
        yield torch.cuda, "stream", lambda stream: contextlib.nullcontext()
        yield torch.cuda, "synchronize", lambda device=None: self.wait("torch.cuda.synchronize")
        yield torch.cuda, "is_current_stream_capturing", lambda: False
        yield torch.cuda, "current_device", lambda: 0
        yield torch.cuda.tunable, "is_enabled", lambda: False
        yield torch.cuda, "_exchange_device", lambda device: 0
        yield torch.cuda, "_maybe_exchange_device", lambda device: 0
        solver = symmetric_eigen.BatchedSolver(Solvers(self.launch))
        yield symmetric_eigen, "_solver", lambda: solver
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
            return self._launch(func, args, kwargs)
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
            self._launch(func, args, kwargs, out)
        kept = name in KEEPS_TRUE and all(_is_true(t) for t in inputs)
        inverted = name in ("bitwise_not", "logical_not") and not _is_true(inputs[0])
        at_most = name == "le" and not isinstance(args[1], Tensor) and args[1] >= 0
        if name == "all" or kept or inverted or at_most:
            for result in results:
                result._all_true = True
        return out

    def _launch(self, func, args, kwargs, out=None):
        self.cuda.launch(str(func), Call(func, args, kwargs, out))

    # ---- ops that may wait; the name of a method is that of an op --------------------------------

    def _local_scalar_dense(self, func, args, kwargs):
        self.cuda.wait(str(func))
        number, dtype = _is_true(args[0]), args[0].dtype
        return number if dtype == torch.bool else float(number) if dtype.is_floating_point else int(number)

    def _equal(self, func, args, kwargs):
        self._launch(func, args, kwargs)
        self.cuda.wait(str(func))
        return True

    def _nonzero(self, func, args, kwargs):
        self._launch(func, args, kwargs)
        self.cuda.wait(str(func))
        return args[0].new_empty(0, args[0].dim(), dtype=torch.int64)

    def _masked_select(self, func, args, kwargs):
        self._launch(func, args, kwargs)
        self.cuda.wait(str(func))
        return args[0].new_empty(0)

    def _linalg_check_errors(self, func, args, kwargs):
        self.cuda.wait(str(func))

    def _fused_adamw_(self, func, args, kwargs):
        refuse_cpu_tensors(str(func), args[:6])  # Fake tensors let numbers on the CPU pass, which CUDA does not.
        return self._faked(func, "_fused_adamw_", args, kwargs)

    def _linalg_eigh(self, func, args, kwargs):
        out = self._faked(func, "_linalg_eigh", args, kwargs)
        self.cuda.wait(f"{func} checks for errors")
        return out

    def _index(self, func, args, kwargs):
        indices = self._positions(func, args[1])
        if len(indices) != len(args[1]) or any(a is not b for a, b in zip(indices, args[1])):
            self._launch(func, args, kwargs)  # The list is empty here, but not on a device.
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
                what = "nonzero of a mask" if masks else "copy of positions to the device"
                self.cuda.launch(what, Call(what, (index,), {}))
                self.cuda.wait(f"{func} with {'a mask' if masks else 'positions on the CPU'}")
            empty = [torch.empty(0, dtype=torch.int64, device="cuda") for _ in range(index.dim())] if masks else []
            found += empty or [index]
        return found

    def _to_copy(self, func, args, kwargs):
        source, target = args[0], kwargs.get("device") or args[0].device
        if source.device.type == target.type:
            return self._faked(func, "_to_copy", args, kwargs)
        dtype = kwargs.get("dtype") or source.dtype
        out = torch.empty(source.shape, dtype=dtype, device=target) if target.type == "cuda" else None
        self._crossed(Call(func, args, kwargs, out), source.device, target, kwargs.get("non_blocking", False))
        if out is not None:
            return out
        with unset_fake_temporarily():
            return (torch.ones if _is_true(source) else torch.zeros)(source.shape, dtype=dtype)

    def _copy_(self, func, args, kwargs):
        dest, source, *rest = args
        if source.device.type == dest.device.type:
            return self._faked(func, "copy_", args, kwargs)
        non_blocking = rest[0] if rest else kwargs.get("non_blocking", False)
        self._crossed(Call(func, args, kwargs), source.device, dest.device, non_blocking)
        return dest

    def _crossed(self, call, source, dest, non_blocking):
        """A copy between host and device. Without non_blocking CUDA waits in both directions."""
        what = f"{call.op} {source.type} to {dest.type}"
        self.cuda.launch(what, call)
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
