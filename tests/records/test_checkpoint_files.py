"""What a checkpoint's folder can hold besides what it should: the right model, or one sentence before any work."""

import json
import math
import os

import pytest
import torch
from checkpoints import gpt2
from safetensors.torch import load_file, save_file

from albert_ablate import compose, run
from albert_ablate.cli import main
from albert_ablate.config import ConfigError
from albert_ablate.model.pretrained import load_pretrained

TOKENS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    return gpt2(tmp_path / "checkpoint")


def configured(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def in_shards(folder, pickled=False):
    """The weights in two files and an index; gives the index."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix, index = ("pytorch_model", "bin", "pytorch_model.bin.index.json") if pickled else (
        "model", "safetensors", "model.safetensors.index.json")  # fmt: skip
    names, where = sorted(whole), {}
    for part, own in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{part}-of-00002.{suffix}"
        held = {name: whole[name] for name in own}
        torch.save(held, folder / file) if pickled else save_file(held, folder / file)
        where |= dict.fromkeys(own, file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder / index


# --- the right logits ------------------------------------------------------------------------------------------------


def test_an_embedding_beside_another_head_is_not_tied(folder):
    weights = load_file(folder / "model.safetensors")
    head = torch.randn(256, 16, generator=torch.Generator().manual_seed(5))
    tied = load_pretrained(folder).eval()
    assert tied.tied
    save_file(weights | {"lm_head.weight": weights["wte.weight"].clone()}, folder / "model.safetensors")
    assert load_pretrained(folder).tied
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    untied = load_pretrained(folder).eval()
    assert not untied.tied and not compose(["model=pretrained", f"model.path={folder}"]).model.tied
    torch.testing.assert_close(untied(TOKENS), tied.features(TOKENS) @ head.T)
    torch.save(weights | {"lm_head.weight": head}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    torch.testing.assert_close(load_pretrained(folder).eval()(TOKENS), untied(TOKENS), rtol=0, atol=0)


def test_a_tied_matrix_may_stand_under_the_heads_name(folder):
    expected = load_pretrained(folder).eval()(TOKENS)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "wte.weight"} | {"lm_head.weight": weights["wte.weight"]},
              folder / "model.safetensors")  # fmt: skip
    torch.testing.assert_close(load_pretrained(folder).eval()(TOKENS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("pickled", [False, True])
def test_weights_in_parts_are_the_weights(folder, pickled):
    expected = load_pretrained(folder).eval()(TOKENS)
    in_shards(folder, pickled)
    torch.testing.assert_close(load_pretrained(folder).eval()(TOKENS), expected, rtol=0, atol=0)


def test_half_precision_is_read_as_the_numbers_it_holds(folder):
    weights = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    save_file({k: v.float() for k, v in weights.items()}, folder / "model.safetensors")
    expected = load_pretrained(folder).eval()(TOKENS)
    save_file(weights, folder / "model.safetensors")
    torch.testing.assert_close(load_pretrained(folder).eval()(TOKENS), expected, rtol=0, atol=0)


def test_fields_that_change_no_logit_are_passed_over(folder):
    expected = load_pretrained(folder).eval()(TOKENS)
    configured(
        folder, max_length=20, do_sample=True, temperature=0.7, top_k=50, num_beams=4, repetition_penalty=1.2,
        auto_map={"AutoModel": "x.Y"}, _commit_hash="abc", _attn_implementation_autoset=True, torch_dtype="bfloat16",
        pruned_heads={}, output_past=True, suppress_tokens=[1, 2], **{"transformers.js_config": {"dtype": "q4"}},
    )  # fmt: skip
    torch.testing.assert_close(load_pretrained(folder).eval()(TOKENS), expected, rtol=0, atol=0)


def test_an_embedding_keeps_rows_beyond_the_tokenizer(tmp_path):
    """OLMo 2 as published has 100,352 rows for 100,278 tokens. Its loss counts what the head gives for the others."""
    folder, runs = gpt2(tmp_path / "checkpoint", vocabulary=300), tmp_path / "runs"
    weights = load_file(folder / "model.safetensors")
    weights["wte.weight"][290] *= 30  # one of those ranks first now and then
    save_file(weights, folder / "model.safetensors")
    cfg = compose(
        ["model=pretrained", f"model.path={folder}", "data=markov", "data.length=20_000", "data.batch=4",
         "budget.tokens=1024", "evaluation.every=1024", "evaluation.tokens=256", "trainer.threads=1",
         "evaluation=calibration", "evaluation.calibration.tokens=256", f"paths.runs={runs}",
         f"paths.cache={tmp_path / 'cache'}"]
    )  # fmt: skip
    record = run(cfg)
    assert record["status"] in ("finished", "diverged") and math.isfinite(record["summary"]["val_loss"])
    assert load_pretrained(folder)(TOKENS).shape[-1] == 300
    assert main(["generate", record["folder"], "--prompt", "a", "--tokens", "40", "--seed", "1"]) == 0
    with pytest.raises(ConfigError, match="tokenizer=byte has 256 tokens and the checkpoint in .* only 200"):
        compose(["model=pretrained", f"model.path={gpt2(tmp_path / 'small', vocabulary=200)}"])


# --- one sentence ----------------------------------------------------------------------------------------------------


def replaced(path, content):
    path.write_bytes(content)


def cut(folder, name, share=0.5):
    file = folder / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["h.0.attn.c_attn.weight"], weights["wte.weight"]
    save_file(weights, folder / "model.safetensors")


def as_integers(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"wte.weight": weights["wte.weight"].to(torch.int8)}, folder / "model.safetensors")


def pickled(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def index_of(folder, content):
    in_shards(folder).write_text(content if isinstance(content, str) else json.dumps(content))


def missing_part(folder):
    in_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut_pickle(folder):
    pickled(folder, load_file(folder / "model.safetensors"))
    cut(folder, "pytorch_model.bin")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
WRONG = {
    "a part that is missing": (missing_part, "names model-00002-of-00002.safetensors, which is not there"),
    "a pointer": (lambda f: replaced(f / "model.safetensors", POINTER), "is a pointer of Git LFS"),
    "half a file": (lambda f: cut(f, "model.safetensors"), "is cut off or not a safetensors file"),
    "all but a byte": (lambda f: cut(f, "model.safetensors", 0.9999), "is cut off or not a safetensors file"),
    "an empty file": (lambda f: replaced(f / "model.safetensors", b""), "is cut off or not a safetensors file"),
    "zeros": (lambda f: replaced(f / "model.safetensors", bytes(1000)), "is cut off or not a safetensors file"),
    "a page": (lambda f: replaced(f / "model.safetensors", b"<!DOCTYPE html>" * 9), "is cut off or not a safetensors"),
    "half a pickle": (cut_pickle, "is cut off or not a file of weights"),
    "a pickle of a pointer": (lambda f: (pickled(f, {}), replaced(f / "pytorch_model.bin", POINTER)), "Git LFS"),
    "a pickle of a list": (lambda f: pickled(f, [torch.zeros(1)]), "must hold tensors by name"),
    "a pickle of nothing": (lambda f: pickled(f, {}), "do not fit its config.json: blocks.0.around_attention"),
    "weights that are missing": (without_a_weight, "blocks.0.attention.qkv.weight is absent instead of 48 x 16"),
    "weights of integers": (as_integers, "holds wte.weight as I8: weights must be one of F64, F32, F16, BF16"),
    "another width": (lambda f: configured(f, n_embd=32), "do not fit its config.json"),
    "more layers": (lambda f: configured(f, n_layer=3), "do not fit its config.json: blocks.2"),
    "another vocabulary": (lambda f: configured(f, vocab_size=257), "embedding.weight is 256 x 16 instead of 257 x 16"),
    "an index that is no JSON": (lambda f: index_of(f, '{"weight_map": '), "cannot be read as JSON"),
    "an index without a map": (lambda f: index_of(f, {"metadata": {}}), "has no weight_map"),
    "an index of numbers": (lambda f: index_of(f, {"weight_map": {"wte.weight": 1}}), "has no weight_map"),
    "an index that leaves its folder": (
        lambda f: index_of(f, {"weight_map": {"wte.weight": "../model.safetensors"}}), "not a file in its folder"
    ),
    "a list": (lambda f: replaced(f / "config.json", b"[1]"), "must hold an object, {...}, and holds a list"),
    "half a configuration": (lambda f: cut(f, "config.json"), "config.json cannot be read as JSON"),
    "no text": (lambda f: replaced(f / "config.json", b"\xff\xfe{}"), "config.json cannot be read as JSON"),
    "brackets": (lambda f: replaced(f / "config.json", b"[" * 100_000), "config.json cannot be read as JSON"),
    "no type": (lambda f: configured(f, model_type=["gpt2"]), "has model_type="),
    "a width in words": (lambda f: configured(f, n_embd="wide"), "has n_embd=wide: it must be a whole number from 1"),
    "no heads": (lambda f: configured(f, n_head=0), "has n_head=0: it must be a whole number from 1"),
    "three heads": (lambda f: configured(f, n_head=3), "a width of 16, which its 3 heads do not divide"),
    "half a layer": (lambda f: configured(f, n_layer=1.5), "has n_layer=1.5: it must be a whole number from 1"),
    "an eps of 0": (lambda f: configured(f, layer_norm_epsilon=0), "has layer_norm_epsilon=0: it must be a number"),
    "ties in words": (lambda f: configured(f, tie_word_embeddings="yes"), "tie_word_embeddings=yes: it must be true"),
    "an unknown field": (lambda f: configured(f, residual_multiplier=0.5), "residual_multiplier=0.5, which this model"),
    "pruned heads": (lambda f: configured(f, pruned_heads={"0": [1]}), "pruned_heads={'0': \\[1\\]}, which this model"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_is_one_sentence_before_a_run(name, folder):
    make, words = WRONG[name]
    make(folder)
    for act in (lambda: load_pretrained(folder), lambda: compose(["model=pretrained", f"model.path={folder}"])):
        with pytest.raises(ConfigError) as said:
            act()
        with pytest.raises(ConfigError, match=words):
            act()
        assert "\n" not in str(said.value) and str(said.value).endswith(".")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_weights_that_may_not_be_read_are_one_sentence(folder):
    (folder / "model.safetensors").chmod(0)
    with pytest.raises(ConfigError, match="model.safetensors cannot be read: Permission denied"):
        load_pretrained(folder)


def test_a_folder_in_place_of_a_file_is_one_sentence(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_pretrained(folder)
