#!/usr/bin/env bash
# Download ADE20K scene parsing (0.9 GB) to data/, unpack it, and write data/training.odgt and data/validation.odgt.
# Start the script again after an interruption to resume. ADE20K_ADDRESS sets another URL of the archive.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-$(command -v python || command -v python3)}
name=ADEChallengeData2016
archive=data/$name.zip
unpacked=data/$name.tmp

# zipfile -t exits with 0 even if a checksum is wrong, but then prints more than this line.
is_complete() { [ "$("$python" -m zipfile -t "$archive" 2> /dev/null)" = "Done testing" ]; }

fetch() {
    local options=(-fL --retry 3 --connect-timeout 20 -o "$archive" "$1") code=0
    curl -C - "${options[@]}" || code=$?
    # Codes 33 and 36: the server cannot resume a download.
    if [ "$code" = 33 ] || [ "$code" = 36 ]; then
        code=0
        curl "${options[@]}" || code=$?
    fi
    return "$code"
}

download() {
    local address=data.csail.mit.edu/places/ADEchallenge/$name.zip
    if [ -n "${ADE20K_ADDRESS:-}" ]; then
        fetch "$ADE20K_ADDRESS"
    else
        fetch "https://$address" || fetch "http://$address"
    fi
}

mkdir -p data
if [ ! -d "data/$name" ]; then
    is_complete || download
    if ! is_complete; then
        rm "$archive"
        echo "error: the downloaded $archive was damaged and has been removed; start the script again" >&2
        exit 1
    fi
    rm -rf "$unpacked"
    "$python" -m zipfile -e "$archive" "$unpacked"
    mv "$unpacked/$name" "data/$name"
    rm -r "$unpacked" "$archive"
fi
"$python" -c "
from mit_semseg.dataset.records import add_sizes, load_records, write_odgt
for split in ('training', 'validation'):
    records = load_records('data/$name/images/' + split, 'data')
    write_odgt(add_sizes(records, 'data'), f'data/{split}.odgt')
"
