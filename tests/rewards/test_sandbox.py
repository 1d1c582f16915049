"""Hostile programs in every sandbox that a machine may offer: none reads, changes or leaves a thing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig

import pytest

from rewards.fork import outgrown, remove
from rewards.pool import TaskFailed, WorkerPool
from rewards.programs.grade import run_tests
from tests.rewards.hostile import NATIVE
from tests.rewards.outside import ROOT, clean_up

KERNEL = ("namespaces", "Landlock", "seccomp")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A module for programs that makes any system call, past Python's audit hook; "" without a C compiler."""
    compiler, folder = shutil.which("cc"), tmp_path_factory.mktemp("native")
    if not compiler or platform.machine() != "x86_64":
        return ""
    (folder / "raw.c").write_text(NATIVE)
    include, out = sysconfig.get_paths()["include"], folder / "raw.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-s", "-I", include, "-o", out, folder / "raw.c"], check=True
    )
    return str(out)


def attacked(native: str, user: str, without: list[str], only: str = "") -> dict:
    """What `tests.rewards.outside` found."""
    plan = {"user": user, "without": without, "native": native, "only": only}
    command = [sys.executable, "-m", "tests.rewards.outside", json.dumps(plan)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    clean_up(found["base"])
    assert [layer in found["active"].partition(";")[0] for layer in KERNEL] == [
        layer not in without for layer in KERNEL
    ]
    return found


@pytest.mark.parametrize("user", ["as it is", "nobody"])
@pytest.mark.parametrize("without", [[], ["namespaces"]], ids=str)
def test_nothing_outside_is_read_changed_or_left(native, user, without):
    if user == "nobody" and os.geteuid():
        pytest.skip("only root can become another user")
    if user != "nobody" and without:
        without = [*without, "audit hook"]  # the kernel's layers hold alone
    found = attacked(native, user, without)
    assert found["faults"] == {}
    assert found["programs"] >= (200 if native else 120)


def test_the_same_programs_read_it_where_nothing_confines_them(native):
    """A check of the programs themselves; seccomp stays, for the machine's sake."""
    found = attacked(native, "as it is", ["namespaces", "Landlock", "audit hook"], "reads")
    passed = [name for name, fault in found["faults"].items() if fault.startswith("value 1")]
    assert len(passed) >= (40 if native else 30), found["faults"]


@pytest.mark.parametrize("without", [["namespaces", "Landlock"], ["seccomp"]], ids=str)
def test_programs_are_not_run_where_the_kernel_cannot_confine_them(tmp_path, without):
    script = (
        "import json, sys\nfrom pathlib import Path\nfrom tests.rewards.outside import take_away\n"
        "from rewards.pool import WorkerPool\nfrom rewards.programs.grade import run_tests\n"
        "take_away(json.loads(sys.argv[1]), Path())\n"
        "for unsafe in (False, True):\n"
        "  with WorkerPool(1, allow_unsafe_code=unsafe) as pool:\n"
        "    outcome = run_tests('x = 1', ['assert x == 1'], pool=pool)\n"
        "    print(json.dumps([outcome.value, outcome.detail]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(without)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )
    refused, run = map(json.loads, done.stdout.splitlines())
    assert refused[0] is None and "programs are not run: this machine has no" in refused[1]
    assert without[-1] in refused[1]
    assert run[0] == 1


def test_a_folder_is_removed_however_deep_and_locked(tmp_path):
    folder = tmp_path / "of a program"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    here = os.open(".", os.O_RDONLY)
    os.chdir(folder)
    for name in ("-rf", "a\nb", b"\xff"):
        open(name, "w").close()
    os.symlink(tmp_path / "outside", "link")
    for _ in range(1200):
        os.mkdir("d")
        os.symlink(tmp_path / "outside", "d/link")
        os.chdir("d")
    os.chmod(".", 0)
    os.fchdir(here)
    os.close(here)
    assert outgrown(str(folder), 1 << 30)
    remove(str(folder))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "outside"]
    remove(str(folder))  # is gone already


def test_a_worker_that_cannot_start_is_a_failure_of_its_task(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with WorkerPool(1) as pool:
        assert "cannot be started" in run_tests("x = 1", ["assert x == 1, 3"], pool=pool).detail
        with pytest.raises(TaskFailed):
            pool.call({"op": "load"})
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with WorkerPool(1) as pool:
        outcome = run_tests("x = 1", ["assert x == 1, 4"], pool=pool)
        assert outcome.value is None and "died" in outcome.detail
