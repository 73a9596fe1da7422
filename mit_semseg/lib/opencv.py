"""OpenCV (`cv2`), imported on first use because models, datasets and configuration do not need it."""

from .utils import UserError


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            f"cannot import OpenCV ({error}); run `pip install opencv-python`. If libGL is missing in a container, run "
            "`pip uninstall opencv-python` and `pip install opencv-python-headless`"
        ) from None
    # Copy the attributes of cv2, so that later accesses do not call this function.
    globals().update({key: value for key, value in vars(cv2).items() if not key.startswith("__")})
    return getattr(cv2, name)
