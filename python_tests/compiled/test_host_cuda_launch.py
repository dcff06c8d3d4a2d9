"""Which device a launch of a CUDA op runs on, with a CUDA runtime that only takes notes.

The extension links a CUDA runtime of its own. Torch's guard, which the binding holds, remembers and
restores the device that is current for torch. The launch must make its own device current, and must
not restore what its own runtime takes for the current one.
"""

from __future__ import annotations

import ctypes
import re

from helpers.host_cuda import ROOT, library

RUNTIME = """
#pragma once
using cudaStream_t = struct Stream*;
extern "C" {
extern int devices[8], calls;
}
inline int cudaSetDevice(int device) { return devices[calls++] = device, 0; }
inline int cudaGetDevice(int* device) {
  *device = 0;
  return devices[calls++] = -1, 0;
}
"""
HARNESS = """
#include "launch.h"
extern "C" {
int devices[8], calls;
}
extern "C" void* stream_of(int device, void* handle) {
  return lift::cuda_stream(lift::DeviceStream{device, handle});
}
"""


def test_a_launch_makes_the_device_of_its_stream_current(tmp_path):
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "cuda_bf16.h").write_text("struct __nv_bfloat16 {};")
    (tmp_path / "cuda_fp16.h").write_text("struct __half {};")
    (tmp_path / "harness.cpp").write_text(HARNESS)
    host = library(tmp_path / "harness.cpp", tmp_path, f"-I{tmp_path}")
    host.stream_of.argtypes, host.stream_of.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    assert host.stream_of(1, 0x1234) == 0x1234
    assert host.stream_of(0, 0x5678) == 0x5678
    assert list((ctypes.c_int * 8).in_dll(host, "devices"))[: ctypes.c_int.in_dll(host, "calls").value] == [1, 0]


def test_every_launch_is_on_such_a_stream():
    """And every binding holds torch's guard while it calls a launch."""
    for file in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        text = re.sub(r"const cudaStream_t launch_stream = cuda_stream\(stream\);", "", file.read_text())
        launches = re.findall(r"<<<[^;]*?, 0, (\w+(?:\(\w+\))?)>>>", text)
        assert len(launches) == text.count("<<<") > 0
        assert set(launches) <= {"cuda_stream(stream)", "launch_stream"}, file.name
    bindings = (ROOT / "csrc/bindings.cpp").read_text()
    calls = re.findall(r"check_cuda\(lift::(\w+)_cuda\((.*?)\)\);\n", bindings, re.DOTALL)
    assert len(calls) == len(re.findall(r"m\.impl\(\"\w+\", TORCH_BOX\(&\w+_on_cuda\)\)", bindings)) > 0
    assert all(re.search(r"current_stream\(\w+\)$", arguments) for _, arguments in calls)
    assert "torch::stable::accelerator::DeviceGuard guard;" in bindings
