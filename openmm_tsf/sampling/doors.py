"""What kernels check of their arguments: an error that names the argument, or the plain value."""

from typing import Any

_FLOW = ("n_momenta", "reference_temperature", "event_shape", "dtype", "forward_and_log_det",
         "inverse_and_log_det", "place", "is_mirror_image")  # fmt: skip


def kernel_name(name: Any) -> str:
    """A name: files and summaries are keyed by it.

    Raises
    ------
    TypeError
        If it is no string, or an empty one.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a string that is not empty, got {name!r}")
    return name


def check_flow(flow: Any) -> None:
    """Refuse what has not the face of a flow.

    Raises
    ------
    TypeError
        If something is missing.
    """
    missing = [part for part in _FLOW if not hasattr(flow, part)]
    if missing:
        raise TypeError(
            f"flow: expected a flow, got {type(flow).__name__}, which has no {missing[0]}"
        )
