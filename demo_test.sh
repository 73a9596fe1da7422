#!/usr/bin/env bash
# Segment an image with the published model ResNet50dilated + PPM_deepsup. With --offline, or if the server does not
# answer, train a small model on generated scenes instead (a few minutes). DOWNLOAD_ONLY=1 ./demo_test.sh only downloads
# the published model and the image.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-$(command -v python || command -v python3)}
result=${DEMO_RESULT:-demo_result}

published_model() {
    local name=ade20k-resnet50dilated-ppm_deepsup image=ADE_val_00001519.jpg
    local server=${MIT_SEMSEG_MIRROR:-http://sceneparsing.csail.mit.edu/model}
    mkdir -p "$result"
    # Download the small file first, to find out quickly whether the server answers.
    curl -fsSL --connect-timeout 10 --max-time 60 -o "$result/$image.part" \
        "${server%/model}/data/ADEChallengeData2016/images/validation/$image" || return 1
    mv "$result/$image.part" "$result/$image"
    "$python" -c "
import sys
from mit_semseg.models.pretrained import WeightsError, download_published
try:
    download_published('$name', 'ckpt/$name')
except WeightsError as error:
    sys.exit(f'error: {error}')" || return 1
    cfg=config/$name.yaml imgs=$result/$image
}

trained_model() {
    local data=data/quickstart scores=ckpt/quickstart/result/results.json
    cfg=config/quickstart.yaml imgs=$data/validation/images/scene_0003.jpg
    "$python" -m mit_semseg.dataset.synthetic "$data"
    "$python" train.py --cfg "$cfg" TRAIN.resume restart
    "$python" eval.py --cfg "$cfg" VAL.visualize True
    summary="Mean IoU on the validation scenes: $("$python" -c \
        'import json, sys; print("%.4f" % json.load(open(sys.argv[1]))["mean_iou"])' "$scores")
Panels of the validation scenes (image, label, prediction): ckpt/quickstart/result/validation/images/
Training curves: ckpt/quickstart/curves.png"
}

summary=
case "${DOWNLOAD_ONLY:+download}${1:-}" in
    download*)
        published_model
        exit
        ;;
    --offline) trained_model ;;
    "")
        if ! published_model; then
            echo "The published model cannot be downloaded; training a small model instead."
            trained_model
        fi
        ;;
    *)
        echo "usage: ./demo_test.sh [--offline]" >&2
        exit 2
        ;;
esac
"$python" test.py --imgs "$imgs" --cfg "$cfg" --overlay TEST.result "$result"
stem=$result/$(basename "$imgs" .jpg)
echo
[ -z "$summary" ] || echo "$summary"
echo "Image and prediction: $stem.png; overlay with legend: ${stem}_overlay.png"
