"""Converting models: what comes out is the same model, whole, with all that lay beside it; or nothing comes out."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from goldens import Golden, load_golden

import lmx
from lmx.checkpoint.checkpointer import Checkpointer
from lmx.checkpoint.config import CheckpointConfig
from lmx.checkpoint.huggingface import export_params, find_tensors
from lmx.config import save
from lmx.data.tokenizer import TextTokenizer
from lmx.decode import convert as module
from lmx.decode.convert import convert
from lmx.errors import LmxError, UserError
from lmx.experiment import Experiment, RunDir
from lmx.models.config import ModelConfig
from lmx.models.families.llama import Llama
from lmx.models.model import cast_floats
from lmx.nn.module import Params


def written(golden: Golden, directory: Path, dtype: object = None) -> Path:
    export_params(golden.config, golden.params, directory, golden.config_json, dtype=dtype)
    return directory


def write_run(path: Path, model: ModelConfig, params: Params, tokenizer: TextTokenizer) -> Path:
    run = RunDir(path)
    run.path.mkdir()
    save(Experiment(model=model), run.experiment)
    tokenizer.save(run.tokenizer)
    with Checkpointer(run.checkpoints, CheckpointConfig()) as checkpointer:
        checkpointer.save(7, {"params": params}, {})
    return path


@pytest.fixture
def run(tmp_path: Path, config: Llama, stacked: Params, tokenizer: TextTokenizer) -> Path:
    """A run directory, written by hand."""
    return write_run(tmp_path / "run", config, stacked, tokenizer)


@pytest.mark.parametrize("name", ["llama_sequence", "bert_span", "t5"])
def test_there_and_back_is_the_same_model(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    source = written(golden, tmp_path / "source")
    first = convert(source, tmp_path / "ours", "lmx")
    second = convert(tmp_path / "ours", tmp_path / "theirs", "hf")
    assert set(first.compared) == set(second.compared)
    assert set(first.compared.values()) | set(second.compared.values()) == {0.0}
    tensors = find_tensors(tmp_path / "theirs")
    assert {n: tensors.read(n).tobytes() for n in tensors} == {n: a.tobytes() for n, a in golden.tensors.items()}
    again = json.loads((tmp_path / "theirs" / "config.json").read_text())
    kept = {
        k: v for k, v in golden.config_json.items() if k.endswith("_token_id") or k in ("id2label", "architectures")
    }
    assert kept.items() <= again.items()
    assert again["dtype"] == "float32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "source", "theirs"]


def test_a_run_is_exported_with_its_tokenizer(run: Path, tmp_path: Path) -> None:
    for to in ("hf", "lmx"):
        assert convert(run, tmp_path / to, to).compared == {"logits": 0.0}  # type: ignore[arg-type]
    models = [lmx.load(path) for path in (run, tmp_path / "hf", tmp_path / "lmx")]
    texts = [m.generate(["the quick"], max_new_tokens=12, seed=3)[0] for m in models]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0].tokens) == 12
    prompts = [m.tokenize(["the quick"])[0].ids for m in models]
    tokenizer = models[0].tokenizer
    assert tokenizer is not None
    assert prompts == [[tokenizer.end_id, *tokenizer.encode("the quick")]] * 3
    entries = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert entries["eos_token_id"] == entries["bos_token_id"] == tokenizer.end_id


def test_dtypes_stay_or_are_chosen(llama: Golden, run: Path, tmp_path: Path) -> None:
    source = written(llama, tmp_path / "source", ml_dtypes.bfloat16)
    convert(source, tmp_path / "ours", "lmx")
    model = lmx.load(tmp_path / "ours")
    assert {a.dtype for a in jax.tree.leaves(model.params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, cast_floats(llama.params, ml_dtypes.bfloat16)))
    assert lmx.load(tmp_path / "ours", dtype="float32").params["embedding"]["table"].dtype == np.float32
    done = convert(run, tmp_path / "small", "hf", dtype="bfloat16")
    assert list(done.dtypes) == ["bfloat16"]
    assert json.loads((tmp_path / "small" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_lies_beside_goes_with_the_model(llama: Golden, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    source = written(llama, tmp_path / "source")
    tokenizer.save(source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "generation_config.json").write_text('{"do_sample": true, "top_k": 3}')
    for to, place in (("lmx", source), ("hf", tmp_path / "lmx")):
        convert(place, tmp_path / to, to)  # type: ignore[arg-type]
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (tmp_path / to / name).read_bytes() == (source / name).read_bytes()
    assert lmx.load(tmp_path / "lmx").defaults.sampling.top_k == 3


@pytest.mark.parametrize("fault", ["tensor", "config"])
def test_nothing_is_left_of_an_export_that_differs(
    llama: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A byte that changes on the way is found by reading back; a wrong number in config.json by the logits."""
    source, write = written(llama, tmp_path / "source"), module.write_tensors

    def flipped(config: Llama, params: Params, folder: Path) -> None:
        write(config, params, folder)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-100] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    if fault == "tensor":
        monkeypatch.setattr(module, "write_tensors", flipped)
    else:
        wrong = {**llama.config.to_huggingface(), "rope_theta": 77.0}
        monkeypatch.setattr(type(llama.config), "to_huggingface", lambda self: wrong)
    with pytest.raises(LmxError, match="other content" if fault == "tensor" else "logits of the model .* differ"):
        convert(source, tmp_path / "new", "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_changed_byte_of_a_converted_model_is_noticed(llama: Golden, tmp_path: Path) -> None:
    convert(written(llama, tmp_path / "source"), tmp_path / "ours", "lmx")
    largest = max((tmp_path / "ours" / "checkpoints").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(LmxError, match="can be trusted"):
        lmx.load(tmp_path / "ours")


def test_nan_is_named_and_kept(llama: Golden, tmp_path: Path) -> None:
    broken = jax.tree.map(np.copy, llama.params)
    broken["final_norm"]["scale"][0] = np.nan
    export_params(llama.config, broken, tmp_path / "source", llama.config_json)
    with pytest.warns(UserWarning, match=r"model\.norm\.weight holds NaN"):
        convert(tmp_path / "source", tmp_path / "new", "hf")


def test_a_task_without_a_hugging_face_class_is_refused(
    config: Llama, stacked: Params, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", replace(config, task="pretraining"), stacked, tokenizer)
    with pytest.raises(UserError, match="no Hugging Face class of this family for pretraining"):
        convert(run, tmp_path / "new", "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
