#!/usr/bin/env bash
# Segments a picture. With the published ResNet50dilated + PPM_deepsup when its server answers; else, or with --offline,
# with a small network trained here on generated scenes (a few minutes). DOWNLOAD_ONLY=1 ./demo_test.sh only fetches the
# published model and its picture.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-$(command -v python || command -v python3)}
result=${DEMO_RESULT:-demo_result}

instead=${DOWNLOAD_ONLY:+.}
instead=${instead:-: taking the built-in way instead.}

published() {
    local name=ade20k-resnet50dilated-ppm_deepsup picture=ADE_val_00001519 message
    # The small file first: a server that does not answer is noticed at once.
    if ! message=$("$python" -m mit_semseg.cli.fetch file \
        "/data/ADEChallengeData2016/images/validation/$picture.jpg" --to "$result/$picture.jpg" 2>&1); then
        echo "The published model cannot be downloaded (${message#error: })${instead}"
        return 1
    fi
    if ! "$python" -m mit_semseg.cli.fetch model "$name" --to "ckpt/$name"; then
        echo "The published model cannot be downloaded${instead}"
        return 1
    fi
    cfg=config/$name.yaml imgs=$result/$picture.jpg
}

built_in() {
    local data=data/quickstart scores=ckpt/quickstart/result/results.json
    cfg=config/quickstart.yaml imgs=$data/validation/images/scene_0003.jpg
    "$python" -m mit_semseg.dataset.synthetic "$data"
    "$python" train.py --cfg "$cfg" TRAIN.resume restart
    "$python" eval.py --cfg "$cfg" VAL.visualize True
    summary="Mean IoU on the validation scenes: $("$python" -c \
        'import json, sys; print("%.4f" % json.load(open(sys.argv[1]))["mean_iou"])' "$scores")
Every validation scene (image, annotation, prediction): ckpt/quickstart/result/validation/images/
Curves of the training: ckpt/quickstart/curves.png"
}

if [ -n "${DOWNLOAD_ONLY:-}" ]; then
    published
    exit
fi
summary=
case "${1:-}" in
    --offline) built_in ;;
    "") published || built_in ;;
    *)
        echo "usage: ./demo_test.sh [--offline]" >&2
        exit 2
        ;;
esac
"$python" test.py --imgs "$imgs" --cfg "$cfg" --overlay TEST.result "$result"
stem=$result/$(basename "$imgs" .jpg)
echo
[ -z "$summary" ] || echo "$summary"
echo "Picture and prediction: $stem.png; tinted, with a legend: ${stem}_overlay.png"
