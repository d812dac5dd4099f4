"""Two nodes of a network on this machine: processes in network namespaces, as root on Linux."""

import os
import selectors
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

ADDRESS, PORT = "10.77.0.{}", 29777


def _ip(command):
    return subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)


class Nodes:
    """The processes of two nodes, ranks 0 and 1."""

    def __init__(self, names, links, source):
        self._names, self._links, self.processes = names, links, []
        for rank, (name, link) in enumerate(zip(names, links, strict=True)):
            numbers = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_PORT": PORT}
            env = {key: str(number) for key, number in numbers.items()}
            env |= {"MASTER_ADDR": ADDRESS.format(1), "GLOO_SOCKET_IFNAME": link}
            command = ["ip", "netns", "exec", name, sys.executable, "-c", source]
            # Without buffers, so that select sees all that is there.
            self.processes.append(
                subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, bufsize=0)
            )

    def read_line(self, rank, seconds=60.0):
        """Return what a rank prints next; "" after so many seconds, or its end."""
        output, text, end = self.processes[rank].stdout, b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while not text.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    return ""
                more = output.read(1)
                if not more:
                    break
                text += more
        return text.decode().strip()

    def cut(self):
        """Take the network of the second node away: it closes no connection."""
        done = _ip(f"-n {self._names[1]} link set {self._links[1]} down")
        assert done.returncode == 0, done.stderr

    def wait(self, rank, seconds=30.0):
        """Return the exit status of a rank."""
        return self.processes[rank].wait(seconds)


@contextmanager
def two_nodes(source):
    """Run Python code on two nodes, ranks of one job as of ``torchrun``; skip where that fails."""
    names, links = ("tsf-node-a", "tsf-node-b"), ("tsf-a", "tsf-b")
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add {links[0]} type veth peer name {links[1]}")
    for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
        commands += [
            f"link set {link} netns {name}",
            f"-n {name} addr add {ADDRESS.format(number)}/24 dev {link}",
            f"-n {name} link set {link} up",
            f"-n {name} link set lo up",
        ]
    nodes = None
    try:
        for command in commands:
            try:
                done = _ip(command)
            except FileNotFoundError:
                pytest.skip("no program ip")
            if done.returncode:
                pytest.skip(f"no network namespaces: ip {command}: {done.stderr.strip()}")
        nodes = Nodes(names, links, source)
        yield nodes
    finally:
        for process in nodes.processes if nodes is not None else ():
            process.kill()
            process.wait()
            process.stdout.close()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
