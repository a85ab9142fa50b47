"""``lmx convert``, ``generate`` and ``eval`` on Hugging Face directories, and one sentence for each mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from goldens import load_golden

from lmx.checkpoint.huggingface import export_params
from lmx.cli.main import main
from lmx.data.tokenizer import train_bpe

TEXT = "the cat sat on the mat and the dog sat on the cat. "


RECIPE = """
import lmx
from lmx.data.config import DataConfig, LocalFiles
from lmx.experiment import Experiment
from lmx.objectives.masked_lm import MaskedLm


def masked() -> Experiment:
    data = DataConfig(sources=(LocalFiles(files=("{place}/*.txt",)),), held_out=1.0)
    return Experiment(data=data, objective=MaskedLm(rate=0.25))
"""


def write(name: str, directory: Path) -> Path:
    golden = load_golden(name)
    export_params(golden.config, golden.params, directory, golden.config_json)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory without a tokenizer."""
    return write("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def directory(llama: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with all that belongs to it."""
    import jax

    from lmx.models.families.llama import Llama
    from tests.jitted import init_params

    config = Llama(vocab=300, context=128, layers=1, width=16, heads=2, kv_heads=2, head_dim=8, hidden=32)
    directory = tmp_path_factory.mktemp("models") / "model"
    export_params(config, init_params(config.spec(), jax.random.key(0)), directory, config.to_huggingface())
    train_bpe(iter([TEXT * 20]), 300).save(directory)
    (directory / "generation_config.json").write_text('{"do_sample": false, "num_beams": 4, "eos_token_id": [0, 299]}')
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    return directory


def said(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence about a mistake, for which the command ends with code 2."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("lmx ")]
    assert (out, len(lines)) == ("", 1), err
    assert "Traceback" not in err
    return lines[0]


def test_convert_says_what_it_did(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(llama), str(tmp_path / "new"), "--to", "lmx", "--json", "-"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["compared"] == {"logits": 0.0}
    assert main(["convert", str(tmp_path / "new"), str(tmp_path / "back"), "--to", "hf", "--dtype", "bfloat16"]) == 0
    assert "every tensor the same" in capfd.readouterr().out


def _edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes())) and None


def _config(**entries: object) -> Callable[[Path], None]:
    return _edit("config.json", lambda text: json.dumps({**json.loads(text), **entries}).encode())


def _pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _sharded(path: Path) -> None:
    golden = load_golden("llama")
    shutil.rmtree(path)
    export_params(golden.config, golden.params, path, golden.config_json, shard_bytes=20_000)
    sorted(path.glob("*.safetensors"))[1].unlink()


WEIGHTS = "model.safetensors"
SPOILED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no config": (lambda p: (p / "config.json").unlink(), ["neither experiment.json", "config.json"]),
    "not json": (_edit("config.json", lambda text: text[:20]), ["config.json is not JSON"]),
    "unknown": (_config(model_type="lama"), ["model_type 'lama', expected llama, palm"]),
    "truncated": (_edit(WEIGHTS, lambda b: b[:-10]), ["is not a whole safetensors file"]),
    "corrupt": (_edit(WEIGHTS, lambda b: b[:9] + b"x" * 9 + b[18:]), ["header cannot be understood"]),
    "shape": (_config(intermediate_size=999), ["has the shape", "but the configuration says"]),
    "shards": (_sharded, ["lacks model-00002-of-"]),
    "pickle": (_pickle, ["a pickle that can run any code"]),
    "tokenizer": (lambda p: (p / "tokenizer.json").write_text("{]") and None, ["is not a tokenizer"]),
    "generation": (lambda p: (p / "generation_config.json").write_text("[]") and None, ["expected an object"]),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_directory_is_one_sentence(
    directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, words = SPOILED[case]
    spoil(directory)
    sentence = said(capfd, "convert", directory, tmp_path / "new", "--to", "hf")
    assert all(word in sentence for word in words), sentence
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_target_that_cannot_be(directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "is there already" in said(capfd, "convert", directory, directory, "--to", "hf")
    assert "lies in" in said(capfd, "convert", directory, directory / "new", "--to", "lmx")
    assert "there is no directory" in said(capfd, "convert", tmp_path / "no", tmp_path / "new", "--to", "lmx")
    assert "expected one of float32" in said(
        capfd, "convert", directory, tmp_path / "new", "--to", "hf", "--dtype", "i4"
    )
    assert "has no step 3" in said(capfd, "convert", directory, tmp_path / "new", "--to", "hf", "--step", 3)
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_generate_takes_the_models_settings(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(model), "--prompt", "the cat", "--max-new-tokens", "4", "--json", "-"]
    assert main(command) == 0
    out, err = capfd.readouterr()
    assert "lmx generate: warning:" in err
    assert "num_beams 4, which lmx does not do" in err
    assert json.loads(out)["sampling"]["temperature"] == 0
    assert "temperature 0" in err
    assert "generation_config.json" in err
    assert main([*command, "--temperature", "0.5", "--top-k", "2"]) == 0
    assert json.loads(capfd.readouterr().out)["sampling"]["temperature"] == 0.5


@pytest.mark.filterwarnings("ignore:generation_config.json asks")
def test_generate_chats(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(model), "--chat", "the cat", "--system", "sat", "--max-new-tokens", "4"]
    assert main([*command, "--json", "-"]) == 0
    (completion,) = json.loads(capfd.readouterr().out)["completions"]
    assert completion["prompt"] == "system: sat\nuser: the cat\n"
    assert main(command) == 0
    assert capfd.readouterr().out == completion["text"] + "\n"


def test_eval_scores_files(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 5)
    files = ["--files", str(tmp_path / "*.txt"), "--length", "32", "--batch", "2", "--json", "-"]
    assert main(["eval", str(model), *files]) == 0
    score = json.loads(capfd.readouterr().out)
    assert score["bytes"] == len(TEXT * 5)
    assert abs(score["loss"] - 5.7) < 0.3  # a fresh model: the logarithm of 300
    assert score["command"] == ["lmx", "eval", str(model), *files]
    assert (score["configuration"]["length"], score["configuration"]["batch"]) == (32, 2)
    assert "jax" in score["versions"]
    found = score["tasks"]["held-out text"]
    assert set(found["measures"]) == {"loss", "perplexity", "bits_per_byte", "accuracy"}
    for name, measure in found["measures"].items():
        assert measure["value"] == pytest.approx(score[name])
        assert (measure["stderr"] > 0) == (name != "accuracy")  # a fresh model is never right
        assert measure["method"] == "bootstrap, 500 resamples of the rows, seed 0"
    assert main(["eval", str(model), *files[:-2]]) == 0
    out = capfd.readouterr().out
    assert f"perplexity {score['perplexity']:.2f}" in out
    assert "+- is the standard error: bootstrap" in out
    assert "so it has no held-out text of its own" in said(capfd, "eval", model)


def test_an_encoder_is_scored_on_a_recipes_masked_tokens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import jax

    from lmx.models.families.bert import Bert
    from tests.jitted import init_params

    config, bert = Bert(vocab=300, context=64, layers=1, width=16, heads=2, hidden=32), tmp_path / "bert"
    export_params(config, init_params(config.spec(), jax.random.key(0)), bert, config.to_huggingface())
    train_bpe(iter([TEXT * 20]), 300, ("[MASK]",)).save(bert)
    (tmp_path / "text.txt").write_text(TEXT * 5)
    (tmp_path / "masked.py").write_text(RECIPE.format(place=tmp_path))
    assert main(["eval", str(bert), "--data", str(tmp_path / "masked.py"), "--json", "-"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert abs(found["loss"] - 5.7) < 0.3
    settings = found["tasks"]["held-out text"]["configuration"]
    assert (settings["objective"]["type"], settings["objective"]["rate"], settings["length"]) == ("MaskedLm", 0.25, 64)


def test_models_that_do_not_write(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    bert = write("bert", tmp_path / "bert")
    assert "is an encoder and does not generate" in said(capfd, "generate", bert, "--prompt", "a", "--json", "-")
    sentence = said(capfd, "eval", bert, "--files", tmp_path / "*.txt")
    assert "is an encoder, which has no perplexity; give --data RECIPE" in sentence
    assert "has no tokenizer" in said(capfd, "generate", llama, "--prompt", "a", "--json", "-")
    assert "has no chat template" in said(capfd, "generate", llama, "--chat", "a", "--json", "-")
    assert "has no tokenizer" in said(capfd, "eval", llama, "--files", tmp_path / "*.txt")
    assert "both --prompt and --chat" in said(capfd, "generate", llama, "--chat", "a", "--prompt", "b")
