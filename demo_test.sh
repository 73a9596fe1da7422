#!/usr/bin/env bash
# Segments a picture. With the published ResNet50dilated + PPM_deepsup when its server answers; else, or with --offline,
# with a small network trained here on generated scenes (a few minutes).
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-$(command -v python || command -v python3)}
result=${DEMO_RESULT:-demo_result}

published() {
    local name=ade20k-resnet50dilated-ppm_deepsup picture=ADE_val_00001519.jpg
    local address=/data/ADEChallengeData2016/images/validation/$picture
    # The small file first: a server that does not answer is noticed at once.
    "$python" -m mit_semseg.apps.fetch file "$address" --to "$result/$picture" &&
        "$python" -m mit_semseg.apps.fetch model "$name" --to "ckpt/$name" || return 1
    "$python" test.py --imgs "$result/$picture" --cfg "config/$name.yaml" --overlay TEST.result "$result" || exit 1
    echo "Done: $result/ADE_val_00001519.png (picture and prediction) and $result/ADE_val_00001519_overlay.png"
}

built_in() {
    local cfg=config/quickstart.yaml data=data/quickstart picture=scene_0003
    "$python" -m mit_semseg.dataset.synthetic "$data"
    "$python" train.py --cfg "$cfg" TRAIN.resume restart
    "$python" eval.py --cfg "$cfg" VAL.visualize True
    "$python" test.py --imgs "$data/validation/images/$picture.jpg" --cfg "$cfg" --overlay TEST.result "$result"
    echo "Done. Mean IoU on the validation scenes: $("$python" -c \
        'import json; print("%.4f" % json.load(open("ckpt/quickstart/result/results.json"))["mean_iou"])')"
    echo "Pictures: $result/$picture.png (picture and prediction), $result/${picture}_overlay.png (with a legend),"
    echo "          ckpt/quickstart/result/validation/images/ (image, annotation, prediction of every scene),"
    echo "          ckpt/quickstart/curves.png (the training)"
}

case "${1:-}" in
    --offline) built_in ;;
    "")
        if ! published 2>"${TMPDIR:-/tmp}/mit_semseg_demo.$$"; then
            reason=$(grep -m 1 '^error: ' "${TMPDIR:-/tmp}/mit_semseg_demo.$$" | cut -c 8- || true)
            rm -f "${TMPDIR:-/tmp}/mit_semseg_demo.$$"
            echo "The published model cannot be downloaded (${reason:-no reason given}): taking the built-in way instead."
            built_in
        fi
        ;;
    *)
        echo "usage: ./demo_test.sh [--offline]" >&2
        exit 2
        ;;
esac
