#!/usr/bin/env bash
# All checks on a machine with a GPU, the most important first:
#
#     bash benchmarks/gpu_first.sh FOLDER [PART...]
#
# Runs from a plain checkout with the installed python3 (PYTHON=... names another). Each part has a
# time limit; one that fails or hangs does not stop the others. Two files in FOLDER are written again
# after each part: summary.txt, and evidence.tar.gz with each part's output and the files that it
# wrote to benchmarks/results/; results of earlier calls are kept. While a part runs, running.txt has
# its output. All of it takes 33 minutes at most. Where a command may last ten minutes, these names
# select groups of parts:
#
# first      qualify warm smoke sequence verify report: 10 minutes
# second     warm suite: 9 minutes
# third      warm full: 10 minutes
# fourth     warm frozen sanitizer tuning: 10 minutes
#
# qualify    xprnn qualify: every kernel compared and timed, in three minutes; its file is
#            qualified.json in the archive, and the other parts do not read it
# warm       compiles the kernels in advance, in a dozen processes: benchmarks/device/warm.py
# smoke      every kind of kernel once, at small, odd sizes, compared with float64
# sequence   the parity suite with the sequence kernels only
# verify     every implementation, compared with the float64 equations
# report     xprnn and torch, with roofline bounds, for a minute: benchmarks/device_report.py
# suite      the parity suite, and long runs of the sequence kernels from threads and processes
# full       the complete report
# frozen     the tests of cluster and wavefront kernels
# sanitizer  compute-sanitizer on all kernels
# tuning     every tiling of the sequence kernels
set -uo pipefail

parts=(qualify warm smoke sequence verify report suite full frozen sanitizer tuning)
declare -A calls=(
    [first]="qualify warm smoke sequence verify report"
    [second]="warm suite"
    [third]="warm full"
    [fourth]="warm frozen sanitizer tuning"
)
[ $# -gt 0 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) && shift || exit
requested=()
for part; do
    # shellcheck disable=SC2206  # the parts of a group are words
    requested+=(${calls[$part]:-$part})
done
for part in "${requested[@]}"; do
    [[ " ${parts[*]} " == *" $part "* ]] || { echo "no part $part: ${parts[*]}" >&2 && exit 2; }
done
[ ${#requested[@]} -eq 0 ] || parts=("${requested[@]}")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
export COLUMNS=120  # of tables
export XPRNN_QUALIFIED=off  # the parts test the defaults
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1  # other plugins may warn, and warnings are errors here
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
touch "$work/begin"
mkdir "$work/evidence"
[ ! -f "$out/evidence.tar.gz" ] || tar -xzf "$out/evidence.tar.gz" -C "$work" || exit
failed=0

keep() {  # copy the results so far to FOLDER
    find benchmarks/results -type f -newer "$work/begin" -exec cp {} "$work/evidence" \;
    tar -czf "$work/evidence.tar.gz" -C "$work" evidence && mv "$work/evidence.tar.gz" "$out"
    cp "$work/evidence/summary.txt" "$out"
}

fail() {  # report a failure in the summary and on the screen
    failed=1
    echo "$*" | tee -a "$work/evidence/summary.txt" >&2
    keep
}

# step NAME SECONDS COMMAND...: its output goes to NAME.txt, the last lines also to the screen
step() {
    local name=$1 seconds=$2 status=0 start=$SECONDS
    shift 2
    [[ " ${parts[*]} " == *" $name "* ]] || return
    # SIGINT, so that pytest and the report still write their results; `timeout` creates a process
    # group, so that processes started by the part end with it
    timeout -s INT -k 10 "$seconds" "$@" >"$out/running.txt" 2>&1 || status=$?
    [ "$status" -eq 0 ] || failed=1
    mv "$out/running.txt" "$work/evidence/$name.txt"
    tail -n 12 "$work/evidence/$name.txt"
    printf '%-9s exit %-3s %3s of %3s s  %s\n' \
        "$name" "$status" $((SECONDS - start)) "$seconds" "$*" |
        tee -a "$work/evidence/summary.txt"
    keep
}

{
    echo "${parts[*]}"
    git rev-parse HEAD 2>/dev/null
    timeout 20 nvidia-smi
    timeout 60 "$python" -m xprnn info
    "$python" -c 'from importlib.metadata import distributions as all
print(*sorted(f"{d.name} {d.version}" for d in all() if d.name.lower().startswith(
    ("cupy", "nvidia-cu", "numpy", "torch", "ml", "onnx", "pytest", "hypothesis"))), sep="\n")'
    nproc
} >>"$work/evidence/summary.txt" 2>&1
keep

missing=$("$python" -c 'from importlib.util import find_spec
needed = "numpy safetensors rich cupy ml_dtypes pytest hypothesis torch"
print(*[name for name in needed.split() if find_spec(name) is None])')
[ -z "$missing" ] || fail "not installed, parts that need it will fail: $missing"

# without a GPU the suite skips its tests and passes
timeout 60 "$python" -c 'import xprnn; xprnn.get_backend("cupy")' 2>/dev/null ||
    fail 'no usable GPU, see xprnn info above: the results do not count'

# xdist replaces a worker whose process a test has ended; without it the remaining tests do not run
xdist=() one_worker=() workers=()
"$python" -c 'import xdist' 2>/dev/null && xdist=(-p xdist.plugin --max-worker-restart 50) &&
    one_worker=("${xdist[@]}" -n 1) workers=("${xdist[@]}" -n $(($(nproc) > 15 ? 8 : 4)))
tests=("$python" -m pytest -v -p no:cacheprovider --continue-on-collection-errors --durations=15)
suite=("${tests[@]}" -m gpu "${workers[@]}")

step qualify 190 env OMP_NUM_THREADS="$(nproc)" "$python" -m xprnn qualify --backend cupy \
    -o "$work/evidence/qualified.json"
step warm 50 "$python" -m benchmarks.device.warm
step smoke 40 "${tests[@]}" -m gpu "${one_worker[@]}" tests/gpu/test_smoke.py
step sequence 70 env XPRNN_KERNELS=sequence "${suite[@]}"
step verify 40 env XPRNN_KERNELS=sequence "$python" -m xprnn verify --backend cupy
step report 100 env OMP_NUM_THREADS="$(nproc)" "$python" -m benchmarks.device_report --limit 80
step suite 420 "${suite[@]}"
step full 480 env OMP_NUM_THREADS="$(nproc)" "$python" -m benchmarks.device_report
step frozen 60 "${tests[@]}" -m "gpu and frozen" "${workers[@]}"
step sanitizer 240 "$python" benchmarks/sanitize.py
step tuning 170 "$python" -m benchmarks.device.tuning
exit "$failed"
