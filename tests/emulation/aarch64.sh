#!/bin/bash
# Runs the kernel tests with the NEON code, compiled here for aarch64 and run by QEMU. For Debian and Ubuntu on x86-64, as root:
#
#   apt-get install debootstrap cmake ninja-build g++-aarch64-linux-gnu qemu-user-static
#   tests/emulation/aarch64.sh [arguments for pytest]
#
# PYTHON (default python3) must have pip and nanobind. The aarch64 system stays in WORK for the next run.
# Tests that start another Python need QEMU registered with the kernel (binfmt_misc), as qemu-user-static's installation does.
set -euo pipefail

python=${PYTHON:-python3}
work=${WORK:-/var/tmp/fanin-aarch64}
tree=$(cd "$(dirname "$0")/../.." && pwd)
root=$work/root
packages=$work/packages

if [ ! -e "$work/ready" ]; then  # a Debian of packages unpacked but not configured: enough for Python
  debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,libpython3-dev bookworm "$root"
  for package in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
  "$python" -m pip install --quiet --target "$packages" --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
    --python-version 3.11 --implementation cp --only-binary=:all: "numpy>=2" pytest hypothesis
  mkdir -p "$work/include/aarch64-linux-gnu"
  ln -sfn "$root/usr/include/aarch64-linux-gnu/python3.11" "$work/include/aarch64-linux-gnu/"
  touch "$work/ready"
fi

cmake -S "$tree" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS="-I$work/include" \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DPython_EXECUTABLE="$(command -v "$python")" -DPython_INCLUDE_DIR="$root/usr/include/python3.11"
cmake --build "$work/build"

rm -rf "$work/tree" && mkdir -p "$work/tree"
(cd "$tree" && tar -c --exclude='*.so' --exclude=__pycache__ pyproject.toml models tests/__init__.py tests/test_head.py tests/kernels) |
  tar -x -C "$work/tree"
cp "$work"/build/_cpu.*.so "$work/tree/models/kernels/_cpu.cpython-311-aarch64-linux-gnu.so"  # CMake named it after this machine

cd "$work/tree"
export QEMU_LD_PREFIX=$root PYTHONPATH=$packages OMP_NUM_THREADS=1
exec qemu-aarch64-static "$root/usr/bin/python3.11" -m pytest -p no:cacheprovider \
  --ignore tests/kernels/test_reference.py "$@" tests/test_head.py tests/kernels  # the reference is held against torch, which is not here
