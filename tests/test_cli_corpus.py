"""The text corpus: selection of files, the split, and errors without readable text."""

import dataclasses
import hashlib
import os
import struct
import sys

import pytest
import torch

from fxtrain.cli._corpus import LARGEST, SHARE, CorpusError, check_fits, read_corpus


def text_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.tolist())


@pytest.fixture
def folder(tmp_path):
    """A tree with 100 text files of 10 lines, and with files that are not text."""
    for i in range(100):
        path = tmp_path / f"part{i % 3}" / f"file{i:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"line of file {i:02}\n" * 10)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_text("no")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_folder_is_read_in_order_and_split_by_file(folder):
    corpus = read_corpus(str(folder))
    assert len(corpus.names) == 100
    assert list(corpus.names) == sorted(corpus.names)
    assert corpus.names[0] == "part0/file00.txt"
    assert set(corpus.sizes) == {160}
    assert corpus.train.dtype == corpus.validation.dtype == torch.uint8
    train, validation = text_of(corpus.train), text_of(corpus.validation)
    assert len(validation) == 5 * 160
    for i in range(100):
        line = f"line of file {i:02}\n".encode() * 10
        assert (line in train) != (line in validation)
    assert (
        corpus.description
        == f"{folder}, 100 files, 16000 bytes, of which validation has 800 bytes: 5 files selected by their paths"
    )


def test_split_depends_only_on_relative_paths(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    folder.rename(elsewhere)
    (elsewhere / "again").mkdir()
    (elsewhere / "again").rmdir()
    moved = read_corpus(str(elsewhere))
    elsewhere.rename(folder)
    corpus = read_corpus(str(folder))
    assert moved.digest == corpus.digest
    assert torch.equal(moved.validation, corpus.validation)


def test_new_file_keeps_most_of_split(folder):
    before = text_of(read_corpus(str(folder)).validation).splitlines()
    (folder / "part0" / "new.txt").write_text("line of file xx\n" * 10)
    after = text_of(read_corpus(str(folder)).validation).splitlines()
    assert len(set(before) & set(after)) >= 4


def test_digest_covers_both_parts(folder):
    corpus = read_corpus(str(folder))
    parts = (
        struct.pack("<QQ", len(corpus.train), len(corpus.validation)),
        text_of(corpus.train),
        text_of(corpus.validation),
    )
    assert corpus.digest == hashlib.sha256(b"".join(parts)).hexdigest()
    (folder / "part0" / "file00.txt").write_text("line of file 0?\n" * 10)
    assert read_corpus(str(folder)).digest != corpus.digest


@pytest.mark.parametrize("text", [b"A line of text.\n" * 500, b"no line ends " * 600, b"x"])
def test_single_file_is_split_by_position(tmp_path, text):
    (tmp_path / "one.txt").write_bytes(text)
    corpus = read_corpus(str(tmp_path / "one.txt"))
    assert corpus.names == ("one.txt",)
    assert corpus.sizes == (len(text),)
    train, validation = text_of(corpus.train), text_of(corpus.validation)
    assert train + validation == text
    assert len(validation) <= 2 * SHARE * len(text)
    if b"\n" in text:
        assert train.endswith(b"\n")
        assert len(validation) >= SHARE * len(text)
    assert corpus.description.endswith(": the end of the file")


def test_few_large_files_are_split_by_position(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(f"{name}\n" * 1000)
    corpus = read_corpus(str(tmp_path))
    assert text_of(corpus.validation) == b"".join(f"{name}\n".encode() * 50 for name in "abc")
    assert corpus.description.endswith(": the end of each file")


def test_large_file_stays_in_training(tmp_path):
    (tmp_path / "large").write_text("large\n" * 1000)
    for i in range(100):
        (tmp_path / f"small{i}").write_text("small\n" * 20)
    validation = text_of(read_corpus(str(tmp_path)).validation)
    assert b"large" not in validation
    assert SHARE <= len(validation) / (6 * 3000) <= 1.5 * SHARE


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "deep/c.txt"]),
        ("deep/[cd].*", ["c.txt", "d.md"]),
        ("**/**/c*", ["deep/c.txt"]),
    ],
)
def test_glob_selects_matching_files(tmp_path, pattern, wanted):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep.txt").mkdir()
    for name in ("a.txt", "b.txt", "deep/c.txt", "deep/d.md"):
        (tmp_path / name).write_text("text\n")
    corpus = read_corpus(str(tmp_path / pattern))
    assert list(corpus.names) == wanted


def test_existing_path_is_not_a_glob(tmp_path):
    (tmp_path / "what[1].txt").write_text("text\n")
    assert read_corpus(str(tmp_path / "what[1].txt")).names == ("what[1].txt",)


def test_latin_1_is_text(tmp_path):
    (tmp_path / "old.txt").write_bytes("café\n".encode("latin-1"))
    assert len(read_corpus(str(tmp_path / "old.txt")).names) == 1


def test_default_corpus_is_standard_library():
    corpus = read_corpus()
    assert corpus.description.startswith("the Python 3.")
    assert len(corpus.names) > 300
    assert {"ast.py", "json/decoder.py"} <= set(corpus.names)
    folders = {part for name in corpus.names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    assert all(name.endswith(".py") for name in corpus.names)
    assert 0.05 <= len(corpus.validation) / sum(corpus.sizes) <= 0.075
    assert len(corpus.train) + len(corpus.validation) == sum(corpus.sizes)
    assert read_corpus().digest == corpus.digest
    check_fits(corpus, batch_size=16, length=128)


def make_nothing(path):
    pass


def make_empty_file(path):
    path.write_text("")


def make_binary(path):
    path.write_bytes(b"GIF\0")


def make_empty_folder(path):
    path.mkdir()


def make_folder_of_binaries(path):
    path.mkdir()
    (path / "a").write_bytes(b"\0")
    (path / "b").write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (
            make_nothing,
            "expected a file, a folder, a glob or the name of a data set (stdlib, sklearn, wikitext or datasets:NAME), "
            "got '{path}', which does not exist. Check the path or the name.",
        ),
        (make_empty_file, "expected a file of text, got {path}, which is empty or binary. Give another file."),
        (make_binary, "expected a file of text, got {path}, which is empty or binary. Give another file."),
        (make_empty_folder, "expected files of text in {path}, got no files. Give a file, a folder or a glob of text."),
        (
            make_folder_of_binaries,
            "expected files of text in {path}, got 2 files that cannot be read or used as text. Give a file, a folder "
            "or a glob of text.",
        ),
        (os.mkfifo, "expected a file or a folder, got {path}, which is neither. Copy its content to a file first."),
    ],
)
def test_missing_text_is_reported(tmp_path, make, wanted):
    path = tmp_path / "given"
    make(path)
    with pytest.raises(CorpusError) as caught:
        read_corpus(str(path))
    assert str(caught.value) == wanted.format(path=path)


@pytest.mark.parametrize("text", ["", "a" * 5000, "a\0b", "~nobody-of-this-name/text"])
def test_invalid_path_is_reported_as_missing(text):
    with pytest.raises(CorpusError, match=r"^expected a file, .*, got '.*', which does not exist\. "):
        read_corpus(text)


def test_unmatched_glob_is_reported(tmp_path):
    with pytest.raises(CorpusError) as caught:
        read_corpus(f"{tmp_path}/*.txt")
    assert str(caught.value) == (
        f"expected a pattern that matches a file, got '{tmp_path}/*.txt'. Check it, and quote it in the shell."
    )


def test_unreadable_file_is_reported(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("text\n")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)  # root can read any file
    with pytest.raises(CorpusError) as caught:
        read_corpus(str(path))
    assert str(caught.value) == f"expected a readable file, got {path} (Permission denied). Give another one."
    with pytest.raises(CorpusError, match="got 1 file that cannot be read or used as text"):
        read_corpus(str(tmp_path))


def test_missing_standard_library_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(
        CorpusError, match=r"^expected the files of the Python 3\.\d+ standard library on this machine, got none\. "
    ):
        read_corpus()


def test_oversized_text_is_reported(tmp_path, monkeypatch):
    assert LARGEST == 2**30
    monkeypatch.setattr("fxtrain.cli._corpus.LARGEST", 150_000)
    for name in "ab":
        (tmp_path / name).write_text("text\n" * 20_000)
    with pytest.raises(CorpusError, match=r"^expected at most 0\.1 MB of text, got more\. Give a part of it\.$"):
        read_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "validation", "wanted"),
    [
        (
            64,
            9,
            "expected at least 65 bytes of training text, for one batch of 8 sequences of 8, got 64. "
            "Give more text, or reduce the batch size or the length.",
        ),
        (
            65,
            8,
            "expected at least 9 bytes of validation text, for one sequence of 8, got 8. "
            "Give more text, or reduce the length.",
        ),
        (65, 9, None),
    ],
)
def test_short_text_is_reported(tmp_path, train, validation, wanted):
    (tmp_path / "one.txt").write_text("text\n")
    corpus = dataclasses.replace(
        read_corpus(str(tmp_path)),
        train=torch.zeros(train, dtype=torch.uint8),
        validation=torch.zeros(validation, dtype=torch.uint8),
    )
    if wanted is None:
        check_fits(corpus, batch_size=8, length=8)
    else:
        with pytest.raises(CorpusError) as caught:
            check_fits(corpus, batch_size=8, length=8)
        assert str(caught.value) == wanted


ROWS = ["", " = Title = \n", "", " A sentence . \n", " Another one , without a line end ."]


@pytest.fixture
def wikitext(tmp_path, monkeypatch):
    """A folder in the layout of WikiText's, which ``datasets`` prefers to a download."""
    pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = tmp_path / "Salesforce" / "wikitext"
    configurations = []
    for name in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        (root / name).mkdir(parents=True)
        files = ""
        for split, rows in (("test", ["test"]), ("train", ROWS * 100), ("validation", ROWS)):
            mark = [name] if split == "train" else []
            parquet.write_table(arrow.table({"text": mark + rows}), root / name / f"{split}-00000-of-00001.parquet")
            files += f"  - split: {split}\n    path: {name}/{split}-*\n"
        configurations.append(f"- config_name: {name}\n  data_files:\n{files}")
    (root / "README.md").write_text("---\nconfigs:\n" + "".join(configurations) + "---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return root


@pytest.mark.parametrize(
    ("dataset", "configuration"),
    [
        ("wikitext", "wikitext-2-raw-v1"),
        ("wikitext:wikitext-103-raw-v1", "wikitext-103-raw-v1"),
        ("datasets:Salesforce/wikitext:wikitext-103-raw-v1", "wikitext-103-raw-v1"),
    ],
)
def test_wikitext_is_read_with_its_splits(wikitext, dataset, configuration):
    corpus = read_corpus(dataset)
    page = b"\n = Title = \n\n A sentence . \n Another one , without a line end .\n"
    assert text_of(corpus.train) == configuration.encode() + b"\n" + page * 100
    assert text_of(corpus.validation) == page
    assert corpus.names == ("train", "validation")
    assert corpus.sizes == (len(corpus.train), len(corpus.validation))
    assert corpus.description.startswith(f"Salesforce/wikitext ({configuration}), ")
    assert corpus.description.endswith(f"validation has {len(page)} bytes: its validation split")


def test_data_set_without_validation_is_cut_near_its_end(wikitext):
    (wikitext / "README.md").unlink()
    for path in [*wikitext.rglob("validation-*"), *wikitext.rglob("test-*")]:
        path.unlink()
    corpus = read_corpus(f"datasets:{wikitext}")
    assert corpus.names == ("train",)
    assert corpus.description.endswith("the end of its training split")
    assert len(corpus.train) + len(corpus.validation) == corpus.sizes[0]
    assert 0.85 < len(corpus.train) / corpus.sizes[0] < 0.96
    assert text_of(corpus.train).endswith(b"\n")


def test_unreadable_data_set_is_reported(wikitext):
    with pytest.raises(CorpusError, match=r"expected a data set that .* reads, got Salesforce/wikitext \(wikitext-3\)"):
        read_corpus("wikitext:wikitext-3")


def test_data_set_without_text_is_reported(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.csv").write_text("a,b\n1,2\n" * 20)
    with pytest.raises(CorpusError, match=r"expected a data set with a column of strings named text, .* columns a, b"):
        read_corpus(f"datasets:{tmp_path}")


def test_missing_package_for_data_sets_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"expected the package datasets to read Salesforce/wikitext .* pip install"):
        read_corpus("wikitext")


def test_descriptions_of_scikit_learn_are_read():
    corpus = read_corpus("sklearn")
    assert "iris.rst" in corpus.names
    assert b"Fisher" in text_of(corpus.train) + text_of(corpus.validation)
    assert corpus.description.startswith("scikit-learn's descriptions of data sets, ")


def test_name_of_standard_library_is_the_default():
    assert read_corpus("stdlib").digest == read_corpus().digest
