"""Compiles the kernels for a GPU that is not there: exactly what a call would start, with the same types and constants.

A call on CPU tensors is recorded instead of run; a record is compiled the way Triton's launcher would, and ptxas is asked for
registers and spills, which the compiled kernel itself only tells on a device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.kernels.gpu.launch import REGISTERS, Config

# Shared memory that one program may have, in bytes: A100, GeForce 30 and A10, H100, B200 (CUDA programming guide, compute
# capabilities).
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.uint16: "u16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Launch:
    """A recorded start of a kernel."""

    kernel: Any
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    config: Config


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs of a multiprocessor, for one program; `tensor_cores` are its instructions for them."""

    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    tensor_cores: frozenset[str]


def record(monkeypatch: Any, call: Callable[[], object], every_config: bool = False) -> list[Launch]:
    """The launches of a call on CPU tensors; with `every_config` those of the configurations tried, too."""
    from models.kernels.gpu import ops, train

    launches: list[Launch] = []

    def run(kernel: Any, programs: int, arguments: Any, constants: Any, config: Config) -> None:
        launches.append(Launch(kernel, dict(arguments), dict(constants), config))

    def choose(x: Any, problem: Any, configs: list[Config], prepare: Any) -> Config:
        for config in configs[1:]:
            prepare()(config)
        return configs[0]

    for module in (ops, train):
        monkeypatch.setattr(module, "run", run)
        if every_config:
            monkeypatch.setattr(module, "choose", choose)
    monkeypatch.setattr(ops, "INTERPRETED", True)  # CPU tensors will do
    call()
    return launches


def compile_for(capability: int, launch: Launch) -> Resources:
    signature, constants, attributes = {}, dict(launch.constants) | dict(launch.config.sizes), {}
    free = launch.kernel.do_not_specialize or ()
    for name, argument in launch.arguments.items():
        signature[name] = _type(argument)
        if argument is None or (type(argument) is int and argument == 1 and name not in free):
            signature[name], constants[name] = "constexpr", argument
        elif isinstance(argument, torch.Tensor) or (type(argument) is int and argument % 16 == 0 and name not in free):
            attributes[(launch.kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys([*launch.constants, *launch.config.sizes], "constexpr")
    signature = {name: signature[name] for name in launch.kernel.arg_names}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.config.warps, "num_stages": launch.config.stages, "maxnreg": REGISTERS},
    )
    ptx = compiled.asm["ptx"]
    registers, spilled = _resources(ptx)
    found = frozenset(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx))
    return Resources(registers, spilled, compiled.metadata.shared, found)


def _type(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return "*" + TYPES[argument.dtype]
    if isinstance(argument, tuple):
        return tuple(_type(each) for each in argument)
    if isinstance(argument, float):
        return "fp32"
    return "i32" if argument is not None and -(2**31) <= argument < 2**31 else "i64"


def _resources(ptx: str) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, from ptxas."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    blackwell = target[1].startswith("sm_1")
    ptxas = triton.knobs.nvidia.ptxas_blackwell if blackwell else triton.knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [ptxas.path, "-v", f"--gpu-name={target[1]}", str(file), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers is not None, said
    assert spills is not None, said
    return int(registers[1]), int(spills[1]) + int(spills[2])
