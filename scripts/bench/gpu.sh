#!/usr/bin/env bash
# All that can be measured on one GPU, in one command: the tests that need it, the step (batch, compile, checkpointing,
# float8), the loss, the loader, the first step and training from shards; against open_clip, where it is installed.
#
#     scripts/bench/gpu.sh [FOLDER]
#
# Writes FOLDER/<name of the GPU>.md (docs/benchmarks by default). A part that fails says so there, and the next one runs.
# PYTHON names the Python to use; MODELS, BATCHES, SETTINGS and PARTS leave something out.
set -uo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-uv run python}
MODELS=${MODELS:-vit_b_32,vit_b_16,vit_l_14}
BATCHES=${BATCHES:-256,1024}
SETTINGS=${SETTINGS:-plain;compile;selective;blocks;selective, compile;float8, compile;4 micro-batches;open_clip}
PARTS=${PARTS:-tests step loss loader first_step end_to_end}
folder=${1:-docs/benchmarks}

name=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) || {
    echo "error: torch sees no CUDA GPU here" >&2
    exit 2
}
record="$folder/$(tr '[:upper:] ' '[:lower:]_' <<<"$name").md"
mkdir -p "$folder"
unfinished=$(mktemp -d "$folder/.gpu.XXXXXX")
trap 'rm -rf "$unfinished"' EXIT

part() { # TITLE COMMAND...: what the command prints, under the title
    echo "== $1" >&2
    printf '\n## %s\n\n' "$1" >>"$unfinished/record"
    if "${@:2}" >"$unfinished/out" 2>"$unfinished/err"; then
        cat "$unfinished/out" >>"$unfinished/record"
    else
        printf 'Failed: `%s`\n' "$(tail -n 1 "$unfinished/err")" >>"$unfinished/record"
        tail -n 20 "$unfinished/err" >&2
    fi
}

printf '# %s\n\nMeasured by `scripts/bench/gpu.sh`; every table names its own versions.\n' "$name" >"$unfinished/record"
for one in $PARTS; do
    case $one in
        tests) part "Tests that need a GPU" $PYTHON -m pytest -q -n 0 -k "gpu or triton" --no-header -p no:warnings \
            tests/losses/test_triton_tiles.py tests/training/test_step_times.py tests/training/test_host_sync.py ;;
        step) part "Step" $PYTHON scripts/bench/step_sweep.py \
            --models "$MODELS" --batch "$BATCHES" --settings "$SETTINGS" ;;
        loss) part "Loss" $PYTHON scripts/bench/loss_gpu.py ;;
        loader) part "Loader" $PYTHON scripts/bench/loader.py --rounds 1 ;;
        first_step) part "From the command to the first step" $PYTHON scripts/bench/first_step.py \
            --device cuda --batch 256 --rounds 1 ;;
        end_to_end) part "From shards, loader included" $PYTHON scripts/bench/end_to_end.py \
            --device cuda --batch 256 --steps 40 --workers "$(nproc)" --rounds 1 ;;
        *) echo "error: PARTS has no $one" >&2; exit 2 ;;
    esac
done
mv "$unfinished/record" "$record"
echo "wrote $record"
