#!/bin/sh
# All checks that need a GPU, in one go; a table in Markdown on standard output, progress on standard error.
#
# benches/gpu.sh BUNDLE...
#
# A bundle is compared with its own recordings, stage by stage and token by token. Where a folder BUNDLE-float32 lies beside it,
# texts of greedy and of beam search are compared with those that it writes on the processor. PROVIDER=cpu runs all of it dry.
#
#   PROVIDER    cuda (default), tensorrt (after `blip2 build`) or cpu
#   BLIP2       the binary (default: target/release/blip2)
#   RUNTIME     ONNX Runtime's library or its folder, for --onnxruntime
#   PICTURES    what is captioned (default: models/samples/*.png)
#   ROUNDS      captions of every picture that are timed (default: 5)
#   CHECKPOINT  with it, `transformers` in DTYPE (default: float16) on DEVICE (default: cuda:0) is timed beside, by PYTHON
set -u
cd "$(dirname "$0")/.."
PROVIDER=${PROVIDER:-cuda} BLIP2=${BLIP2:-target/release/blip2} ROUNDS=${ROUNDS:-5} DTYPE=${DTYPE:-float16}
DEVICE=${DEVICE:-cuda:0} PYTHON=${PYTHON:-export/.venv/bin/python}
[ -z "${RUNTIME:-}" ] || export ORT_DYLIB_PATH="$RUNTIME"
[ $# -gt 0 ] || { echo "usage: benches/gpu.sh BUNDLE..." >&2; exit 2; }
[ -x "$BLIP2" ] || { echo "$BLIP2: the engine is not there; \`make build\` makes it" >&2; exit 2; }
: "${PICTURES:=$(echo models/samples/*.png)}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1)
echo "$("$BLIP2" --version) on $PROVIDER, ${card:-no NVIDIA driver}"
"$BLIP2" doctor --provider "$PROVIDER" | sed -n 's/^ONNX Runtime/\nONNX Runtime/p'

texts() { # bundle provider beams
    # shellcheck disable=SC2086
    "$BLIP2" caption --model "$1" --provider "$2" --beams "$3" $PICTURES
}

same() { # bundle beams: pictures with the text of the float32 bundle
    [ -d "$1-float32" ] || { echo "-"; return; }
    texts "$1-float32" cpu "$2" >"$work/wanted" && texts "$1" "$PROVIDER" "$2" >"$work/found" || { echo failed; return; }
    awk 'NR == FNR { wanted[FNR] = $0; next } $0 == wanted[FNR] { n++ } END { print n + 0 " of " FNR }' "$work/wanted" "$work/found"
}

echo
echo "| bundle | checks that hold | greedy | beams | copies |"
echo "|---|---|---|---|---|"
for bundle; do
    echo "verify $bundle" >&2
    "$BLIP2" verify "$bundle" --provider "$PROVIDER" >"$work/verify" 2>"$work/said" || failed=1
    held=$(grep -c '^ok ' "$work/verify"); wrong=$(grep -c '^WRONG' "$work/verify")
    result="$held of $((held + wrong))"
    [ -s "$work/verify" ] && ! grep -q '^blip2: .*\(cannot\|not usable\|failed:\)' "$work/said" || result="failed: $(tail -1 "$work/said")"
    copies=$(sed -n 's/^ *copies: //p' "$work/verify")
    echo "| $(basename "$bundle") | $result | $(same "$bundle" 1) | $(same "$bundle" 5) | ${copies:--} |"
    grep '^WRONG' "$work/verify" >&2
done

one=""
"$BLIP2" caption --help | grep -q -e --batch && one="--batch 1"
echo
echo "| one caption, ms: median of $ROUNDS rounds | vision | qformer | prefill | decode |"
echo "|---|---|---|---|---|"
for bundle; do
    echo "time $bundle" >&2
    : >"$work/times"
    many=""; for _ in $(seq "$ROUNDS"); do many="$many $PICTURES"; done
    # shellcheck disable=SC2086
    "$BLIP2" caption --model "$bundle" --provider "$PROVIDER" --beams 1 $one --json $many >"$work/times" || failed=1
    row="| $(basename "$bundle")"
    for stage in vision qformer prefill decode; do
        # The first texts warm the device up.
        median=$(sed -n "s/.*\"timings_ms\":{[^}]*\"$stage\":\([0-9.e+-]*\).*/\1/p" "$work/times" | tail -n +4 | sort -g |
            awk '{ v[NR] = $1 } END { if (NR) printf "%.2f", v[int((NR + 1) / 2)]; else print "-" }')
        row="$row | $median"
    done
    echo "$row |"
done

if [ -n "${CHECKPOINT:-}" ]; then
    echo "transformers $CHECKPOINT" >&2
    echo
    PYTHONPATH=export "$PYTHON" -m blip2_export baseline "$CHECKPOINT" --dtype "$DTYPE" --device "$DEVICE" || failed=1
fi
exit $failed
