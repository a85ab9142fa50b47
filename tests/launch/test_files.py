"""The launchers' files: as valid as can be told without their clusters."""

import shutil
import subprocess
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


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_vm.sh"])
def test_shell_scripts_are_sound(name: str) -> None:
    checks = [["bash", "-n"]] + ([["shellcheck"]] if shutil.which("shellcheck") else [])
    for check in checks:
        done = subprocess.run([*check, LAUNCH / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


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
