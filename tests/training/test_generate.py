"""Sampling against distributions worked out by hand and transformers'; `albert-ablate generate` as a person uses it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forking import nano, train, write_text

from albert_ablate.cli import main
from albert_ablate.config import ConfigError
from albert_ablate.data.tokenizers import BytePairs, Bytes
from albert_ablate.model.sampling import draw, tempered, top_k, top_p
from albert_ablate.training.generate import continuation, load_kept, pieces

LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()


def probabilities(logits):
    return logits.double().softmax(-1).tolist()


def test_temperature_raises_probabilities_to_its_inverse():
    squares = [p**2 for p in (0.1, 0.5, 0.15, 0.25)]
    assert probabilities(tempered(LOGITS, 0.5)) == pytest.approx([s / sum(squares) for s in squares])
    assert probabilities(tempered(LOGITS, 0)) == [0, 1, 0, 0]
    assert probabilities(tempered(torch.zeros(3), 0)) == [1, 0, 0]  # the first of equals


def test_top_k_renormalizes_the_k_likeliest():
    assert probabilities(top_k(LOGITS, 2)) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert probabilities(top_k(LOGITS, 9)) == pytest.approx([0.1, 0.5, 0.15, 0.25])


@pytest.mark.parametrize(
    ("p", "kept"), [(1e-9, 1), (0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (0.899, 3), (0.901, 4), (1.0, 4)]
)
def test_the_nucleus_is_the_smallest_set_that_reaches_p(p, kept):
    assert int(top_p(LOGITS, p).isfinite().sum()) == kept
    order = [1, 3, 2, 0][:kept]
    total = sum([0.1, 0.5, 0.15, 0.25][i] for i in order)
    expected = [x / total if i in order else 0 for i, x in enumerate((0.1, 0.5, 0.15, 0.25))]
    assert probabilities(top_p(LOGITS, p)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("p", "kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_a_set_that_sums_to_just_p_is_enough(p, kept):  # quarters are exact
    assert top_p(torch.zeros(4), p).isfinite().tolist() == [i < kept for i in range(4)]


@pytest.mark.parametrize("seed", range(5))
def test_filters_agree_with_transformers(seed):
    lp = pytest.importorskip("transformers.generation.logits_process", reason="pip install transformers")
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    for k in (1, 7, 50):
        torch.testing.assert_close(top_k(logits, k), lp.TopKLogitsWarper(k)(None, logits))
    for p in (0.1, 0.5, 0.9, 0.99):
        torch.testing.assert_close(top_p(logits, p), lp.TopPLogitsWarper(p)(None, logits))
    torch.testing.assert_close(tempered(logits, 0.7), lp.TemperatureLogitsWarper(0.7)(None, logits))


def test_draws_follow_the_running_sum():
    found = [draw(LOGITS, u) for u in (0.0, 0.0999, 0.1001, 0.5999, 0.6001, 0.7499, 0.7501, 0.999999)]
    assert found == [0, 0, 1, 1, 2, 2, 3, 3]
    ruled_out = torch.tensor([-math.inf, 0.0, -math.inf])
    assert {draw(ruled_out, u) for u in (0.0, 0.5, 1 - 2**-53)} == {1}


@pytest.mark.parametrize("text", ["né à l’été, 東京 🙂!", "plain"])
def test_characters_appear_when_they_are_whole(text):
    codec = Bytes()
    tokens = list(codec.encode(text))
    found = list(pieces(codec, [], tokens[0], iter(tokens[1:])))
    assert "".join(found) == text and len(found) == len(text)
    cut = [*codec.encode("a🙂")[:3]]  # ends within a character
    assert list(pieces(codec, [], cut[0], iter(cut[1:]))) == ["a", "\ufffd"]


def test_characters_of_byte_pairs_appear_when_they_are_whole():
    codec = BytePairs(260).fit(["ab ab ab ab"])
    tokens = list(codec.encode("ab é🙂b"))
    assert "".join(pieces(codec, [], tokens[0], iter(tokens[1:]))) == "ab é🙂b"


# --- from a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_text(folder / "text.txt", 20_000)
    return folder


@pytest.fixture(scope="module")
def run(place) -> Path:
    return Path(train(nano(place / "text.txt", place / "runs", "budget.tokens=1024", "optimizer.lr=0.02"))["folder"])


def text_of(run, **more):
    return "".join(continuation(run, **{"prompt": "the", "tokens": 40, **more}))


@pytest.mark.process
def test_the_seed_and_nothing_else_decides(run):
    assert text_of(run) == text_of(run) and text_of(run) != text_of(run, seed=1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert text_of(run).startswith("the") and torch.equal(before, torch.get_rng_state())
    assert text_of(run, temperature=1.0, top_k=256, top_p=1.0) == text_of(run)


@pytest.mark.process
def test_greedy_takes_the_likeliest_of_a_window_that_slides(run):
    _, model = load_kept(run, "best")
    seen = list(b"the")
    for _ in range(40):  # beyond the context of 32
        seen.append(int(model(torch.tensor([seen[-32:]]))[0, -1].argmax()))
    assert text_of(run, temperature=0) == bytes(seen).decode(errors="replace")
    assert text_of(run, top_k=1, seed=3) == text_of(run, temperature=0)


@pytest.mark.process
def test_the_command_prints_the_text(run, capsys):
    arguments = ["generate", str(run), "--tokens", "20", "--seed", "4"]
    assert main([*arguments, "--prompt", "the"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("the") and said.endswith("\n") and all(c.isprintable() or c in "\n\t" for c in said)
    assert main(arguments) == 0  # no prompt: as after the end of a document
    assert capsys.readouterr().out


@pytest.mark.process
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--temperature", "0", "--top-k", "3"], "--top-k and --top-p would do nothing"),
        (["--temperature", "inf"], "must be a number"),
        (["--temperature", "nan"], "greater than or equal to 0"),
        (["--top-p", "0"], "--top-p 0 is not allowed"),
        (["--tokens", "0"], "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(run, more, sentence, capsys):
    assert main(["generate", str(run), *more]) == 2
    found = capsys.readouterr()
    assert sentence in found.err and len(found.err.splitlines()) == 1 and not found.out


@pytest.mark.process
def test_runs_that_cannot_write_are_refused(run, tmp_path, capsys):
    import shutil

    assert main(["generate", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    copy = shutil.copytree(run, tmp_path / "copy")
    weights = torch.load(copy / "checkpoints" / "last.ckpt", weights_only=True)
    weights["state_dict"]["head.weight"].fill_(math.nan)
    torch.save(weights, copy / "checkpoints" / "last.ckpt")
    assert main(["generate", str(copy), "--weights", "last", "--prompt", "a"]) == 2
    found = capsys.readouterr()
    assert "not finite" in found.err and not found.out
    (copy / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="last.ckpt cannot be read"):
        list(continuation(copy, weights="last"))
    (copy / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(ConfigError, match="last.ckpt is missing"):
        list(continuation(copy, weights="last"))
    record = json.loads((copy / "record.json").read_text())
    (copy / "record.json").write_text(json.dumps({**record, "status": "stopped"}))
    with pytest.raises(ConfigError, match="is stopped, not finished"):
        list(continuation(copy))


@pytest.mark.process
@pytest.mark.slow
def test_byte_pairs_go_on_too_and_nothing_imports_lightning(place):
    cfg = nano(place / "text.txt", place / "runs", "tokenizer=bpe", "tokenizer.vocabulary=300", "budget.tokens=1024")
    folder = train(cfg)["folder"]
    code = "import sys; from pathlib import Path; from albert_ablate.training.generate import continuation\n"
    code += f"text = ''.join(continuation(Path({folder!r}), 'the', 30)); assert text.startswith('the'), text\n"
    code += "assert not {'pytorch_lightning', 'sklearn', 'wandb'} & set(sys.modules); print(len(text))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 10, done.stderr
