#!/usr/bin/env bash
# Downloads ADE20K scene parsing (0.9 GB) to data/, unpacks it, and writes data/training.odgt and data/validation.odgt.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-$(command -v python || command -v python3)}
address=${ADE20K_ADDRESS:-http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip}
archive=data/ADEChallengeData2016.zip

if [ ! -d data/ADEChallengeData2016/images ]; then
    [ -f "$archive" ] || "$python" -m mit_semseg.cli.fetch file "$address" --to "$archive"
    "$python" -m mit_semseg.cli.fetch unpack "$archive" --strip --to data/ADEChallengeData2016
    rm "$archive"
fi
"$python" -m mit_semseg.cli.fetch list data/ADEChallengeData2016/images/training --root data --to data/training.odgt
"$python" -m mit_semseg.cli.fetch list data/ADEChallengeData2016/images/validation --root data --to data/validation.odgt
