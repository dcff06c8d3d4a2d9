"""Build lift_kernels._C: the CPU ops, and the CUDA ops if nvcc is found.

The CUDA ops are also built under a CPU-only torch. One abi3 file supports Python 3.11 and later. It
uses torch's stable ABI, so it also supports torch 2.11 and later. The CUDA sources do not include
torch, so plain ``nvcc -c`` compiles them. The CUDA runtime is linked statically.

Environment variables:

- ``LIFT_CUDA=0`` leaves CUDA out. ``LIFT_CUDA=1`` makes a missing nvcc or CUDA runtime an error.
- ``LIFT_CUDA_ARCHS`` lists the target architectures. By default these are the ones of
  ``75;80;90;100;120`` that nvcc knows. Code for sm_80 also runs on sm_86, sm_87 and sm_89, and code
  for sm_100 and sm_120 on the later cards of their generation.
- ``CUDA_HOME`` is the CUDA toolkit. By default it is the toolkit of ``nvcc`` on PATH.
- ``LIFT_REQUIRE_NATIVE=1`` makes a failed build of the extension an error.

Without a C++ compiler the package still installs. It then uses Triton and the PyTorch reference,
and a warning reports this when the first op runs.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import CCompilerError, CompileError, ExecError, PlatformError

ROOT = Path(__file__).parent
CPU_SOURCES = ["csrc/bindings.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))]
CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
# Without -fno-math-errno and -fno-trapping-math the loops around sqrt do not vectorize.
# -ffp-contract=off gives the same bits on all instruction sets.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-g0",
]
# One for each generation of cards.
CUDA_ARCHS = ["75", "80", "90", "100", "120"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-Xcompiler=-fPIC", "-Xptxas=-v"]


def cuda_toolkit() -> Path | None:
    """Return the CUDA toolkit to compile with, or None.

    The path comes from ``nvcc --dryrun``, because nvcc on PATH is often a wrapper script.
    """
    if os.environ.get("LIFT_CUDA", "auto") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    if nvcc is not None:
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
        if top is not None:
            return Path(top.group(1).strip()).resolve()
    if os.environ.get("LIFT_CUDA") == "1":
        sys.exit("setup.py: LIFT_CUDA=1, but nvcc was found neither in CUDA_HOME nor on PATH")
    return None


def static_runtime(toolkit: Path) -> Path | None:
    """Return the folder of libcudart_static.a, or None."""
    for folder in (toolkit / "lib64", *sorted(toolkit.glob("targets/*/lib"))):
        if (folder / "libcudart_static.a").exists():
            return folder
    return None


def cuda_archs(nvcc: Path) -> list[str]:
    """Return the target architectures: those of LIFT_CUDA_ARCHS, or all that nvcc knows."""
    given = os.environ.get("LIFT_CUDA_ARCHS", "")
    chosen = [arch for arch in re.split(r"[;,\s]+", given) if arch]
    for arch in chosen:  # nvcc's own error would only leave the CUDA ops out.
        if re.fullmatch(r"\d{2,3}[af]?", arch) is None:
            sys.exit(
                f"setup.py: LIFT_CUDA_ARCHS={given!r} has {arch!r}; name architectures by their number, "
                "90 for sm_90, with semicolons between them, as in 80;90"
            )
    if chosen:
        return sorted(chosen, key=lambda arch: int(arch.rstrip("af")))
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known] or ["80"]


def code_flags(archs: list[str]) -> list[str]:
    """Return nvcc's options for machine code of each target, and for PTX.

    PTX serves cards whose generation is not among the targets, if they are newer than it. That of
    sm_100 serves sm_110 as well, which lies between two targets.
    """
    ptx = "100" if "100" in archs else archs[-1]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


def compile_cuda(toolkit: Path, build_dir: Path) -> list[str]:
    """Compile the CUDA sources in parallel and return the object files."""
    nvcc = toolkit / "bin" / "nvcc"
    targets = code_flags(cuda_archs(nvcc))
    build_dir.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> str:
        target = str(build_dir / (Path(source).stem + ".cu.o"))
        command = [str(nvcc), "-c", *NVCC_FLAGS, *targets, source, "-o", target]
        print(*command, flush=True)
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, CUDA_SOURCES))


def add_cuda(ext: Extension, build_dir: Path) -> None:
    """Add the CUDA objects to the extension if a working toolkit is found.

    The CPU ops never depend on CUDA.
    """
    toolkit = cuda_toolkit()
    if toolkit is None:
        return
    runtime = static_runtime(toolkit)
    if runtime is None:
        problem = f"{toolkit} has nvcc, but no libcudart_static.a; install the package cuda-cudart-dev (cudart_static)"
        if os.environ.get("LIFT_CUDA") == "1":
            sys.exit(f"setup.py: LIFT_CUDA=1, but {problem}")
        print(f"lift_kernels: {problem}; the CUDA ops are left out, GPUs use Triton", file=sys.stderr)
        return
    try:
        ext.extra_objects = compile_cuda(toolkit, build_dir)
    except subprocess.CalledProcessError as error:
        if os.environ.get("LIFT_CUDA") == "1":
            raise
        print(f"lift_kernels: nvcc failed ({error}); the CUDA ops are left out, GPUs use Triton", file=sys.stderr)
        return
    ext.define_macros.append(("LIFT_WITH_CUDA", "1"))
    ext.library_dirs.append(str(runtime))
    ext.libraries += ["cudart_static", "rt", "dl", "pthread"]


def native_extension() -> tuple[list[Extension], dict]:
    """Return the extension and its build command.

    Both are empty if torch cannot be imported, as in an isolated build.
    """
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print(
            "lift_kernels: torch is not visible to the build, so the native extension is left out; "
            "use pip install --no-build-isolation",
            file=sys.stderr,
        )
        return [], {}

    class Build(BuildExtension):
        def build_extension(self, ext):
            add_cuda(ext, Path(self.build_temp).resolve())
            try:
                super().build_extension(ext)
            except (CCompilerError, CompileError, ExecError, PlatformError, RuntimeError, OSError) as error:
                if os.environ.get("LIFT_REQUIRE_NATIVE") == "1":
                    raise
                print(
                    f"lift_kernels: the native extension was not built ({error}). CPU tensors will use the "
                    "slow PyTorch reference; Triton on GPUs is not affected.",
                    file=sys.stderr,
                )

        def copy_extensions_to_source(self):
            if (Path(self.build_lib) / self.get_ext_filename("lift_kernels._C")).exists():
                super().copy_extensions_to_source()

    extension = CppExtension(
        "lift_kernels._C",
        CPU_SOURCES,
        define_macros=[("TORCH_TARGET_VERSION", "0x020B000000000000")],
        extra_compile_args={"cxx": CXX_FLAGS},
        py_limited_api=True,
    )
    return [extension], {"build_ext": Build}


if __name__ == "__main__":  # not when bench/kernels/compile.py imports this file
    extensions, commands = native_extension()
    setup(
        ext_modules=extensions,
        cmdclass=commands,
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
    )
