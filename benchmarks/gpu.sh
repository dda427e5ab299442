#!/usr/bin/env bash
# Builds mor for the GPU of this machine alone, runs the tests that need one and every benchmark in
# bfloat16, writes benchmarks/results/GPU/*.json and from them the tables of docs/performance.md:
# SECONDS_IN_ALL (480) at most. What had no time left is named. PYTHON: the interpreter whose torch
# knows CUDA. LIBRARY: an _ops.so built elsewhere with nvcc for this GPU, which saves the minutes of
# building it here.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD

gpu=$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader 2>/dev/null | head -n 1) || true
if [ -z "$gpu" ]; then
  echo "gpu.sh: nvidia-smi finds no GPU here; nothing was done" >&2
  exit 1
fi
if ! "$python" -c 'import torch; torch.zeros(1, device="cuda")' 2>/dev/null; then
  echo "gpu.sh: the torch of $python cannot use $gpu (PYTHON names another); nothing was done" >&2
  exit 1
fi

left() { echo $((${SECONDS_IN_ALL:-480} - SECONDS)); }
failed=()
step() { # NAME COMMAND...: at most the time that is left
  printf '\n== %s (%ss left)\n' "$1" "$(left)"
  if [ "$(left)" -lt 10 ]; then
    failed+=("$1: no time left")
  else
    timeout "$(left)" "${@:2}" || failed+=("$1: exit status $?")
  fi
}

build() {
  timeout "$(left)" cmake -S . -B build/gpu -G Ninja -DMOR_CUDA=ON \
    -DMOR_CUDA_ARCHITECTURES="$(tr -d '. ' <<<"${gpu##*,}")-real" \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
  timeout "$(left)" cmake --build build/gpu
  cmake --install build/gpu --prefix .
}
if [ -n "${LIBRARY:-}" ]; then
  cp "$LIBRARY" mor/_ops.so
else
  printf '== build for %s\n' "$gpu"
  build
fi

workers=() # 2000 small tests wait for the host
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
step tests timeout $(($(left) / 3)) "$python" -m pytest -q -m cuda "${workers[@]}" tests/ops tests/models

# Each gets an equal part of the time that is left; what it saves goes to the later ones, and so to
# attention, which compiles most.
benchmarks=()
for name in benchmarks/bench_*.py; do
  name=${name#benchmarks/bench_} name=${name%.py}
  [[ $name == *depth_attention ]] || benchmarks+=("$name")
done
benchmarks+=(paged_depth_attention depth_attention)
for i in "${!benchmarks[@]}"; do
  name=${benchmarks[i]} only=(--only bfloat16)
  case $name in dispatch | group_rows) only=() ;; train) only=(--bf16) ;; esac
  step "$name" "$python" "benchmarks/bench_$name.py" --device cuda "${only[@]}" \
    --limit $(($(left) / (${#benchmarks[@]} - i) * 3 / 4)) --json
done
"$python" tools/performance_page.py

printf '\n%s seconds\n' "$SECONDS"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
