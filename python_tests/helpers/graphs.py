"""CUDA graphs, and their emulation on the CPU, behind one interface.

The emulation records what a step launches, with its very tensors: Triton kernels, which run in the
interpreter, and ops of torch. A replay runs all of it again in the same memory. So a launch that
reads what a refresh has put elsewhere shows without a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lift_kernels.ops import dispatch
from lift_kernels.ops.device_tables import DeviceTables


class CudaGraph:
    """A graph of torch."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @staticmethod
    @contextlib.contextmanager
    def warming_up() -> Iterator[None]:
        """What is to be captured runs here first, on another stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, step: Callable[[], object]) -> None:
        with torch.cuda.graph(self._graph):
            step()

    def replay(self) -> None:
        self._graph.replay()


class CpuGraph:
    """The emulation.

    As on a GPU nothing that is captured takes place before it is replayed, and until then the
    results hold anything. The host reads no tensor, and no table is built.
    """

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    @staticmethod
    @contextlib.contextmanager
    def warming_up() -> Iterator[None]:
        yield

    @torch.no_grad()
    def capture(self, step: Callable[[], object]) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        run = InterpretedFunction.run

        def launch(kernel, *args, **kwargs):
            self._calls.append(lambda: run(kernel, *args, **kwargs))

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(InterpretedFunction, "run", launch))
            stack.enter_context(mock.patch.object(dispatch, "capturing", lambda: True))
            stack.enter_context(mock.patch.object(DeviceTables, "_upload", staticmethod(_refuse_table)))
            capture = stack.enter_context(_Capture(self._calls))
            step()
        for tensor in capture.results:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1 if tensor.dtype == torch.bool else 99)

    @torch.no_grad()
    def replay(self) -> None:
        for call in self._calls:
            call()

    def __len__(self) -> int:
        return len(self._calls)


class _Capture(TorchDispatchMode):
    """Records ops. Those that write are left for the replay, the others make their results here."""

    def __init__(self, calls: list[Callable[[], None]]) -> None:
        super().__init__()
        self.calls = calls
        self.results: list[Tensor] = []  # tensors that hold nothing before the first replay

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "aten" and not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)  # a label of the profiler, or a question about the library
        if func.namespace == "lift_kernels":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        assert func.namespace == "aten", f"{func} is no op of a GPU"
        if _reads(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            with self:  # It may be made of others.
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        returns = [value.alias_info for value in func._schema.returns]
        written = {
            argument.name: value
            for argument, value in _bound(func, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        if written:
            self.calls.append(lambda: func(*args, **kwargs))
            assert len(returns) <= 1, f"{func}: only the written argument can be given back"
            return next(iter(written.values())) if returns else None
        out = func(*args, **kwargs)
        if not any(returns):  # The others are views.
            self.calls.append(lambda: _into(out, func(*args, **kwargs)))
            given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            made = [leaf.detach() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self.results += [tensor for tensor in made if tensor.untyped_storage()._cdata not in given]
        return out


def _bound(func, args, kwargs):
    """The arguments of a schema, with their values."""
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args) and not argument.kwarg_only:
            yield argument, args[place]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _into(results, new) -> None:
    for result, value in zip(tree_leaves(results), tree_leaves(new), strict=True):
        if isinstance(result, Tensor):
            result.copy_(value)


def _reads(func, args) -> bool:
    """Whether the host would have to wait for the result of an op."""
    if func.overloadpacket is torch.ops.aten.index:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _refuse_table(table, device):
    raise RuntimeError("a table is built inside a capture, where it would stay empty")
