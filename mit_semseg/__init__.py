"""Semantic segmentation networks: training, evaluation and inference on ADE20K and any other labelled images."""

__version__ = "3.0.0"
__all__ = ["Segmenter", "__version__"]


def __getattr__(name: str):
    # Imported when it is asked for: `import mit_semseg` alone loads nothing.
    if name == "Segmenter":
        from .predict.segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
