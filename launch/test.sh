#!/usr/bin/env bash
# Install what development needs, then lint, check types and run the tests.
#   launch/test.sh [ARGUMENTS OF pytest]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

"$root/launch/install.sh" dev
# W&B's own sweep engine, to hold ours against; it asks for an old numpy that it can do without
"$venv/bin/python" -m pip install --quiet --no-deps --constraint "$root/constraints.txt" sweeps
# for the kernels' tests on a CPU; torch for GPUs has brought the version that it wants
"$venv/bin/python" -c "import triton" 2>/dev/null ||
    "$venv/bin/python" -m pip install --quiet --no-deps triton==3.8.0
cd "$root"
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
"$venv/bin/mypy"
# threads that spin at OpenMP's barriers take the cores from other tests: two trainings of two threads on
# two cores took 43 s so, and 13 s when their threads sleep instead (over the whole suite no gain was seen)
export OMP_WAIT_POLICY=passive
# most tests wait for processes to start or to end: three files at a time keep two cores busy. In the
# order that tests/conftest.py gives, the longest first
exec "$venv/bin/python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
