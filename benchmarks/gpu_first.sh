#!/usr/bin/env bash
# All that is to be seen on a machine with a GPU, what matters most first:
#
#     bash benchmarks/gpu_first.sh FOLDER [PART...]
#
# Runs from a plain checkout with the python3 that is there (PYTHON=... names another). Each part
# has its time; one that fails does not stop the others. FOLDER gets two files, new after each
# part: summary.txt, and evidence.tar.gz with what each part printed and what it wrote to
# benchmarks/results/. All of it takes 21 minutes at most. Where a run may last ten: first
# `suite sequence verify`, then `report`, then `sanitizer tuning`.
#
# suite      the parity suite, and the sequence kernels for long, from threads and processes at once
# sequence   the parity suite, the sequence kernels alone having their turns
# verify     every implementation against the float64 equations
# report     xprnn beside torch, with floors: benchmarks/device_report.py
# sanitizer  compute-sanitizer over the fused kernels
# tuning     every tiling of the sequence kernels
set -uo pipefail

parts=(suite sequence verify report sanitizer tuning)
[ $# -gt 0 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) && shift || exit
for part; do
    [[ " ${parts[*]} " == *" $part "* ]] || { echo "no part $part: ${parts[*]}" >&2 && exit 2; }
done
[ $# -eq 0 ] || parts=("$@")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
export COLUMNS=120  # of tables
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
touch "$work/begin"
mkdir "$work/evidence"
failed=0

keep() {  # what there is by now
    find benchmarks/results -type f -newer "$work/begin" -exec cp {} "$work/evidence" \;
    tar -czf "$work/evidence.tar.gz" -C "$work" evidence && mv "$work/evidence.tar.gz" "$out"
    cp "$work/evidence/summary.txt" "$out"
}

# step NAME SECONDS COMMAND...: what it prints goes to NAME.txt, its end to the screen too
step() {
    local name=$1 seconds=$2 status=0 start=$SECONDS
    shift 2
    [[ " ${parts[*]} " == *" $name "* ]] || return
    # SIGINT: pytest then still writes its report
    timeout -s INT -k 10 "$seconds" "$@" >"$work/evidence/$name.txt" 2>&1 || status=$?
    [ "$status" -eq 0 ] || failed=1
    tail -n 12 "$work/evidence/$name.txt"
    printf '%-9s exit %-3s %3s s  %s\n' "$name" "$status" $((SECONDS - start)) "$*" |
        tee -a "$work/evidence/summary.txt"
    keep
}

{
    nvidia-smi
    "$python" -m xprnn info
    "$python" -m pip list 2>/dev/null | grep -iE '^(cupy|nvidia|numpy|torch|ml.dtypes|onnx|pytest)'
    nproc
} >"$work/evidence/summary.txt" 2>&1
keep

# without one the suite skips its tests, and passes
"$python" -c 'import xprnn; xprnn.get_backend("cupy")' 2>/dev/null || {
    failed=1
    echo 'no usable GPU, as xprnn info says above: nothing here counts' |
        tee -a "$work/evidence/summary.txt" >&2
    keep
}

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
suite=("$python" -m pytest -m gpu -q -p no:cacheprovider "${workers[@]}" --durations=15)

step suite 300 "${suite[@]}"
step sequence 150 env XPRNN_KERNELS=sequence "${suite[@]}"
step verify 60 env XPRNN_KERNELS=sequence "$python" -m xprnn verify --backend cupy
step report 480 env OMP_NUM_THREADS="$(nproc)" "$python" -m benchmarks.device_report
step sanitizer 75 "$python" benchmarks/sanitize.py
step tuning 170 "$python" -m benchmarks.device.tuning
exit "$failed"
