"""Safetensors files of models, and files whose bytes are changed on purpose."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn


def save(model: nn.Module, path: Path) -> Path:
    """Write a module's weights, tied ones once, as safetensors."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save_file(weights, path)
    return path


def reseal(path: Path, change) -> None:
    """Let ``change`` edit header and data of a checksummed file, then renew its checksum.

    This is what a forger would do.
    """
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    change(header, data)
    header["__metadata__"]["checksum"] = "0" * 64
    encoded = json.dumps(header, separators=(",", ":")).encode()
    seal = hashlib.sha256(encoded + hashlib.sha256(data).digest()).hexdigest().encode()
    encoded = encoded.replace(b"0" * 64, seal, 1)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(data))


def alter(raw: bytes, rng) -> bytes:
    """Make one random change.

    It flips bits, cuts, appends, zeroes, copies or removes a block, or replaces the length of the
    header.
    """
    out = bytearray(raw)
    kind = rng.randrange(8)
    start, length = rng.randrange(len(raw)), rng.randrange(1, 64)
    if kind == 0:
        out[start] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.randrange(2, 20)):
            out[rng.randrange(min(len(raw), 4096))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del out[start:]
    elif kind == 3:
        out += rng.randbytes(length)
    elif kind == 4:
        out[start : start + length] = bytes(len(out[start : start + length]))
    elif kind == 5:
        other = rng.randrange(len(raw))
        out[start : start + length] = raw[other : other + length]
    elif kind == 6:
        out[:8] = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(raw), rng.randrange(2 * len(raw))]).to_bytes(
            8, "little"
        )
    else:
        del out[start : start + length]
    return bytes(out)


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], **more) -> Path:
    """Write safetensors from dtype name, shape and bytes; ``more`` goes into each description."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]} | more
        end += len(data)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(t[2] for t in tensors.values()))
    return path


def forget_unchanged(path: Path) -> Path:
    """Turn a delta into one of version 0.1, which does not name the tensors that did not change."""
    reseal(path, lambda header, data: header["__metadata__"].pop("unchanged"))
    return path
