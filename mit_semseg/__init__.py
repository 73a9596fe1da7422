"""Train and evaluate semantic segmentation networks on ADE20K or any other dataset, and segment images."""

__version__ = "3.0.0"
__all__ = ["Segmenter", "__version__"]


def __getattr__(name: str):
    # `Segmenter` is imported on first access, so that `import mit_semseg` is fast.
    if name == "Segmenter":
        from .predict.segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
