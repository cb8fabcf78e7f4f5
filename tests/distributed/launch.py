"""Launch a probe script on several local processes."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ABORTED = f"exitcode: -{int(signal.SIGABRT)}"


def launch(script: Path, *arguments: str, num_processes: int = 2, timeout: int = 500) -> None:
    """Run ``script`` under torchrun and fail with its output if it fails.

    A process that the C++ libraries abort (gloo does, where it cannot start a thread) is no failure of an assertion:
    the script runs a second time, with a warning that shows the first.
    """
    folders = [path for path in map(Path, arguments) if path.is_absolute() and path.is_dir()]
    with tempfile.TemporaryDirectory() as copies:
        for number, folder in enumerate(folders):
            shutil.copytree(folder, Path(copies) / str(number))
        done = _run(script, arguments, num_processes, timeout)
        if done.returncode != 0 and ABORTED in done.stderr:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn(
                    f"{script.name} was aborted and runs again.\n{report(done)}", AbortedWarning, stacklevel=2
                )
            for number, folder in enumerate(folders):
                shutil.rmtree(folder)
                shutil.copytree(Path(copies) / str(number), folder)
            done = _run(script, arguments, num_processes, timeout)
    assert done.returncode == 0, report(done)


class AbortedWarning(UserWarning):
    """A process was aborted by a library."""


def report(done: subprocess.CompletedProcess[str]) -> str:
    """The end of what a run printed, and last what a library or the interpreter said of its death."""
    lines = done.stderr.splitlines()
    telling = ("terminate called", "what():", "Fatal Python error", "Current thread", "Most recent call first")
    deaths = [at for at, line in enumerate(lines) if any(word in line for word in telling)]
    shown = sorted({near for at in deaths[:6] for near in range(at, min(at + 12, len(lines)))})
    death = "\n".join(lines[at] for at in shown)
    return f"{done.stdout[-2000:]}\n{done.stderr[-8000:]}\n{death[:3000]}"


def share_meshes() -> None:
    """Let Lightning's own strategies of one process share one mesh; each new one leaves its threads behind."""
    from lightning.pytorch.strategies import model_parallel

    model_parallel._setup_device_mesh = functools.cache(model_parallel._setup_device_mesh)


def _run(
    script: Path, arguments: tuple[str, ...], num_processes: int, timeout: int
) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONFAULTHANDLER"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={num_processes}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}", str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
