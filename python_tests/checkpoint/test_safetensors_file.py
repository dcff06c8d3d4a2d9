"""Safetensors files with every dtype and form that the format allows, through a delta and back."""

from __future__ import annotations

import pytest
import torch
from helpers.files import write_raw
from safetensors.torch import load_file

from lift_kernels import apply_delta, delta_info, revert_delta, save_delta
from lift_kernels.checkpoint.safetensors_file import TensorFile, save_tensors
from lift_kernels.checkpoint.training_state import load_checkpoint, save_checkpoint
from lift_kernels.errors import FileError

KNOWN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors 0.8 with whole bytes."""
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BYTES = bytes(range(1, 65))


def data(dtype: str, entries: int) -> bytes:
    bits = BITS.get(dtype) or 8 * KNOWN[dtype].itemsize
    return bytes(entries * bits // 8) if dtype == "BOOL" else (BYTES * 4)[: entries * bits // 8]


def checkpoint(path, first: float, **others) -> dict:
    """A file with one fp32 tensor, which begins with ``first``, and the others."""
    values = torch.tensor([first, 2.0, 3.0])
    return write_raw(path, {"a": ("F32", [3], values.numpy().tobytes())} | others)


@pytest.mark.parametrize("dtype", [*KNOWN, *BITS, "F3_NEW", "MXFP4"])
def test_tensors_of_any_dtype_pass_through_a_delta(tmp_path, dtype):
    """Also those of dtypes that torch, or everyone so far, lacks."""
    content = data(dtype, 8) if dtype in KNOWN or dtype in BITS else BYTES[:5]
    others = {"b": (dtype, [2, 4], content), "c": ("U8", [1], b"x")}
    base, model = checkpoint(tmp_path / "base", 1.0, **others), checkpoint(tmp_path / "model", 5.0, **others)
    info = save_delta(model, base, tmp_path / "d")
    assert info.counts == {"a": 1} and set(info.unchanged) == {"b", "c"}
    shape = (2, 2) if dtype == "F4" else (2, 4)
    assert info.unchanged["b"] == (KNOWN.get(dtype, torch.float4_e2m1fn_x2 if dtype == "F4" else dtype), shape)
    apply_delta(base, tmp_path / "d", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == model.read_bytes()
    revert_delta(model, tmp_path / "d", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == base.read_bytes()
    changed = others | {"b": (dtype, [2, 4], bytes([content[0] ^ 1]) + content[1:])}
    checkpoint(tmp_path / "other", 1.0, **changed)
    with pytest.raises(FileError, match="a tensor that the delta does not change holds other values"):
        apply_delta(tmp_path / "other", tmp_path / "d", tmp_path / "out2")


@pytest.mark.parametrize("dtype", [*KNOWN, "F4"])
def test_changes_of_every_dtype_of_torch_are_exact(tmp_path, dtype):
    content = data(dtype, 8)
    flipped = bytes([content[0] ^ 1]) + content[1:]
    base = write_raw(tmp_path / "base", {"a": (dtype, [8], content)})
    model = write_raw(tmp_path / "model", {"a": (dtype, [8], flipped)})
    info = save_delta(model, base, tmp_path / "d")
    assert info.counts == {"a": 1} and info == delta_info(tmp_path / "d")
    assert load_file(tmp_path / "d")["a:old"].dtype == info.dtypes["a"]  # stock safetensors reads the delta
    apply_delta(base, tmp_path / "d", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == model.read_bytes()
    revert_delta(model, tmp_path / "d", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == base.read_bytes()
    if dtype != "F4":  # torch copies no such tensor
        module = torch.nn.Module()
        module.register_buffer("a", load_file(base)["a"].clone())
        apply_delta(module, tmp_path / "d")
        assert torch.equal(module.a.view(torch.uint8), load_file(model)["a"].view(torch.uint8))


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F3_NEW"])
def test_changes_of_a_dtype_that_torch_lacks_are_refused(tmp_path, dtype):
    base = write_raw(tmp_path / "base", {"a": (dtype, [4], b"abc")})
    model = write_raw(tmp_path / "model", {"a": (dtype, [4], b"abd")})
    with pytest.raises(FileError, match=f"a changed and is of dtype {dtype}; a delta holds changes of dtypes"):
        save_delta(model, base, tmp_path / "d")
    with pytest.raises(FileError, match="a changed and is of dtype torch.complex128"):
        save_delta({"a": torch.ones(2).cdouble()}, {"a": torch.zeros(2).cdouble()}, tmp_path / "d")
    same = {"a": torch.ones(2).cdouble()}
    assert save_delta(same, same, tmp_path / "d").unchanged == {"a": (torch.complex128, (2,))}


@pytest.mark.parametrize(
    ("dtype", "shape", "content", "message"),
    [
        ("F4", [2, 3], b"12", "has 2 bytes for the tensor 'a' of 3"),
        ("F4", [3], b"12", "has 2 bytes for the tensor 'a' of 2"),  # a byte and a half
        ("F6_E2M3", [4], b"1234", "has 4 bytes for the tensor 'a' of 3"),
        ("U16", [4], b"1234", "has 4 bytes for the tensor 'a' of 8"),
        ("", [4], b"1234", "malformed dtype"),
        (None, [4], b"1234", "malformed dtype"),
        (["F32"], [1], b"1234", "malformed dtype"),
        ("NEW", [-1], b"1234", "malformed shape"),
        ("U8", [2**62, 2**62], b"1234", "of 21267647932558653966460912964485513216"),
    ],
)
def test_sizes_are_checked_as_far_as_they_are_known(tmp_path, dtype, shape, content, message):
    write_raw(tmp_path / "a", {"a": (dtype, shape, content)})
    with pytest.raises(FileError, match=message):
        TensorFile(tmp_path / "a")


def test_a_place_that_runs_backwards_is_refused(tmp_path):
    header = b'{"a":{"dtype":"NEW","shape":[1],"data_offsets":[4,0]}}'
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(FileError, match="malformed place"):
        TensorFile(tmp_path / "a")


def test_scalars_and_empty_tensors_pass_through_and_change(tmp_path):
    empty = {"e": ("F32", [0, 3], b""), "f": ("NEW", [0], b""), "g": ("F4", [0], b"")}
    one, two = (("I64", [], n.to_bytes(8, "little")) for n in (1, 2))
    base = write_raw(tmp_path / "base", empty | {"s": one, "t": one})
    model = write_raw(tmp_path / "model", empty | {"s": two, "t": one})
    info = save_delta(model, base, tmp_path / "d")
    assert info.counts == {"s": 1} and info.shapes == {"s": ()}
    assert info.unchanged["t"] == (torch.int64, ()) and info.unchanged["e"] == (torch.float32, (0, 3))
    apply_delta(base, tmp_path / "d", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == model.read_bytes()


def test_headers_that_safetensors_reads_are_read(tmp_path):
    """Without metadata by null, and with further keys of a tensor."""
    write_raw(tmp_path / "a", {"a": ("U8", [2], b"xy")}, comment="by another tool")
    assert load_file(tmp_path / "a")["a"].tolist() == [120, 121]
    with TensorFile(tmp_path / "a") as file:
        assert file.read("a").tolist() == [120, 121]
    header = b'{"__metadata__":null,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}  '
    (tmp_path / "b").write_bytes(len(header).to_bytes(8, "little") + header + b"z")
    assert load_file(tmp_path / "b")["a"].tolist() == [122]
    with TensorFile(tmp_path / "b") as file:
        assert file.read("a").tolist() == [122] and file.metadata == {}


def test_a_dtype_that_safetensors_lacks_is_named_and_the_old_file_stays(tmp_path):
    (tmp_path / "a").write_text("precious")
    for write in (save_tensors, save_checkpoint):
        with pytest.raises(TypeError, match="safetensors has no dtype torch.complex128; convert the tensor"):
            write(tmp_path / "a", {"w": torch.ones(2).cdouble()})
    assert (tmp_path / "a").read_text() == "precious" and [path.name for path in tmp_path.iterdir()] == ["a"]
    state = {
        name: torch.zeros(4, dtype=torch.uint8).view(dtype) for name, dtype in KNOWN.items() if dtype.itemsize == 1
    }
    state["F4"] = torch.arange(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_checkpoint(tmp_path / "a", state)
    loaded = load_checkpoint(tmp_path / "a")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {name: t.dtype for name, t in state.items()}
    assert loaded["F4"].view(torch.uint8).tolist() == [0, 1, 2, 3]
