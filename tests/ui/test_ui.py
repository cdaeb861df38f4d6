"""The live page: what its server answers and refuses, its status, and that a page in a browser follows its runs."""

import json
import os
import re
import shutil
import threading
from contextlib import contextmanager

import pytest
from factories import edit_record, make_run

from albert_ablate.cli import main
from albert_ablate.report import report
from albert_ablate.report.material import gather
from albert_ablate.report.section_cache import SectionCache
from albert_ablate.studies.status import arms, read_states, share_done, time_left

pytest.importorskip("altair", reason="pip install 'albert_ablate[ui]'")
pytest.importorskip("vl_convert", reason="pip install 'albert_ablate[ui]'")
pytest.importorskip("starlette", reason="pip install 'albert_ablate[ui]'")
testclient = pytest.importorskip("starlette.testclient", reason="pip install httpx")

from albert_ablate.ui import server  # noqa: E402
from albert_ablate.ui.live import Pages  # noqa: E402
from albert_ablate.ui.status_section import status_section  # noqa: E402

EVIL = '"><script>window.hacked=1</script>'
ADDRESS = "http://127.0.0.1"


def make_runs(folder):
    for norm in ("pre_ln", EVIL):
        for seed in range(3):
            make_run(folder, {"norm": norm}, seed, steps=60)
    return folder


@contextmanager
def serving(runs):
    pages = Pages(runs)
    pages.cache.seconds = 1e9  # nothing waits
    with testclient.TestClient(server.application(pages), base_url=ADDRESS) as opened:
        opened.pages = pages
        yield opened


@pytest.fixture
def runs(tmp_path):
    return make_runs(tmp_path / "runs")


@pytest.fixture
def client(runs):
    with serving(runs) as opened:
        yield opened


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A client of runs that no test changes: their page is made once."""
    with serving(make_runs(tmp_path_factory.mktemp("read") / "runs")) as opened:
        yield opened


def fresh(client):
    """The page, whenever it was made last."""
    client.pages.study.at = -1e9
    return client.get("/")


# --- the server ------------------------------------------------------------------------------------------------------


def test_a_page_is_the_report_with_a_status_on_top(reader):
    text = reader.get("/").text
    titles = re.findall(r'<h2 id="[^"]*">([^<]*)</h2>', text)
    assert titles == ["Status", *(s.title for s in report.make(reader.pages.root).sections)]
    assert "6 runs: 6 finished." in text and EVIL not in text
    content = json.loads(text.split('id="content">')[1].split("</script>")[0])
    drawn = set(re.findall(r'data-chart="([^"]*)"', text))
    assert drawn == {*content["charts"]} and len(drawn) > 5


def test_nothing_of_a_page_is_inline_or_from_elsewhere(reader):
    answer = reader.get("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    scripts = re.findall(r"<script([^>]*)>", answer.text)
    assert all(' src="/static/' in s or 'type="application/json"' in s for s in scripts) and len(scripts) == 3
    assert "<style" not in answer.text and not re.search(r'\s(style|on\w+)="', answer.text)
    for address in re.findall(r'(?:src|href)="(/static/[^"]*)"', answer.text):
        assert reader.get(address).status_code == 200 and len(reader.get(address).content) > 1000
    for name in ("x-content-type-options", "referrer-policy", "cross-origin-resource-policy", "x-frame-options"):
        assert name in answer.headers and name in reader.get("/nowhere").headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "0.0.0.0", "169.254.169.254", ""])
def test_another_host_is_refused(reader, host):
    """A name of somebody else's that is made to lead to 127.0.0.1 (DNS rebinding) is in the Host header."""
    assert reader.get("/", headers={"Host": host}).status_code == 400
    assert reader.get("/", headers={"Host": "localhost:8321"}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_get_and_head_is_answered(reader, method):
    for address in ("/", "/static/page.js"):
        assert reader.request(method, address).status_code == 405
    head = reader.head("/")
    assert head.status_code == 200 and not head.content


@pytest.mark.parametrize(
    "address",
    ["/run/../../secret/seed0", "/run/%2e%2e/seed0", "/run/..%2fsecret/seed0", "/run/%2fetc/passwd",
     "/static/..%2f..%2fcli.py", "/static/page.html.j2", "/run/secret/seed0", "/run/a/b/c", "/run//seed0"],
)  # fmt: skip
def test_no_path_leads_out_of_the_runs(client, runs, address):
    secret = make_run(runs.parent, {"norm": "secret"}, steps=20)
    secret.parent.rename(runs.parent / "secret")
    assert client.get(address).status_code == 404


def test_a_run_has_its_page_and_damage_is_a_sentence(client, runs):
    links = re.findall(r'href="(/run/[^"]*)"', client.get("/").text)
    assert len(links) == 6 and all(client.get(link).status_code == 200 for link in links)
    text = client.get(links[0]).text
    assert "Depth by tokens" in text and '<a href="/">All runs</a>' in text
    folder = runs / links[0].removeprefix("/run/")
    (folder / "steps.arrow").write_bytes(b"torn")
    client.pages.runs.clear()
    said = client.get(links[0])
    assert said.status_code == 200 and "steps cannot be read" in said.text and str(runs) not in said.text


def test_a_page_is_made_again_when_a_record_changes(client, runs):
    first = client.get("/")
    tag = {"If-None-Match": first.headers["etag"]}
    client.pages.study.at = -1e9
    again = client.get("/", headers=tag)
    assert again.status_code == 304 and not again.content
    folder = next(runs.glob("*/seed0"))
    edit_record(folder, summary__val_loss=1.2345)
    client.pages.study.at = -1e9
    changed = client.get("/", headers=tag)
    assert changed.status_code == 200 and "1.234" in changed.text and changed.headers["etag"] != first.headers["etag"]
    (runs / "ledger.json").write_text('{"claims": 3}')
    assert "is not a ledger" in fresh(client).text
    (runs / "ledger.json").unlink()
    assert "Leaderboard" in fresh(client).text
    shutil.rmtree(runs)
    assert "No run has begun yet" in fresh(client).text


def test_a_page_is_not_made_more_often_than_its_share(client, runs):
    before = client.get("/").headers["etag"]
    edit_record(next(runs.glob("*/seed0")), summary__val_loss=1.5)
    client.pages.study.took = 1e6
    assert client.get("/").headers["etag"] == before
    client.pages.study.took = 0.0
    assert client.get("/").headers["etag"] != before


def test_who_asks_while_a_page_is_made_gets_the_last_one(reader):
    before = reader.get("/").headers["etag"]
    with reader.pages.study.lock:
        assert reader.get("/").headers["etag"] == before


def test_a_taken_port_is_a_sentence_or_another_port(capsys):
    with server.listening(None) as one:
        one.listen()
        port = one.getsockname()[1]
        with pytest.raises(server.ConfigError, match=f"Port {port} cannot be used"), server.listening(port):
            pass
        assert one.getsockname()[0] == "127.0.0.1"


def test_what_cannot_be_shown_is_one_sentence(tmp_path, capsys):
    run = make_run(tmp_path, {"norm": "a"}, steps=20)
    (tmp_path / "file").touch()
    for arguments, said in (
        ([str(run)], "is one run, not a folder of runs"),
        ([str(tmp_path / "file")], "is not a folder of runs"),
        ([str(tmp_path / "nowhere")], "nowhere does not exist"),
        ([str(tmp_path), "norm=x"], "has no effect without --sweep"),
        ([str(tmp_path), "--sweep", str(tmp_path / "no.yaml")], "no.yaml"),
    ):
        assert main(["ui", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


# --- status ----------------------------------------------------------------------------------------------------------


def run_of(status, step=0, seconds=None):
    progress = {"step": step, "steps": 100}
    return {"status": status, "progress": progress, "cost": {"seconds": seconds}, "summary": {}, "folder": "r/ab/seed0"}


def test_time_left_is_that_of_the_runs_so_far():
    done, half, none = run_of("finished", 100, 60.0), run_of("running", 50, 30.0), {"status": "pending"}
    assert [share_done(r) for r in (done, half, none)] == [1, 0.5, 0]
    # 1.5 runs took 90 s; 1.5 are to be done by one that runs, or by two
    assert time_left([done, half, none]) == "about 1 min left"
    assert time_left([done, half, half]) == "about 30 s left"
    assert time_left([done, none]) == time_left([]) == time_left([run_of("running")]) == ""


def test_status_names_arms_by_what_they_differ_in(runs):
    make_run(runs, {"norm": "pre_ln"}, lr=4e-3, steps=20)
    names = [*arms(read_states(runs), runs)]
    assert names == sorted(gather(runs, None).arms)  # as the report does
    assert "norm=pre_ln optimizer.lr=0.004" in names and len(names) == 3
    (runs / "0123" / "seed0").mkdir(parents=True)
    (runs / "0123" / "seed0" / "record.json").write_text("{")
    assert "0123" in arms(read_states(runs), runs)


def test_a_status_section_says_states_progress_and_errors():
    table = {"a": {0: run_of("finished", 100), 1: run_of("running", 50)}, "b": {0: {"status": "pending"}}}
    table["b"][1] = run_of("failed", 50) | {"error": "Traceback\nOSError: disk full"}
    section = status_section(table)
    assert (
        section.done == (0.5, "50% done") and section.text[0] == "4 runs: 1 finished, 1 running, 1 pending, 1 failed."
    )
    assert section.text[1] == "b seed=1: OSError: disk full"
    (shown,) = section.tables
    assert shown.cells[1] == ["b", "pending", "failed 50%"]
    assert [c and (c.state, c.done, c.link) for c in shown.more[0]] == [
        None, ("finished", None, "/run/ab/seed0"), ("running", 0.5, "/run/ab/seed0")]  # fmt: skip
    many = status_section({"a": {seed: run_of("finished", 100) for seed in range(50)}})
    assert many.tables[0].rows.to_dict("records") == [{"arm": "a", "runs": 50, "finished": 50}]


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_only_sections_of_another_state_are_made():
    kept, made = SectionCache(seconds=1e9), []
    for states in ({"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 2}):
        wanted = {n: (s, lambda n=n, s=s: made.append(n) or f"{n}{s}") for n, s in states.items()}
        found = kept.sections_of(wanted, "blue")
        assert found == {n: f"{n}{s}" for n, s in states.items()}
    assert made == ["a", "b", "b"]
    kept.sections_of(wanted, "red")
    assert made == ["a", "b", "b", "a", "b"]


def test_sections_that_wait_are_the_first_of_the_next_making():
    kept, made = SectionCache(seconds=-1.0), []  # no time: only what there is nothing of is made

    def wanted(state):
        return {n: (state, lambda n=n: made.append(n) or f"{n}{state}") for n in "abc"}

    assert kept.sections_of(wanted(1), "") == {"a": "a1", "b": "b1", "c": "c1"} and kept.behind == []
    assert kept.sections_of(wanted(2), "") == {"a": "a1", "b": "b1", "c": "c1"} and kept.behind == ["a", "b", "c"]
    kept.behind, kept.seconds = ["b", "c", "a"], 1e9
    made.clear()
    assert kept.sections_of(wanted(3), "") == {"a": "a3", "b": "b3", "c": "c3"} and made == ["b", "c", "a"]


def test_a_part_is_kept_while_its_section_uses_it():
    kept, made = SectionCache(), []

    def section():
        return kept.part("x", lambda: made.append(1) or "part")

    for state in range(3):
        assert kept.sections_of({"s": (state, section)}, "")["s"] == "part"
    assert made == [1]
    kept.sections_of({"s": (3, lambda: "without")}, "")
    kept.sections_of({"s": (4, section)}, "")
    assert made == [1, 1]


def test_a_kept_report_is_the_same_as_a_new_one(runs):
    kept = SectionCache(seconds=1e9)
    report.make(runs, cache=kept)
    lost = next(runs.glob("*/seed1"))
    edit_record(lost, status="diverged", summary__val_loss=9.0, summary__divergence="stuck")
    ours, theirs = report.make(runs, cache=kept), report.make(runs)
    assert ours.subtitle == theirs.subtitle and ours.arms == theirs.arms
    for one, other in zip(ours.sections, theirs.sections, strict=True):
        assert (one.title, one.text, one.missing) == (other.title, other.text, other.missing)
        assert [t.cells for t in one.tables] == [t.cells for t in other.tables]
        assert [f.embedded for f in one.figures] == [f.embedded for f in other.figures], one.title


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(runs):
    import uvicorn

    pages = Pages(runs)
    with server.listening(None) as opened:
        opened.listen()
        running = uvicorn.Server(uvicorn.Config(server.application(pages), log_level="warning"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{opened.getsockname()[1]}/"
        running.should_exit = True
        thread.join(10)


def until(page, condition):
    """Waits without evaluating text in the page, which its policy forbids."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(condition)


UNDRAWN = "figure[data-chart]:not([hidden]):not([data-drawn])"


@pytest.mark.slow
def test_what_a_reader_has_set_survives_an_update(browser, served, runs):
    page = browser.new_page(viewport={"width": 1280, "height": 700})
    trouble = []
    page.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.goto(served)
    until(page, f"!document.querySelector('{UNDRAWN}')")
    page.locator("#filter summary").click()
    page.locator("#filter input[type=checkbox]").first.uncheck()
    hidden = page.locator("#filter label").first.inner_text()
    page.get_by_role("button", name="validation loss", exact=True).first.click()
    page.locator("#loss-curves").scroll_into_view_if_needed()
    page.locator("summary", has_text="All 6 runs").click()
    page.locator("#loss-curves").evaluate("e => e.scrollIntoView()")
    top = page.locator("#loss-curves").evaluate("e => e.getBoundingClientRect().top")
    canvas = page.locator("figure[data-chart] canvas").first.element_handle()
    version = page.evaluate("document.querySelector('section[aria-labelledby=leaderboard]').dataset.digest")
    for seed in range(3, 6):  # the tables above grow
        make_run(runs, {"norm": "pre_ln"}, seed, steps=60)
    until(page, f"document.querySelector('section[aria-labelledby=leaderboard]').dataset.digest !== '{version}'")
    until(page, "document.body.textContent.includes('9 runs: 9 finished.')")
    until(page, "document.body.textContent.includes('All 9 runs')")
    page.wait_for_timeout(1500)
    assert abs(page.locator("#loss-curves").evaluate("e => e.getBoundingClientRect().top") - top) < 3
    unchecked = page.locator("#filter label:has(input:not(:checked))")
    assert unchecked.all_inner_texts() == [hidden] and page.locator("#filter details").get_attribute("open") is not None
    assert page.locator("th[aria-sort=ascending]").all_inner_texts()[0].startswith("validation loss")
    assert page.locator("details[open] > summary", has_text="All 9 runs").count() == 1
    assert page.evaluate("window.hacked") is None and not trouble
    assert canvas is not None and page.locator("figure[data-chart] canvas").count() > 3


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_axe_finds_nothing_on_a_live_page(browser, served, runs, width, scheme):
    file = os.environ.get("AXE_CORE") or "node_modules/axe-core/axe.min.js"
    if not os.path.isfile(file):
        pytest.skip("no axe-core: npm install axe-core")
    edit_record(next(runs.glob("*/seed2")), status="running", progress={"step": 30, "steps": 60})
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(served)
    until(page, f"!document.querySelector('{UNDRAWN}')")
    page.evaluate(open(file).read())
    found = page.evaluate("async () => (await axe.run()).violations.map(v => v.id + ': ' + v.nodes[0].html)")
    assert found == [] and page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_page_says_when_its_server_has_ended(browser, runs):
    import uvicorn

    with server.listening(None) as opened:
        opened.listen()
        running = uvicorn.Server(uvicorn.Config(server.application(Pages(runs)), log_level="warning"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{opened.getsockname()[1]}/")
        running.should_exit = running.force_exit = True
        thread.join(10)
    until(page, "document.getElementById('live').innerText.includes('does not answer')")
