"""`bench.kernels.cpu`: the loops of the CPU ops have no faults, and loops made worse have them."""

from __future__ import annotations

import csv
import platform
import re
import shutil

import pytest

from bench import ROOT
from bench.kernels import cpu
from bench.kernels import report as kernel_report
from bench.kernels.cpu import LEVELS, Loops, compile_object, examine, faults, missing, of_objects, tables
from bench.kernels.disassembly import Function, innermost_loops, pointers, weak_functions

pytestmark = pytest.mark.slow

CPU = ROOT / "csrc" / "cpu"
WIDE = """
inline __attribute__((noinline)) void twice(float* x) { for (int i = 0; i < 64; ++i) x[i] *= 2; }
void own(float* x) { for (int i = 0; i < 64; ++i) x[i] += 1; twice(x); }
"""
PRAGMA = '#pragma GCC optimize("fp-contract=fast", "no-schedule-insns")'


@pytest.fixture(scope="module")
def objects(cpu_objects, tmp_path_factory):
    """The objects with tables, by architecture that has a compiler here."""
    found = {}
    for architecture in LEVELS:
        if architecture == platform.machine():
            found[architecture] = [file for name, file in cpu_objects.items() if name.endswith("_loops")]
        elif not missing(architecture):
            folder = tmp_path_factory.mktemp(architecture)
            found[architecture] = [compile_object(file, folder, architecture) for file in CPU.glob("*_loops.cpp")]
    return found


@pytest.fixture(scope="module")
def survey(objects):
    return [loops for architecture, files in objects.items() for loops in of_objects(files, architecture)]


def record(**changes) -> Loops:
    """A function without a fault."""
    fields = dict.fromkeys(("scalar_instructions", "stack_loads", "stack_stores", "carried_spills"), 0)
    fields |= {"function": "compute_keys", "level": "x86-64-v3", "compiler": "g++ 12", "may_fuse": True}
    fields |= {"vector_bits": 256, "needed_bits": 256, "instructions": 25, "vector_instructions": 12}
    return Loops(**(fields | {"fused": 12, "multiplies": 0, "additions": 0} | changes))


def changed(objects, tmp_path, name: str, old: str, new: str, source: str = "product_loops", machine="x86_64"):
    """The records where one text of ``csrc/cpu`` is another, by function and level."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (CPU / name).read_text()
    assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times; renew the test"
    (tmp_path / "csrc" / "cpu" / name).write_text(text.replace(old, new))
    file = compile_object(tmp_path / "csrc" / "cpu" / f"{source}.cpp", tmp_path, machine)
    others = [other for other in objects[machine] if other.name != file.name]
    return {(loops.function, loops.level): loops for loops in of_objects([file, *others], machine)}


def test_the_loops_as_they_are(survey, monkeypatch, capsys, tmp_path):
    """No faults at any level; the report shows and writes each of them."""
    monkeypatch.setattr(cpu, "survey", lambda only: survey)
    assert kernel_report.main(["--cpu", "--cpu-csv", str(tmp_path / "loops.csv"), "--markdown"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| (?!---)", line)]
    absent = [reason for architecture in LEVELS if (reason := missing(architecture))]
    assert len(shown) == 1 + len(survey) + len(absent) and all(any(reason in row for row in shown) for reason in absent)
    with (tmp_path / "loops.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["function"], row["level"]) for row in rows] == [(loops.function, loops.level) for loops in survey]
    assert all(row["verdict"] == "ok" and row["compiler"].startswith("g++ ") for row in rows)


def test_rows_of_a_compiler_that_is_missing_stay(survey, monkeypatch, tmp_path):
    """Those of the levels that were compiled are replaced."""
    target = tmp_path / "loops.csv"
    monkeypatch.setattr(cpu, "survey", lambda only: survey)
    monkeypatch.setattr(cpu, "missing", lambda architecture: "no compiler" if architecture == "aarch64" else "")
    target.write_text("function,level,verdict,commit\nupdate,aarch64,ok,1234567\nupdate,x86-64-v2,ok,1234567\n")
    assert kernel_report.main(["--cpu", "--cpu-csv", str(target)]) == 0
    with target.open() as file:
        rows = list(csv.DictReader(file))
    old = [(row["function"], row["level"], row["verdict"]) for row in rows if row["commit"] == "1234567"]
    assert old == [("update", "aarch64", "ok")] and len(rows) == len(survey) + 1


def test_every_function_of_the_tables_has_a_row(survey):
    """Whoever adds one writes the CSV again, by `make report`."""
    names = [name for names in tables().values() for name in names]
    text = "".join((CPU / f"{part}_functions.h").read_text() for part in ("step", "product"))
    initializers = re.findall(r"^constexpr \w+ loops = \{(.*?)\};$", text, re.MULTILINE | re.DOTALL)
    given = re.findall(r"[\w<>]+", " ".join(initializers))
    pointers_given = [name for name in given if name not in ("nullptr", "kPanelColumns")]
    assert len(initializers) == len(tables()) and given.count("nullptr") + len(pointers_given) == len(names)
    expected = {level for architecture, levels in LEVELS.items() if not missing(architecture) for level in levels}
    rows = {(loops.function, loops.level) for loops in survey}
    assert len(rows) == len(survey) == len(expected) * len(pointers_given)
    assert {function for function, _ in rows} < set(names) and {level for _, level in rows} == expected
    with (ROOT / "bench/results/compiled/cpu_loops.csv").open() as file:
        written = {(row["function"], row["level"]) for row in csv.DictReader(file)}
    assert rows <= written and {function for function, _ in written} == {function for function, _ in rows}


def test_the_levels_are_those_of_the_library():
    names = re.findall(r"kNames\[\] = \{(.*?)\}", (CPU / "levels.cpp").read_text())
    assert [re.findall(r'"(.*?)"', line) for line in names] == [*map(list, LEVELS.values()), ["generic"]]


def test_wide_registers_are_in_functions_of_the_tables_alone(cpu_objects):
    """They are in no function of which the linker would keep one copy for all machines."""
    wide, allowed = set(), set()
    for name, file in cpu_objects.items():
        found = cpu.wide_functions(file, "objdump")
        assert not found & weak_functions(file, "objdump"), name
        wide |= found
        for table in tables():
            if cpu.has_symbol(file, "objdump", table) and name.endswith("_loops"):
                allowed |= {function.name for function in pointers(file, "objdump", table)[1].values()}
    assert len(cpu_objects) == 9 and wide < allowed
    if platform.machine() != "x86_64":
        assert not wide
        return
    levels = {re.search(r"lift::(v\d)", name)[1] for name in wide}
    assert levels == {"v3", "v4"} and len(wide) == 2 * len([name for name in allowed if "lift::v3" in name])


def test_wide_registers_in_other_functions_are_found(tmp_path):
    """A file compiled for one level has them in its own functions and in those of headers."""
    if missing("x86_64"):
        assert "x86-64-linux-gnu-g++" in missing("x86_64")
        return
    (tmp_path / "wide.cpp").write_text(WIDE)
    objdump = cpu.tool("x86_64", "objdump")
    file = compile_object(tmp_path / "wide.cpp", tmp_path, "x86_64", "-march=x86-64-v3")
    assert cpu.wide_functions(file, objdump) == {"twice(float*)", "own(float*)"}
    assert weak_functions(file, objdump) == {"twice(float*)"}
    file = compile_object(tmp_path / "wide.cpp", tmp_path, "x86_64")
    assert cpu.wide_functions(file, objdump) == set() and weak_functions(file, objdump) == {"twice(float*)"}


def test_the_old_tile_spills(objects, tmp_path):
    """6 rows by two vectors of 64 bytes need 24 registers of v3, which has 16."""
    if "x86_64" not in objects:
        assert "x86-64-linux-gnu-g++" in missing("x86_64")
        return
    tile = "#define LIFT_LANES 8\n#define LIFT_TILE_VECTORS "
    found = changed(objects, tmp_path, "each_level.h", f"{tile}2", f"{tile}4")
    assert faults(found["compute_keys", "x86-64-v3"]) == ["spills"]
    assert found["compute_keys", "x86-64-v3"].carried_spills >= 24 - 16
    assert faults(found["compute_keys", "x86-64-v4"]) == []


def test_a_branch_in_a_conversion_makes_sums_scalar(objects, tmp_path):
    """The conversion from fp16 had one, which sums of squares did not survive as vectors."""
    if "x86_64" not in objects:
        assert "x86-64-linux-gnu-g++" in missing("x86_64")
        return
    old = "return float_of(sign | special | bits_of(scaled));"
    new = "return float_of(sign | ((x & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : bits_of(scaled)));"
    found = changed(objects, tmp_path, "dtypes.h", old, new, "step_loops")
    wrong = {key for key, loops in found.items() if faults(loops)}
    assert wrong == {("add_squares: fp16", level) for level in LEVELS["x86_64"]}
    assert all("scalar arithmetic" in faults(found[key]) for key in wrong)


def test_a_loop_that_is_no_vector_loop(objects, tmp_path):
    """A store that no compiler may move keeps the whole loop scalar."""
    if "x86_64" not in objects:
        assert "x86-64-linux-gnu-g++" in missing("x86_64")
        return
    old = "    w[j] = w[j] * own.decay - own.step_size * now.m /"
    found = changed(
        objects, tmp_path, "step_functions.h", old, old.replace("w[j] =", "*(volatile float*)&w[j] ="), "step_loops"
    )
    wrong = {key: faults(loops) for key, loops in found.items() if faults(loops)}
    assert set(wrong) == {(f"update: {form}", level) for form in ("fp32", "bf16") for level in LEVELS["x86_64"]}
    assert all(found_faults[0] == "scalar arithmetic" for found_faults in wrong.values())


def test_scheduling_before_registers_are_given_out_spills_on_aarch64(objects, tmp_path):
    if "aarch64" not in objects:
        assert "aarch64-linux-gnu-g++" in missing("aarch64") and "no CPU loops for aarch64" in missing("aarch64")
        return
    new = '#pragma GCC optimize("fp-contract=fast")'
    found = changed(objects, tmp_path, "product_loops.cpp", PRAGMA, new, machine="aarch64")
    assert faults(found["compute_keys", "aarch64"]) == ["spills"]


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"scalar_instructions": 1}, "scalar arithmetic"),
        ({"vector_instructions": 0}, "scalar arithmetic"),
        ({"vector_bits": 128}, "narrow vectors"),
        ({"carried_spills": 1}, "spills"),
        ({"fused": 0, "multiplies": 12, "additions": 12}, "multiply-adds not fused"),
        ({"function": "update: fp32", "may_fuse": False}, "fused multiply-adds"),
    ],
)
def test_faults(changes, fault):
    assert faults(record()) == faults(record(stack_loads=3, stack_stores=1)) == []
    assert faults(record(**changes)) == [fault]
    apart = record(level="x86-64-v2", fused=0, multiplies=12, additions=12)
    assert faults(apart) == [] and apart.multiply_adds == "12 apart" and record().multiply_adds == "12 fused"
    assert "no multiply-adds" in faults(record(fused=0))


def test_where_a_compiler_is_missing_a_row_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert kernel_report.main(["--cpu"]) == 0
    out = capsys.readouterr().out
    assert "no CPU loops for x86_64" in out and "no CPU loops for aarch64" in out and "objdump not on PATH" in out


def test_an_object_that_does_not_compile(tmp_path):
    (tmp_path / "wrong.cpp").write_text("not C++")
    with pytest.raises(RuntimeError, match="wrong.cpp"):
        compile_object(tmp_path / "wrong.cpp", tmp_path, platform.machine())


def by_hand(*texts: str) -> Function:
    return Function(".text", 0, "by hand", tuple((4 * i, text) for i, text in enumerate(texts)))


def test_loops_by_hand():
    """An outer loop, an inner one in two parts, and padding that nothing reaches."""
    function = by_hand(
        "xor %eax,%eax",
        "jmp c <f+0xc>",
        "nop",
        "add $0x1,%eax",  # c: the outer loop
        "mulss %xmm0,%xmm1",  # 10: the inner one
        "je 20 <f+0x20>",
        "jne 10 <f+0x10>",
        "jmp 28 <f+0x28>",
        "addss %xmm0,%xmm1",  # 20: its other part
        "jmp 10 <f+0x10>",
        "jne c <f+0xc>",  # 28
        "ret",
    )
    (loop,) = innermost_loops(function)
    assert loop == function.texts[4:7] + function.texts[8:10]


@pytest.mark.parametrize(
    "level, bits, texts, expected",
    [
        (
            "x86-64-v3",
            256,
            ("vmulps 0x20(%rsp),%ymm1,%ymm2", "vmovaps %ymm2,0x40(%rsp)", "vaddps 0x40(%rsp),%ymm3,%ymm3"),
            (256, 2, 0, 2, 1, 0),  # a constant, and a value that stays in its iteration
        ),
        (
            "x86-64-v3",
            256,
            (
                "vmovaps 0x40(%rsp),%ymm2",
                "vaddps %ymm1,%ymm2,%ymm2",
                "vmovaps %ymm2,0x40(%rsp)",
                "vaddss %xmm1,%xmm2,%xmm3",
            ),
            (256, 1, 1, 1, 1, 1),
        ),
        (
            "aarch64",
            128,
            ("ldp q1, q2, [sp, #64]", "fmla v1.4s, v3.4s, v4.s[0]", "stp q1, q2, [sp, #64]", "umov w0, v1.s[1]"),
            (128, 1, 1, 1, 1, 2),
        ),
    ],
)
def test_counts_by_hand(level, bits, texts, expected):
    branch = "b.ne 0 <f>" if level == "aarch64" else "jne 0 <f>"
    loops = examine(by_hand(*texts, branch, "ret"), "update: fp32", level, bits)
    counts = loops.vector_bits, loops.vector_instructions, loops.scalar_instructions
    assert (*counts, loops.stack_loads, loops.stack_stores, loops.carried_spills) == expected
    assert loops.instructions == len(texts) + 1 and loops.fused == (level == "aarch64")
