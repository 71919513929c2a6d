"""Several machines on one: each is a network namespace with an address of its own, a launcher in
each, and torchrun between them. A machine is cut off, slowed, killed, signalled; a process of it is
killed; file systems are shared or not; a clock is hours off.

Where the system permits no network namespaces, the machines are launchers on 127.0.0.1, and the
cases that need a network of their own are left out and named.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import heapq
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _survival_processes import (
    STARTED,
    Command,
    all_gone,
    checkpoints,
    descendants,
    keys,
    make_home,
    result,
    same_end,
    send,
    start,
)
from _survival_stopped import SLACK, free_port

HEARTBEAT = 8
KINDS = (
    "whole",
    "across",
    "cut",
    "signal",
    "restart",
    "killed",
    "caches",
    "unshared",
    "separate",
    "slow",
    "clock",
    "four",
)
NEED_NETWORK = ("cut", "slow")
LIMIT = 6 * STARTED


@functools.cache
def permitted() -> bool:
    """Whether network namespaces can be made here."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"survival-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return made


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    kinds = [k for k in KINDS if permitted() or k not in NEED_NETWORK]
    if not permitted():
        print(f"skipped, network namespaces are not permitted: {', '.join(NEED_NETWORK)}")
    draw = random.Random(seed)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        machine = 1 if kind == "slow" else draw.randrange(2)
        yield {"number": number, "kind": kind, "machine": machine}


class Network:
    """`count` machines at 10.77.0.1, 10.77.0.2, ... on a bridge; without permission, 127.0.0.1."""

    def __init__(self, count: int, delay: float = 0.0):
        self.relay: Relay | None = None
        self.name = f"lf{os.getpid() % 10000}"
        self.count = count
        self.real = permitted()
        if not self.real:
            return
        if delay:
            for k in range(count):
                _ip("netns", "add", self.host(k))
            self.relay = Relay([self.host(k) for k in range(count)], delay)
            return
        _ip("netns", "add", f"{self.name}-bridge")
        inside = ("netns", "exec", f"{self.name}-bridge", "ip")
        _ip(*inside, "link", "add", "bridge", "type", "bridge")
        _ip(*inside, "link", "set", "bridge", "up")
        for k in range(count):
            host = self.host(k)
            _ip("netns", "add", host)
            port = f"port{k}"
            _ip(
                *("link", "add", port, "netns", f"{self.name}-bridge", "type", "veth"),
                *("peer", "name", "net0", "netns", host),
            )
            _ip(*inside, "link", "set", port, "master", "bridge", "up")
            on_host = ("netns", "exec", host, "ip")
            _ip(*on_host, "address", "add", f"10.77.0.{k + 1}/24", "dev", "net0")
            _ip(*on_host, "link", "set", "net0", "up")
            _ip(*on_host, "link", "set", "lo", "up")

    def host(self, k: int) -> str:
        return f"{self.name}-{k}"

    @property
    def address(self) -> str:
        """Of the first machine."""
        return "10.77.0.1" if self.real else "127.0.0.1"

    def prefix(self, k: int) -> list[str]:
        """Words before a command that runs on machine k, with a host name of its own."""
        if not self.real:
            return []
        rename = f'hostname host{k}; exec "$@"'
        return ["ip", "netns", "exec", self.host(k), "unshare", "--uts", "sh", "-c", rename, "sh"]

    def cut(self, k: int) -> None:
        _ip("netns", "exec", f"{self.name}-bridge", "ip", "link", "set", f"port{k}", "down")

    def close(self) -> None:
        if self.relay is not None:
            self.relay.close()
        if self.real:
            for k in range(self.count):
                subprocess.run(["ip", "netns", "delete", self.host(k)], capture_output=True)
            subprocess.run(["ip", "netns", "delete", f"{self.name}-bridge"], capture_output=True)


class Relay(threading.Thread):
    """A network in user space: each host has a TUN device, whose packets this thread passes on
    `delay` seconds later. (The kernel's own, netem, is not everywhere.)
    """

    def __init__(self, hosts: list[str], delay: float):
        super().__init__(daemon=True)
        self.delay = delay
        self.devices = []
        self._closing = threading.Event()
        for k, host in enumerate(hosts):
            self.devices.append(_tun_of(host))
            on_host = ("netns", "exec", host, "ip")
            _ip(*on_host, "address", "add", f"10.77.0.{k + 1}/24", "dev", "net0")
            _ip(*on_host, "link", "set", "net0", "mtu", "1400", "up")
            _ip(*on_host, "link", "set", "lo", "up")
        self.start()

    def run(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        number = 0
        while not self._closing.is_set():
            ready, _, _ = select.select(self.devices, [], [], 0.001 if waiting else 0.2)
            for device in ready:
                packet = os.read(device, 65536)
                number += 1
                if packet[0] >> 4 == 4 and 1 <= packet[19] <= len(self.devices):
                    due = time.monotonic() + self.delay
                    heapq.heappush(waiting, (due, number, packet[19] - 1, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, to, packet = heapq.heappop(waiting)
                with contextlib.suppress(OSError):
                    os.write(self.devices[to], packet)

    def close(self) -> None:
        self._closing.set()
        self.join(5)
        for device in self.devices:
            os.close(device)


def _tun_of(host: str) -> int:
    """A TUN device `net0` in a network namespace, as a file descriptor of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_net, set_name, tun_without_header = 0x40000000, 0x400454CA, 0x1001
    with open("/proc/thread-self/ns/net") as here, open(f"/run/netns/{host}") as there:
        if libc.setns(there.fileno(), new_net):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            device = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(device, set_name, struct.pack("16sH", b"net0", tun_without_header))
        finally:
            libc.setns(here.fileno(), new_net)
    return device


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def launch(
    home: Path, net: Network, port: int, name: str, slow: dict[str, float], **changes: Any
) -> list[Command]:
    """A launcher on each machine."""
    own = changes.pop("own", "")
    variables = changes.pop("variables", {})
    commands = []
    for k in range(net.count):
        out = home / f"out-{k}" if own in ("unshared", "separate") else home / "out"
        given = keys(home, out, nproc_per_node=1, heartbeat_timeout=HEARTBEAT, **changes)
        commands.append(
            start(
                home,
                given,
                slow,
                name=f"{name}-{k}",
                prefix=net.prefix(k),
                NNODES=str(net.count),
                NODE_RANK=str(k),
                MASTER_ADDR=net.address,
                MASTER_PORT=str(port),
                GLOO_SOCKET_IFNAME="net0" if net.real else "lo",
                **({"LONGFACTORY_CACHE": str(home / f"cache-{k}")} if own else {}),
                **variables.get(k, variables.get("all", {})),
            )
        )
    return commands


def wait_all(commands: list[Command], seconds: float) -> list[int | None]:
    end = time.monotonic() + seconds
    return [c.wait(max(1.0, end - time.monotonic())) for c in commands]


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    begun = time.monotonic()
    kind, machine = case["kind"], case["machine"]
    make_home(home)
    net = Network(4 if kind == "four" else 2, delay=0.01 if kind == "slow" else 0.0)
    try:
        return _run(kind, machine, home, net, begun)
    finally:
        net.close()


def _run(kind: str, machine: int, home: Path, net: Network, begun: float) -> dict[str, Any]:
    port = free_port() if not net.real else 29500
    changes: dict[str, Any] = {
        "own": kind if kind in ("caches", "unshared", "separate") else "",
        "save_on_each_node": True if kind == "separate" else None,
    }
    if kind in ("across", "slow"):
        changes["sequence_parallel_size"] = 2
    if kind == "four":
        changes |= {"sequence_parallel_size": 2, "gradient_accumulation_steps": 2}
    if kind == "restart":
        changes["variables"] = {"all": {"MAX_RESTARTS": "1"}}
    if kind == "clock":
        changes["variables"] = {machine: {"SURVIVAL_CLOCK": str(5 * 3600)}}
    hurt = kind in ("cut", "signal", "restart", "killed")
    commands = launch(home, net, port, "first", {"step": 0.3 if hurt else 0.0}, **changes)
    pids = []
    at, limit = time.monotonic(), LIMIT
    if hurt:
        if not commands[0].until(lambda: commands[0].steps() >= 3, 3 * STARTED):
            for c in commands:
                c.kill()
            return result(False, begun, 0, "three steps were not reached", commands[0])
        pids = [p for c in commands for p in (c.process.pid, *descendants(c.process.pid))]
        at = time.monotonic()
        limit = HEARTBEAT + SLACK if kind in ("cut", "killed") else LIMIT
        _hurt(kind, machine, net, commands)
    statuses = wait_all(commands, limit + SLACK)
    took = time.monotonic() - at
    wrong = [] if all_gone(pids) else ["processes are left"]
    wrong += _wrong(kind, machine, home, statuses, commands)
    if kind == "signal" and not wrong:
        again = launch(home, net, port, "again", {}, **changes)
        if (ends := wait_all(again, LIMIT)) != [0, 0]:
            wrong.append(f"the same command ended with {ends}")
        elif differs := same_end(home / "out", 2):
            wrong.append(differs)
    where = "namespaces" if net.real else "launchers on 127.0.0.1"
    words = "; ".join(wrong) or f"exit {statuses} after {took:.0f} s, on {where}"
    done = result(not wrong, begun, limit, words, commands[0], statuses=statuses)
    if wrong:
        done["end"] += " || " + " / ".join(commands[1].text().strip().splitlines()[-4:])[-600:]
    return {**done, "seconds": took}


def _hurt(kind: str, machine: int, net: Network, commands: list[Command]) -> None:
    command = commands[machine]
    if kind == "cut":
        net.cut(machine)
    elif kind == "signal":
        send(_launcher(command), signal.SIGTERM)
    elif kind == "restart":
        send(next(iter(command.workers().values())), signal.SIGKILL)
    else:
        for pid in (*descendants(command.process.pid), command.process.pid):
            send(pid, signal.SIGKILL)


def _launcher(command: Command) -> int:
    """The process id of `longfactory train` behind `ip netns exec`, which becomes the command."""
    return command.process.pid


def _wrong(
    kind: str, machine: int, home: Path, statuses: list[int | None], commands: list[Command]
) -> list[str]:
    wrong = []
    text = "\n".join(c.text() for c in commands)
    if kind == "cut":
        if not all(s in (76, 77) for s in statuses):
            wrong.append(f"exit statuses {statuses}")
        if "No sign of life from rank" not in text and "has not reached the run's" not in text:
            wrong.append("the lost machine is not named")
    elif kind == "killed":
        if statuses[1 - machine] not in (76, 77):
            wrong.append(f"exit statuses {statuses}")
    elif kind == "signal":
        if statuses != [75, 75]:
            wrong.append(f"exit statuses {statuses}")
        if not checkpoints(home / "out"):
            wrong.append("no checkpoint")
    elif kind == "unshared":
        # Checkpoints are written by all machines into one folder.
        if set(statuses) != {2} or "output_dir: " not in text:
            wrong.append(f"exit statuses {statuses}, or no sentence on output_dir")
    else:
        if set(statuses) != {0}:
            wrong.append(f"exit statuses {statuses}")
        out = home / ("out-0" if kind == "separate" else "out")
        if kind in ("whole", "restart", "caches", "separate", "clock"):
            if not wrong and (differs := same_end(out, 2)):
                wrong.append(differs)
        elif not wrong and not (out / "train_results.json").exists():
            wrong.append("train_results.json is missing")
    if kind != "killed" and "Traceback" in text:
        wrong.append("a stack trace")
    return wrong
