"""A Debian machine with a real systemd: an image made once, booted by qemu without any privilege.

`Machine` is one boot of it. What is written there is gone when it is switched off; a reboot keeps it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: The image is kept here; `make clean` removes it.
CACHE = ROOT / "build" / "vm"
PACKAGES = (
    "systemd-sysv,udev,dbus,libnss-systemd,iproute2,openssh-server,ca-certificates,"
    "linux-image-cloud-amd64,initramfs-tools,python3,sqlite3,caddy,curl"
)
PROGRAMS = ("debootstrap", "mkfs.ext4", "qemu-system-x86_64", "ssh-keygen", "ssh", "scp")
#: Seconds that an emulated processor may take.
BOOT_TIME = 600.0
COMMAND_TIME = 900.0

NETWORK = "[Match]\nName=en*\n[Network]\nDHCP=yes\n"


def missing_programs() -> list[str]:
    """What has to be installed before there can be a machine."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def make_image() -> None:
    """Debian 12 with what docs/deploy.md wants of a host, and a key to come in with; once."""
    if (CACHE / "disk.ext4").exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    tree = CACHE / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(tree))
    (CACHE / "key").unlink(missing_ok=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(CACHE / "key"))
    (tree / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(CACHE / "key.pub", tree / "root/.ssh/authorized_keys")
    (tree / "etc/systemd/network/all.network").write_text(NETWORK)
    (tree / "etc/hostname").write_text("vps\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost vps\n::1 localhost\n")
    # Without it each login writes an error, and the last line of the journal is none of ours.
    (tree / "etc/default/locale").touch()
    run("chroot", str(tree), "systemctl", "enable", "systemd-networkd", "ssh")
    run("chroot", str(tree), "systemctl", "disable", "apt-daily.timer", "apt-daily-upgrade.timer")
    for kind in ("vmlinuz", "initrd.img"):
        shutil.copy(next((tree / "boot").glob(f"{kind}-*")), CACHE / kind)
    run("mkfs.ext4", "-q", "-d", str(tree), str(CACHE / "half.ext4"), "2G")
    shutil.rmtree(tree)
    (CACHE / "half.ext4").rename(CACHE / "disk.ext4")


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class Machine:
    """One boot; commands run there as root."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._ssh_config = folder / "ssh_config"
        self._ssh_config.write_text(
            f"Host HOST\n HostName 127.0.0.1\n Port {port}\n User root\n"
            f" IdentityFile {CACHE / 'key'}\n StrictHostKeyChecking no\n"
            f" UserKnownHostsFile {os.devnull}\n LogLevel ERROR\n ConnectTimeout 30\n"
            # A reboot takes the other end away without a word.
            " ServerAliveInterval 15\n ServerAliveCountMax 8\n"
        )
        self._console = folder / "console.txt"
        self._qemu = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "1024"),
                *("-nographic", "-serial", f"file:{self._console}", "-monitor", "none"),
                *("-kernel", str(CACHE / "vmlinuz"), "-initrd", str(CACHE / "initrd.img")),
                *("-append", "root=/dev/vda rw console=ttyS0 systemd.show_status=0"),
                *("-drive", f"file={CACHE / 'disk.ext4'},if=virtio,format=raw,snapshot=on"),
                *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22"),
                *("-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"),
            ],
            stdin=subprocess.DEVNULL,
        )

    def run(self, command: str, *, given: str = "", check: bool = True) -> str:
        """Run a command there; what it prints. Raises AssertionError when it fails."""
        done = subprocess.run(
            ["ssh", "-F", str(self._ssh_config), "HOST", command],
            input=given,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIME,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def run_here(self, command: str, folder: Path) -> None:
        """Run a command on this side that speaks of HOST, as docs/deploy.md has it."""
        config = shlex.quote(str(self._ssh_config))
        command = command.replace("ssh HOST", f"ssh -F {config} HOST")
        command = command.replace("scp ", f"scp -q -F {config} ")
        subprocess.run(command, shell=True, check=True, cwd=folder, timeout=COMMAND_TIME)

    def write(self, path: str, text: str) -> None:
        self.run(f"cat >{shlex.quote(path)}", given=text)

    def until(self, command: str, expected: Callable[[str], bool], within: float = 60.0) -> str:
        """Run a command again and again until what it prints is as expected."""
        deadline = time.monotonic() + within
        while not expected(said := self.run(command, check=False)):
            assert time.monotonic() < deadline, f"{command} still says:\n{said}"
            time.sleep(0.5)
        return said

    def wait_up(self) -> None:
        """Until somebody may log in."""
        deadline = time.monotonic() + BOOT_TIME
        while "vps" not in self.run("hostname", check=False):
            assert self._qemu.poll() is None, self._console.read_text()
            assert time.monotonic() < deadline, self._console.read_text()[-2000:]
            time.sleep(1.0)

    def reboot(self) -> None:
        before = self.run("cat /proc/sys/kernel/random/boot_id")
        self.run("systemctl reboot", check=False)
        self.until(
            "cat /proc/sys/kernel/random/boot_id",
            lambda now: "-" in now and now != before,
            within=BOOT_TIME,
        )

    def switch_off(self) -> None:
        self._qemu.terminate()
        self._qemu.wait(10)


@contextlib.contextmanager
def booted(folder: Path) -> Iterator[Machine]:
    """A machine that is up, switched off at the end."""
    make_image()
    machine = Machine(folder)
    try:
        machine.wait_up()
        yield machine
    finally:
        machine.switch_off()
