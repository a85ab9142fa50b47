"""``lmx model``: the tree and the totals, as text and as JSON, of recipes and directories; and its mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmx import config
from lmx.checkpoint.huggingface import read_config
from lmx.cli.main import main
from lmx.cli.model import BYTES, COUNTS, scaled
from lmx.experiment import Experiment, RunDir, TrainConfig
from lmx.models.families.llama import Llama
from lmx.models.flops import parameter_count

LLAMA = str(Path(__file__).parents[2] / "configs" / "llama.py")
QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.py")
TINY = Llama(vocab=300, context=64, layers=3, width=16, heads=4, kv_heads=2, head_dim=8, hidden=32)


def code(*arguments: Any) -> int:
    """The exit code of the command; tyro ends the process for wrong options."""
    try:
        return main(["model", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)


def shown(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    assert code(*arguments, "--json", "-") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Hugging Face directory that has its configuration only."""
    entries = {**TINY.to_huggingface(), "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    return tmp_path


def test_a_large_model_on_a_mesh_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(f"{LLAMA}:llama_70b", "--mesh.fsdp", 8, "--mesh.tensor", 4) == 0
    text = capsys.readouterr().out
    for words in (
        "80 layers x 8192 embed/fsdp x 28672 mlp/tensor",
        "layers 0-79",
        "2,048.5 positions seen",
        "70.6B (70,553,706,496), 262.8 GiB in float32",
        "fsdp 8 x tensor 4: 8.2 GiB on each of 32 devices",
        "320.0 KiB per token in bfloat16",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) < 160


def test_text_and_json_are_of_one_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(QUICKSTART, "--model.layers", 2, "--length", 128, "--json", tmp_path / "model.json") == 0
    text, data = capsys.readouterr().out, json.loads((tmp_path / "model.json").read_text())
    assert f"{data['parameters']:,}" in text
    assert f"{scaled(data['flops_per_token']['forward'], ' k M G')} FLOPs per token in rows of 128" in text
    assert data["length"] == 128
    assert {t["shape"][0] for t in data["tensors"] if t["layers"]} == {2}


def test_depth_folds_the_tree_but_not_the_sums(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(QUICKSTART, "--depth", 1) == 0
    text = capsys.readouterr().out
    assert "stack" in text
    assert "segment_0" not in text
    assert text.splitlines()[1].startswith("├─ embedding/table")


def test_a_huggingface_directory_needs_its_configuration_only(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shown(capsys, checkpoint, "--mesh.fsdp", 4, "--devices", 8)
    assert data["parameters"] == parameter_count(read_config(TINY.to_huggingface()).spec())
    assert (data["family"], data["dtype"], data["length"]) == ("llama", "bfloat16", 64)
    assert (data["mesh"]["data"], data["mesh"]["fsdp"], data["devices"]) == (2, 4, 8)
    assert data["device_bytes"] < data["bytes"]


def test_a_run_directory_shows_its_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = Experiment(model=TINY, train=TrainConfig(length=32))
    config.save(experiment, RunDir(tmp_path).experiment)
    data = shown(capsys, tmp_path)
    assert (data["parameters"], data["length"], data["dtype"]) == (parameter_count(TINY.spec()), 32, "float32")


def test_the_caches_dtype_is_an_option(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    per_token = [
        shown(capsys, checkpoint, "--dtype", dtype)["cache_bytes"]["per_token"] for dtype in ("bfloat16", "float32")
    ]
    assert per_token == [3 * 2 * 2 * 8 * 2, 3 * 2 * 2 * 8 * 4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is neither a recipe"),
        ([QUICKSTART, "--length", "257"], "--length is 257, expected 1 to the model's context of 256"),
        ([QUICKSTART, "--length", "-1"], "--length is -1"),
        ([QUICKSTART, "--train.length", "512"], "train.length is 512"),
        ([QUICKSTART, "--depth", "-1"], "--depth is -1"),
        ([QUICKSTART, "--devices", "-2"], "--devices is -2"),
        ([QUICKSTART, "--mesh.fsdp", "8", "--devices", "12"], "12"),
        ([QUICKSTART, "--mesh.tensor", "3"], "does not divide"),
        ([QUICKSTART, "--mesh.tensor", "0"], "mesh.tensor is 0"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_an_unknown_architecture_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    assert code(tmp_path) == 2
    assert "the model_type 'lama', expected llama" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "units", "expected"),
    [(671_026_419_200, COUNTS, "671.0B"), (12, COUNTS, "12"), (0.5, COUNTS, "0.5"), (1536, BYTES, "1.5 KiB")],
)
def test_numbers_are_readable(number: float, units: str, expected: str) -> None:
    assert scaled(number, units) == expected


def test_a_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    data = shown(capsys, "mixtral_8x7b", "--mesh.fsdp", 8)
    assert (data["family"], data["parameters"]) == ("mixtral", 46_702_792_704)


def test_a_name_that_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("mixtral_8x7") == 2
    assert "nor one of the" in (error := capsys.readouterr().err)
    assert "the nearest: mixtral_8x7b" in error
