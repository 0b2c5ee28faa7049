"""ngrok's numbers as sentences."""

from __future__ import annotations

import pytest

from medusa_serve.notebook.tunnel import ngrok_advice


@pytest.mark.parametrize("code", sorted(ngrok_advice.ADVICE))
def test_every_code_has_one_sentence_of_advice(code: int) -> None:
    said = ngrok_advice.advice(f"failed to start: nonsense\\r\\n\\r\\nERR_NGROK_{code}\\r\\n", binary="/x/ngrok")
    assert said.endswith(f"(ERR_NGROK_{code})")
    assert "\n" not in said
    assert 40 < len(said) < 330
    assert "{" not in said
    assert "nonsense" not in said


def test_unknown_codes_keep_ngroks_words() -> None:
    said = ngrok_advice.advice("the moon is in the way\\r\\n\\r\\nERR_NGROK_7777\\r\\n")
    assert said == "ngrok refused: the moon is in the way (ngrok.com/docs/errors/err_ngrok_7777 says more)."
    assert ngrok_advice.advice("broken pipe") == "ngrok failed: broken pipe."
    assert "said nothing" in ngrok_advice.advice("")
