"""Colab's own way to a port: a proxy for the signed-in reader of the notebook. No account, no third party."""

from __future__ import annotations

import contextlib
from typing import Any
from urllib.parse import quote

from ..errors import TunnelError

HOSTS = ("*.colab.dev", "*.googleusercontent.com")  # names that its proxy may put into Host headers
ANSWER_S = 10.0  # for the notebook's page to answer; where no page is open, nothing does


def proxy_url(port: int) -> str:
    """The address of a port of this machine for a browser tab, while the notebook is open. Raises TunnelError."""
    output = _colab_output()
    url: object = None
    with contextlib.suppress(Exception):  # such as Colab's own TimeoutException; the error below says it
        url = output.eval_js(f"google.colab.kernel.proxyPort({int(port)}, {{cache: false}})", timeout_sec=ANSWER_S)
    if not isinstance(url, str) or not url.startswith("https://"):
        raise TunnelError("Colab gave no address for this port: run the cell from its page, with cookies allowed.")
    return url


def page(key: str | None) -> str:
    """The path of the chat page, with the key in the fragment, which browsers do not send."""
    return "/" if key is None else f"/#key={quote(key, safe='')}"


def show_page(port: int, *, key: str | None = None, height: int = 720) -> None:
    """The chat page below the cell: answering and Stop do not touch the kernel, so they work while a cell runs.

    Raises TunnelError outside Colab.
    """
    _colab_output().serve_kernel_port_as_iframe(int(port), path=page(key), height=str(height), cache_in_notebook=False)


def _colab_output() -> Any:
    try:
        from google.colab import output
    except ImportError:
        raise TunnelError("Only Colab has a port proxy; elsewhere open the server's own address.") from None
    return output
