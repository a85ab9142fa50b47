import base64
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data.config import AlignedFiles, DataConfig, TokenizerFile
from lmx.data.prepare import prepare
from lmx.data.tokenizer import SPLIT, TextStream, TextTokenizer, load_tokenizer, open_tokenizer, train_bpe
from lmx.errors import UserError
from lmx.eval.asking import AskEncoderDecoder

TEXTS = [
    "the cat sat on the mat, the cat ate\n\n    return x == 12345",
    "日本語 café 🎉🎉 naïve\r\n\tend",
    "<|endoftext|> is text",
    "",
]


@pytest.fixture(scope="module")
def bpe() -> TextTokenizer:
    return train_bpe(iter(TEXTS * 20), 320)


def sentencepiece_model(directory: Path, texts: Sequence[str] = TEXTS) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts] * 20),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "own.model").write_bytes(model.getvalue())
    return directory / "own.model"


def tiktoken_file(file: Path, pieces: Iterable[bytes] = (b"th", b"the", b" the", b"at")) -> Path:
    pytest.importorskip("tiktoken")
    ranks = enumerate([*(bytes([i]) for i in range(256)), *pieces])
    file.write_bytes(b"".join(base64.b64encode(piece) + f" {rank}\n".encode() for rank, piece in ranks))
    return file


OWN_TIKTOKEN = {"pattern": SPLIT, "special_tokens": (("<|endoftext|>", 261), ("<|start|>", 262))}


@pytest.fixture(params=["bpe", "sentencepiece", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, bpe: TextTokenizer) -> TextTokenizer:
    if request.param == "bpe":
        return bpe
    if request.param == "sentencepiece":
        return open_tokenizer(TokenizerFile(path=str(sentencepiece_model(tmp_path))))
    return open_tokenizer(TokenizerFile(path=str(tiktoken_file(tmp_path / "own.tiktoken")), **OWN_TIKTOKEN))


def test_text_survives_and_bytes_add_up(tokenizer: TextTokenizer) -> None:
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids
        assert tokenizer.end_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        # SentencePiece writes a space before the first word.
        extra = int(tokenizer.token_bytes()[ids].sum()) - len(text.encode()) if ids else 0
        assert extra == (1 if type(tokenizer).__name__.startswith("Sentence") and ids else 0)
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes().dtype == np.int32
    assert tokenizer.token_bytes()[tokenizer.end_id] == 0
    unknown = [tokenizer.end_id, tokenizer.vocab_size, tokenizer.vocab_size + 100]
    assert tokenizer.decode([*tokenizer.encode("cat"), *unknown]) == "cat"


def test_a_directory_carries_a_tokenizer(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.end_id, loaded.vocab_size) == (tokenizer.end_id, tokenizer.vocab_size)
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


@pytest.mark.parametrize(
    ("ranks", "end", "others", "digits", "start"),
    [
        (128000, 128001, {"<|begin_of_text|>": 128000, "<|eot_id|>": 128009}, 1, 128000),
        (151643, 151643, {"<|im_start|>": 151644, "<|im_end|>": 151645, "<|extra_204|>": 151850}, 3, None),
    ],
    ids=["Llama 3", "Qwen"],
)
def test_published_tiktoken_files_are_known_by_their_ranks(
    ranks: int, end: int, others: dict[str, int], digits: int, start: int | None, tmp_path: Path
) -> None:
    """Whatever their name is. Llama 3 takes up to three digits together, Qwen each alone."""
    pieces = itertools.product(range(256), repeat=3)
    several = [b"123", *itertools.islice(map(bytes, pieces), ranks - 257)]
    file = tiktoken_file(tmp_path / "tokenizer.model", several)
    tokenizer = open_tokenizer(TokenizerFile(path=str(file)))
    assert tokenizer.end_id == end
    assert {name: tokenizer.token_id(name) for name in others} == others
    assert tokenizer.start_id == start
    assert len(tokenizer.encode("123")) == digits
    turn = [*others][1]
    assert open_tokenizer(TokenizerFile(path=str(file), end_token=turn)).end_id == others[turn]
    with pytest.raises(UserError, match="has no token '</s>'; its special tokens are"):
        open_tokenizer(TokenizerFile(path=str(file), end_token="</s>"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"260 ranks, which is none of .*Llama 3 \(128,000\), Qwen .*: set pattern and special_tokens of Tok"),
        ({"pattern": SPLIT}, "set special_tokens of TokenizerFile"),
        ({"pattern": SPLIT, "special_tokens": (("<stop>", 300),)}, r"has no token '<\|endoftext\|>'.* are <stop>"),
    ],
)
def test_other_tiktoken_files_need_a_pattern_and_special_tokens(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tiktoken_file(tmp_path / "cl100k_base.tiktoken")
    with pytest.raises(UserError, match=message):
        open_tokenizer(TokenizerFile(path=str(file), **given))


def test_what_a_tokenizer_says_itself_is_not_said_again(bpe: TextTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json is no tiktoken file and has its own pattern"):
        open_tokenizer(TokenizerFile(path=str(tmp_path), pattern=SPLIT))


def test_a_stream_gives_whole_characters_only(tokenizer: TextTokenizer) -> None:
    for text in TEXTS:
        stream = TextStream(tokenizer)
        pushed = [stream.push(i) for i in tokenizer.encode(text)]
        assert "".join(pushed) == text
        assert not any("\ufffd" in part for part in pushed)
        assert stream.flush() == ""


def test_a_stream_flushes_an_unfinished_character(bpe: TextTokenizer) -> None:
    stream = TextStream(bpe)
    first = train_bpe(iter([""]), 257).encode("é")[0]
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"


@given(st.text())
def test_any_text_survives_a_byte_level_bpe(bpe: TextTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    stream = TextStream(bpe)
    assert bpe.decode(ids) == text
    assert "".join(stream.push(i) for i in ids) + stream.flush() == text
    assert bpe.token_bytes()[ids].sum() == len(text.encode())


def test_training_is_repeatable() -> None:
    assert train_bpe(iter(TEXTS * 20), 320).fingerprint == train_bpe(iter(TEXTS * 20), 320).fingerprint


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="vocab_size is 100, expected at least 257"):
        train_bpe(iter(TEXTS), 100)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "there is no tokenizer file"),
        ("bad.json", "{]", "is not a tokenizer that can be read"),
        ("bad.model", "not a model", "is not a tokenizer that can be read"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if name.endswith(".model"):
        pytest.importorskip("sentencepiece")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        open_tokenizer(TokenizerFile(path=str(tmp_path / name)))


def test_an_unknown_end_token_is_refused(bpe: TextTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    with pytest.raises(UserError, match=r"no token '</end>'; its special tokens are <\|endoftext\|>"):
        open_tokenizer(TokenizerFile(path=str(tmp_path / "tokenizer.json"), end_token="</end>"))


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    (tmp_path / "own.model").write_bytes(b"\x0a\x0b")
    with pytest.raises(UserError, match=r"pip install 'lmx\[sentencepiece\]'"):
        open_tokenizer(TokenizerFile(path=str(tmp_path / "own.model")))


def test_prompts_take_special_tokens_and_documents_do_not(bpe: TextTokenizer) -> None:
    end = bpe.end_id
    assert bpe.encode_prompts(["the<|endoftext|>cat"])[0].ids == [*bpe.encode("the"), end, *bpe.encode("cat")]
    assert end not in bpe.encode("the<|endoftext|>cat")
    assert bpe.start_id is None


@pytest.mark.parametrize("before", [True, False])
def test_an_end_token_around_prompts_survives_saving(tokenizer: TextTokenizer, tmp_path: Path, before: bool) -> None:
    around = tokenizer.with_end_token(before=before)
    around.save(tmp_path / "saved")
    text, end = tokenizer.encode("the cat"), tokenizer.end_id
    wanted = [end, *text] if before else [*text, end]
    for own in (around, load_tokenizer(tmp_path / "saved")):
        assert own.encode_prompts(["the cat"])[0].ids == wanted
        assert own.encode_prompts(["the cat"], around=False)[0].ids == text
        assert own.encode("the cat") == text
        assert own.start_id == (end if before else None)


def test_settings_say_what_is_around_prompts(bpe: TextTokenizer, tmp_path: Path) -> None:
    """As in transformers: add_bos_token and add_eos_token go before the file's own post-processor."""
    bpe.save(tmp_path)
    end, ids = bpe.end_id, bpe.encode("cat")
    settings = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|endoftext|>"}
    for more, wanted in (({}, ids), ({"add_bos_token": True, "add_eos_token": True}, [end, *ids, end])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **more}))
        assert load_tokenizer(tmp_path).encode_prompts(["cat"])[0].ids == wanted
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    given = open_tokenizer(TokenizerFile(path=str(tmp_path), end_token="<|endoftext|>"))
    given.save(tmp_path / "run")
    assert given.special_tokens == load_tokenizer(tmp_path / "run").special_tokens == {"eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_tokenizer(tmp_path)


def test_older_files_are_read(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    bert = load_tokenizer(tmp_path)
    assert bert.encode_prompts([("The cats", "[MASK]"), "x"]) == [
        ([2, 5, 6, 7, 3, 4, 3], [0, 0, 0, 0, 0, 1, 1]),
        ([2, 1, 3], [0, 0, 0]),
    ]
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({"<s>": 0, "</s>": 1, "c": 2, "a": 3, "ca": 4, "t": 5}))
    with pytest.raises(UserError, match=r"needs a merges\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\n")
    roberta = load_tokenizer(tmp_path)
    assert roberta.encode_prompts(["cat", ("cat", "a")]) == [
        ([0, 4, 5, 1], [0] * 4),
        ([0, 4, 5, 1, 1, 3, 1], [0] * 7),
    ]


def test_sentencepiece_prompts_by_the_files_name(tmp_path: Path) -> None:
    """T5's spiece.model ends texts and has extra tokens; Llama's tokenizer.model begins them."""
    file = sentencepiece_model(tmp_path)
    file.rename(tmp_path / "spiece.model")
    t5 = load_tokenizer(tmp_path)
    text = t5.encode("the cat")
    assert t5.encode_prompts(["the cat<extra_id_0>"])[0].ids == [*text, t5.vocab_size - 1, t5.end_id]
    assert t5.vocab_size == t5.token_bytes().size
    assert t5.decode([*text, t5.vocab_size - 1]) == "the cat"
    (tmp_path / "spiece.model").rename(tmp_path / "tokenizer.model")
    llama = load_tokenizer(tmp_path)
    assert llama.encode_prompts(["the cat"])[0].ids == [llama.token_id("<s>"), *text]
    assert llama.encode_prompts(["</s>"])[0].ids == [llama.start_id, llama.end_id]
    assert llama.vocab_size == t5.vocab_size - 100
    with pytest.raises(UserError, match="reads single texts"):
        llama.encode_prompts([("a", "b")])


def test_marian_reads_one_language_and_writes_another(tmp_path: Path) -> None:
    file = sentencepiece_model(tmp_path)
    pieces = __import__("sentencepiece").SentencePieceProcessor(model_proto=file.read_bytes())
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    ids = {"</s>": 0, "<unk>": 1, ">>fra<<": 2} | {p: i for i, p in enumerate(names[3:], 3)}
    (tmp_path / "source.spm").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"lacks target.spm, vocab.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "target.spm").write_bytes(file.read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps({**ids, "<pad>": len(ids)}))
    marian = load_tokenizer(tmp_path)
    text = pieces.encode("the cat")
    assert marian.encode("the cat") == text  # where both give the same numbers
    assert marian.encode_prompts([">>fra<<the cat"])[0].ids == [2, *text, 0]
    assert marian.decode([len(ids), *text, 0]) == "the cat"
    marian.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == marian.fingerprint


def test_marian_learns_and_scores_targets_in_their_own_language(tmp_path: Path) -> None:
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor
    texts = {"source": TEXTS, "target": ["le chat et la chatte sont chez le chef"]}
    models = {}
    for name, own in texts.items():
        models[name] = processor(
            model_proto=sentencepiece_model(tmp_path, own).rename(tmp_path / f"{name}.spm").read_bytes()
        )
    pieces = {m.id_to_piece(i) for m in models.values() for i in range(3, m.get_piece_size())}
    ids = {piece: i for i, piece in enumerate(["</s>", "<unk>", *sorted(pieces), "<pad>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    marian, written = load_tokenizer(tmp_path), "le chat chez le chef"
    wanted = [ids[piece] for piece in models["target"].encode(written, out_type=str)]
    assert marian.of_targets.encode(written) == wanted != marian.encode(written)
    assert marian.of_targets.decode(wanted) == marian.decode(wanted) == written

    for name, line in (("a", "the cat"), ("b", written)):
        (tmp_path / f"{name}.txt").write_text(f"{line}\n" * 3)
    source = AlignedFiles(files=(str(tmp_path / "a.txt"),), target_files=(str(tmp_path / "b.txt"),))
    given = DataConfig((source,), TokenizerFile(path=str(tmp_path)), held_out=0.0, cache_dir=str(tmp_path / "cache"))
    prepared = prepare(given, progress=False).sources[0]
    assert prepared.targets is not None
    assert prepared.targets.values(0).tolist() == wanted
    assert prepared.tokens.values(0).tolist() == marian.encode("the cat")
    assert AskEncoderDecoder(marian, 64, 0, marian.encode).pair("the cat", written).target == tuple(wanted)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
