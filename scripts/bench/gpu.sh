#!/usr/bin/env bash
# All that can be measured on one GPU, in one command: the tests that need it, the step (batch, compile, checkpointing,
# float8), attention, the loss, the loader, the first step and training from shards; against open_clip, where it is
# installed.
#
#     scripts/bench/gpu.sh [FOLDER]
#
# Writes FOLDER/<name of the GPU>.md (docs/benchmarks by default), a section for each part and model, as it goes: it may be
# killed, and other commands with other PARTS or MODELS complete the same file. A part that fails says so there.
#
# PYTHON names the Python to use, which needs what clip_train needs to run (and pytest for the tests); clip_train itself
# need not be installed. SHARDS is an absolute pattern of shards with jpg and txt files, instead of the photos in ../shared:
# without either, captions are made up, training is from the built-in pictures, and the loader is not measured. MODELS,
# BATCHES (of one model in one command), SETTINGS (of step_sweep.py, by semicolons) and PARTS leave something out.
set -uo pipefail
folder=$(realpath -m "${1:-$(dirname "$0")/../../docs/benchmarks}")
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

PYTHON=${PYTHON:-$(command -v uv >/dev/null && echo uv run python || echo python3)}
MODELS=${MODELS:-vit_b_32,vit_b_16,vit_l_14}
BATCHES=${BATCHES:-256,1024}
PARTS=${PARTS:-tests step attention loss first_step end_to_end loader}
settings=(${SETTINGS:+--settings "$SETTINGS"})
shards=(${SHARDS:+--shards "$SHARDS"})

for one in $PARTS; do
    [[ " tests step attention loss first_step end_to_end loader " == *" $one "* ]] || {
        echo "error: PARTS has no $one" >&2
        exit 2
    }
done
name=$($PYTHON - <<'END'
import sys

try:
    import torch

    import clip_train.data.files
except ImportError as error:
    sys.exit(f"error: {sys.executable}: {error}")
if not torch.cuda.is_available():
    sys.exit(f"error: torch {torch.__version__} sees no CUDA GPU here")
print(torch.cuda.get_device_name())
END
) || exit 2
record="$folder/$(tr '[:upper:] ' '[:lower:]_' <<<"$name").md"

failed=0
part() { # TITLE SCRIPT...: what it prints, under the title
    echo "== $1" >&2
    $PYTHON scripts/bench/part.py "$record" "$name" "$1" $PYTHON "${@:2}" || failed=1
}

for one in $PARTS; do
    case $one in
        tests) part "Tests that need a GPU" -m pytest -o addopts= -v --tb short -m gpu --continue-on-collection-errors \
            --no-header -p no:warnings tests ;;
        step) for model in ${MODELS//,/ }; do
            part "Step of $model" scripts/bench/step_sweep.py --models "$model" --batch "$BATCHES" \
                "${settings[@]}" "${shards[@]}"
        done ;;
        attention) part "Attention" scripts/bench/attention.py ;;
        loss) part "Loss" scripts/bench/loss_gpu.py ;;
        first_step) part "From the command to the first step" scripts/bench/first_step.py \
            --device cuda --batch 256 --rounds 1 ;;
        end_to_end) for model in ${MODELS//,/ }; do
            [[ $model == vit_l_14 ]] && continue # 1024 pairs of it are too many for most
            part "From shards, loader included: $model" scripts/bench/end_to_end.py --device cuda --model "$model" \
                --batch 1024 --steps 80 --workers "$(nproc)" --rounds 1 "${shards[@]}"
        done ;;
        loader) part "Loader" scripts/bench/loader.py --rounds 1 "${shards[@]}" ;;
    esac
done
echo "wrote $record"
exit $failed
