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

options=(-fL --retry 3 --connect-timeout 20 -o "$archive")
# If curl ends with code 33 or 36, the server cannot resume a download.
fetch() { curl -C - "${options[@]}" "$1" || { [[ $? == 3[36] ]] && curl "${options[@]}" "$1"; }; }

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
