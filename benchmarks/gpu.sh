#!/usr/bin/env bash
# All GPU tests and benchmarks in one command, within eight minutes, from a bare checkout: nothing is installed.
#
#   benchmarks/gpu.sh                       # on a machine with a GPU
#   benchmarks/gpu.sh --device cpu --tiny   # tries every stage out on a CPU, in two or three minutes
#
# --out DIR takes the results (benchmarks/results/gpu, or out/gpu_tiny with --tiny). Where the environment variable OUT
# names a folder, they are packed into it after each stage. The exit code is 0 if every stage went well. PYTHON names the
# interpreter (python3).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

device=cuda tiny=0 out=
while (($#)); do
    case $1 in
        --device) device=${2:?--device needs a value} && shift 2 ;;
        --out) out=${2:?--out needs a value} && shift 2 ;;
        --tiny) tiny=1 && shift ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
done
python=${PYTHON:-python3}
if ((tiny)); then
    out=${out:-out/gpu_tiny}
    step_options=(--every-network --sizes 1000 4000 --rounds 2 --repetitions 3 --seconds 1 --budget 30 --threads 1)
    training_options=(--tiny --rounds 3 --milliseconds 50 --seconds 30 --threads 1)
else
    out=${out:-benchmarks/results/gpu}
    # The sizes that matter most come first, should the time not do for all.
    step_options=(--sizes 95000 1e6 11173962 1e8 1e4 1e3 --rounds 5 --repetitions 20 --seconds 0.5 --budget 125)
    training_options=(--rounds 9 --milliseconds 400 --seconds 75)
fi
mkdir -p "$out" || exit 2
summary=$out/summary.txt
failed=0
: >"$summary"

# stage NAME SECONDS COMMAND...: runs it for so long at most, keeps what it prints, and notes how it ended. An interrupt
# lets pytest still say what failed.
stage() {
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    echo "== $name: $*"
    timeout --signal=INT --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    ((code == 0)) || failed=1
    case $code in
        0) code="done" ;;
        124 | 137) code="stopped after $limit s" ;;
        *) code="FAILED with exit code $code" ;;
    esac
    echo "$name: $code, $((SECONDS - begin)) s" >>"$summary"
    pack
}

# What has been found so far, for whoever can look into OUT only.
pack() {
    [[ -n ${OUT:-} ]] || return 0
    mkdir -p "$OUT" && cp "$summary" "$OUT/" && tar -czf "$OUT/gpu_results.tar.gz" -C "$out" .
}

# shellcheck disable=SC2329  # called by the first stage, in a shell of its own
# Both sets of tests even if the first fails.
run_tests() {
    local python=$1 tiny=$2 code=0 options=(-q -p no:cacheprovider --color=no --tb=short)
    "$python" -m pytest "${options[@]}" -m cuda tests || code=1
    # Not marked so, for without a GPU these run in Triton's interpreter. Compiling for sm_90 says nothing new on a GPU.
    options+=(-m "not cuda and not compile")
    local name=tests/lodo/test_gpu_kernels.py
    if ((tiny)); then
        "$python" -m pytest "${options[@]}" --collect-only "$name" || code=1 # in the interpreter it would take minutes
    elif "$python" -c "import xdist" 2>/dev/null; then
        "$python" -m pytest "${options[@]}" -n 8 "$name" || code=1 # most of their time is compilation
    else # the same in processes that share the compiled kernels
        "$python" -m pytest "${options[@]}" -k "not test_networks" "$name" &
        "$python" -m pytest "${options[@]}" -k "test_networks and random" "$name" &
        "$python" -m pytest "${options[@]}" -k "test_networks and shuffle" "$name" || code=1
        wait %1 || code=1
        wait %2 || code=1
    fi
    return "$code"
}
export -f run_tests

# The limits add up to less than eight minutes.
# shellcheck disable=SC2016  # expanded there
stage tests 105 bash -c 'run_tests "$1" "$2"' tests "$python" "$tiny"
stage step_time 165 "$python" -m benchmarks.step_time --device "$device" --out "$out" "${step_options[@]}"
stage training_throughput 105 \
    "$python" -m benchmarks.training_throughput --device "$device" --out "$out" "${training_options[@]}"
stage kernel_limits 75 "$python" -m benchmarks.kernel_limits --device "$device" --out "$out"

{
    echo
    "$python" - "$device" <<'END'
import sys

from benchmarks import measuring
import torch

print(f"{measuring.device_name(sys.argv[1])}, torch {torch.__version__}", measuring.device_software(sys.argv[1]))
END
    for name in step_time training_throughput kernel_limits; do
        [[ ! -e $out/$name.md ]] || sed -n '/^## Headlines/,$p' "$out/$name.md" | sed "1s/.*/\n$name/"
    done
} >>"$summary" 2>&1
pack
echo
cat "$summary"
exit $failed
