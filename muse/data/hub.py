"""Whether the Hugging Face hub answers, asked once and quickly."""

from __future__ import annotations


def reachable(timeout: float = 5.0) -> bool:
    """Whether the hub answers one request within ``timeout`` seconds.

    The hub's own clients retry with growing pauses for about 25 seconds before they give up; asking
    first lets a machine without a network fail at once, or fall back on what is cached.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        response = get_session().head(constants.ENDPOINT, timeout=timeout)
    # The HTTP library behind the session, and with it the errors, differs between versions.
    except Exception:  # noqa: BLE001
        return False
    return response.status_code < 500
