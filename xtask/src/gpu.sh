#!/usr/bin/env bash
# Checks and times the CUDA kernels on this machine: ./run.sh RESULTS [CASES]. Made by `cargo xtask gpu`.
# RESULTS gets device.txt, check.txt, tests.txt, a file for each of compute-sanitizer's tools, and bench.json (an object a
# line). The exit status is 1 if anything but a missing tool went wrong.
set -uo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
results="${1:?usage: ./run.sh RESULTS [CASES]}"
cases="${2:-2000}"
mkdir -p "$results"
export LD_LIBRARY_PATH="$here" DELTANET_TEST_GPU=1 DELTANET_TEST_CASES="$cases"
failed=0
step() { # name, command...
    local name="$1"
    shift
    if "$@" >"$results/$name.txt" 2>&1; then
        echo "$name: ok"
    else
        echo "$name: FAIL (see $results/$name.txt)"
        tail -n 5 "$results/$name.txt"
        failed=1
    fi
}

{ date -u +%F; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; "$here/deltanet" info; } \
    >"$results/device.txt" 2>&1
cat "$results/device.txt"
step check "$here/deltanet" check --device cuda "$here"/data/*.safetensors
step driver_cuda "$here/driver_cuda" 128 5 2
step tests "$here/cuda-tests" --test-threads=1

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        # Some tens of problems reach every kernel family; the tools are slow.
        DELTANET_TEST_CASES=40 step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$here/cuda-tests" --test-threads=1 match_the_oracle
    done
else
    echo "compute-sanitizer: SKIPPED, it is not installed"
fi

bench() { "$here/deltanet" bench --device cuda --json "$@" >>"$results/bench.json" || failed=1; }
: >"$results/bench.json"
bench --tokens 1,2,4,8,16,32,64,128,512,1024,2048,4096 --seqs 1 --in-place
bench --tokens 1 --seqs 1,4,32,128 --gate scalar,channel --in-place
bench --tokens 1 --seqs 1,32,128
bench --tokens 16 --seqs 1 --gate channel --in-place
bench --tokens 1,16 --seqs 1,32 --layout value --in-place
bench --tokens 1,16 --head-size 64,256 --in-place
bench --tokens 2048 --seqs 8 --in-place
bench --tokens 32768 --in-place
bench --tokens 4096,32768 --heads 2/4 --in-place
bench --tokens 64,512,2048,4096 --precision bf16 --in-place
echo "bench: $(wc -l <"$results/bench.json") lines in $results/bench.json"
exit "$failed"
