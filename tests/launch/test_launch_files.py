"""The launchers' files: as valid as can be told without their clusters."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jobs import ROOT

LAUNCH = ROOT / "launch"


@pytest.fixture
def manifest() -> list[Any]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def test_the_manifest_follows_the_published_schemas(manifest: list[Any]) -> None:
    assert [part["kind"] for part in manifest] == ["Service", "Job"]
    for part in manifest:
        kubernetes_validate.validate(part, "1.31", strict=True)


def test_the_manifest_says_the_same_number_of_pods_everywhere(manifest: list[Any]) -> None:
    service, job = manifest
    pod = job["spec"]["template"]["spec"]
    told = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(told["LMX_PROCESSES"])
    host, _, port = told["LMX_COORDINATOR"].partition(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(port) == service["spec"]["ports"][0]["port"]


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_flags.sh", "tpu_vm.sh"])
def test_shell_scripts_are_sound(name: str) -> None:
    checks = [["bash", "-n"]] + ([["shellcheck"]] if shutil.which("shellcheck") else [])
    for check in checks:
        done = subprocess.run([*check, LAUNCH / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def sourced(own: str, command: str) -> str:
    """What a command prints after ``tpu_flags.sh`` was sourced with one's own flags set."""
    script = f"source {LAUNCH / 'tpu_flags.sh'} && {command}"
    env = {**os.environ, "LIBTPU_INIT_ARGS": own}
    return subprocess.run(["bash", "-uc", script], env=env, capture_output=True, text=True, check=True).stdout


def test_flags_for_tpus_stand_after_ones_own() -> None:
    own, *flags = sourced("--mine=1", 'echo "$LIBTPU_INIT_ARGS"').split()
    assert own == "--mine=1"
    assert len(set(flags)) == 9
    assert all(flag.startswith("--xla_") and "=" in flag for flag in flags)
    assert sourced("", 'echo "$LIBTPU_INIT_ARGS"').split() == flags


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_with_the_flags_a_step_on_a_tpu_sends_what_the_formula_says() -> None:
    shape = "--model.layers 2 --model.vocab 32768 --train.batch 8 --train.length 2048 --train.compute bfloat16"
    mesh = "--topology v5p:2x2x2 --mesh.data 1 --mesh.fsdp 8 --train.remat none --formulas True --effort -1"
    recipe = ROOT / "configs" / "llama.py"
    told = sourced("", f"{sys.executable} -m lmx.cli.main plan {recipe}:llama_8b {shape} {mesh} --json - 2> /dev/null")
    (row,) = [row for row in json.loads(told)["communication"] if row["axes"] == "fsdp"]
    assert row["measured"] == pytest.approx(row["formula"], rel=1e-3)


def test_skypilot_tells_every_node_its_place() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    done = subprocess.run(
        ["bash", "-c", task["run"].replace("lmx train", "env #")],
        env={"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for line in ("LMX_COORDINATOR=10.0.0.1:8476", "LMX_PROCESSES=2", "LMX_PROCESS=1"):
        assert line in done.stdout.splitlines()
    assert Path(LAUNCH / "README.md").exists()
