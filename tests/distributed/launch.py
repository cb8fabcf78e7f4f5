"""Launch a probe script on several local processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch(script: Path, *arguments: str, num_processes: int = 2, timeout: int = 500) -> None:
    """Run ``script`` under torchrun and fail with its output if it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={num_processes}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}", str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
