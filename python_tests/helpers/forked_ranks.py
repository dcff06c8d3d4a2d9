"""Fine-tuning commands on several ranks, each a fork of one process that has imported everything.

`test_finetune_ddp.py` starts this as a process. It must start no OpenMP thread before its last
fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.bits import HANG_S
from helpers.finetune_runs import make_runs_cheap
from torch.distributed import TCPStore

from lift_kernels.cli import main
from lift_kernels.finetune import parallel
from lift_kernels.finetune.trainer import AnswerTrainer


def run_forked(folder: Path, commands: list[dict[str, Any]]) -> list[list[tuple[int, str, str]]]:
    """Run commands one after another; return exit code, stdout and stderr of each of their ranks.

    Args:
        folder: an empty directory for what the ranks print.
        commands: each with ``arguments`` of the command finetune, in which ``{rank}`` is replaced,
            the number of ``ranks`` (0: no launcher), more ``environment``, and ``kill``: a rank and
            the step after which it is killed.
    """
    # One thread: on a busy machine, two threads wait for each other in every tiny operation.
    environment = {
        **{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # the process imports helpers too
    }
    process = [sys.executable, "-m", "helpers.forked_ranks", str(folder), json.dumps(commands)]
    done = subprocess.run(process, capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        [(code, *said) for code, said in zip(codes, _read(folder, number))]
        for number, codes in enumerate(json.loads(done.stdout))
    ]


def _read(folder: Path, number: int) -> list[tuple[str, str]]:
    files = sorted(folder.glob(f"{number}.*.out"))
    return [(file.read_text(), file.with_suffix(".err").read_text()) for file in files]


def _start(command: dict[str, Any], rank: int, port: int, said: Path) -> int:
    """Fork a rank, and return its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        for number, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(said.with_suffix(f"{said.suffix}{suffix}"), os.O_WRONLY | os.O_CREAT), number)
        if command["ranks"]:
            launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": command["ranks"], "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in launched.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
        os.environ.update(command.get("environment", {}))
        if command.get("kill", [None])[0] == rank:
            _die_after(command["kill"][1])
        code = main(["finetune", *(argument.replace("{rank}", str(rank)) for argument in command["arguments"])])
        if code == 0 and (left := _threads_of_groups()):
            code = 1
            print(f"the run has ended, and these threads have not: {left}", file=sys.stderr)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _threads_of_groups() -> list[str]:
    """Names of the threads of process groups. They could abort an interpreter that ends."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # It has ended.
            names.append((task / "comm").read_text().strip())
    return [name for name in names if "gloo" in name]


def _die_after(step: int) -> None:
    original = AnswerTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if len(self.losses) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    AnswerTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def _main(folder: Path, commands: list[dict[str, Any]]) -> None:
    make_runs_cheap()
    parallel.LINGER_S = 0.0  # no launcher ends the others here
    results = []
    for number, command in enumerate(commands):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives the ranks, as torchrun's
        port = store.port
        ranks = [_start(command, rank, port, folder / f"{number}.{rank}") for rank in range(max(1, command["ranks"]))]
        results.append([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks])
    print(json.dumps(results))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), json.loads(sys.argv[2]))
