#!/bin/bash
# Runs the kernel tests with the AVX-512 code on a machine that has only AVX2: avx512.h makes its intrinsics of two of AVX2's each.
#
#   make set-up
#   tests/emulation/avx512.sh [arguments for pytest]
set -euo pipefail

tree=$(cd "$(dirname "$0")/../.." && pwd)
python=${VENV:-$tree/.venv}/bin/python
work=${WORK:-/var/tmp/fanin-avx512}
source=$tree/models/kernels/csrc

rm -rf "$work" && mkdir -p "$work/tree"
"$python" -m pip install --quiet --target "$work/packages" --constraint "$tree/constraints.txt" nanobind
nanobind=$work/packages/nanobind
compile() { g++ -std=gnu++20 -fPIC -O3 "${@:3}" -c "$1" -o "$work/$2.o"; }
level=(-ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-psabi)
python_headers=$("$python" -c "import sysconfig; print(sysconfig.get_path('include'))")
emulated=("${level[@]}" -DFANIN_AVX512 -mavx2 -mfma -mf16c -include "$tree/tests/emulation/avx512.h")
compile "$source/kernels.cpp" avx512 "${emulated[@]}" -DFANIN_LEVEL=avx512
compile "$source/kernels.cpp" avx512vnni "${emulated[@]}" -DFANIN_LEVEL=avx512vnni -DFANIN_AVX512VNNI
compile "$source/kernels.cpp" avx2 "${level[@]}" -DFANIN_LEVEL=avx2 -DFANIN_AVX2 -mavx2 -mfma -mf16c
compile "$source/kernels.cpp" scalar "${level[@]}" -DFANIN_LEVEL=scalar -DFANIN_SCALAR
compile "$source/ops.cpp" ops '-D__builtin_cpu_supports(feature)=true'
compile "$source/threads.cpp" threads
compile "$source/bindings.cpp" bindings -I"$nanobind/include" -I"$python_headers"
compile "$nanobind/src/nb_combined.cpp" nanobind -I"$nanobind/include" -I"$nanobind/ext/robin_map/include" -I"$python_headers" -fno-strict-aliasing

(cd "$tree" && tar -c --exclude='*.so' --exclude=__pycache__ pyproject.toml models tests/__init__.py tests/test_head.py tests/kernels) | tar -x -C "$work/tree"
g++ -shared "$work"/*.o -pthread -o "$work/tree/models/kernels/_cpu$("$python" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")"

# The editable installation would give the modules of the checkout: -S leaves it out, PYTHONPATH brings its packages back.
cd "$work/tree"
export PYTHONPATH=$work/tree:$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
exec "$python" -S -m pytest -p no:cacheprovider "$@" tests/test_head.py tests/kernels
