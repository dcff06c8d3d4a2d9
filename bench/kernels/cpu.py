"""What the loops of the CPU ops compile to, for each level of instruction sets.

The rows are the functions of the tables in `csrc/cpu/levels.h`. They are read from the machine
code, so no machine needs to have the level. Judged are the main loops of a function: the innermost
loops with the widest vectors. The other loops take what is left over at the end. A function whose
loops were all unrolled is judged as a whole.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import ROOT
from bench.kernels.compile import build
from bench.kernels.disassembly import Function, functions, innermost_loops, pointers

LEVELS = {"x86_64": {"x86-64-v2": 128, "x86-64-v3": 256, "x86-64-v4": 512}, "aarch64": {"aarch64": 128}}
"""By architecture, the levels of csrc/cpu/levels.cpp and the bits of their vectors."""
FORMATS = ("fp32", "bf16", "fp16")  # in the order of DType
NARROW = {"add_squares": 128}
"""Functions that need no wider vectors: four sums of fp64, whose additions wait for each other."""
CARRIED = {"round_stochastic: fp16": 1}
"""Functions that may leave vectors on the stack from one iteration to the next.

It is a counter of positions, which does not fit the registers of v2 and v3. Noise in a loop of its
own made v2 and v3 a tenth faster and v4 a third slower.
"""
COLUMNS = (
    "function",
    "level",
    "vectors",
    "multiply-adds",
    "instructions",
    "scalar",
    "stack",
    "carried",
    "verdict",
)
PRODUCTS = ("compute_keys",)  # may fuse multiplications with additions, and must do both

_X86_SCALAR = re.compile(
    r"v?(?:add|sub|mul|div|sqrt|min|max|cmp\w*|u?comi|round|fn?m(?:add|sub)\d+)s[sd]\s|v?cvtt?\w*(?:ss|sd|si)\w*\s|"
    r"v?(?:pinsr|pextr)[bwdq]\s|v?(?:insert|extract)ps\s"
)
_ARM_SCALAR = re.compile(
    r"(?:f(?:n?m?add|n?m?sub|n?mul|div|sqrt|min\w*|max\w*|cmpe?|cvt\w*|abs|neg)|[su]cvtf)\s+[sdhw]\d|(?:[us]?mov|ins)\s.*v\d+\.[bhsd]\["
)
_X86_BITS = {"x": 128, "y": 256, "z": 512}


@dataclass(frozen=True)
class Loops:
    """What a function of a table compiled to at a level. Counts are of its main loops together."""

    function: str
    level: str
    compiler: str
    vector_bits: int  # of the widest vectors that it computes with
    needed_bits: int
    instructions: int
    vector_instructions: int  # that compute; moves are not counted
    scalar_instructions: int  # on floats, and those that move one lane
    fused: int  # vector multiply-adds
    multiplies: int
    additions: int
    may_fuse: bool
    stack_loads: int  # of whole vectors: constants, and what was spilled
    stack_stores: int
    carried_spills: int  # vectors on the stack that go from one iteration to the next

    @property
    def multiply_adds(self) -> str:
        pairs = min(self.multiplies, self.additions)
        return f"{self.fused} fused" if self.fused else f"{pairs} apart" if self.may_fuse else ""


def faults(loops: Loops) -> list[str]:
    """Return what a function does that it must not."""
    checks = {
        "scalar arithmetic": loops.vector_instructions == 0 or loops.scalar_instructions > 0,
        "narrow vectors": loops.vector_bits < loops.needed_bits,
        "spills": loops.carried_spills > CARRIED.get(loops.function, 0),
        "no multiply-adds": loops.may_fuse and not loops.fused and not min(loops.multiplies, loops.additions),
        "multiply-adds not fused": loops.may_fuse and not loops.fused and loops.level != "x86-64-v2",
        "fused multiply-adds": not loops.may_fuse and loops.fused > 0,
    }
    return [name for name, broken in checks.items() if broken]


def survey(only: str = "", source: Path = ROOT) -> list[Loops]:
    """Return every function of every table whose name contains ``only``, at every level.

    Architectures without a compiler here are left out; `missing` names them.

    Args:
        only: part of the names.
        source: the project.

    Raises:
        RuntimeError: a file does not compile. The message is the compiler's.
    """
    found: list[Loops] = []
    if not any(only in name for names in tables(source).values() for name in names):
        return found
    with tempfile.TemporaryDirectory() as folder:
        for architecture in LEVELS:
            if not missing(architecture):
                files = sorted((source / "csrc" / "cpu").glob("*_loops.cpp"))
                objects = [compile_object(file, Path(folder), architecture) for file in files]
                found += of_objects(objects, architecture, source)
    return [loops for loops in found if only in loops.function]


def of_objects(objects: list[Path], architecture: str, source: Path = ROOT) -> list[Loops]:
    """Return the functions of all tables, which are in these objects, in the order of levels.h."""
    objdump, compiler, levels = tool(architecture, "objdump"), version(architecture), LEVELS[architecture]
    found = []
    for table, slots in tables(source).items():
        (file,) = [file for file in objects if has_symbol(file, objdump, table)]
        size, targets = pointers(file, objdump, table)
        for number, (level, bits) in enumerate(levels.items()):
            for slot, name in enumerate(slots):
                function = targets.get(number * size // len(levels) + 8 * slot)
                if function is not None:
                    found.append(examine(function, name, level, bits, compiler))
    return found


def tables(source: Path = ROOT) -> dict[str, list[str]]:
    """Return the name of each function pointer of a level, by table, in the order of levels.h."""
    text = (source / "csrc" / "cpu" / "levels.h").read_text()
    found = {}
    for struct, table in re.findall(r"extern const (\w+) (k\w+)\[\];", text):
        body = re.search(rf"struct {struct} {{\n(.*?)^}};", text, re.MULTILINE | re.DOTALL)
        assert body is not None, f"levels.h has no {struct}"
        fields = re.findall(r"\(\*(\w+)(\[kFormats\])?\)\(", body[1])
        found[table] = [
            f"{name}: {form}" if many else name for name, many in fields for form in (FORMATS if many else ("",))
        ]
    return found


def examine(function: Function, name: str, level: str, bits: int, compiler: str = "") -> Loops:
    """Return the record of one function."""
    is_arm = level == "aarch64"
    loops = innermost_loops(function) or [function.texts]
    widest = max(_vector_bits(text, is_arm) for loop in loops for text in loop)
    work = [sum(_vector_bits(text, is_arm) == widest for text in loop) for loop in loops]
    main = [loop for loop, vectors in zip(loops, work) if 2 * vectors >= max(work)]
    frame = not is_arm and any(re.match(r"mov\s+%rsp,%rbp", text) for text in function.texts)
    texts = [text for loop in main for text in loop]
    stack = [_stack_access(text, is_arm, frame) for text in texts]
    stem = name.split(":")[0]
    count = {
        key: sum(bool(re.match(pattern, text)) for text in texts)
        for key, pattern in {
            "fused": r"fml[as]\s+v|vfn?m(?:add|sub)\d+p[sd]\s",
            "multiplies": r"fmul\s+v|v?mulp[sd]\s",
            "additions": r"fadd\s+v|v?addp[sd]\s",
        }.items()
    }
    return Loops(
        function=name,
        level=level,
        compiler=compiler,
        vector_bits=widest,
        needed_bits=min(bits, NARROW.get(stem, bits)),
        instructions=len(texts),
        vector_instructions=sum(_vector_bits(text, is_arm) > 0 for text in texts),
        scalar_instructions=sum(bool((_ARM_SCALAR if is_arm else _X86_SCALAR).match(text)) for text in texts),
        may_fuse=stem in PRODUCTS,
        stack_loads=sum(access is not None and not access[0] for access in stack),
        stack_stores=sum(access is not None and access[0] for access in stack),
        carried_spills=-(-128 * sum(_carried(loop, is_arm, frame) for loop in main) // max(widest, 128)),
        **count,
    )


def wide_functions(file: Path, objdump: str) -> set[str]:
    """Return the x86 functions that use registers or encodings of AVX and later."""
    return {
        f.name for f in functions(file, objdump) if any(re.search(r"%[yz]mm|^v\w+\s.*%xmm", text) for text in f.texts)
    }


def line(loops: Loops) -> dict[str, str]:
    """A row of the printed table."""
    return {
        "function": loops.function,
        "level": loops.level,
        "vectors": f"{loops.vector_bits}/{loops.needed_bits}",
        "multiply-adds": loops.multiply_adds,
        "instructions": str(loops.instructions),
        "scalar": str(loops.scalar_instructions),
        "stack": f"{loops.stack_loads} + {loops.stack_stores}",
        "carried": str(loops.carried_spills),
        "verdict": ", ".join(faults(loops)).upper() or "ok",
    }


def csv_row(loops: Loops, commit: str) -> dict:
    """All counts, and where they come from."""
    more = {"multiply_adds": loops.multiply_adds, "verdict": ", ".join(faults(loops)) or "ok", "commit": commit}
    return asdict(loops) | more


def compile_object(file: Path, folder: Path, architecture: str, *flags: str) -> Path:
    """Compile a C++ file with the flags of setup.py.

    Raises:
        RuntimeError: it does not compile. The message is the compiler's.
    """
    target = folder / f"{file.stem}.{architecture}.o"
    command = [tool(architecture, "g++"), *build().CXX_FLAGS, "-fPIC", *flags, "-c", str(file), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return target


def tool(architecture: str, name: str) -> str:
    """Return the command of a compiler or disassembler for an architecture.

    The compiler of this machine's own is CXX or g++, as in the build.
    """
    if architecture != platform.machine():
        return f"{architecture}-linux-gnu-{name}".replace("_", "-")
    return os.environ.get("CXX", name) if name == "g++" else name


def missing(architecture: str) -> str:
    """Return why nothing is compiled for an architecture, or an empty string."""
    absent = [name for name in ("g++", "objdump") if shutil.which(tool(architecture, name)) is None]
    if not absent:
        return ""
    return f"{' and '.join(tool(architecture, name) for name in absent)} not on PATH: no CPU loops for {architecture}"


def version(architecture: str) -> str:
    command = [tool(architecture, "g++"), "-dumpfullversion"]
    return f"g++ {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}"


def has_symbol(file: Path, objdump: str, name: str) -> bool:
    return name in subprocess.run([objdump, "-t", file], capture_output=True, text=True, check=True).stdout


def _vector_bits(text: str, is_arm: bool) -> int:
    """The width of the vectors that an instruction computes with; 0 for moves and scalars."""
    if is_arm:
        if re.match(r"(?:mov|movi|ld\w+|st\w+|dup)\s", text) or _ARM_SCALAR.match(text):
            return 0
        return max(
            (128 if form in ("16b", "8h", "4s", "2d") else 64 for form in re.findall(r"v\d+\.(\d+[bhsd])", text)),
            default=0,
        )
    if re.match(r"v?mov|v?(?:p?xor\w*) (%\w+),\1|vzero|vbroadcast|vpbroadcast", text) or _X86_SCALAR.match(text):
        return 0
    return max((_X86_BITS[kind] for kind in re.findall(r"%([xyz])mm", text)), default=0)


def _stack_access(text: str, is_arm: bool, frame: bool) -> tuple[bool, set[int]] | None:
    """Whether an access to the stack by a whole vector is a store, and which 16-byte units it
    touches.
    """
    if is_arm:
        match = re.match(r"(ld|st)\w+\s+((?:q\d+, )+)\[(?:sp|x29)(?:, #(-?\d+))?\]", text)
        if match is None:
            return None
        start, count = int(match[3] or "0"), match[2].count("q")
        return match[1] == "st", {start // 16 + i for i in range(count)}
    match = re.search(rf"(-?0x[0-9a-f]+)?\((?:%rsp{'|%rbp' if frame else ''})\)", text)
    kinds = re.findall(r"%([xyz])mm", text)
    if match is None or not kinds:
        return None
    start, width = int(match[1] or "0", 16), max(_X86_BITS[kind] for kind in kinds) // 8
    return text.endswith(")"), {(start + 8) // 16 + i for i in range(width // 16)}


def _carried(loop: tuple[str, ...], is_arm: bool, frame: bool) -> int:
    """How many 16-byte units of the stack one iteration leaves to the next.

    They are read first and written later.
    """
    read, written, carried = set(), set(), set()
    for access in (_stack_access(text, is_arm, frame) for text in loop):
        if access is not None:
            is_store, units = access
            carried |= units & read if is_store else set()
            (written if is_store else read).update(units - written)
    return len(carried)
