"""Download what the scripts work on.

    python -m mit_semseg.cli.fetch model ade20k-resnet50dilated-ppm_deepsup --to ckpt/FOLDER
    python -m mit_semseg.cli.fetch file http://HOST/picture.jpg --to picture.jpg [--sha256 HEX]
    python -m mit_semseg.cli.fetch unpack data/ADEChallengeData2016.zip --strip --to data/ADEChallengeData2016
    python -m mit_semseg.cli.fetch list data/ADEChallengeData2016/images/training --root data --to data/training.odgt

A download that was interrupted goes on where it was. `unpack` takes zip and tar archives, and none that would
leave the folder. `list` writes the list of a folder of images and annotations. An address that begins with a slash is
on the server of the published models.
"""

import argparse
from pathlib import Path

from ..dataset.records import load_records, write_odgt
from ..lib.archives import MOST_BYTES, MOST_ENTRIES, unpack
from ..lib.download import download
from ..lib.utils import expand_path
from ..models.pretrained import PUBLISHED, download_published, server
from .common import run


def main() -> None:
    """Fetch from the command line."""
    parser = argparse.ArgumentParser(
        "python -m mit_semseg.cli.fetch",
        description="Download published weights and files, unpack archives, and write image lists.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="encoder and decoder of a published model")
    model.add_argument("source", metavar="NAME", help=", ".join(PUBLISHED))
    file = commands.add_parser("file", help="any file")
    file.add_argument("source", metavar="ADDRESS", help="http, https or file")
    file.add_argument("--sha256", metavar="DIGEST", default="", help="expected digest, or its beginning")
    listing = commands.add_parser("list", help="list (.odgt) of a folder of images and annotations")
    listing.add_argument("source", metavar="FOLDER", type=expand_path, help="with images/ and annotations/")
    listing.add_argument(
        "--root",
        metavar="FOLDER",
        type=expand_path,
        default=".",
        help="folder that the paths are relative to (DATASET.root_dataset)",
    )
    archive = commands.add_parser("unpack", help="all of an archive, or nothing")
    archive.add_argument("source", metavar="ARCHIVE", type=expand_path, help="zip or tar")
    archive.add_argument("--strip", action="store_true", help="leave out the one folder that everything is in")
    archive.add_argument("--most-bytes", type=int, default=MOST_BYTES, metavar="N", help="that it may unpack to")
    archive.add_argument("--most-entries", type=int, default=MOST_ENTRIES, metavar="N", help="that it may have")
    for command in (model, file, archive, listing):
        command.add_argument("--to", required=True, metavar="PATH", type=expand_path, help="where to write")
    args = parser.parse_args()
    if args.command == "model":
        download_published(args.source, args.to)
    elif args.command == "file":
        on_server = args.source.startswith("/")
        address = server().removesuffix("/model") + args.source if on_server else args.source
        download(address, Path(args.to), sha256=args.sha256)
    elif args.command == "unpack":
        limits = {"most_bytes": args.most_bytes, "most_entries": args.most_entries}
        count = unpack(Path(args.source), Path(args.to), strip=args.strip, **limits)
        print(f"{count} files unpacked to {args.to}")
    else:
        records = load_records(Path(args.source).resolve(), Path(args.root).resolve())
        write_odgt(records, args.to)
        print(f"{len(records)} pairs listed in {args.to}")


if __name__ == "__main__":
    run(main)
