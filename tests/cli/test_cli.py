"""The command line from end to end: a run, what can be done with it, and one sentence for each mistake."""

import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import lmx
from lmx.cli.main import COMMANDS, main

QUICK = "--xla_backend_optimization_level=0"
RECIPE = """
from dataclasses import replace

from lmx.data.config import DataConfig, LocalFiles, TrainedBpe
from lmx.experiment import EvalConfig, Experiment, SampleConfig, TrainConfig
from lmx.models.families.llama import Llama
from lmx.optim.schedule import Schedule

CONSTANT = 3


def tiny() -> Experiment:
    return Experiment(
        model=Llama(
            vocab=300, context=64, layers=1, width=16, heads=2, kv_heads=2, head_dim=8, hidden=32, tied=True
        ),
        data=DataConfig((LocalFiles(files=("CORPUS/*.txt",)),), TrainedBpe(vocab_size=300), held_out=0.2),
        schedule=Schedule(warmup=1),
        train=TrainConfig(steps=6, batch=8, length=32, log_every=1),
        eval=EvalConfig(every=0, rows=8),
        sample=SampleConfig(prompts=("the",), tokens=4),
    )


def wider() -> Experiment:
    return replace(tiny(), model=replace(tiny().model, width=32))


def written_loosely() -> Experiment:
    return replace(tiny(), data=replace(tiny().data, sources=list(tiny().data.sources), held_out="0.2"))


def raises() -> Experiment:
    return 1 / 0


def exits() -> Experiment:
    raise SystemExit(0)


def returns_a_dict() -> dict:
    return {"steps": 3}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recipes")
    corpus = directory / "corpus"
    corpus.mkdir()
    for index in range(30):
        (corpus / f"{index:02}.txt").write_text(f"document {index}: the cat sat on the mat and slept " * 3)
    file = directory / "tiny.py"
    file.write_text(RECIPE.replace("CORPUS", str(corpus)))
    return file


@pytest.fixture(scope="module")
def run_dir(recipe: Path) -> Path:
    """A run that the command made, with its summary beside it and a trace of two steps in it."""
    path = recipe.parent / "run"
    result = recipe.parent / "summary.json"
    traced = ["--profile", "2", "3"]
    assert main(["train", str(recipe), "--run-dir", str(path), "--json", str(result), *traced]) == 0
    return path


def code(*arguments: Any) -> int:
    """The exit code of a command; tyro ends the process for help and wrong options."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def one_sentence(capfd: pytest.CaptureFixture[str], command: str) -> str:
    """What was said of a mistake: one line that names the command, and nothing on standard output."""
    out, err = capfd.readouterr()
    said = [line for line in err.splitlines() if line.startswith("lmx ")]
    assert out == ""
    assert "Traceback" not in err
    assert len(said) == 1, err
    assert said[0].startswith(f"lmx {command}: ")
    return said[0]


def python(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=240,
    )


def test_train_leaves_a_summary_a_report_and_a_trace(run_dir: Path) -> None:
    summary = json.loads((run_dir.parent / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["run_dir"] == str(run_dir)
    assert Path(summary["report"]).is_file()
    assert list((run_dir / "profile").rglob("*.xplane.pb"))
    logged = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4, 5, 6]


def test_train_again_goes_on_and_prints_for_people(
    recipe: Path, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert code("train", recipe, "--run-dir", run_dir) == 0
    out, err = capfd.readouterr()
    assert "going on after step 6" in err
    assert "6 steps, held-out loss" in out
    assert "bits per byte" in out
    assert f"run directory: {run_dir}" in out
    assert "--- sample\nthe" in out


def test_train_refuses_another_configuration_with_exit_code_2(
    recipe: Path, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert code("train", f"{recipe}:wider", "--run-dir", run_dir) == 2
    err = capfd.readouterr().err
    assert "model.width: 16 -> 32" in err
    assert "--allow-config-change model.width" in err


def test_train_refuses_the_checkpoints_of_another_model(
    recipe: Path, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign = ("--checkpoint.directory", run_dir / "checkpoints")
    assert code("train", f"{recipe}:wider", "--run-dir", tmp_path / "new", *foreign) == 2
    said = one_sentence(capfd, "train")
    assert f"the checkpoint of step 6 in {run_dir / 'checkpoints'} does not fit this model: " in said
    assert "use the configuration it was saved with" in said


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "the environment of Slurm is half set"),
        ({"LMX_PROCESSES": "2"}, "several processes are half set: LMX_PROCESSES=2 is there"),
        ({"LMX_PROCESSES": "two"}, "LMX_PROCESSES is 'two', expected a number"),
    ],
)
def test_train_refuses_a_launcher_environment_that_is_half_set(
    recipe: Path,
    variables: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert code("train", recipe) == 2
    assert words in one_sentence(capfd, "train")


def test_generate_prints_the_prompt_and_goes_on(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--max-new-tokens", 5, "--temperature", 0)
    assert code("generate", run_dir, "--prompt", "the cat", *options) == 0
    shown = capfd.readouterr().out
    assert shown.startswith("the cat")
    assert code("generate", run_dir, "--prompt", "the cat", *options, "--json", "-") == 0
    (completion,) = json.loads(capfd.readouterr().out)["completions"]
    assert shown == f"the cat{completion['text']}\n"
    assert completion["prompt"] == "the cat"
    assert 1 <= len(completion["tokens"]) == len(completion["logprobs"]) <= 5
    assert all(p <= 0 for p in completion["logprobs"])
    assert completion["finish_reason"] in ("stop", "length")


def test_generate_shows_each_text_as_it_comes(run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pieces, clock = list[str](), itertools.count()
    monkeypatch.setattr("lmx.decode.generate.perf_counter", lambda: next(clock))  # a slow device: a second a look
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=pieces.append, flush=lambda: None))
    options = ["--prompt", "the cat", "a mat", "--max-new-tokens", 8, "--seed", 5, 9, "--json", tmp_path / "out.json"]
    assert code("generate", run_dir, *options) == 0
    first, second = json.loads((tmp_path / "out.json").read_text())["completions"]
    assert "".join(pieces) == f"the cat{first['text']}\n---\na mat{second['text']}\n"
    assert len("".join(pieces[:1])) < len(f"the cat{first['text']}")
    assert len([piece for piece in pieces[: pieces.index("\n---\n")] if piece]) > 2
    monkeypatch.undo()
    alone = lmx.load(run_dir).generate(["a mat"], max_new_tokens=8, seed=9)[0]
    assert second["tokens"] == list(alone.tokens)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "the cat sat " * 30], ["prompt 0 has", "context of 64"]),
        (["--prompt", "a", "--max-new-tokens", "0"], ["max_new_tokens is 0"]),
        (["--prompt", "a", "--step", "5"], ["no checkpoint of step 5", "steps there are: 6"]),
        (["--prompt", "a", "--temperature", "-1"], ["temperature"]),
        (["--prompt", "a", "--stop", ""], ["stop is ('',)", "at least one character"]),
        (["--prompt", "a", "--seed", "1", "2"], ["there are 2 seeds for 1 prompts"]),
        ([], ["there is no prompt"]),
    ],
)
def test_generate_says_what_is_wrong(
    run_dir: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    assert code("generate", run_dir, *arguments, "--json", "-") == 2
    sentence = one_sentence(capfd, "generate")
    assert all(words in sentence for words in said), sentence


def test_generate_needs_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert code("generate", tmp_path, "--prompt", "a", "--json", "-") == 2
    assert "is not a run directory" in one_sentence(capfd, "generate")


BROKEN = {
    "missing": ("nowhere.py", ["there is no recipe file nowhere.py"]),
    "not python": ("README.md", ["there is no recipe file README.md", "configs/quickstart.py"]),
    "no function": ("DIR/tiny.py:narrow", ["no recipe function 'narrow'", "tiny, wider"]),
    "no callable": ("DIR/tiny.py:CONSTANT", ["no recipe function 'CONSTANT'"]),
    "raises": ("DIR/tiny.py:raises", ["raised ZeroDivisionError: division by zero"]),
    "exits": ("DIR/tiny.py:exits", ["tiny.py:exits raised SystemExit: 0"]),
    "exits at once": ("DIR/stops.py", ["stops.py raised SystemExit: enough"]),
    "a value of another type": ("DIR/tiny.py:written_loosely", ["data.held_out is '0.2', expected float"]),
    "another type": ("DIR/tiny.py:returns_a_dict", ["returned dict, expected an lmx.Experiment"]),
    "syntax": ("DIR/syntax.py", ["syntax.py raised SyntaxError"]),
    "import": ("DIR/imports.py", ["imports.py raised ModuleNotFoundError", "no_such_module"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_recipe_is_one_sentence(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    (recipe.parent / "syntax.py").write_text("def syntax(:\n")
    (recipe.parent / "imports.py").write_text("import no_such_module\n")
    (recipe.parent / "stops.py").write_text("import sys\nsys.exit('enough')\n")
    name, said = BROKEN[case]
    run = tmp_path / "run"
    assert code("train", name.replace("DIR", str(recipe.parent)), "--run-dir", run) == 2
    sentence = one_sentence(capfd, "train")
    assert all(words in sentence for words in said), sentence
    assert not run.exists()


def test_the_recipe_comes_first(capfd: pytest.CaptureFixture[str]) -> None:
    assert code("train") == 2
    assert "the first argument is the recipe" in one_sentence(capfd, "train")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--model.layrs", "2"], "--model.layers"),
        (["--train.steps", "many"], "many"),
        (["--train.steps", "1.5"], "1.5"),
        (["--train.compute", "float8"], "float8"),
        (["--model.layers"], "--model.layers"),
    ],
)
def test_a_wrong_override_is_named(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], named: str
) -> None:
    assert code("train", recipe, "--run-dir", tmp_path / "run", *overrides) == 2
    out, err = capfd.readouterr()
    assert named in out + err
    assert not (tmp_path / "run").exists()


MISFITS = {
    "vocabulary": (["--model.vocab", "100"], ["model.vocab 100 is smaller than the tokenizer's 300 tokens"]),
    "devices": (["--mesh.data", "3"], ["the mesh data 3", "there are 8"]),
    "heads": (["--mesh.data", "2", "--mesh.tensor", "4"], ["the axis 'kv_heads'", "does not divide its size 2"]),
    "batch": (["--train.batch", "6"], ["splits the batch into 8", "6 sequences"]),
    "length": (["--train.length", "128"], ["train.length 128 is longer than model.context 64"]),
    "steps": (["--train.steps", "0"], ["train.steps is 0"]),
    "shape": (["--model.kv-heads", "3"], ["model.heads 2 is not divisible by model.kv_heads 3"]),
    "schedule": (["--schedule.warmup", "9"], ["schedule.warmup is 9"]),
    "corpus": (["--data.sources.0.files", "/nowhere/*.txt"], ["/nowhere/*.txt"]),
    "init": (["--init-from", "/nowhere"], ["there is no directory /nowhere"]),
}


@pytest.mark.parametrize("case", MISFITS)
def test_numbers_that_do_not_fit_are_one_sentence(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    overrides, said = MISFITS[case]
    assert code("train", recipe, "--run-dir", tmp_path / "run", *overrides) == 2
    sentence = one_sentence(capfd, "train")
    assert all(words in sentence for words in said), sentence
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_wrong_start_does_not_spoil_the_run_directory(recipe: Path, tmp_path: Path) -> None:
    assert code("train", recipe, "--run-dir", tmp_path / "run", "--model.vocab", 100) == 2
    assert code("train", recipe, "--run-dir", tmp_path / "run") == 0


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS), ["check", "mesh"], ["check", "faults"]])
def test_help_of_every_command_has_an_example(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert code(*command, "--help") == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "xample" in out
    assert f"lmx {command[0]} " in out


def test_help_of_a_recipe_shows_its_fields(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert code("train", recipe, "--help") == 0
    out = capfd.readouterr().out
    for option in ("--model.kv-heads", "--train.steps", "--mesh.fsdp", "--run-dir", "--checkpoint.every"):
        assert option in out
    assert "Optimizer steps." in out  # the docstring of the field
    assert "Example: lmx train" in " ".join(out.split())


@pytest.mark.parametrize(("command", "expected"), [("data", 75), ("train", 75), ("report", 1)])
def test_ctrl_c_ends_with_a_code_of_the_contract(
    command: str, expected: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lmx.cli.{command}.main", interrupted)
    assert code(command) == expected
    assert one_sentence(capfd, command).endswith("run the same command again to go on") == (expected == 75)


def test_general_help_names_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert code("--help") == 0
    out = capfd.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert "xample" in out
    assert code() == 2


def test_an_unknown_command_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert code("trian") == 2
    assert "there is no command 'trian'" in capfd.readouterr().err
    assert code("check", "wings") == 2
    assert "there is no check 'wings'; the checks are mesh, faults" in capfd.readouterr().err


def test_help_and_import_stay_light() -> None:
    heavy = {"jax", "flax", "numpy", "optax", "orbax", "tensorflow_datasets", "grain", "tyro", "rich"}
    done = python(
        "import sys, lmx; from lmx.cli.main import main; code = main(['--help'])\n"
        f"sys.exit(code or ', '.join({heavy!r} & set(sys.modules)) or 0)"
    )
    assert done.returncode == 0, done.stderr


def test_check_mesh_prints_a_table_and_writes_json(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "check.json"
    meshes = ("--mesh", "data=2,fsdp=2", "data=2,tensor=4")
    assert code("check", "mesh", recipe, *meshes, "--steps", 1, "--json", result) == 0
    out = capfd.readouterr().out
    assert "one device" in out
    assert "skipped data=2,tensor=4: the mesh splits the axis 'kv_heads'" in out
    assert "the same on every mesh" in out
    assert json.loads(result.read_text())["same"]


@pytest.mark.parametrize("mesh", ["data", "data=0", "data=2;fsdp=2", "row=2", "data=two"])
def test_check_mesh_says_how_a_mesh_is_written(recipe: Path, capfd: pytest.CaptureFixture[str], mesh: str) -> None:
    assert code("check", "mesh", recipe, "--mesh", mesh) == 2
    assert "write it as data=2,fsdp=4" in one_sentence(capfd, "check")


def test_check_mesh_makes_virtual_devices_and_fails_when_no_mesh_can_be_tried(recipe: Path) -> None:
    command = ["check", "mesh", str(recipe), "--devices", "3", "--steps", "1", "--json", "-"]
    done = python(f"import sys; from lmx.cli.main import main; sys.exit(main({command!r}))", XLA_FLAGS=QUICK)
    assert done.returncode == 1, done.stderr
    assert "lmx check: tiny: no mesh could be tried: tensor=3: the mesh splits the axis" in done.stderr
    result = json.loads(done.stdout)
    assert not result["same"]
    checked = result["recipes"]["tiny"]
    assert checked["devices"] == 3
    split = [{axis: size for axis, size in t["mesh"].items() if size > 1} for t in checked["trials"]]
    assert split == [{}, *({axis: 3} for axis in ("tensor", "sequence", "expert", "stage", "fsdp", "data"))]


def test_check_faults_needs_room_for_its_faults(capfd: pytest.CaptureFixture[str]) -> None:
    assert code("check", "faults", "--faults", 20, "--steps", 50) == 2
    assert "expected at least 1 fault and 71 steps" in one_sentence(capfd, "check")
