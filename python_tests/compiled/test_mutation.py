"""Tests of the tests: they must fail for a copy of the project that is broken on purpose.

Each mutant is a change of text that matches exactly once, so a change of the code it breaks is
noticed here. The core of the suite runs on each mutant in a forked process. It also runs on an
intact copy for every backend, which must pass.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
CORE = (
    "sparse_adamw_several_blocks or sparse_adamw_first_step or sparse_adamw_scaled_gradients or "
    "found_inf_changes_nothing or noise_is_the_specified_one or decay_touches or packed_migrate or "
    "packed_l2_norm or one_matrix_at_a_time or weight_grad_by_hand or weight_grad_in_several_panels or "
    "lowrank_topk_of_whole or lowrank_topk_with_any or lowrank_topk_where_all or lowrank_topk_tells or "
    "bitmap_to_indices or arena_migrate or forms"
)


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in ``file``, and the tests of ``backend`` must notice.

    The intact copy has no file.
    """

    name: str
    backend: str
    file: str = ""
    old: str = ""
    new: str = ""


REFERENCE, SCALARS = "lift_kernels/ops/reference.py", "lift_kernels/ops/bias_correction.py"
TRITON, TABLES = "lift_kernels/ops/triton/sparse_adamw.py", "lift_kernels/ops/triton/launch_tables.py"
TRITON_PACKED = "lift_kernels/ops/triton/packed_ops.py"
NATIVE, NATIVE_BLOCKS, NATIVE_PACKED = (
    "csrc/cpu/sparse_adamw.cpp",
    "csrc/cpu/guided_schedule.h",
    "csrc/cpu/packed_ops.cpp",
)
NATIVE_SCALARS, NATIVE_STEP = "csrc/cpu/adamw_update.h", "csrc/cpu/step_functions.h"
NATIVE_PRODUCT = "csrc/cpu/product_functions.h"
NATIVE_CANDIDATES = "csrc/cpu/candidates.h"
NATIVE_SELECT, TRITON_SELECT = "csrc/cpu/lowrank_topk.cpp", "lift_kernels/ops/triton/lowrank_topk.py"
TRITON_BITMAP = "lift_kernels/ops/triton/bitmap_to_indices.py"
NATIVE_ARENA, TRITON_ARENA = "csrc/cpu/arena_migrate.cpp", "lift_kernels/ops/triton/arena_migrate.py"
FORMATS, NATIVE_FORMATS = "lift_kernels/ops/state_formats.py", "csrc/cpu/moment_codes.h"
TRITON_FORMATS = "lift_kernels/ops/triton/state_formats.py"
NATIVE_GRAD, TRITON_GRAD = "csrc/cpu/packed_weight_grad.cpp", "lift_kernels/ops/triton/packed_weight_grad.py"

MUTANTS = [
    Mutant("intact", "reference"),
    Mutant("intact", "native-cpu"),
    Mutant("intact", "triton"),
    Mutant("no bias correction", "reference", REFERENCE, "v.sqrt() / (1 - beta2**step) ** 0.5", "v.sqrt()"),
    Mutant(
        "index shifted",
        "reference",
        REFERENCE,
        "index = indices[segment].long()",
        "index = (indices[segment].long() + 1) % weight.numel()",
    ),
    Mutant(
        "last entry skipped",
        "reference",
        REFERENCE,
        "segment = slice(offsets[i], offsets[i] + counts[i])",
        "segment = slice(offsets[i], offsets[i] + max(counts[i] - 1, 0)); grad = grad.reshape(-1)[:counts[i] - 1] "
        "if packed_grads else grad",
    ),
    Mutant(
        "decay on unselected entries",
        "reference",
        REFERENCE,
        "        w.mul_(1 - lr * weight_decay)\n",
        "        w.mul_(1 - lr * weight_decay); weight.mul_(1 - lr * weight_decay)\n",
    ),
    Mutant("gradient scale ignored", "reference", REFERENCE, "g = g * inv_scale.to(compute)", "pass"),
    Mutant(
        "no first bias correction",
        "native-cpu",
        NATIVE_SCALARS,
        "a.lr / (1 - std::pow(a.beta1, double(step)))",
        "a.lr",
    ),
    Mutant("ages off by one", "native-cpu", SCALARS, "age = torch.arange(", "age = 1 + torch.arange("),
    Mutant(
        "scalars of the first matrix for all",
        "native-cpu",
        NATIVE,
        "scalars.emplace_back(adamw, segments[i].step)",
        "scalars.emplace_back(adamw, segments[0].step)",
    ),
    Mutant("no bias correction", "native-cpu", NATIVE_STEP, "* own.inv_sqrt_bc2 + own.eps", "+ own.eps"),
    Mutant(
        "no decay",
        "native-cpu",
        NATIVE_STEP,
        "w[j] * own.decay - own.step_size * now.m",
        "w[j] - own.step_size * now.m",
    ),
    Mutant(
        "correction of the first entry for all", "native-cpu", NATIVE_STEP, "inv_bc1[j] * now.m", "inv_bc1[0] * now.m"
    ),
    Mutant("noise of the first entry", "native-cpu", NATIVE_STEP, "position + uint32_t(j)", "position"),
    Mutant("norm: last entries left out", "native-cpu", NATIVE_STEP, "for (; j < n; ++j) {", "for (; j < 0; ++j) {"),
    Mutant("index shifted", "native-cpu", NATIVE, "weight[index[j]] = rounded[j]", "weight[index[j] + 1] = rounded[j]"),
    Mutant(
        "last block skipped",
        "native-cpu",
        NATIVE_BLOCKS,
        "left = blocks_ - at_;",
        "left = std::max<int64_t>(blocks_ - at_ - 1, 0);",
    ),
    Mutant(
        "last block of a run done twice",
        "native-cpu",
        NATIVE_BLOCKS,
        "compare_exchange_weak(at_, end_,",
        "compare_exchange_weak(at_, end_ < blocks_ ? end_ - 1 : end_,",
    ),
    Mutant(
        "noise of the segment", "native-cpu", NATIVE, "uint32_t(arena), scalars.key", "uint32_t(block.at), scalars.key"
    ),
    Mutant(
        "merge advances once",
        "native-cpu",
        NATIVE_PACKED,
        "while (at < last && *at < new_indices[j]) ++at;",
        "if (at < last && *at < new_indices[j]) ++at;",
    ),
    Mutant("no first bias correction", "triton", SCALARS, "lr if per_entry else lr / (1 - beta1**step)", "lr"),
    Mutant(
        "scalars of the first matrix for all",
        "triton",
        SCALARS,
        "step, lr = steps.double()",
        "step, lr = steps.double()[:1].expand(len(steps))",
    ),
    Mutant("no bias correction", "triton", TRITON, "tl.sqrt_rn(v) * correction + eps", "tl.sqrt_rn(v) + eps"),
    Mutant("no decay", "triton", TRITON, "w = w * decay - ", "w = w - "),
    Mutant(
        "padding overwritten",
        "triton",
        TRITON,
        "tl.where(real, narrow(m, m_stored.dtype), m_stored)",
        "narrow(m, m_stored.dtype)",
    ),
    Mutant(
        "last block skipped",
        "triton",
        TABLES,
        "programs = (count + block - 1) // block",
        "programs = torch.where(count > block, count // block, (count + block - 1) // block)",
    ),
    Mutant(
        "index shifted",
        "triton",
        TRITON,
        "weight += index",
        "weight += index + 1",
    ),
    Mutant("found_inf ignored", "triton", TRITON, "tl.load(found_inf) != 0.0", "tl.load(found_inf) > 1.0"),
    Mutant("forms: to nearest", "reference", FORMATS, ">= (1.0 - up) * distance", ">= 0.5 * distance"),
    Mutant("forms: a root lost", "reference", FORMATS, "code.clamp(1, ROOT_TOP)", "code.clamp(0, ROOT_TOP)"),
    Mutant("forms: NaN hidden", "reference", FORMATS, "scales, torch.nan)", "scales, 0.0)"),
    Mutant("forms: ties forgotten", "reference", FORMATS, "(low == 0x8000) & above", "(low == 0x8000) & ~above"),
    Mutant("forms: ties forgotten", "native-cpu", NATIVE_FORMATS, "== 0x18000u", "== 0x8000u"),
    Mutant("forms: another dither", "native-cpu", NATIVE_FORMATS, "0x91e10da5u", "0x31e10da5u"),
    Mutant(
        "forms: scales of the first group",
        "native-cpu",
        NATIVE_ARENA,
        "scales[(old + p) / kGroup]",
        "scales[old / kGroup]",
    ),
    Mutant("forms: ties forgotten", "triton", TRITON_FORMATS, "== 0x18000)", "== 0x8000)"),
    Mutant("forms: another dither", "triton", TRITON_FORMATS, "0x91E10DA5", "0x31E10DA5"),
    Mutant("forms: NaN hidden", "triton", TRITON_FORMATS, 'float("nan")', "0.0"),
    Mutant("sides exchanged", "reference", REFERENCE, "grad_output.t() @ input", "input.t() @ grad_output"),
    Mutant(
        "first entry of a panel lost",
        "native-cpu",
        NATIVE_GRAD,
        "indices + k, row * n, below",
        "indices + k, row * n + 1, below",
    ),
    Mutant(
        "ties to the higher position",
        "native-cpu",
        NATIVE_CANDIDATES,
        "kLowerFirst = ~uint32_t{0};",
        "kLowerFirst = 0;",
    ),
    Mutant("the last candidate left out", "native-cpu", NATIVE_SELECT, ">= smallest) choose", "> smallest) choose"),
    Mutant(
        "four positions of a word",
        "native-cpu",
        NATIVE_SELECT,
        "    for (; rest != 0; rest &= rest - 1) *out++ = int32_t(start + std::countr_zero(rest));\n    out = next;",
        "    out = next;",
    ),
    Mutant("rows of the tile exchanged", "native-cpu", NATIVE_PRODUCT, "+= rows[i][p]", "+= rows[i ^ 1][p]"),
    Mutant("panel of the first columns for all", "native-cpu", NATIVE_PRODUCT, "panels + column * rank", "panels"),
    Mutant("signs kept", "native-cpu", NATIVE_PRODUCT, "& 0x7fffffffu", "& 0xffffffffu"),
    Mutant("bound left out", "native-cpu", NATIVE_PRODUCT, "at_least(now, bounds[1])", "at_least(now, bounds[1] + 1)"),
    Mutant(
        "candidates in no order",
        "native-cpu",
        NATIVE_CANDIDATES,
        "std::nth_element(near.begin(), near.begin() + (n - 1), near.end(), std::greater<>());",
        "",
    ),
    Mutant("candidates of a higher bin too", "native-cpu", NATIVE_CANDIDATES, "bin_of(c) == bin", "bin_of(c) >= bin"),
    Mutant(
        "ties by the last bit",
        "native-cpu",
        NATIVE_SELECT,
        "bitmap_[at] |= rest & -rest",
        "bitmap_[at] |= uint64_t{1} << (63 - std::countl_zero(rest))",
    ),
    Mutant(
        "threshold left out", "triton", TRITON_SELECT, "(keys >= low) & (keys <= high)", "(keys >= low) & (keys < high)"
    ),
    Mutant(
        "bitmap: pivot left out", "triton", TRITON_BITMAP, "chosen = candidate >= pivot", "chosen = candidate > pivot"
    ),
    Mutant(
        "bitmap: the lower of two digits",
        "triton",
        TRITON_BITMAP,
        "(above + histogram >= rank)",
        "(above + histogram > rank)",
    ),
    Mutant(
        "bitmap: bits behind the last column", "triton", TRITON_BITMAP, "tl.where(last, words & real, words)", "words"
    ),
    Mutant("bitmap: spare candidates read", "reference", REFERENCE, "candidates[i, :near].sort", "candidates[i].sort"),
    Mutant("bitmap: too few bits accepted", "reference", REFERENCE, "len(positions) == k", "len(positions) <= k"),
    Mutant(
        "bound included", "triton", TRITON_GRAD, "other=0).to(tl.int64) < bound)", "other=0).to(tl.int64) <= bound)"
    ),
    Mutant("any old entry is found", "triton", TRITON_PACKED, "== entry)\n", "!= -1)\n"),
    Mutant(
        "arena: the next old value",
        "reference",
        REFERENCE,
        "out[stays] = values[place[stays]]",
        "out[stays] = values[(place[stays] + 1).clamp_(max=old_indices.numel() - 1)]",
    ),
    Mutant(
        "arena: last old entry lost",
        "reference",
        REFERENCE,
        "(slice(offsets[i], offsets[i] + count) for count in (counts[i], new.numel()))",
        "(slice(offsets[i], offsets[i] + count) for count in (counts[i] - 1, new.numel()))",
    ),
    Mutant(
        "arena: weights ignored",
        "reference",
        REFERENCE,
        "None if split else packed_gather_ref(weight, new, torch.float32)",
        "None",
    ),
    Mutant("arena: born at zero", "reference", REFERENCE, "old, new, int(steps[i]))", "old, new, 0)"),
    Mutant("arena: the list stays", "reference", REFERENCE, "        indices[after] = new\n", ""),
    Mutant(
        "arena: the next old value",
        "native-cpu",
        NATIVE_ARENA,
        "merged.position[j] = int32_t(at);",
        "merged.position[j] = int32_t(std::min(at + 1, last - 1));",
    ),
    Mutant("arena: what stays enters", "native-cpu", NATIVE_ARENA, "j += now <= before;", "j += now < before;"),
    Mutant(
        "arena: last of the entries behind lost",
        "native-cpu",
        NATIVE_ARENA,
        "for (; j < count; ++j) {",
        "for (; j + 1 < count; ++j) {",
    ),
    Mutant("arena: last chunk skipped", "native-cpu", NATIVE_ARENA, "c < runs[end]; ++c", "c + 1 < runs[end]; ++c"),
    Mutant("arena: fill ignored", "native-cpu", NATIVE_ARENA, "= value(merged.entering[e]);", "= T(); (void)value;"),
    Mutant(
        "arena: put before all is taken",
        "native-cpu",
        NATIVE_ARENA,
        "if (chunk.is_whole()) moved.put_chunk(chunk);",
        "moved.put_chunk(chunk);",
    ),
    Mutant(
        "arena: the next old value", "triton", TRITON_ARENA, "tl.where(found, low, -1)", "tl.where(found, low + 1, -1)"
    ),
    Mutant("arena: every entry is found", "triton", TRITON_ARENA, "== entry)\n", "!= -1)\n"),
    Mutant(
        "arena: steps of the merge left out", "triton", TRITON_ARENA, "stride = stride >> 1", "stride = stride >> 2"
    ),
    Mutant(
        "arena: last block skipped",
        "triton",
        TRITON_ARENA,
        "_arena_migrate_take_kernel[grid](",
        "_arena_migrate_take_kernel[(max(len(blocks) - 1, 1),)](",
    ),
    Mutant("arena: fill ignored", "triton", TRITON_ARENA, "tl.where(enters, w, x)", "tl.where(enters, 0, x)"),
    Mutant("arena: step of the first matrix", "triton", TRITON_ARENA, "tl.load(steps + matrix)", "tl.load(steps)"),
]


def compile_native(source: Path, build: Path, *names: str) -> None:
    """Compile the named C++ files to objects.

    Little optimization makes this quick. Results do not depend on it.
    """
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-ffp-contract=off",
        "-DTORCH_TARGET_VERSION=0x020B000000000000",
    ]
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    for name in names:
        target = build / (Path(name).stem + ".o")
        subprocess.run([os.environ.get("CXX", "g++"), *flags, *includes, "-c", source / name, "-o", target], check=True)


def including(file: str) -> list[str]:
    """The C++ files that must be compiled again when a file of ``csrc/cpu`` changes."""
    included = {
        path.name: re.findall(r'"(?:\.\./)?(\w+\.h)"', path.read_text()) for path in (ROOT / "csrc" / "cpu").iterdir()
    }
    names = {Path(file).name}
    for _ in included:  # a header may be included by another one
        names |= {name for name, headers in included.items() if names & set(headers)}
    return sorted(f"csrc/cpu/{name}" for name in names if name.endswith(".cpp"))


@pytest.fixture(scope="module")
def intact_objects(tmp_path_factory) -> Path:
    """A folder with every object file of the native CPU ops."""
    build = tmp_path_factory.mktemp("objects")
    compile_native(
        ROOT, build, "csrc/bindings.cpp", *(f"csrc/cpu/{path.name}" for path in (ROOT / "csrc/cpu").glob("*.cpp"))
    )
    return build


def build_copy(mutant: Mutant, objects: Path, copy: Path) -> None:
    """Copy the project into folder ``copy``, apply the change and build the native extension."""
    for folder in ("lift_kernels", "csrc", "python_tests"):
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
        )
    shutil.copy(ROOT / "pyproject.toml", copy)
    build = copy / "objects"
    shutil.copytree(objects, build)
    if mutant.file:
        text = (copy / mutant.file).read_text()
        assert text.count(mutant.old) == 1, (
            f"{mutant.file}: {mutant.old!r} is there {text.count(mutant.old)} times; renew the mutant"
        )
        (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        if mutant.file.startswith("csrc"):
            compile_native(copy, build, *including(mutant.file))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    target = ["-o", copy / "lift_kernels" / "_C.abi3.so"]
    subprocess.run([os.environ.get("CXX", "g++"), "-shared", *build.glob("*.o"), *libraries, *target], check=True)


# One process imports everything and forks for each copy, because importing torch takes longer than
# most runs.
RUNNER = """
import os, sys
import pytest, torch
torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()
for copy, selection, *files in map(str.split, sys.argv[1].splitlines()):
    if os.fork() == 0:
        os.chdir(copy)
        sys.path.insert(0, copy)
        os.dup2(os.open("output", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        arguments = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-k", selection.replace("+", " "), *files]
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    os.wait()
"""


def run_core(copies: dict[Mutant, Path], interpret: str) -> None:
    """Run the core tests of each mutant's backend, up to the first failure.

    Their output goes to ``copy/output``.
    """
    lines = []
    for mutant, copy in copies.items():
        files = [
            "python_tests/ops/test_sparse_adamw.py",
            "python_tests/ops/test_packed_ops.py",
            "python_tests/ops/test_packed_weight_grad.py",
        ]
        if not mutant.file:
            files += ["python_tests/ops/test_lowrank_topk.py", "python_tests/ops/test_bitmap_to_indices.py"]
            files += ["python_tests/ops/test_arena_migrate.py", "python_tests/ops/test_arena_migrate_forms.py"]
            files += ["python_tests/ops/test_sparse_adamw_forms.py", "python_tests/ops/test_state_formats.py"]
        selection = f"{mutant.backend} and ({CORE})"
        if mutant.name.startswith("forms") and mutant.backend == "reference":
            files, selection = ["python_tests/ops/test_state_formats.py"], "test"
        elif mutant.name.startswith("forms"):
            files = ["python_tests/ops/test_sparse_adamw_forms.py", "python_tests/ops/test_arena_migrate_forms.py"]
        elif mutant.name.startswith("bitmap"):
            files = ["python_tests/ops/test_bitmap_to_indices.py"]
        elif mutant.name.startswith("arena"):
            files = ["python_tests/ops/test_arena_migrate.py"]
        elif mutant.file in (NATIVE_SELECT, NATIVE_CANDIDATES, NATIVE_PRODUCT, TRITON_SELECT):
            files = ["python_tests/ops/test_lowrank_topk.py"]
        elif mutant.file in (NATIVE_GRAD, TRITON_GRAD) or mutant.name == "sides exchanged":
            files = files[2:]
        elif mutant.file:
            files = files[1:2] if "packed" in mutant.file or mutant.name.startswith("norm") else files[:1]
        lines.append(" ".join([str(copy), selection.replace(" ", "+"), *files]))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "TRITON_INTERPRET": interpret}
    subprocess.run([sys.executable, "-c", RUNNER, "\n".join(lines)], env=os.environ | settings, cwd="/", check=True)


@pytest.fixture(scope="module")
def outputs(request, intact_objects, tmp_path_factory) -> dict[Mutant, str]:
    """The output of pytest by mutant.

    Two processes run the mutants, one of them with Triton's interpreter.
    """
    items = [item for item in request.session.items if getattr(item, "originalname", "") == "test_mutation"]
    selected = [item.callspec.params["mutant"] for item in items]
    copies = {mutant: tmp_path_factory.mktemp("copy") for mutant in selected}
    interpreted = {mutant: copy for mutant, copy in copies.items() if mutant.backend == "triton"}
    compiled = {mutant: copy for mutant, copy in copies.items() if mutant.backend != "triton"}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda mutant: build_copy(mutant, intact_objects, copies[mutant]), selected))
        list(pool.map(run_core, (interpreted, compiled), ("1", "0")))
    return {mutant: (copy / "output").read_text() for mutant, copy in copies.items()}


def test_a_changed_header_compiles_what_includes_it():
    assert including(NATIVE_PRODUCT) == ["csrc/cpu/product_loops.cpp"]
    assert including(NATIVE_SCALARS) == ["csrc/cpu/sparse_adamw.cpp", "csrc/cpu/step_loops.cpp"]
    assert including(NATIVE_BLOCKS) == [NATIVE] and including(NATIVE_PACKED) == [NATIVE_PACKED]
    assert len(including("csrc/cpu/dtypes.h")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.backend}: {mutant.name}")
def test_mutation(outputs, mutant):
    output = outputs[mutant]
    verdict = output.strip().splitlines()[-1]
    if mutant.file:
        assert re.match(r"1 failed.* in ", verdict), f"the mutant survived, or failed for another reason:\n{output}"
    else:
        assert re.match(r"\d\d+ passed.* in ", verdict), f"the intact copy failed:\n{output}"
