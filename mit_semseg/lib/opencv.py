"""OpenCV (`cv2`), imported on first use: models, data sets and configuration work without it."""

from .utils import UserError


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            f"OpenCV cannot be imported ({error}). On systems without libGL, such as containers: pip uninstall "
            f"opencv-python, then pip install opencv-python-headless. Otherwise: pip install opencv-python"
        ) from None
    return getattr(cv2, name)
