"""Colab's own way to a port: a proxy for the signed-in reader of the notebook. No account, no third party."""

from __future__ import annotations

from urllib.parse import quote

from ..errors import TunnelError

HOSTS = ("*.colab.dev", "*.googleusercontent.com")  # names that its proxy may put into Host headers


def proxy_url(port: int) -> str:
    """The address of a port of this machine for a browser tab, while the notebook is open. Raises TunnelError."""
    try:
        from google.colab import output
    except ImportError:
        raise TunnelError("Only Colab has a port proxy; elsewhere open the server's own address.") from None
    url = output.eval_js(f"google.colab.kernel.proxyPort({int(port)}, {{cache: false}})")
    if not isinstance(url, str) or not url.startswith("https://"):
        raise TunnelError("Colab gave no address for this port: run the cell from its page, with cookies allowed.")
    return url


def show_page(port: int, *, key: str | None = None, height: int = 720) -> None:
    """The chat page below the cell: answering and Stop do not touch the kernel, so they work while a cell runs.

    The key travels in the URL's fragment, which browsers do not send. Raises TunnelError outside Colab.
    """
    try:
        from google.colab import output
    except ImportError:
        raise TunnelError("Only Colab shows a port below a cell; elsewhere open the server's own address.") from None
    path = "/" if key is None else f"/#key={quote(key, safe='')}"
    output.serve_kernel_port_as_iframe(int(port), path=path, height=str(height), cache_in_notebook=False)
