"""What the commands have in common: how they end when something that they need is not there, or when they are not wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "train": ["--data", "absent", "--out", "absent"],
    "export": ["absent", "--out", "absent"],
    "serve": ["absent", "--port", "0"],
    "serve.predict": ["absent", "--input", "absent", "--output", "absent"],
}
each_command = pytest.mark.parametrize("command", COMMANDS)


def run(command: str, modules: Path) -> tuple[int, list[str]]:
    """Exit code and standard error of a command that finds the Python files in `modules` before those installed."""
    words = [sys.executable, "-m", command, *COMMANDS[command]]
    environment = os.environ | {"PYTHONPATH": str(modules)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("train", "torch", "train"),
        ("train", "transformers", "train"),
        ("train", "pyarrow", "train"),
        ("train", "jinja2", "train"),
        ("export", "torch", "train"),
        ("export", "onnxruntime", "train"),
        ("serve", "onnxruntime", "cpu"),
        ("serve.predict", "onnxruntime", "cpu"),
    ],
)
def test_a_package_that_is_not_installed_is_one_line(tmp_path: Path, command: str, package: str, extra: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no such package', name='{package}')\n")
    line = f"python -m {command}: error: needs the package {package}: pip install 'fanin[{extra}]'"
    assert run(command, tmp_path) == (2, [line])


@each_command
def test_kernels_that_cannot_be_used_are_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['models.kernels._cpu'] = None\n")
    code, (line,) = run(command, tmp_path)
    assert code == 2
    assert line.startswith(f"python -m {command}: error: the compiled kernels are missing in ")


@each_command
def test_ctrl_c_while_it_loads_is_one_line(tmp_path: Path, command: str) -> None:
    package = "torch" if command in ("train", "export") else "onnxruntime"
    stub = """import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with Ctrl-C ignored
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
    (tmp_path / f"{package}.py").write_text(stub)
    code, (line,) = run(command, tmp_path)
    assert code == 130
    assert line.startswith(f"python -m {command}: error: stopped")
