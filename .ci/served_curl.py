"""Serve the default model, run the curl line that `serve --json` prints, compare its text with argv[1], and stop.

Where there is no curl, the same request is sent by urllib.
"""

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request


def send(line: str) -> bytes:
    if shutil.which("curl"):
        return subprocess.run(line, shell=True, check=True, capture_output=True).stdout
    words = shlex.split(line)
    after = dict(zip(words, words[1:], strict=False))
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    url = next(word for word in words if word.startswith("http"))
    return urllib.request.urlopen(urllib.request.Request(url, after["-d"].encode(), headers), timeout=120).read()


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        alone = json.load(file)
    command = [sys.executable, "-m", "medusa_serve", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            answer = json.loads(send(ready["curl"]))
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(timeout=30)
    print(json.dumps(answer))
    assert code == 0, f"the server ended with {code}"
    assert answer["text"].startswith(alone["text"]), "the served text is not the command line's"
    host, port = ready["url"].removeprefix("http://").rsplit(":", 1)
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0, f"port {port} is still open"


if __name__ == "__main__":
    main()
