"""Where an ngrok token may be: argument, environment, Colab's secrets, Kaggle's secrets, in this order."""

from __future__ import annotations

import os

from ...errors import TunnelError
from .. import env
from .ngrok_advice import TOKEN_HELP

NAME = "NGROK_AUTHTOKEN"


def ngrok_token(given: str | None = None) -> str:
    """The token. Raises TunnelError, which never quotes it."""
    looked_in = [f"the environment variable {NAME}"]
    token = given or os.environ.get(NAME)
    place = env.place()
    ask = {"colab": _colab, "kaggle": _kaggle}.get(place)
    if not token and ask is not None:
        token, why = ask()
        looked_in.append(f"{place.capitalize()}'s secrets ({why})")
    if not token:
        raise TunnelError(f"There is no ngrok token in {' or '.join(looked_in)}. {TOKEN_HELP}")
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise TunnelError("The ngrok token must be one word: paste the token alone, without the command around it.")
    return token


def _colab() -> tuple[str | None, str]:
    """(token, why there is none)"""
    try:
        from google.colab import userdata

        return userdata.get(NAME), "empty"
    except Exception as error:  # not found, no access for this notebook, or no Colab page to ask (it times out)
        why = {
            "SecretNotFoundError": "not there",
            "NotebookAccessError": "this notebook has no access to it: turn it on",
        }
        return None, why.get(type(error).__name__, "no answer")


def _kaggle() -> tuple[str | None, str]:
    try:
        from kaggle_secrets import UserSecretsClient

        return UserSecretsClient().get_secret(NAME), "empty"
    except Exception as error:  # missing, not attached to this notebook, or no internet
        missing = type(error).__name__ == "BackendError"
        return None, "not there, or not attached to this notebook" if missing else "no answer"
