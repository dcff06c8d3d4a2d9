"""The object files of the extension, compiled with the flags of setup.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

from bench.kernels.compile import build
from bench.kernels.cpu import compile_object

ROOT = Path(__file__).parents[2]
TORCH = ["-DTORCH_TARGET_VERSION=0x020B000000000000", *(f"-I{path}" for path in cpp_extension.include_paths())]


def compile_all(folder: Path, architecture: str) -> dict[str, Path]:
    """Compile every C++ source of setup.py; return the objects by the name of their source.

    Only the bindings include torch. Raises RuntimeError with the compiler's message.
    """

    def compile_one(source: str) -> Path:
        return compile_object(ROOT / source, folder, architecture, *(TORCH if "bindings" in source else []))

    sources = build().CPU_SOURCES
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((Path(source).stem for source in sources), pool.map(compile_one, sources)))
