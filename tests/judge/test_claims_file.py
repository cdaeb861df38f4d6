"""The claims file as a model: its schema, its page, and what a wrong value of each kind is answered with."""

import copy
import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import jsonschema
import pytest
import yaml

from albert_ablate.config import ConfigError
from albert_ablate.judge.claims import claims_schema, read_claims

ROOT = Path(__file__).parents[2]
TREE = {
    "arms": {"pre": ["norm=pre_ln"], "post": ["norm=post_ln"], "zero": ["norm=rezero"]},
    "regimes": {"short": {"text": "at 2 layers", "overrides": ["model=nano"]}},
    "claims": [
        {
            "name": "first",
            "statement": "Pre-norm is better.",
            "parts": [{"treatment": "pre", "control": "post", "measure": "test_loss"}],
            "screen": {"regime": "short"},
        }
    ],
}


def changed(path, value):
    """TREE with the value at a dotted path replaced, or the key added."""
    tree = copy.deepcopy(TREE)
    *above, last = path.split(".")
    node = tree
    for step in above:
        node = node[int(step) if step.isdigit() else step]
    node[int(last) if last.isdigit() else last] = value
    return tree


def refusal(tmp_path, tree):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as error:
        read_claims(file)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value).removeprefix(f"{file}: ")


PART = "claims.0.parts.0"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("arm", {}, "the file: arm is unknown: it holds arms, claims, family, regimes."),
        ("arms.pre", "norm=pre_ln", "arms.pre: it must be a list of key=value, got 'norm=pre_ln'."),
        ("arms.pre", ["seed=1"], "arms.pre: seed=1 is not allowed: the judge chooses it."),
        ("regimes.short", "short", "regimes.short holds text, overrides, not 'short'."),
        ("claims", {}, "claims={} is not allowed: it is a list of one or more claims."),
        ("claims.0", "first", "a claim holds name, statement, needs, parts, secondary, screen, full, equal, tuned, "
         "test, waives, seeds, not 'first'."),
        ("claims.0.name", "a b", "claim a b.name=a b is not allowed: it is a name of letters, digits, _ and -."),
        ("claims.0.parts", [], "claim first.parts=[] is not allowed: it is a list of one or more contrasts."),
        (f"{PART}.contrl", "post", "claim first.parts[0]: contrl is unknown: it holds control, "),
        (f"{PART}.control", ["post"], "claim first.parts[0].control=['post'] is not allowed: it is an arm."),
        (f"{PART}.treatment", {"a": 1}, "claim first.parts[0].treatment={'a': 1} is not allowed: it is an arm or"),
        (f"{PART}.control", "", "claim first.parts[0]: control= is unknown: an arm is one of post, pre, zero."),
        (f"{PART}.margin", "a lot", "claim first.parts[0].margin=a lot is not allowed: it is 0 or a number above 0."),
        (f"{PART}.margin", True, "claim first.parts[0].margin=True is not allowed: it is 0 or a number above 0."),
        (f"{PART}.margin", float("inf"), "claim first.parts[0].margin=inf is not allowed: it is 0 or a number"),
        (f"{PART}.margin", -0.1, "claim first.parts[0].margin=-0.1 is not allowed: it is 0 or a number above 0."),
        (f"{PART}.margin", 1e9, "claim first.parts[0]: margin=1e+09 is not allowed: of log ratios at most 0.693"),
        (f"{PART}.direction", "lowr", "claim first.parts[0].direction=lowr is not allowed: it is one of lower, h"),
        (f"{PART}.singles", ["zero"], None),
        ("claims.0.screen.N", 12.0, "claim first.screen.N=12 is not allowed: it is a whole number 4 to 12."),
        ("claims.0.screen", [], "claim first.screen holds regime, N, rates, step, grid, measure, not []."),
        ("claims.0.seeds", [0, 1, 1], "claim first.seeds=[0, 1, 1] is not allowed: it is a list of different seeds"),
        ("claims.0.equal", {"token": 0}, "claim first.equal: token is unknown: it holds tokens, "),
        ("claims.0.full", {"N": 20}, "claim first.full: regime is missing."),
        ("family", {"size": 0}, "family.size=0 is not allowed: it must be at least the file's 1 claims."),
        ("family", {"alpha": 1}, "family.alpha=1 is not allowed: it is a number above 0, at most 0.2."),
    ],
)  # fmt: skip
def test_a_wrong_value_names_its_place_and_what_it_may_be(tmp_path, path, value, sentence):
    tree = changed(path, value)
    if sentence is None:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
        assert read_claims(tmp_path / "c.yaml").claims[0].parts[0].singles == ("zero",)
    else:
        assert refusal(tmp_path, tree).startswith(sentence)


def test_an_unknown_word_is_said_before_what_is_missing(tmp_path):
    tree = changed(f"{PART}.contrl", "post")
    del tree["claims"][0]["parts"][0]["control"]
    assert refusal(tmp_path, tree).startswith("claim first.parts[0]: contrl is unknown: it holds control, ")


def test_numbers_as_yaml_reads_them_and_defaults_by_measure(tmp_path):
    """YAML reads 1e-3 as text, the word null as nothing, and 0 as a number."""
    text = yaml.safe_dump(TREE).replace("measure: test_loss", "measure: test_loss\n    margin: 1e-3\n    null: 0")
    (tmp_path / "c.yaml").write_text(text)
    (claim,) = read_claims(tmp_path / "c.yaml").claims
    assert claim.parts[0].margin == 0.001 and claim.parts[0].null == "0" and claim.parts[0].direction == "lower"
    assert claim.seeds == tuple(range(12)) and claim.forms["screen"].rates == 5


def test_the_schema_takes_the_shipped_claims_and_no_other_word():
    schema = claims_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    # as JSON, whose keys are text: YAML reads the key null as nothing
    shipped = json.loads(json.dumps(yaml.safe_load((ROOT / "sweeps" / "claims.yaml").read_text())))
    assert not [*validator.iter_errors(shipped)] and not [*validator.iter_errors(TREE)]
    for path, value in ((f"{PART}.contrl", "post"), ("claims.0.test", "tt"), ("claims.0.screen.N", 100), ("arm", {})):
        assert [*validator.iter_errors(changed(path, value))], path


def test_the_page_of_the_claims_file_is_what_its_schema_says():
    spec = spec_from_file_location("claims_table", ROOT / "docs" / "claims_table.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == module.PAGE.read_text(), "run `make claims-table`"


@pytest.mark.process
def test_reports_and_help_do_not_load_pydantic():
    modules = ["albert_ablate", "albert_ablate.cli", "albert_ablate.report.report", "albert_ablate.report.study"]
    code = f"import sys\nsys.modules['pydantic'] = None\nimport {', '.join(modules)}\nalbert_ablate.load_runs"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
