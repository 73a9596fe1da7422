"""Networks on the Hugging Face hub: a network file with a model card, and optionally an example."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ..dataset import ClassTable
from ..lib.utils import UTF8, UserError

PREFIX = "hf:"  # before the names of networks on the hub
FILE = "model.safetensors"
EXAMPLE = "example.png"
CARD = """\
---
library_name: mit_semseg
pipeline_tag: image-segmentation
tags: [semantic-segmentation]
---
# {title}

Semantic segmentation into {count} classes: {network}.

```python
from mit_semseg import Segmenter

result = Segmenter.from_pretrained("{prefix}{name}")("image.png")
result.overlay().save("overlay.png")
```
"""


def download(name: str) -> Path:
    """Return the path of the network file of `hf:USER/NAME`; it is downloaded to the cache of huggingface_hub."""
    hub, name = _library(), name.removeprefix(PREFIX)
    try:
        return Path(hub.hf_hub_download(name, FILE))
    except Exception as error:  # error of the connection, server, disk or name
        raise UserError(f"{PREFIX}{name}: {FILE} cannot be downloaded ({_reason(error)})") from None


def upload(
    name: str, save: Callable[[Path], None], card: str, panel: Image.Image | None, *, private: bool, token: str | None
) -> str:
    """Upload the file written by `save`, a model card and a panel; return the address. See `Segmenter.push_to_hub`."""
    api = _library().HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, FILE))
        Path(folder, "README.md").write_text(card, **UTF8)
        if panel:
            panel.save(Path(folder, EXAMPLE))
        try:
            api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload network")
        except Exception as error:  # error of the connection or server, wrong name or missing token
            raise UserError(f"{PREFIX}{name}: the network cannot be uploaded ({_reason(error)})") from None
    return f"{api.endpoint}/{name}"


def read_results(folder: str, checkpoint: str) -> dict | None:
    """Return the results that `eval.py` has written to a run folder; None if there are none for this checkpoint.

    Results that are older than the weights belong to replaced weights.
    """
    path, weights = Path(folder, "result", "results.json"), Path(folder, f"decoder_{checkpoint}")
    if path.is_file() and weights.is_file() and path.stat().st_mtime < weights.stat().st_mtime:
        return None
    results = json.loads(path.read_text(**UTF8)) if path.is_file() else {}
    return results if checkpoint and results.get("checkpoint") == checkpoint else None


def model_card(name: str, network: str, table: ClassTable, results: dict | None, *, with_example: bool) -> str:
    """Return a model card in Markdown. `network` names encoder and decoder; see `read_results` for `results`."""
    card = CARD.format(title=name.partition("/")[2], count=len(table), network=network, prefix=PREFIX, name=name)
    if with_example:
        card += f"\n![image and prediction]({EXAMPLE})\n"
    if not results:
        return f"{card}\nClasses: {', '.join(table.labels)}.\n"
    rows = [
        *(("mean IoU", results["mean_iou"]), ("pixel accuracy", results["pixel_accuracy"])),
        *((f"IoU of {entry['class']}", entry["iou"]) for entry in results["iou_per_class"] if entry["present"]),
    ]
    lines = [f"\n## Metrics on {results['images']} validation images\n", "| Metric | % |", "|---|---|"]
    return card + "\n".join([*lines, *(f"| {label} | {100 * value:.2f} |" for label, value in rows)]) + "\n"


def _library():
    try:
        import huggingface_hub
    except ImportError:
        raise UserError('huggingface_hub is not installed; run pip install -e ".[hub]"') from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
