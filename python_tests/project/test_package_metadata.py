"""The metadata of an installation: version, links, types."""

from __future__ import annotations

import email
import zipfile

import pytest
from helpers.wheels import ROOT, build_wheel, copy_source

import lift_kernels


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = copy_source(tmp_path_factory.mktemp("source"))
    with zipfile.ZipFile(build_wheel(source, tmp_path_factory.mktemp("wheel"))) as file:
        yield file


def test_the_metadata_is_complete(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == lift_kernels.__version__
    assert metadata["Author"] == "The lift_kernels authors" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2506.00772"]
    assert metadata["Keywords"] and "Typing :: Typed" in metadata.get_all("Classifier")


def test_the_version_is_written_once():
    assert f'"{lift_kernels.__version__}"' not in (ROOT / "pyproject.toml").read_text()


def test_types_are_installed(wheel):
    assert "lift_kernels/py.typed" in wheel.namelist()
