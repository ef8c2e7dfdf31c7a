"""What an installation and the container image are made from fits together."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OTHER_MACHINE = {"onnxruntime-gpu"}  # the Makefile and the Dockerfile do not install it


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    listed = (
        PROJECT["build-system"]["requires"] + PROJECT["project"]["dependencies"] + [line for extra in extras for line in extra]
    )
    return [Requirement(line) for line in listed if not line.startswith("fanin[")]


@pytest.mark.parametrize("requirement", [r for r in requirements() if r.name not in OTHER_MACHINE], ids=str)
def test_the_pinned_version_is_one_that_the_project_accepts(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_pins_are_exact_and_no_package_has_two() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    assert len(pins()) == len(lines)


def imported(package: str) -> set[str]:
    """The distributions that a package of ours imports; the GPU's kernels, imported only with tensors on one, are their own."""
    names: set[str] = set()
    for file in (ROOT / package).rglob("*.py"):
        if "gpu" in file.relative_to(ROOT).parts and "gpu" not in package:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    foreign = names - sys.stdlib_module_names - set(PROJECT["tool"]["scikit-build"]["wheel"]["packages"])
    distributions = packages_distributions()
    return {canonicalize_name(each) for name in foreign for each in distributions[name]}


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("models", "train"),
        ("models/kernels/gpu", "gpu"),
        ("train", "train"),
        ("export", "train"),
        ("serve", "cpu,client"),
        ("serve/gpu", "gpu"),
    ],
)
def test_what_is_imported_is_required(package: str, extra: str) -> None:
    project = PROJECT["project"]
    extras = [line for name in extra.split(",") for line in project["optional-dependencies"][name]]
    required = {canonicalize_name(Requirement(line).name) for line in project["dependencies"] + extras}
    missing = imported(package) - required - {"pydantic", "pydantic-core", "starlette"}  # fastapi is made of them
    missing -= {"googleapis-common-protos"}  # another package of the name google, which is protobuf's
    assert {name for name in missing if not name.startswith("opentelemetry-")} == set()  # imported only when it is switched on


def copied_into_the_image() -> list[str]:
    lines = re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return sorted({source for line in lines for source in line.split()[:-1]})


@pytest.mark.parametrize("source", copied_into_the_image())
def test_what_the_image_copies_exists_and_reaches_the_build(source: str) -> None:
    assert (ROOT / source).exists()
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    ignored = False
    for pattern in patterns:  # the last match decides
        if fnmatch(source, pattern.removeprefix("!")):
            ignored = not pattern.startswith("!")
    assert not ignored


def test_the_image_is_built_from_all_that_the_wheel_needs() -> None:
    copied = set(copied_into_the_image())
    assert set(PROJECT["tool"]["scikit-build"]["wheel"]["packages"]) <= copied
    assert {"pyproject.toml", "CMakeLists.txt", PROJECT["project"]["readme"], "LICENSE", "constraints.txt"} <= copied


def make_chromium(programs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`make chromium` where the commands are those in the folder `programs`."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is missing")
    environment["PATH"] = str(programs)
    return subprocess.run([make, "chromium"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["chromium", "chromium-browser", "google-chrome"])
def test_make_is_content_with_any_browser_of_the_family(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch(0o755)
    done = make_chromium(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_make_asks_for_a_browser_unless_its_tests_are_left_out(tmp_path: Path) -> None:
    without = make_chromium(tmp_path)
    assert without.returncode != 0
    assert "make test FANIN_SKIP_BROWSER=1" in without.stdout
    assert make_chromium(tmp_path, FANIN_SKIP_BROWSER="1").returncode == 0
