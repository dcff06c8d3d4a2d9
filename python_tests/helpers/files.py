"""Small models and their checkpoints for the tests of files, and files whose bytes were altered."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from helpers.step_problems import bits
from safetensors.torch import save_file
from torch import nn


class Small(nn.Module):
    """Two matrices and a bias, and a head tied to the first matrix."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(40, 30, bias=False), nn.Linear(30, 20)
        self.head = nn.Linear(40, 30, bias=False)
        self.to(dtype)
        self.head.weight = self.first.weight


def tuned(seed: int, dtype: torch.dtype = torch.bfloat16, share: float = 0.1) -> Small:
    """A copy of `Small` with other values at a share of its entries, chosen by ``seed``."""
    model = Small(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            chosen = torch.randperm(p.numel(), generator=generator)[: max(1, round(share * p.numel()))]
            p.view(-1)[chosen] += torch.randn(len(chosen), generator=generator).to(dtype)
    return model


def save(model: nn.Module, path: Path) -> Path:
    """Write a module's weights, tied ones once, as safetensors."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save_file(weights, path)
    return path


def assert_equal_models(actual: nn.Module, expected: nn.Module) -> None:
    """The same parameters to the bit."""
    for (name, a), (_, e) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(bits(a.detach()), bits(e.detach())), name


def reseal(path: Path, change) -> None:
    """Let ``change`` alter header and data of a sealed file, then give it a valid checksum, as a
    forger would.
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
    """One random alteration: flipped bits, a cut, more bytes, a block zeroed, copied or moved,
    another header length.
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
