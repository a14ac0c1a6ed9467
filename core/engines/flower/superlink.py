"""A whole Flower federation on one machine, SuperLink, SuperNodes, certificates and keys: begun for a run, stopped after it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import tomli_w
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from filelock import FileLock, Timeout

from hetfl.engines.flower import warm
from hetfl.engines.flower.manifest import EVENTS
from hetfl.errors import RunError, UsageError

BIN = Path(sys.executable).parent

HERE = "127.0.0.1"

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}

QUICK = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3"}  # seconds between looks for a message to begin a program for; 1 else

READY = 60.0  # seconds for a SuperLink to begin


class LocalFederation:
    """`nodes` SuperNodes and their SuperLink, in folder `home`; use as a context."""

    def __init__(self, home: Path, nodes: int, tls: bool, allow: str = "") -> None:
        self._home, self._nodes, self._tls, self._allow = home.absolute(), nodes, tls, allow
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._port = free_port()
        self._lock = FileLock(self._home / ".lock", timeout=0, thread_local=False)
        self._programs = BIN
        self.env = {**QUICK, **os.environ, **QUIET, "FLWR_HOME": str(self._home)}

    def __enter__(self) -> LocalFederation:
        if os.name != "posix":
            raise UsageError("a federation on this machine needs Linux or macOS; take hfl export flower and flwr run elsewhere")
        self._home.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UsageError(f"the federation in '{self._home.parent}' is being run by another process") from error
        (self._home / "state.db").unlink(missing_ok=True)
        write_secret(self._home / "state.db", b"")  # nobody else may read what nodes and tokens it holds
        (self._home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": "here", "here": self._address()}}))
        self._programs = warm.write_stubs(self._home, BIN)
        found = dict.fromkeys([str(self._programs), str(BIN), *os.environ.get("PATH", "").split(os.pathsep)])
        self.env["PATH"] = os.pathsep.join(found)  # Flower's programs start one another by name
        try:
            if self._programs != BIN:
                self._start("warm", sys.executable, "-P", "-m", warm.__name__, str(self._home))  # imports nothing from here
            self._superlink()
            for node in range(self._nodes):
                self.register(f"node{node}")
            for node in range(self._nodes):
                self.join(node)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _address(self) -> dict[str, Any]:
        """How `flwr` reaches the SuperLink."""
        if not self._tls:
            return {"address": f"{HERE}:{self._port}", "insecure": True}
        make_certificates(self._home)
        return {"address": f"{HERE}:{self._port}", "root-certificates": str(self._home / "ca.crt")}

    def _superlink(self) -> None:
        words = ["--host", HERE, "--port", str(self._port), "--disable-runtime-dependency-installation"]
        if self._tls:
            named = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.pem", "--ssl-keyfile": "server.key"}
            words += [word for flag, name in named.items() for word in (flag, str(self._home / name))]
            words += ["--enable-supernode-auth", "--database", str(self._home / "state.db")]
        self._start("superlink", BIN / "flower-superlink", *words, *([] if self._tls else ["--insecure"]))
        until = time.monotonic() + READY
        while not port_answers(self._port):
            if time.monotonic() > until or self._running["superlink"].poll() is not None:
                raise RunError(f"the SuperLink did not begin; what it said is in '{self._log('superlink')}'")
            time.sleep(0.1)

    def _start(self, name: str, command: Path | str, *words: str) -> None:
        if (before := self._running.get(name)) is not None:
            end(before, signal.SIGKILL)
        with open(self._log(name), "ab") as log:
            self._running[name] = subprocess.Popen(
                [str(command), *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.env,
                start_new_session=True, preexec_fn=warm.die_with_parent,
            )  # fmt: skip

    def register(self, name: str) -> None:
        """Makes a key for a node and has the SuperLink know it; nothing without TLS."""
        if not self._tls:
            return
        make_key(self._home / name)
        self.flwr("supernode", "register", str(self._home / f"{name}.pub"), "here", "--name", name)

    def keys(self) -> dict[int, str]:
        """The public key of each client's node; none without TLS."""
        paths = {node: self._home / f"node{node}.pub" for node in range(self._nodes)}
        return {node: path.read_text() for node, path in paths.items() if path.exists()}

    def join(self, node: int, name: str | None = None) -> None:
        """Starts SuperNode `node`, which holds that partition; one that ran before comes back with its memory."""
        name = name or f"node{node}"
        config = {"partition-id": node, "num-partitions": self._nodes, "memory": str(self._home / "memory"), "allow": self._allow}
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        words = ["--superlink", f"{HERE}:{self._port}", "--host", HERE, "--port", str(free_port()), "--node-config", pairs]
        if self._tls:
            words += ["--root-certificates", str(self._home / "ca.crt"), "--auth-supernode-private-key", str(self._home / name)]
        self._start(name, BIN / "flower-supernode", *words, *([] if self._tls else ["--insecure"]))

    def leave(self, node: int) -> None:
        """Ends SuperNode `node` and its processes, as a crash would."""
        end(self._running.pop(f"node{node}"), signal.SIGKILL)

    def running(self, name: str) -> bool:
        """Whether a process of ours is still there."""
        return name in self._running and self._running[name].poll() is None

    def flwr(self, *words: str) -> str:
        """Runs a command of Flower's. Raises RunError, which names the file with what it said."""
        done = subprocess.run(
            [str(self._programs / "flwr"), *words], capture_output=True, text=True, env=self.env, check=False, timeout=120
        )
        if done.returncode:
            self._log("flwr").write_text(done.stdout + done.stderr)
            raise RunError(f"flwr {' '.join(words[:2])} failed; what it said is in '{self._log('flwr')}'")
        return done.stdout

    def events(self, app: Path, out: Path) -> Iterator[dict[str, Any]]:
        """Runs an exported app to its end; what its server tells, as it tells it. Raises RunError where it fails."""
        events = out / EVENTS
        events.unlink(missing_ok=True)
        self._start("run", self._programs / "flwr", "run", str(app), "here", "--stream", "--run-config", f'out="{out.absolute()}"')
        seen, over = 0, False  # bytes
        while True:
            over = over or not self.running("run")
            for line in read_lines(events, seen):
                seen += len(line)
                event = json.loads(line)
                yield event
                if "ended" in event or "failed" in event:
                    return
            if over:
                raise RunError(self._why_over())
            time.sleep(0.1)

    def _why_over(self) -> str:
        """Why a run ended that told no result, with the file of whoever knows more."""
        if not self.running("superlink"):
            return f"the SuperLink ended in mid-run, and the run with it; what it said is in '{self._log('superlink')}'"
        return f"the federation's server ended without a result; what it said is in '{self._log('run')}'"

    def _log(self, name: str) -> Path:
        """The file with what a process of ours said."""
        return self._home / f"{name}.log"

    def stop(self) -> None:
        """Ends everything that was begun, within a second: what does not end when asked is killed."""
        until = time.monotonic() + 0.7
        begun = [pid for process in self._running.values() for pid in find_descendants(process.pid)]
        for process in self._running.values():
            end(process, signal.SIGTERM, wait=0.0)
        while any(process.poll() is None for process in self._running.values()) and time.monotonic() < until:
            time.sleep(0.05)
        for process in self._running.values():
            end(process, signal.SIGKILL)
        self._lock.release()
        for pid in begun:  # in sessions of their own: the SuperLink's executor and its ServerApp
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def read_lines(path: Path, start: int) -> list[bytes]:
    """The lines of a file that are whole by now, from byte `start` on; none where there is no file yet."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(start)
        return [line for line in file if line.endswith(b"\n")]


def end(process: subprocess.Popen[bytes], sign: int, wait: float = 3.0) -> None:
    """Signals a process and those it began; waits at most so many seconds for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, sign)
    with suppress(subprocess.TimeoutExpired):
        process.wait(wait)


def find_descendants(pid: int) -> list[int]:
    """The processes that `pid` began and those that they began, on Linux; elsewhere none are found."""
    parents = dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HERE, 0))
        return int(found.getsockname()[1])


def port_answers(port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(0.5)
        return tried.connect_ex((HERE, port)) == 0


def make_certificates(home: Path) -> None:
    """Writes ca.crt, a certificate authority of our own, and server.pem and server.key for the SuperLink on this machine.

    Those that are there stay, unless they end within a month.
    """
    if all(is_valid(home / name) for name in ("ca.crt", "server.pem")):
        return
    authority = trustme.CA(organization_name="hetfl")
    server = authority.issue_cert("localhost", HERE, common_name="localhost", organization_name="hetfl")
    authority.cert_pem.write_to_path(home / "ca.crt")
    (home / "server.pem").write_bytes(b"".join(part.bytes() for part in server.cert_chain_pems))
    write_secret(home / "server.key", server.private_key_pem.bytes())


def is_valid(certificate: Path) -> bool:
    """Whether a certificate is there and is valid for a month to come."""
    try:
        ends = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return False
    return ends > datetime.now(UTC) + timedelta(days=30)


def make_key(path: Path) -> None:
    """A node's key pair in OpenSSH's form, kept where it is there already."""
    if path.exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    write_secret(path, private)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(path.name + ".pub").write_bytes(public + b"\n")


def write_secret(path: Path, data: bytes) -> None:
    """Writes a file that only its owner may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
