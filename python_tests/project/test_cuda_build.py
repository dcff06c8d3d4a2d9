"""setup.py: the architectures that nvcc compiles for, and toolkits that lack something."""

from __future__ import annotations

import pytest
from setuptools import Extension

from bench.kernels.compile import build

SETUP = build()


def fake_toolkit(folder, codes="", runtime=True):
    """A toolkit whose nvcc knows these codes, and says what a dry run of the real one says."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *--list-gpu-code*) printf "{codes}" ;; *--dryrun*) echo "#\\$ TOP={folder}" >&2 ;; '
        f'*) echo "$@" >> {folder}/commands ;; esac\n'
    )
    nvcc.chmod(0o755)
    (folder / "lib64").mkdir()
    if runtime:
        (folder / "lib64" / "libcudart_static.a").touch()
    return folder


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Makes `fake_toolkit` and lets setup.py find it."""
    for name in ("LIFT_CUDA", "LIFT_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)

    def make(codes="", runtime=True):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
        return fake_toolkit(tmp_path / "cuda", codes, runtime)

    return make


CUDA_13 = "sm_75\\nsm_80\\nsm_86\\nsm_89\\nsm_90\\nsm_100\\nsm_103\\nsm_120\\nsm_121\\n"
CUDA_12_4 = "sm_50\\nsm_75\\nsm_80\\nsm_86\\nsm_89\\nsm_90\\nsm_90a\\n"


@pytest.mark.parametrize(
    "codes, chosen, expected",
    [
        (CUDA_13, None, ["75", "80", "90", "100", "120"]),
        (CUDA_12_4, None, ["75", "80", "90"]),
        (CUDA_13, "86;90", ["86", "90"]),
        (CUDA_13, "86; 90a;", ["86", "90a"]),
        (CUDA_13, "120;80", ["80", "120"]),  # PTX is that of the newest
        (CUDA_12_4, ";", ["75", "80", "90"]),
        (CUDA_12_4, "120", ["120"]),  # nvcc says what is wrong with it
        ("", None, ["80"]),
    ],
)
def test_architectures(toolkit, monkeypatch, codes, chosen, expected):
    if chosen:
        monkeypatch.setenv("LIFT_CUDA_ARCHS", chosen)
    assert SETUP.cuda_archs(toolkit(codes) / "bin" / "nvcc") == expected


@pytest.mark.parametrize(
    "chosen, wrong", [("native", "native"), ("80;9.0", "9.0"), ("sm_90", "sm_90"), ("90+PTX", "90+PTX")]
)
def test_an_architecture_that_is_no_number_is_named(toolkit, monkeypatch, chosen, wrong):
    """Before, nvcc failed, and the CUDA ops were left out."""
    monkeypatch.setenv("LIFT_CUDA_ARCHS", chosen)
    with pytest.raises(SystemExit) as stopped:
        SETUP.cuda_archs(toolkit(CUDA_13) / "bin" / "nvcc")
    assert f"LIFT_CUDA_ARCHS={chosen!r} has {wrong!r}; name architectures by their number" in str(stopped.value)


@pytest.mark.parametrize(
    "archs, ptx", [(["75", "80", "90", "100", "120"], "100"), (["80", "90"], "90"), (["120"], "120")]
)
def test_code_and_ptx(archs, ptx):
    *code, last = SETUP.code_flags(archs)
    assert code == [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    assert last == f"-gencode=arch=compute_{ptx},code=compute_{ptx}"


def test_the_cuda_ops_are_added(toolkit, tmp_path):
    folder, extension = toolkit(CUDA_12_4), Extension("lift_kernels._C", [])
    SETUP.add_cuda(extension, tmp_path / "build")
    assert extension.define_macros == [("LIFT_WITH_CUDA", "1")]
    assert extension.library_dirs == [str(folder / "lib64")] and "cudart_static" in extension.libraries
    assert len(extension.extra_objects) == len(SETUP.CUDA_SOURCES) == 3
    commands = (folder / "commands").read_text().splitlines()
    assert len(commands) == 3 and all("sm_75" in line and "compute_90,code=compute_90" in line for line in commands)


def test_a_toolkit_without_the_static_runtime_is_named(toolkit, tmp_path, capsys):
    """The CUDA ops are left out, and a message says why."""
    folder, extension = toolkit(CUDA_13, runtime=False), Extension("lift_kernels._C", [])
    SETUP.add_cuda(extension, tmp_path / "build")
    assert extension.define_macros == [] and extension.extra_objects == []
    message = capsys.readouterr().err
    assert f"{folder} has nvcc, but no libcudart_static.a" in message and "the CUDA ops are left out" in message


def test_a_toolkit_without_the_static_runtime_is_refused_where_cuda_is_asked_for(toolkit, tmp_path, monkeypatch):
    toolkit(CUDA_13, runtime=False)
    monkeypatch.setenv("LIFT_CUDA", "1")
    with pytest.raises(SystemExit, match="LIFT_CUDA=1, but .* has nvcc, but no libcudart_static.a; install"):
        SETUP.add_cuda(Extension("lift_kernels._C", []), tmp_path / "build")
