"""The Dockerfile: what can be known of its images without Docker; and, on request, its steps in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve.settings import parse
from tests.serve.harness import ROOT, Process

Step = tuple[str, str]  # instruction, arguments


def stages() -> dict[str, list[Step]]:
    """The Dockerfile's stages by name, each with the steps of the stage that it is made from."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[Step]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, arguments = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = arguments.split()
            found[name] = [*found.get(base, [(instruction, arguments)])]
        else:
            found[name].append((instruction, arguments))
    return found


STAGES = stages()


def last(target: str, instruction: str) -> str:
    """The arguments that hold: of an instruction given twice, the second."""
    return [arguments for name, arguments in STAGES[target] if name == instruction][-1]


def environment(target: str) -> dict[str, str]:
    pairs = [pair for name, arguments in STAGES[target] if name == "ENV" for pair in shlex.split(arguments)]
    return dict(pair.split("=", 1) for pair in pairs)


def test_the_default_target_is_the_one_without_torch() -> None:
    assert list(STAGES)[-1] == "cpu"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for target in ("cpu", "gpu"):
        (extra,) = {match for step in STAGES[target] for match in re.findall(r"\.whl\)\[(\w+),otel\]", step[1])}
        assert extra == target
        assert any(line.startswith("torch") for line in extras[extra]) == (target == "gpu")


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_it_starts_a_server_with_flags_that_exist_as_nobody_in_particular(target: str) -> None:
    assert json.loads(last(target, "ENTRYPOINT")) == ["python", "-m", "serve"]
    settings = parse(json.loads(last(target, "CMD")))
    assert (settings.bundle, settings.host) == (Path("/bundle"), "0.0.0.0")
    assert settings.port == int(last(target, "EXPOSE"))
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last(target, "USER"))
    steps = [name for name, _ in STAGES[target]]
    assert steps.index("USER") > max(
        i for i, name in enumerate(steps) if name in ("RUN", "COPY")
    )  # what it runs is not its own


def health_check(port: int) -> int:
    options, _, command = last("cpu", "HEALTHCHECK").partition(" CMD ")
    assert "--start-period" in options
    assert "127.0.0.1:8000/" in command
    program, *arguments = json.loads(command.replace(":8000/", f":{port}/"))
    assert program == "python"
    return subprocess.run([sys.executable, *arguments], capture_output=True, timeout=60).returncode


def test_the_health_check_tells_a_live_server_from_none(server: Process) -> None:
    assert health_check(int(server.url.rpartition(":")[2])) == 0
    assert health_check(1) != 0


def test_triton_finds_a_compiler_and_a_folder_to_write_and_run_from() -> None:
    installed = " ".join(arguments for name, arguments in STAGES["gpu"] if name == "RUN" and "apt-get" in arguments)
    assert {"gcc", "libc6-dev"} <= set(installed.split())
    volume = Path(last("gpu", "VOLUME"))
    variables = environment("gpu")
    assert all(volume in (path := Path(variables[name]), *path.parents) for name in ("TRITON_CACHE_DIR", "TMPDIR"))
    owner = last("gpu", "USER").partition(":")[0]
    assert any(f"--owner={owner}" in step and step.endswith(f" {volume}") for _, step in STAGES["gpu"])


class Folder:
    """A folder in place of an image's root. Absolute paths that the steps name lie in it; its Python is an environment."""

    def __init__(self, root: Path) -> None:
        self.root, self.workdir = root, root
        self.variables: dict[str, str] = {}
        venv.create(root / "venv", with_pip=True, symlinks=False)

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/") if path.startswith("/") else self.workdir / path

    def step(self, instruction: str, arguments: str, others: dict[str, Folder]) -> None:
        match instruction:
            case "WORKDIR":
                self.workdir = self.at(arguments)
                self.workdir.mkdir(parents=True, exist_ok=True)
            case "ENV":
                self.variables |= dict(pair.split("=", 1) for pair in shlex.split(arguments))
            case "COPY":
                *words, target = arguments.split()
                stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
                self.copy([others[stage].at(word) if stage else ROOT / word for word in words], target)
            case "RUN" if not arguments.startswith("apt-get"):  # the system's packages are there already
                command = re.sub(r"(?<![\w.*)-])/(?=(tmp|source|wheels)\b)", f"{self.root}/", arguments)
                done = subprocess.run(
                    command, shell=True, cwd=self.workdir, env=self.environment(), capture_output=True, text=True
                )
                assert done.returncode == 0, done.stdout + done.stderr

    def copy(self, sources: list[Path], target: str) -> None:
        for source in sources:
            place = self.at(target) / source.name if target.endswith("/") else self.at(target)
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                shutil.copy(source, place)

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name in ("LANG", "TZ")}
        return {**inherited, **self.variables, "PATH": f"{self.root}/venv/bin:{os.environ['PATH']}", "HOME": "/nonexistent"}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.slow
@pytest.mark.skipif(
    "FANIN_TEST_IMAGE" not in os.environ, reason="takes minutes and a package index; FANIN_TEST_IMAGE=1 asks for it"
)
def test_the_steps_of_the_default_target_make_a_server_that_writes_nothing(folder: Path, bundle_path: Path) -> None:
    images: dict[str, Folder] = {}
    for name in ("build", "cpu"):
        images[name] = Folder(folder / name)
        for instruction, arguments in STAGES[name]:
            images[name].step(instruction, arguments, images)
    image = images["cpu"]
    listed = subprocess.run(
        [image.root / "venv/bin/pip", "list"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert re.search(r"^fanin\s", listed, re.MULTILINE)
    assert not re.search(r"^(torch|transformers|triton|nvidia)", listed, re.MULTILINE)

    shutil.copytree(bundle_path, folder / "bundle")
    user = int(last("cpu", "USER").partition(":")[0])
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222 | 0o444 | (0o111 if path.is_dir() else 0))
    command = [image.root / "venv/bin/python", *json.loads(last("cpu", "ENTRYPOINT"))[1:], folder / "bundle", "--port", "0"]
    as_user = {"user": user, "group": user, "extra_groups": []} if os.getuid() == 0 else {}
    process = subprocess.Popen(
        command,
        cwd=image.workdir,
        env=image.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **as_user,
    )
    assert process.stdout
    greeting = process.stdout.readline()
    assert greeting, process.communicate()[1]
    answer = httpx.post(greeting.split()[-1] + "predict", json={"inputs": "sort an array"}, timeout=30)
    assert len(answer.json()["predictions"][0]["labels"]) == 10
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
