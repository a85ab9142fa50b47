"""Pairs of paragraphs of pages in two languages."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmx.data.builders.aligned_pages import paragraphs
from lmx.data.config import AlignedPages, DataConfig, TrainedBpe
from lmx.data.prepare import prepare
from lmx.errors import UserError

SWITCH = '<span class="switchinline"><span hidden="true" class="MAC">Command</span><span hidden="true" id="default1">'


def page(*texts: str) -> str:
    found = "".join(f'<p id="par_id{i}" class="paragraph">{text}</p>' for i, text in enumerate(texts))
    return f'<html><p id="other">menu</p><h1 id="hd_id7"><a name="x"></a>Title\n</h1>{found}</html>'


def test_paragraphs_are_what_a_reader_sees(tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    file.write_text(page(f"Press {SWITCH}Ctrl</span></span>+F10<br>or  <b>go</b> &amp; see", "<img src='x'>", "two"))
    assert paragraphs(str(file)) == {"hd_id7": "Title", "par_id0": "Press Ctrl+F10 or go & see", "par_id2": "two"}


@pytest.fixture
def source(tmp_path: Path) -> AlignedPages:
    """40 pages: a paragraph of its own, one that all share, one that is the same in both, one without a pair."""
    for language in ("en", "de"):
        (tmp_path / language / "guide").mkdir(parents=True)
        for i in range(40):
            own = [f"{language} number {i}", f"{language} everywhere", "LibreOffice", *(["only"] * (language == "en"))]
            (tmp_path / language / "guide" / f"{i:02d}.html").write_text(page(*own), encoding="utf-8")
    (tmp_path / "en" / "alone.html").write_text(page("nobody translated this"))
    return AlignedPages(directory=str(tmp_path / "en"), target_directory=str(tmp_path / "de"))


def test_whole_pages_are_held_out_without_what_other_pages_say_too(source: AlignedPages) -> None:
    data = DataConfig(sources=(source,), tokenizer=TrainedBpe(vocab_size=300), held_out=0.25)
    (found,) = prepare(data, progress=False).sources
    documents = found.documents
    texts = list(documents.texts(range(len(documents))))
    targets = list(documents.targets.texts(range(len(documents)))) if documents.targets else []
    assert len(texts) == 80
    assert documents.dropped == 40 * 3  # the titles, too, are the same in both
    assert all(target == text.replace("en", "de") for text, target in zip(texts, targets, strict=True))
    pages = np.array([documents.document_name(i).split("#")[0] for i in range(80)])
    everywhere = np.array([text == "en everywhere" for text in texts])
    assert 0 < found.held_out.sum() < 40
    assert not found.held_out[everywhere].any()
    assert not set(pages[found.held_out & ~everywhere]) & set(pages[~found.held_out & ~everywhere])


def test_a_missing_directory_is_one_sentence(source: AlignedPages, tmp_path: Path) -> None:
    missing = replace(source, target_directory=str(tmp_path / "fr"))
    with pytest.raises(UserError, match=r"target_directory of AlignedPages is '.*fr', which is no directory"):
        prepare(DataConfig(sources=(missing,)), progress=False)
    with pytest.raises(UserError, match=r"no \.html file of the same name"):
        prepare(DataConfig(sources=(replace(source, directory=str(tmp_path / "de" / "guide")),)), progress=False)


def test_nothing_is_left_behind_where_temporary_files_go(
    source: AlignedPages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    prepare(DataConfig(sources=(source,), tokenizer=TrainedBpe(300), cache_dir=str(tmp_path / "c")), progress=False)
    assert not list((tmp_path / "temporary").iterdir())
