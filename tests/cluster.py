"""Sweeps on real launchers: a job that is killed is resumed, the others are done without it.

`make test-cluster` runs this file; no other command collects it. It starts a Slurm of one node
(Debian's slurm-wlm, as root, with a configuration and state of its own) and a Ray of this machine.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

RAY = os.environ.get("RAY_PYTHON")
"""A Python that has hydra-ray-launcher, which asks for an older cloudpickle than joblib takes."""

EVERY, N_STEPS = 100, 2000  # between checkpoints, of a run
SWEEP = [
    "-m", "allostasis", "+exp=grokking", "preset=quick", "-m", "condition=high_wd", "seed=0,1,2,3",
    "threads=1", "device=cpu", "task.p=23", "model.d_model=32", "model.d_mlp=64",
    "task.probe_size=64", f"module.max_steps={N_STEPS}", "module.stop_after_grok=null",
    f"metrics.checkpoint_every={EVERY}", "metrics.drift_lag=100", "metrics.sparse_every=100",
]  # fmt: skip
KILLED = 1  # the seed whose job is killed
PATIENCE = 400  # seconds

SLURM_CONF = """
ClusterName=allostasis
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# submitit learns of a killed job from sacct, and waits for ever where that answers nothing; the
# real one needs a database server (slurmdbd), the controller knows the same
SACCT = """#!/usr/bin/env python3
import re, subprocess
print("JobID|State|NodeList")
for job in subprocess.check_output(["scontrol", "show", "job", "-o"], text=True).splitlines():
    has = dict(re.findall(r"(\\w+)=(\\S+)", job))
    if {"ArrayJobId", "ArrayTaskId"} <= has.keys():
        nodes = has.get("NodeList", "")
        print(f"{has['ArrayJobId']}_{has['ArrayTaskId']}|{has['JobState']}|{nodes}")
"""


def until(is_so: Callable[[], Any], what: str) -> Any:
    """Wait for something; what it gives."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := is_so():
            return found
        time.sleep(0.2)
    pytest.fail(f"waited {PATIENCE} s for {what}")


def free_ports() -> list[int]:
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of commands that find this test's own Slurm."""
    if shutil.which("slurmctld") is None:
        pytest.fail("no slurmctld: apt-get install slurm-wlm")
    home = tmp_path / "slurm"
    for name in ("state", "spool"):
        (home / name).mkdir(parents=True)
    conf = home / "slurm.conf"
    cores = os.cpu_count() or 1
    host = socket.gethostname()
    conf.write_text(SLURM_CONF.format(home=home, ports=free_ports(), host=host, cores=cores))
    sacct = home / "bin" / "sacct"
    sacct.parent.mkdir()
    sacct.write_text(SACCT)
    sacct.chmod(0o755)
    environ = os.environ | {
        "SLURM_CONF": str(conf),
        "PATH": f"{sacct.parent}{os.pathsep}{os.environ['PATH']}",
    }
    daemons = [
        subprocess.Popen([name, "-D", "-f", str(conf)], env=environ, stderr=subprocess.DEVNULL)
        for name in ("slurmctld", "slurmd")
    ]

    def is_up() -> bool:
        said = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environ, capture_output=True)
        return said.stdout.strip() == b"idle"

    try:
        until(is_up, f"an idle node; see {home}/*.log")
        yield environ
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(60)


def runs(folder: Path) -> dict[int, dict[str, Any]]:
    """run.json by seed."""
    found = [json.loads(path.read_text()) for path in folder.glob("outputs/*/*/*/*/run.json")]
    return {run["seed"]: run for run in found}


def kill_one(folder: Path) -> None:
    """Kill the process that works on one seed once it has a resume point.

    Weights are kept before the resume point of their step: the second mean that the first's is.
    """

    def has_two() -> bool:
        paths = folder.glob(f"outputs/grokking/high_wd/seed={KILLED}/*/checkpoints/*.safetensors")
        return any(int(path.stem) > EVERY for path in paths)

    until(has_two, f"a resume point of seed {KILLED}")
    locks = {str(path) for path in folder.glob(f"outputs/grokking/high_wd/seed={KILLED}/.*.lock")}
    holders = []
    for process in psutil.process_iter():
        try:
            holders += [process] * bool(locks & {file.path for file in process.open_files()})
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    (holder,) = holders
    holder.send_signal(signal.SIGKILL)


def start(python: str, folder: Path, environ: dict[str, str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, *SWEEP, *words], cwd=folder, env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def assert_all_done_and_one_resumed(folder: Path) -> None:
    ended = runs(folder)
    assert {seed: run["status"] for seed, run in ended.items()} == dict.fromkeys(range(4), "done")
    assert {seed: len(run["sessions"]) for seed, run in ended.items()} == {
        seed: 1 + (seed == KILLED) for seed in range(4)
    }
    (log,) = folder.glob(f"outputs/grokking/high_wd/seed={KILLED}/*/run.log")
    resumed = re.search(r"resumed at step ([\d ]+)", log.read_text())
    assert resumed is not None
    assert EVERY <= int(resumed[1].replace(" ", "")) < N_STEPS


def test_slurm_does_the_other_jobs_and_the_same_command_resumes_the_killed_one(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1"]
    first = start(sys.executable, tmp_path, slurm, *words)
    kill_one(tmp_path)
    output, _ = first.communicate(timeout=PATIENCE)
    assert first.returncode == 1, output[-3000:]

    def is_idle() -> bool:
        queue = subprocess.run(["squeue", "-h"], env=slurm, capture_output=True, check=True)
        return not queue.stdout.strip()

    until(is_idle, "an empty queue")
    status = {seed: run["status"] for seed, run in runs(tmp_path).items()}
    assert status == dict.fromkeys(range(4), "done") | {KILLED: "running"}

    again = start(sys.executable, tmp_path, slurm, *words)
    output, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, output[-3000:]
    assert "4 runs, 3 finished already" in output
    assert_all_done_and_one_resumed(tmp_path)


def test_ray_does_the_other_jobs_and_starts_the_killed_one_again_where_it_was(
    tmp_path: Path,
) -> None:
    if RAY is None:
        pytest.fail("RAY_PYTHON names no Python that has hydra-ray-launcher; use make test-cluster")
    words = ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"]
    sweep = start(RAY, tmp_path, dict(os.environ), *words)
    kill_one(tmp_path)
    output, _ = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 0, output[-3000:]
    assert_all_done_and_one_resumed(tmp_path)
