"""One run of the ngrok program, started through pyngrok, and the clean-up after kernels that were killed.

The token is in a private file (0600) of a folder of ours, never on a command line. The folder's name has the process
that made it: a later kernel finds a leftover program by its command line, and knows whether that process still runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from ...errors import TunnelError
from .. import env
from .ngrok_advice import advice, code_of

MARK = "medusa_serve-ngrok-"
_FOLDER = re.compile(re.escape(MARK) + r"(\d+)-(\d+)-(\d+)-[^/]*")
NAME = "medusa_serve"  # of the endpoint, at the agent
KILL_S = 3.0  # for an agent to sign its endpoint off at ngrok, which frees the address at once


class Agent:
    """The ngrok program with one endpoint: `url` leads to 127.0.0.1:port. Raises TunnelError."""

    def __init__(self, port: int, token: str, domain: str | None, *, start_s: float) -> None:
        owner = psutil.Process()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{MARK}{owner.pid}-{_started(owner)}-{port}-"))  # 0700
        self._config: Any = None
        try:
            binary = _binary(self.folder)
            self._config = _pyngrok_config(self.folder, binary, token, start_s)
            tunnel = self._connect(port, domain, binary, start_s)
            self.url, self._api = str(tunnel.public_url), str(tunnel.api_url)
            self._processes = _agents(self.folder)
        except OSError as error:
            self.close()
            raise TunnelError(f"The ngrok program could not be started: {error.strerror}.") from None
        except BaseException:
            self.close()
            raise

    def _connect(self, port: int, domain: str | None, binary: Path, start_s: float) -> Any:
        """pyngrok's tunnel. Its wait for a line of the program has no time limit: a silent program is ended."""
        from pyngrok import ngrok
        from pyngrok.exception import PyngrokError

        # inspect: the agent would keep a copy of the prompts · schemes: keys only travel encrypted
        options: dict[str, Any] = {"inspect": False, "schemes": ["https"]} | ({"domain": domain} if domain else {})
        began, watchdog = time.monotonic(), threading.Timer(start_s, self._end)
        watchdog.daemon = True
        watchdog.start()
        try:
            return ngrok.connect(f"http://127.0.0.1:{port}", "http", NAME, self._config, **options)
        except PyngrokError as error:
            silent = time.monotonic() - began >= start_s and code_of(_said(error)) is None
            raise _explained(error, binary, start_s if silent else None) from None
        finally:
            watchdog.cancel()

    def is_up(self) -> bool:
        """Whether the program runs and still has its endpoint."""
        from pyngrok import ngrok

        with contextlib.suppress(Exception):  # its process has ended, or its API does not answer
            runs = any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in self._processes)
            tunnels: list[Any] = ngrok.api_request(f"{self._api}/api/tunnels", timeout=4).get("tunnels") or []
            return runs and any(tunnel.get("public_url") == self.url for tunnel in tunnels)
        return False

    def close(self) -> None:
        """End the program, and remove its files. May be called twice."""
        self._end()
        if self._config is not None:
            from pyngrok import ngrok

            ngrok.kill(self._config)  # it has ended; this makes pyngrok forget it
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        _end(_agents(self.folder))


def clean_up(port: int) -> int:
    """End the agents of kernels that are gone, and this kernel's own for the same port; → how many."""
    ended = 0
    for folder in _folders():
        found = _FOLDER.fullmatch(folder.name)
        if found is None:
            continue
        pid, started, its_port = map(int, found.groups())
        ours = pid == os.getpid() and its_port == port
        if ours or not _lives(pid, started):
            shutil.rmtree(folder, ignore_errors=True)  # first: a Tunnel sees by it that it was replaced
            ended += _end(_agents(folder))
    return ended


# ---- processes ---------------------------------------------------------------------------------------------------


def _folders() -> list[Path]:
    """Ours, of all kernels: those on disk, and those on the command line of a running program."""
    on_disk = {path for path in Path(tempfile.gettempdir()).glob(MARK + "*") if path.is_dir()}
    return sorted(on_disk | {folder for _, folder in _running()})


def _agents(folder: Path) -> list[psutil.Process]:
    return [process for process, its in _running() if its == folder]


def _running() -> Iterator[tuple[psutil.Process, Path]]:
    """This user's agents, recognised by the config file on their command line."""
    me = os.getuid()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().real != me or process.status() == psutil.STATUS_ZOMBIE:
                continue
            words = process.cmdline()
            for option, value in zip(words, words[1:], strict=False):
                if option == "--config" and _FOLDER.fullmatch(Path(value).parent.name):
                    yield process, Path(value).parent


def _end(processes: list[psutil.Process]) -> int:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=KILL_S)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(processes)


def _started(process: psutil.Process) -> int:
    return int(process.create_time() * 100)


def _lives(pid: int, started: int) -> bool:
    """Whether this process runs, and not a later one with the same number. started: in hundredths of a second"""
    try:
        process = psutil.Process(pid)
        close = abs(_started(process) - started) < 6000  # not equal: the clock may have been set
        return close and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# ---- the program and its file ------------------------------------------------------------------------------------


def _binary(folder: Path) -> Path:
    """The ngrok program, downloaded by pyngrok where there is none."""
    from pyngrok import conf, ngrok
    from pyngrok.exception import PyngrokError

    path = Path(os.environ.get("PYNGROK_NGROK_PATH") or conf.get_default().ngrok_path).absolute()
    if not path.exists():
        try:
            # the config path keeps pyngrok from writing one into the user's home
            ngrok.install_ngrok(conf.PyngrokConfig(ngrok_path=str(path), config_path=str(folder / "unused.yml")))
        except (PyngrokError, OSError):
            why = env.advice() or " Is this machine connected to the internet?"
            raise TunnelError(f"The ngrok program could not be downloaded.{why}") from None
    return path


def _pyngrok_config(folder: Path, binary: Path, token: str, start_s: float) -> Any:
    from pyngrok import conf

    program = folder / "ngrok"  # pyngrok knows its processes by this path, so the user's own stay separate
    program.symlink_to(binary)
    path = _write_config(folder, token)
    config = conf.PyngrokConfig(ngrok_path=str(program), config_path=str(path), startup_timeout=int(start_s) + 1)
    config.auth_token = None  # else pyngrok puts NGROK_AUTHTOKEN on the command line
    config.config_version = "2"  # the local API that every pyngrok since 7.2 and every agent knows
    return config


def _write_config(folder: Path, token: str) -> Path:
    agent = {"authtoken": token, "inspect_db_size": -1, "update_check": False, "console_ui": False}
    path = folder / "ngrok.yml"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"version": 3, "agent": agent}, file)  # JSON is YAML
    return path


def _said(error: Exception) -> str:
    """All that ngrok said of its error: at the start, in its log, or in the body of its API's answer."""
    logs = " ".join(str(line.err or "") for line in getattr(error, "ngrok_logs", ()) if line.err)
    return " ".join(
        str(text) for text in (getattr(error, "ngrok_error", None), getattr(error, "body", None), logs) if text
    )


def _explained(error: Exception, binary: Path, silent_s: float | None) -> TunnelError:
    if silent_s is not None:
        return TunnelError(
            f"ngrok did not connect within {silent_s:.0f} s: its network may be blocked here. Run this again, or use"
            " the panel."
        )
    said = _said(error)
    return TunnelError(advice(said or str(error), binary=str(binary)), ngrok=code_of(said))
