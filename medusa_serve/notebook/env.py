"""Where this runs: Colab, Kaggle, a Jupyter kernel or plain Python; and what helps there after a failure."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Literal

Place = Literal["colab", "kaggle", "jupyter", "python"]


def place() -> Place:
    """From what the platforms set, not from installed packages: the package index has stubs of their names."""
    if any(name.startswith("COLAB_") for name in os.environ) and "google.colab" in sys.modules:
        return "colab"
    if {"KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_USER_SECRETS_TOKEN"} & set(os.environ):
        return "kaggle"
    return "jupyter" if in_kernel() else "python"


def in_kernel() -> bool:
    """Whether there is a front end that could show a widget."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def online(host: str = "www.kaggle.com", seconds: float = 3.0) -> bool:
    """Whether names of the internet resolve and answer."""
    try:
        socket.create_connection((host, 443), seconds).close()
    except OSError:
        return False
    return True


def size(full: int, *, smoke: int) -> int:
    """`full`, or `smoke` where MEDUSA_SMOKE=1 asks for a quick run of everything."""
    return smoke if os.environ.get("MEDUSA_SMOKE") == "1" else full


def keep_in() -> Path:
    """A folder that outlives the session where the platform has one: Drive, when it is mounted, or the one that Kaggle
    saves with the notebook; else the notebook's own."""
    drive = Path("/content/drive/MyDrive")
    places = {"colab": drive if drive.is_dir() else Path("/content"), "kaggle": Path("/kaggle/working")}
    return places.get(place(), Path.cwd())


def mount_drive() -> None:
    """In Colab; elsewhere nothing happens."""
    if place() == "colab":
        from google.colab import drive

        drive.mount("/content/drive")


def advice() -> str:
    """A sentence for a user who could not load a model or a program here, or ""."""
    if place() == "kaggle" and not online():
        return " This Kaggle notebook has no internet: turn it on in its settings (needs a verified phone)."
    return ""
