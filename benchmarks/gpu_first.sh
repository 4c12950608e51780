#!/usr/bin/env bash
# All that is to be seen on a machine with a GPU, in less than nine minutes:
#
#     bash benchmarks/gpu_first.sh FOLDER
#
# Runs from a plain checkout with the python3 that is there (PYTHON=... names another). Each step
# has its time and its file in FOLDER; one that fails does not stop the others. The evidence that
# `pytest -m gpu` and the sanitizer write to benchmarks/results/ is copied there too.
set -uo pipefail

mkdir -p "$1" && out=$(cd "$1" && pwd) || exit
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
export COLUMNS=120  # of tables
begin=$(mktemp)
trap 'rm -f "$begin"' EXIT
failed=0

# step NAME SECONDS COMMAND...: what it prints goes to NAME.txt
step() {
    local name=$1 seconds=$2 status=0 start=$SECONDS
    shift 2
    # SIGINT: pytest then still writes its report
    timeout -s INT -k 10 "$seconds" "$@" >>"$out/$name.txt" 2>&1 || status=$?
    [ "$status" -eq 0 ] || failed=1
    printf '%-9s exit %-3s %3s s  %s\n' "$name" "$status" $((SECONDS - start)) "$*" |
        tee -a "$out/summary.txt"
}

{
    nvidia-smi
    "$python" -m xprnn info
    "$python" -m pip list 2>/dev/null | grep -iE '^(cupy|nvidia|numpy|torch|ml.dtypes|onnx|pytest)'
    nproc
} >"$out/summary.txt" 2>&1

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)

step verify 60 "$python" -m xprnn verify --backend cupy
step suite 300 "$python" -m pytest -m gpu -q -p no:cacheprovider "${workers[@]}" --durations=15
step sanitizer 75 "$python" benchmarks/sanitize.py
for shape in "gru float32 512 32" "gru bfloat16 512 32" "lstm bfloat16 1024 64" "rnn_tanh float32 256 1"; do
    read -r cell dtype hidden batch <<<"$shape"
    step bench 15 "$python" -m xprnn bench --backend cupy --against torch --steps 256 \
        --cell "$cell" --dtype "$dtype" --hidden "$hidden" --batch "$batch"
done

find benchmarks/results -type f -newer "$begin" -exec cp {} "$out" \;
exit "$failed"
