"""ngrok's numbered errors (ngrok.com/docs/errors, August 2026) as one sentence each that says what to do."""

from __future__ import annotations

import re

SITE = "dashboard.ngrok.com"
TOKEN_HELP = (
    f"Sign up at {SITE}/signup, copy your authtoken from {SITE}/get-started/your-authtoken, and put it into the secret"
    " or environment variable NGROK_AUTHTOKEN."
)
_BAD_TOKEN = (
    f"ngrok does not know this token: copy it again from {SITE}/get-started/your-authtoken; it is neither the API key"
    " nor the `ngrok config` command."
)
_PLAN = (
    "ngrok's free plan has one address of its own: leave `domain` out, or name the one listed at " + SITE + "/domains."
)
_RESERVE = f"This domain is not one of your ngrok account's: leave `domain` out, or take one listed at {SITE}/domains."
_QUOTA = (
    "This month's free ngrok traffic is used up: use the panel in the notebook (in Colab also its own port proxy, which"
    " needs no account), or another ngrok plan."
)
_SUSPENDED = (
    f"ngrok has suspended or limited this account: its dashboard says why ({SITE}), or write to support@ngrok.com."
)
_REFUSED_HERE = "ngrok refuses connections from this machine's address: use the panel here, or another network."
_OLD_AGENT = "The ngrok program here is too old: delete {binary} and run this again, which downloads the newest."
_IN_USE = (
    "Your ngrok address is online elsewhere: stop the other notebook that uses it (or the endpoint at"
    f" {SITE}/endpoints), wait a minute, and run this again."
)
_AGENTS = (
    "Your ngrok account allows no more agents at a time: stop the other notebooks that hold one, or disconnect them at"
    f" {SITE}/agents, and run this again."
)
_UPSTREAM = "The tunnel is open, but the server at its end does not answer: look at its /health on this machine."
_RATE = "Too many requests came through ngrok in the last minute: wait a minute; its plans differ in this limit."
_LATER = "ngrok itself had an error: run this again in a minute (status.ngrok.com shows known ones)."

ADVICE: dict[int, str] = {
    **dict.fromkeys((100, 109, 110, 111, 116, 122, 326, 328, 329, 330, 331), _LATER),
    **dict.fromkeys((102, 103, 337, 338), _SUSPENDED),
    **dict.fromkeys((105, 106, 107), _BAD_TOKEN),
    108: _AGENTS,
    115: f"Your ngrok account admits agents from listed addresses only: change that at {SITE}/ip-restrictions.",
    **dict.fromkeys(
        (118, 119), "Your ngrok account may not use this way in: leave ngrok's own settings at their defaults."
    ),
    **dict.fromkeys((120, 121, 9042), _OLD_AGENT),
    123: f"ngrok wants your e-mail address verified first: {SITE}/user/settings.",
    **dict.fromkeys((302, 303, 304, 323, 339, 340, 716, 719, 721, 4018), TOKEN_HELP),
    **dict.fromkeys((307, 309, 318, 319, 320, 321, 15013), _RESERVE),
    **dict.fromkeys((310, 312, 313, 314, 315, 9017, 15002), _PLAN),
    **dict.fromkeys((311, 317, 322), "This ngrok domain belongs to another region: leave `domain` out."),
    324: _AGENTS,
    334: _IN_USE,
    **dict.fromkeys((702, 718, 720, 722, 734), _RATE),
    **dict.fromkeys(range(725, 734), _QUOTA),
    **dict.fromkeys((735, 736, 737), _QUOTA),
    3004: _UPSTREAM,
    3200: "This address is offline: the notebook that served it has ended; run its cell again.",
    **dict.fromkeys(
        (6022, 6024),
        "ngrok shows browsers a page of its own first: press its button, or send ngrok-skip-browser-warning.",
    ),
    8012: _UPSTREAM,
    **dict.fromkeys((9040, 9041), _REFUSED_HERE),
}
PASSING = frozenset({100, 108, 109, 110, 111, 324, 334, 702, 734})  # may pass in a moment: try again


def code_of(text: str) -> int | None:
    """The number of the first ERR_NGROK_… in what ngrok said."""
    found = re.search(r"ERR_NGROK_(\d+)", text)
    return int(found[1]) if found else None


def advice(text: str, *, binary: str = "it") -> str:
    """One sentence for what ngrok said, with ngrok's own first line where we have no advice."""
    code = code_of(text)
    if code in ADVICE:
        return f"{ADVICE[code].format(binary=binary)} (ERR_NGROK_{code})"
    said = re.split(r"(?:\\r|\\n|[\r\n])", text, maxsplit=1)[0].strip(" .\"'")[:200]
    if code is not None:
        return f"ngrok refused: {said} (ngrok.com/docs/errors/err_ngrok_{code} says more)."
    return f"ngrok failed: {said}." if said else "ngrok failed and said nothing; run this again."
