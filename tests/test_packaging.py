"""What is built and installed: the package alone, whole, from either distribution, without a module `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from factory import fine_tunes

import streamsoup

PACKAGE = Path(streamsoup.__file__).resolve().parent
ROOT = PACKAGE.parent
FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in")
# Otherwise the checkout would stand in for what was installed.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def modules():
    """Every module, as it is named in a distribution."""
    found = [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts]
    names = [f"streamsoup/{p.relative_to(PACKAGE).as_posix()}" for p in found]
    return [*names, *(f"streamsoup/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py"))]


def run(*command, cwd=None):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]} {done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, so that nothing is written beside them; tests lie there as in a checkout."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(PACKAGE, source / "streamsoup", ignore=ignore)
    shutil.copytree(ROOT / "kernels", source / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").touch()
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """A source distribution, and the wheel that is built of it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    (archive,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built[1]) as archive:
        return archive.namelist()


def test_a_source_distribution_holds_what_makes_the_package_and_no_tests(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {f"kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert names >= {*FILES, *kernels, *(n for n in modules() if not n.startswith("streamsoup/kernels/"))}
    assert not [name for name in names if name.startswith("tests")]


def test_the_wheel_from_the_source_distribution_is_the_wheel_from_the_checkout(source, built, tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source)
    (direct,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(direct) as one, zipfile.ZipFile(built[1]) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        assert all(one.read(name) == other.read(name) for name in one.namelist() if not name.endswith("RECORD"))


def test_wheel_holds_the_kernels_inside_the_package_and_no_top_level_kernels(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"streamsoup"}
    assert "streamsoup/kernels/__init__.py" in wheel


def test_wheel_holds_every_module_types_and_licence(wheel):
    assert {*modules(), "streamsoup/py.typed"} <= set(wheel)
    assert any(name.endswith("LICENSE") for name in wheel)
    assert not [name for name in wheel if "tests" in name.split("/")]


def test_what_is_installed_is_complete_and_works(built, tmp_path):
    """In an environment with nothing but the wheel and, by path, the dependencies that the tests have already."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", built[1], cwd=tmp_path)
    # Of what lies there besides, something may be broken that is none of ours.
    checked = subprocess.run([*map(str, pip), "check"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert "No broken requirements" in checked.stdout or " requires " in checked.stdout, checked
    assert not [line for line in checked.stdout.splitlines() if line.startswith("streamsoup ")]
    places = "import streamsoup, streamsoup.kernels as k; print(streamsoup.__file__, k.__file__)"
    assert all(Path(p).is_relative_to(site) for p in run(python, "-c", places, cwd=tmp_path).split())
    version = f"streamsoup {streamsoup.__version__}"
    assert run(python, "-m", "streamsoup", "--version", cwd=tmp_path).strip() == version
    assert run(environment / "bin" / "streamsoup", "--version", cwd=tmp_path).strip() == version
    fine_tunes(tmp_path, 2)
    run(python, "-m", "streamsoup", "soup", "run1", "run2", "-o", "soup", cwd=tmp_path)
    run(python, "-m", "streamsoup", "verify", "soup", "--all", cwd=tmp_path)


def test_no_top_level_kernels_can_be_imported_from_an_installation(tmp_path):
    """Outside the checkout, `import kernels` must not find ours."""
    script = (
        "import importlib.util as u, streamsoup.kernels as k\n"
        "spec = u.find_spec('kernels')\n"
        "assert spec is None or spec.origin != k.__file__, spec"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
