"""Where a token may be kept, and what is none."""

from __future__ import annotations

import sys
import types

import pytest

from medusa_serve.errors import TunnelError
from medusa_serve.notebook.tunnel.tokens import ngrok_token


@pytest.mark.parametrize("token", ["ngrok config add-authtoken 2abc", "two\nlines", "  ", "tökén"])
def test_a_token_that_is_none(token: str) -> None:
    with pytest.raises(TunnelError, match="must be one word") as caught:
        ngrok_token(token)
    assert token.strip() not in caught.value.message or not token.strip()


def test_where_a_token_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class SecretNotFoundError(Exception):
        pass

    stored: dict[str, str] = {}

    def get(name: str) -> str:
        if name not in stored:
            raise SecretNotFoundError(name)
        return stored[name]

    module = types.ModuleType("google.colab")
    module.userdata = types.SimpleNamespace(get=get)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", module)
    monkeypatch.delenv("NGROK_AUTHTOKEN", raising=False)
    with pytest.raises(TunnelError, match=r"NGROK_AUTHTOKEN\. "):  # the package alone is no Colab
        ngrok_token()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    with pytest.raises(TunnelError, match=r"or Colab's secrets \(not there\)"):
        ngrok_token()
    stored["NGROK_AUTHTOKEN"] = " from-colab\n"
    assert ngrok_token() == "from-colab"
    monkeypatch.setenv("NGROK_AUTHTOKEN", "from-env")
    assert ngrok_token() == "from-env"
    assert ngrok_token("given") == "given"


def test_kaggles_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    class BackendError(Exception):
        pass

    class UserSecretsClient:
        token: str | None = None

        def get_secret(self, label: str) -> str:
            if self.token is None:
                raise BackendError(label)
            return self.token

    module = types.ModuleType("kaggle_secrets")
    module.UserSecretsClient = UserSecretsClient  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.delenv("NGROK_AUTHTOKEN", raising=False)
    with pytest.raises(TunnelError, match=r"Kaggle's secrets \(not there, or not attached to this notebook\)"):
        ngrok_token()
    UserSecretsClient.token = "from-kaggle"
    assert ngrok_token() == "from-kaggle"
