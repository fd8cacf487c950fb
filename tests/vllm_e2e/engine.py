"""vLLM on a machine without a GPU: what it takes beside TRL, in this process or as a server."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SITES = [str(HERE / "site"), str(HERE.parent / "verl_e2e" / "site")]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
LONGEST = 160


def prepare() -> None:
    """Make TRL's engine of vLLM one for this machine: exact in fp32, and with parameters that can be loaded again."""
    os.environ.update(ENVIRONMENT)
    import trl.generation.vllm_generation as generation
    from store_transfer import keep_linear_layers, patch_trl

    torch.set_num_threads(1)
    keep_linear_layers()
    patch_trl()
    # vLLM profiles with a prompt that the processors of transformers 5.24 refuse.
    generation.LLM = functools.partial(generation.LLM, dtype="float32", enforce_eager=True, skip_mm_profiling=True)


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def server(folder: Path, model: Path) -> Iterator[str]:
    """Start a server of a model and yield its URL, at once; its output is in ``folder``."""
    port = free_port()
    # vLLM looks for its platform in the version of a distribution of this name, and for plugins in any.
    named = folder / "site" / "vllm-0.27.1+cpu.dist-info"
    named.mkdir(parents=True)
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.27.1+cpu\n")
    (named / "entry_points.txt").write_text("[vllm.general_plugins]\nstore = store_transfer:register\n")
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(LONGEST)),
        *("--enforce-eager", "--skip-mm-profiling", "--gpu-memory-utilization", "0.1"),
        *("--weight-transfer-config", '{"backend": "store"}', "--logprobs-mode", "processed_logprobs"),
    ]
    path = os.pathsep.join([*SITES, str(named.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1"}
    with (folder / "server.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
