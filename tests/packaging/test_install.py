"""The wheel and the editable install hold `transfusion.kernels` as real modules and leave the name `kernels` alone."""

import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

# One worker builds for all of them.
pytestmark = pytest.mark.xdist_group("install")

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
PUBLIC_FACE = """
import kernels, transfusion, transfusion.kernels
from transfusion import Transfusion, presets
from transfusion.kernels import IntervalMask, diffusion_loss, patchify_noise, transfusion_attention
assert callable(kernels.get_kernel), "not Hugging Face's `kernels`"
print(kernels.__file__, transfusion.__file__, transfusion.kernels.__file__, sep="\\n")
"""


@pytest.fixture(scope="module")
def checkout(root, repository_files, tmp_path_factory):
    """A copy of the repository: building in place would leave `build/` behind, which leaks into later wheels."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in repository_files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, run, tmp_path_factory):
    """A wheel built the way `python -m build` does it: a source distribution first, the wheel from that."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_package(wheel, checkout, python_files, repository_files):
    patterns = ("README.md", "kernels/tables/*.json", "transfusion/recipes/*.toml", "transfusion/recipes/*/*")
    data = [name for name in repository_files if any(map(name.match, patterns))]
    expected = {
        ("transfusion" / name if name.parts[0] == "kernels" else name).as_posix(): (checkout / name).read_bytes()
        for name in [*python_files, *data]
        if name.parts[0] in ("kernels", "transfusion")
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert sorted(packed) == sorted(
        expected
    )  # a folder without __init__.py would be missing; a flat `kernels` too much
    assert packed == expected


def test_wheel_metadata_and_entry_point(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "Name: transfusion-kernels" in texts["METADATA"]
    assert "Requires-Python: >=3.10" in texts["METADATA"]
    assert "transfusion = transfusion.cli:main" in texts["entry_points.txt"]
    assert texts["top_level.txt"].split() == ["transfusion"]


def test_wheel_installs_beside_the_other_kernels(wheel, run, run_python, tmp_path):
    pip_install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", tmp_path / "target"]
    run(*pip_install, wheel, cwd=tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'target')!r})\n{PUBLIC_FACE}"
    theirs, ours, our_kernels = run_python(code, cwd=tmp_path).stdout.split("\n")[:3]
    assert Path(theirs) == SITE_PACKAGES / "kernels" / "__init__.py"
    assert Path(ours) == tmp_path / "target" / "transfusion" / "__init__.py"
    assert Path(our_kernels) == tmp_path / "target" / "transfusion" / "kernels" / "__init__.py"


def test_editable_install_sees_the_checkout_and_the_other_kernels(checkout, run, run_python, tmp_path):
    scratch = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", scratch, cwd=tmp_path)
    python = scratch / "bin" / "python"
    purelib = Path(
        run_python("import sysconfig; print(sysconfig.get_path('purelib'))", tmp_path, python).stdout.strip()
    )
    # torch and the build tools come from this environment; a path line does not run the .pth files found there,
    # so the editable install of the developer is not seen.
    (purelib / "borrowed.pth").write_text(f"{SITE_PACKAGES}\n")
    pip_install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"]
    run(*pip_install, "--no-build-isolation", "--ignore-installed", "--editable", checkout, cwd=tmp_path)
    theirs, ours, our_kernels = run_python(PUBLIC_FACE, tmp_path, python).stdout.split("\n")[:3]
    assert Path(theirs) == SITE_PACKAGES / "kernels" / "__init__.py"
    assert Path(ours) == checkout / "transfusion" / "__init__.py"
    assert Path(our_kernels).resolve() == checkout / "kernels" / "__init__.py"
