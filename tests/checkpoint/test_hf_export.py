"""Parameters to a directory: what is written, that it is read back, and that nothing is left half done."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lmx.checkpoint.huggingface import (
    export_params,
    export_tensors,
    find_tensors,
    import_params,
    new_directory,
    open_directory,
    verify_tensors,
    write_tensors,
)
from lmx.checkpoint.huggingface.files import read_header, write_file
from lmx.errors import LmxError, UserError
from lmx.models.model import cast_floats


def test_what_is_exported_is_what_was_there(tmp_path, golden):
    export_params(golden.config, golden.params, tmp_path / "new", golden.config_json)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert tensors.keys() == golden.tensors.keys()
    assert all(np.array_equal(tensors[n], a) for n, a in golden.tensors.items())
    assert open_directory(tmp_path / "new").config == golden.config


@pytest.mark.parametrize("most", [1, 5_000, 20_000])
def test_shards(tmp_path, llama, most):
    export_params(llama.config, llama.params, tmp_path / "new", llama.config_json, shard_bytes=most)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in llama.tensors.values())
    for file in files:
        entries = read_header(tmp_path / "new" / file)
        assert len(entries) == 1 or sum(e.nbytes for e in entries.values()) <= most
        assert all(index["weight_map"][name] == file for name in entries)
    tensors = {n: a for file in files for n, a in load_file(tmp_path / "new" / file).items()}
    assert tensors.keys() == index["weight_map"].keys() == llama.tensors.keys()
    assert all(np.array_equal(tensors[n], a) for n, a in llama.tensors.items())


def test_bfloat16_stays_and_dtypes_can_be_chosen(tmp_path, llama):
    small = cast_floats(llama.params, ml_dtypes.bfloat16)
    export_params(llama.config, small, tmp_path / "kept", llama.config_json)
    back = open_directory(tmp_path / "kept")
    again = import_params(back.config, back.tensors)
    assert {a.dtype for a in jax.tree.leaves(again)} == {np.dtype(ml_dtypes.bfloat16)}
    assert jax.tree.all(jax.tree.map(np.array_equal, again, small))
    export_params(llama.config, llama.params, tmp_path / "cast", llama.config_json, dtype=ml_dtypes.bfloat16)
    assert (tmp_path / "cast" / "model.safetensors").read_bytes() == (
        tmp_path / "kept" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(UserError, match="dtype float8_e3m4, which safetensors files cannot hold"):
        export_tensors_to(tmp_path / "odd", llama, ml_dtypes.float8_e3m4)


def export_tensors_to(path, golden, dtype=None):
    path.mkdir()
    write_tensors(golden.config, golden.params, path, dtype=dtype)


def test_in_memory_and_in_files_agree(tmp_path, golden):
    export_tensors_to(tmp_path / "new", golden, np.float16)
    entries = find_tensors(tmp_path / "new")
    memory = export_tensors(golden.config, golden.params, np.float16)
    assert {n: entries.read(n).tobytes() for n in entries} == {n: a.tobytes() for n, a in memory.items()}


KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(KEY), f"not the model: {KEY} are missing"),
        (lambda t: t.update(extra=t[KEY]), "extra are not of the model"),
        (lambda t: t.update({KEY: t[KEY].T.copy()}), f"{KEY} have another shape or dtype"),
        (lambda t: t.update({KEY: t[KEY].astype(np.float16)}), f"{KEY} have another shape or dtype"),
        (lambda t: t.update({KEY: np.nextafter(t[KEY], 9)}), f"{KEY} have other content"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "content"],
)
def test_what_was_written_wrong_is_named(tmp_path, llama, damage, words):
    tensors = {n: a.copy() for n, a in llama.tensors.items()}
    damage(tensors)
    infos = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in tensors.items()}
    write_file(tmp_path / "model.safetensors", infos, tensors.__getitem__)
    with pytest.raises(LmxError, match=words):
        verify_tensors(llama.config, llama.params, tmp_path)


def test_a_flipped_bit_is_found(tmp_path, llama):
    export_tensors_to(tmp_path / "new", llama)
    path = tmp_path / "new" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)
    with pytest.raises(LmxError, match=r"not the model: \S+ have other content"):
        verify_tensors(llama.config, llama.params, tmp_path / "new")


def test_a_directory_with_something_in_it_is_left_alone(tmp_path, llama):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="is there already; give a directory that is new or empty"):
        export_params(llama.config, llama.params, tmp_path, llama.config_json)
    with pytest.raises(UserError, match="is there already"):
        export_params(llama.config, llama.params, tmp_path / "notes", llama.config_json)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    export_params(llama.config, llama.params, tmp_path / "empty", llama.config_json)
    assert len(list((tmp_path / "empty").iterdir())) == 2


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with new_directory(tmp_path / "deep" / "new") as folder:
            (folder / "x").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list((tmp_path / "deep").iterdir()) == []
