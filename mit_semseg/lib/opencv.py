"""OpenCV (`cv2`), imported when one of its names is first used: models, data and configuration work without it."""

from .utils import UserError


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            f"OpenCV cannot be imported ({error}): where the system has no libGL (containers, servers), pip uninstall "
            f"opencv-python and pip install opencv-python-headless; elsewhere pip install opencv-python"
        ) from None
    return getattr(cv2, name)
