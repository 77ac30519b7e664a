"""A real sshd on loopback, with keys of its own, and the ssh configuration of somebody who logs in to it."""

from __future__ import annotations

import getpass
import hashlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from tests.packages import programs

READY_S = 30.0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Sshd:
    """One host. ``folder`` holds its keys, the user's key, and ``config``, which calls the host ``name``."""

    def __init__(self, folder: Path, name: str = "login", *, options: str = "", jump: Sshd | None = None) -> None:
        self.program, _, keygen = programs("sshd", "ssh", "ssh-keygen", packages=("openssh-server", "openssh-client"))
        self.folder, self.name, self.keygen = folder, name, keygen
        self.port = _free_port()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.new_key("host_key")
        self.new_key("user_key")
        (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nPasswordAuthentication no\n"
            f"KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\n{options}"
        )
        self.know()
        self.config = folder / "config"
        self.config.write_text(self.block() + (jump.block() if jump else ""))
        if jump:
            text = self.config.read_text().replace("  Port", f"  ProxyJump {jump.name}\n  Port", 1)
            self.config.write_text(text)
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def block(self) -> str:
        """The host's part of an ssh configuration."""
        return (
            f"Host {self.name}\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {self.folder}/user_key\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
        )

    def new_key(self, name: str) -> None:
        """Make a key, in place of the one that may be there."""
        for path in (self.folder / name, self.folder / f"{name}.pub"):
            path.unlink(missing_ok=True)
        command = [self.keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
        subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)

    def know(self) -> None:
        """The user has seen the host's key."""
        key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}")

    def start(self) -> None:
        """Listen."""
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        log = (self.folder / "log").open("ab")
        command = [self.program, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + READY_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, "the sshd did not start"
                time.sleep(0.05)

    def connections(self) -> list[int]:
        """Process ids of the daemon's children: one for each connection."""
        assert self.process is not None
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    def hang_up(self) -> None:
        """Cut every connection, as a network that fails."""
        for pid in self.connections():
            subprocess.run(["pkill", "-KILL", "-P", str(pid)], check=False)
            subprocess.run(["kill", "-KILL", str(pid)], check=False)

    def stop(self) -> None:
        """No more."""
        if self.process is not None:
            self.hang_up()
            self.process.kill()
            self.process.wait()
            self.process = None
        digest = hashlib.sha256(os.path.realpath(self.config).encode()).hexdigest()[:8]
        for folder in Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp")).glob(f"llmops-ssh-*-{digest}"):
            shutil.rmtree(folder)
