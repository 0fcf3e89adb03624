"""The report: its page is a pure function of JSON, safe whatever a prompt holds; it works in a browser; collect tells what ran."""
import base64
import copy
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_router

from analysis import report as script
from analysis.report_charts import Frame, badness, linear_ticks, log_ticks, skip_map
from analysis.report_page import bench_rows, common, eval_rows, mine_of, named, page
from analysis.style import COLOURS
from lib.artefacts import Schedule
from lib.data import load_tokenizer
from lib.files import FTPError, load_json, save_json
from lib.stage import run
from lib.worth import span_worth, spans_of
from model_ftp import FTPModel

NASTY = ["<s>", "<b>&amp;", ' "quoted"', " it's", "\n", "", "🙂", "{{data}}", "</script><script>throw 1</script>", "\t", " end\n\n", "x" * 80]


def made_report():
    """12 tokens, 4 blocks; the first token computes all, token t skips block l where (t + l) % 3 == 0 but for block 0."""
    kept = [["1" if l == 0 or t == 0 or (t + l) % 3 else "0" for t in range(len(NASTY))] for l in range(4)]
    answer = {"text": "The same <i>start</i>, then one way.", "ids": [5, 6, 7, 8]}
    return {
        "format": "ftp-report-1", "what": "out/<schedule>.json", "method": "ftp", "artefacts": ["aaa", "bbb", None],
        "config": {"model": "/x/tiny&model", "commit": "abc", "date": "2026-01-01T00:00:00", "device": "a <cpu>",
                   "settings": {"prompt": "<img src=x onerror=alert(1)>", "threads": 0}, "fingerprint": {"config": "f"}},
        "tokens": NASTY, "special": [0], "kept": ["".join(row) for row in kept], "skipped": 0.25, "flops_saved": 0.27,
        "worth": {"size": 4, "values": [0.001, 0.1, 0.01]},
        "quality": {"kl": 0.0512, "ppl_ratio": 1.043}, "speed": {"dense_ms": 200.0, "pruned_ms": 160.0, "n": 3, "bound": 1.4},
        "answers": {"dense": answer, "pruned": {"text": "The same <i>start</i>, then another.", "ids": [5, 6, 9]}},
        "schedule": {"sparsity": [0.0, 0.3, 0.3, 0.4], "block_influence": [0.6, 0.1, 0.02, 0.2]}}


def eval_row(name, kl, skipped, artefacts=None, ppl=(10.0, 20.0)):
    return {"name": name, "kl": kl, "kl_stderr": kl / 10, "kl_items": [kl] * 7, "top1_agreement": 0.9, "ppl": {"responses": ppl[0], "passages": ppl[1]},
            "sparsity_prefill": skipped, "flops_saved_prefill": skipped, "artefacts": artefacts or [], "retention_pooled": 0.8,
            "tasks": {"mine": {"acc": 0.5, "acc_norm": None, "stderr": 0.1}}}


def bench_row(name, ms, skipped, phase="prefill", length=256):
    return {"name": name, "phase": phase, "batch_size": 1, "prompt_len": length, "dtype": "float32", "median_ms": ms, "p10_ms": 0.9 * ms,
            "p90_ms": 1.2 * ms, "speedup_vs_dense": 200 / ms, "flops_bound": 1.45, "sparsity_prefill": skipped, "sparsity_decode": 0.0,
            "tokens_per_s": 1e3 * length / ms, "kv_bytes": 1 << 20, "flops_saved_prefill": skipped}


def made_results():
    config = {"model": "tiny", "device": "cpu", "dtype": "float32", "settings": {"protocol": "causal", "data": "<data>"}}
    evals = [{"label": "", "config": config, "rows": [
        eval_row("dense", 0.0, 0.0), eval_row("uniform", 0.2, 0.25), eval_row("static", 0.1, 0.25, ["aaa", None, None]),
        eval_row("ftp", 0.05, 0.25, ["aaa", "bbb", None], (11.0, 21.0)), eval_row("ftp_decode", 0.09, 0.25, ["aaa", "bbb", None])]},
        {"label": "late", "config": config, "rows": [eval_row("dense", 0.0, 0.0), eval_row("static", 0.004, 0.31)]}]
    benches = [{"label": "", "config": config, "rows": [
        bench_row(*row, length=length) for length in (256, 1024)
        for row in (("dense", 200, 0.0), ("ftp", 150, 0.25), ("static", 145, 0.25), ("transformers", 230, None))]
        + [bench_row("dense", 9, 0.0, "decode"), bench_row("ftp", 9, 0.25, "decode")]},
        {"label": "late", "config": config, "rows": [bench_row("dense", 210, 0.0, length=1024), bench_row("static", 140, 0.31, length=1024)]}]
    return evals, benches


class Seen(HTMLParser):
    """Of a page: its tokens' texts and shades, its headings, its links to elsewhere; tags must nest."""
    VOID = {"meta", "link", "img", "br"}

    def __init__(self, html):
        super().__init__()
        self.tokens, self.shades, self.headings, self.links, self.stack = [], [], [], [], []
        self.feed(html)
        assert not self.stack

    def handle_starttag(self, name, attributes):
        got = dict(attributes)
        self.links += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]
        assert not [k for k in got if k.startswith("on")]
        if name not in self.VOID:
            self.stack.append((name, got.get("class") or ""))
        if name == "i" and (got.get("class") or "").split()[:1] == ["t"]:
            self.tokens.append("")
            self.shades.append(got.get("style", ""))
        if name == "h2":
            self.headings.append("")

    def handle_startendtag(self, name, attributes):
        raise AssertionError(name)

    def handle_endtag(self, name):
        assert self.stack.pop()[0] == name

    def handle_data(self, text):
        names = [name for name, _ in self.stack]
        if any(c.split()[:1] == ["t"] for _, c in self.stack) and ("span", "nl") not in self.stack:
            self.tokens[-1] += text
        if "h2" in names:
            self.headings[-1] += text


# ------------------------------------------------------------------------------------------------
# the page


def test_page_holds_the_prompt_as_it_is():
    """Whatever a token holds is text: nothing in it becomes markup, nothing is lost, and marks of the template in it stay."""
    html = page(made_report())
    seen = Seen(html)
    assert seen.tokens == NASTY
    assert seen.shades[0] == "" and set(seen.shades) == {"", "--a:32%", "--a:64%"} or len(set(seen.shades)) > 1
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])
    assert data["tokens"] == NASTY and data["kept"] == made_report()["kept"]
    assert html.count("<script") == 2 and "<img src=x" not in html and "&lt;img src=x" in html
    assert "tiny&amp;model" in html and "&lt;schedule&gt;.json" in html


def test_the_worth_of_what_was_skipped():
    """Of spans (1,4), (4,8), (8,11) with worth 1, 100 and 10: shaded by orders of magnitude; what the skips hold of it is told."""
    report = made_report()
    html = page(report)
    shades = re.findall(r'class="w" style=--a:(\d+)% title="([^"]*)"', html)
    assert shades == [("0", "0.001 nats"), ("64", "0.1 nats"), ("32", "0.01 nats")]
    skipped = np.array([[c == "0" for c in row] for row in report["kept"]]).mean(0)
    lost = sum(w * skipped[a:b].mean() for w, (a, b) in zip((1, 100, 10), ((1, 4), (4, 8), (8, 11)))) / 111
    assert f"holds <b>{100 * lost:.0f} %</b> of the worth" in html and "90 % of the worth" in html


def test_page_needs_no_network():
    evals, benches = made_results()
    html = page(made_report(), evals, benches)
    assert not Seen(html).links
    assert "http" not in html and "@import" not in html and "url(" not in html
    assert len(html.encode()) < 60_000


def test_sections_without_data_are_left_out():
    """With nothing measured the head tells what the report itself measured; a table comes with its file."""
    evals, benches = made_results()
    bare, full = Seen(page(made_report())), Seen(page(made_report(), evals, benches))
    assert len(bare.headings) == 5 and len(full.headings) == 8
    none = page(made_report() | {"worth": {"size": None, "values": []}})
    assert "What did the answer need?" in bare.headings and len(Seen(none).headings) == 4
    assert "How good is it?" in Seen(page(made_report(), evals)).headings
    assert "How fast is it?" in Seen(page(made_report(), (), benches)).headings
    html = page(made_report())
    assert "0.051" in html and "1.043×" in html and "1.25×" in html and "1.40×" in html
    html = page(made_report(), evals, benches)
    assert "0.050" in html and "1.050×" in html and "1.33×" in html and "1.45×" in html and "200 → 150 ms" in html


def test_page_is_pure():
    evals, benches = made_results()
    args = made_report(), evals, benches
    before = copy.deepcopy(args)
    assert page(*args) == page(*args) and args == before


def test_rows_get_the_names_that_readers_know():
    evals, benches = made_results()
    scores, times = eval_rows(evals), bench_rows(benches)
    assert [r["name"] for r in scores] == ["dense", "uniform", "static", "ftp", "ftp_decode", "late"]
    assert [r["dense_ms"] for r in times if r["name"] == "late"] == [210]
    score, timing = mine_of(made_report(), scores, times)
    assert score["name"] == "ftp" and timing["name"] == "ftp" and timing["prompt_len"] == 1024
    # another method of this level, and one that was measured at another level alone, are not it
    assert mine_of(made_report() | {"artefacts": [], "skipped": 0.5}, scores, times) == (None, None)
    late = made_report() | {"method": "late", "artefacts": [], "skipped": 0.3}
    assert [r["name"] for r in mine_of(late, scores, times)] == ["late", "late"]
    # without a label a file of late keys and values is known by its settings; a level is no name
    alone = {"label": "", "config": {"settings": {"forecaster": "f", "kv": "keep"}}, "rows": [bench_row("static", 1, 0.3)]}
    assert named(alone)[0]["name"] == "late"
    level = {"label": "", "config": {"settings": {}}, "rows": [bench_row("static 0.3", 1, 0.3)]}
    assert named(level)[0]["name"] == "static"


def test_one_colour_a_method():
    evals, benches = made_results()
    html = page(made_report(), evals, benches)
    chart = html[html.index("How much quality"):html.index("How good is it?")]
    assert {c for c in re.findall(r"--m:(#\w+)", chart)} == {COLOURS[m] for m in ("ftp", "static", "late")}
    assert f"--m: {COLOURS['ftp']};" in html


def test_equal_answers_and_no_skips():
    report = made_report()
    report["answers"]["pruned"] = report["answers"]["dense"]
    report["kept"] = ["1" * len(NASTY)] * 4
    report["schedule"] = {"sparsity": [0.0] * 4, "block_influence": [0.0] * 4}
    html = page(report)
    assert "Word for word the same: 4 tokens" in html and not any(Seen(html).shades)
    assert common([1, 2, 3], [1, 2]) == 2 and common("", "a") == 0


# ------------------------------------------------------------------------------------------------
# the pictures


def test_map_is_the_decisions():
    kept = np.random.default_rng(0).random((5, 37)) > 0.4
    png = base64.b64decode(skip_map(kept, "#0072b2").partition(",")[2])
    width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
    at = png.index(b"IDAT")
    rows = np.frombuffer(zlib.decompress(png[at + 4:at + 4 + int.from_bytes(png[at - 4:at])]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    cells = np.unpackbits(rows[:, 1:], axis=1)[:, :width].astype(bool)
    small = cells[::10, ::width // 37][:, :37]
    assert np.array_equal(~small[::-1], kept) and bytes.fromhex("0072b2") in png


def test_ticks_are_round_and_within():
    assert linear_ticks(0.97, 1.52, 6) == pytest.approx([1, 1.1, 1.2, 1.3, 1.4, 1.5]) and linear_ticks(0, 0) == [0]
    assert log_ticks(0.01, 0.3) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2])
    assert log_ticks(0.001, 30) == pytest.approx([0.001, 0.01, 0.1, 1, 10])


@pytest.mark.parametrize("width", [340, 896])
def test_labels_cover_nothing(width):
    """Eight series, some of them close together: no name covers another's point or name, none leaves the frame."""
    rng = np.random.default_rng(1)
    points = [{"name": f"method {i}", "series": str(i), "ink": "#000000", "label": f"method {i}", "x": x, "x_low": x - 0.01, "x_high": x + 0.01,
               "y": y, "y_error": 0.01} for i, (x, y) in enumerate(rng.uniform((1.1, 0.1), (1.5, 1.0), (8, 2)).tolist())]
    frame = Frame(width, 400, (0.95, 1.6), (0.0, 1.1), False)
    boxes = [frame.box(p) for p in points]
    for p in points:
        frame.name(p, boxes)
    for i, (left, top, right, _) in enumerate(boxes[8:]):
        others = boxes[:8 + i] + boxes[9 + i:]
        assert badness(left, top, right - left, others, (44, frame.top, frame.right, frame.bottom)) < 12


# ------------------------------------------------------------------------------------------------
# running the model


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    threads = torch.get_num_threads()
    try:
        run(script.main)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def routed(workshop, tmp_path_factory):
    """The workshop's model with a schedule and a router for it, and the folder that they lie in."""
    out = tmp_path_factory.mktemp("routed")
    model = FTPModel.from_pretrained(workshop[0])
    Schedule([0.0, 0.3, 0.5, 0.7, 0.2, 0.4], model.fingerprint).save(out / "schedule.json")
    make_router(model).save(out / "router.safetensors")
    return workshop[0], out


def flags(routed, out, *more):
    model, made = routed
    return ["--model", model, "--out_dir", out, "--dtype", "float32", "--threads", "1", "--schedule", made / "schedule.json", "--max_new_tokens", "6",
            "--rounds", "1", *more]


def test_collect_tells_what_ran(routed, tmp_path, monkeypatch, capsys):
    """report.json holds the prompt, the decisions of its pass, and both models' greedy answers; the page is drawn again from it alone."""
    text = "a <cat> & a 🙂\nsat"
    call(monkeypatch, *flags(routed, tmp_path, "--router", routed[1] / "router.safetensors", "--prompt", text))
    assert "of the prompt's FLOPs saved" in capsys.readouterr().out
    report, html = load_json(tmp_path / "report.json", "ftp-report-1", "-"), (tmp_path / "report.html").read_text()
    assert "".join(report["tokens"]) == f"<s>{text}</s><s>" and report["tokens"].count("") == 3
    assert report["special"] == [0, len(report["tokens"]) - 2, len(report["tokens"]) - 1]
    assert Seen(html).tokens == report["tokens"]

    model, tokenizer = FTPModel.from_pretrained(routed[0]), load_tokenizer(routed[0])
    prompt = tokenizer(f"<s>{text}</s><s>", add_special_tokens=False)["input_ids"]
    assert report["answers"]["dense"]["ids"] == model.generate([prompt], 6)[0]
    model.use(routed[1] / "schedule.json", routed[1] / "router.safetensors")
    assert report["answers"]["pruned"]["ids"] == model.generate([prompt], 6)[0]
    kept = np.array([[c == "1" for c in row] for row in report["kept"]])
    assert report["skipped"] == pytest.approx(1 - kept.mean()) and kept[0].all() and kept[:, [0, -1]].all()
    assert report["method"] == "ftp" and 0 < report["flops_saved"] < 1 and report["quality"]["kl"] > 0 and report["speed"]["bound"] > 1
    assert len(report["schedule"]["block_influence"]) == 6
    answer = report["answers"]["dense"]["ids"]
    assert report["worth"]["values"] == pytest.approx(span_worth(model, prompt, answer, report["worth"]["size"]).tolist(), rel=1e-3)

    call(monkeypatch, "--from_json", "--out_dir", tmp_path)
    assert (tmp_path / "report.html").read_text() == html
    save_json(tmp_path / "report.json", report | {"kept": report["kept"][:-1]})
    with pytest.raises(SystemExit) as e:
        call(monkeypatch, "--from_json", "--out_dir", tmp_path)
    assert e.value.code == 2 and "make it again without --from_json" in capsys.readouterr().err


def test_files_and_labels(routed, tmp_path, monkeypatch, capsys):
    """--eval and --bench may be repeated, and labelled; eval files of other data are refused; a prompt is taken where none is given."""
    evals, benches = made_results()
    for i, (e, b) in enumerate(zip(evals, benches)):
        save_json(tmp_path / f"e{i}.json", {"format": "ftp-eval-1", **e})
        save_json(tmp_path / f"b{i}.json", {"format": "ftp-bench-1", **b})
    some = ["--eval", tmp_path / "e0.json", "--eval", f"late={tmp_path}/e1.json", "--bench", tmp_path / "b0.json", "--bench", f"late={tmp_path}/b1.json"]
    call(monkeypatch, *flags(routed, tmp_path, "--longest", "200", *some))
    html = (tmp_path / "report.html").read_text()
    assert len(Seen(html).headings) == 8 and "late keys and values" in html
    assert load_json(tmp_path / "report.json", "ftp-report-1", "-")["method"] == "static"
    (tmp_path / "book.txt").write_text("a text")
    call(monkeypatch, *flags(routed, tmp_path, "--prompt", "What?", "--file", tmp_path / "book.txt"))
    assert "What?\n\na text" in "".join(load_json(tmp_path / "report.json", "ftp-report-1", "-")["tokens"])
    evals[1]["config"] = copy.deepcopy(evals[1]["config"])
    evals[1]["config"]["settings"]["data"] = "other"
    save_json(tmp_path / "e1.json", {"format": "ftp-eval-1", **evals[1]})
    capsys.readouterr()
    for words, mend in ((some, "evaluate all in the same way"), (["--bench", tmp_path / "no.json"], "no file"),
                        (["--prompt", " "], "it is empty"), (["--pruned", "late-0.30"], "give one of the two"),
                        (["--longest", "5"], "give a larger one"), (["--router", "no.safetensors"], "--router")):
        with pytest.raises(SystemExit) as e:
            call(monkeypatch, *flags(routed, tmp_path, *words))
        assert e.value.code == 2 and mend in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(monkeypatch, "--kv", "keep", "--out_dir", tmp_path)
    assert "it needs the --schedule" in capsys.readouterr().err


def test_page_stays_small(tmp_path):
    with pytest.raises(FTPError, match="shorter prompt"):
        script.write_page(tmp_path / "report.html", "x" * script.LARGEST)
    assert not (tmp_path / "report.html").exists()
    many = 2000
    report = made_report() | {"tokens": [" word"] * many, "kept": ["01" * (many // 2)] * 30}
    report["schedule"] = {"sparsity": [0.3] * 30, "block_influence": [0.1] * 30}
    report["worth"] = {"size": 42, "values": [0.01] * len(spans_of(many, 42))}
    assert len(page(report).encode()) < 250_000


# ------------------------------------------------------------------------------------------------
# in a browser


class Browser:
    """Headless Chromium by chromedriver's plain HTTP protocol."""
    FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars"]
    SETTLED = "return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"    # a scroll's event comes with the next frame

    def __init__(self):
        self.folder = tempfile.mkdtemp()
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        port = next(m[1] for line in self.driver.stdout if (m := re.search(r"successfully on port (\d+)", line)))
        self.url = f"http://127.0.0.1:{port}/session"
        wanted = {"goog:chromeOptions": {"args": [*self.FLAGS, f"--user-data-dir={self.folder}"]}, "goog:loggingPrefs": {"browser": "ALL"}}
        self.url += "/" + self.send("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def send(self, path, **body):
        ask = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(ask, timeout=60))["value"]

    def open(self, path, width, height=800, dark=False):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.send("/url", url=Path(path).resolve().as_uri())

    def cdp(self, cmd, **params):
        return self.send("/goog/cdp/execute", cmd=cmd, params=params)

    def run(self, code):
        return self.send("/execute/sync", script=code, args=[])

    def point(self, selector):
        e = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{e}.scrollIntoView({{block: 'center'}}); {self.SETTLED}")
        x, y = self.run(f"const b = {e}.getClientRects()[0]; return [Math.round(b.left + b.width / 2), Math.round(b.top + b.height / 2)]")
        self.send("/actions", actions=[{"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"},
                                        "actions": [{"type": "pointerMove", "duration": 0, "x": x, "y": y, "origin": "viewport"}]}])

    def press(self, key):
        self.send("/actions", actions=[{"type": "key", "id": "keys", "actions": [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]}])

    def tip(self):
        self.run(self.SETTLED)
        return self.run("const t = document.getElementById('tip'); return t.hidden ? null : t.innerText")

    def shoot(self, path, whole=True):
        got = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **({"clip": self.clip()} if whole else {}))
        Path(path).write_bytes(base64.b64decode(got["data"]))

    def clip(self):
        width, height = self.run("const e = document.documentElement; return [e.clientWidth, e.scrollHeight]")
        return {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}

    def close(self):
        try:
            urllib.request.urlopen(urllib.request.Request(self.url, method="DELETE"), timeout=30)
        finally:
            self.driver.terminate()
            self.driver.wait()
            self.driver.stdout.close()
            shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def browser():
    if not (shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome"))):
        pytest.skip("no Chromium with chromedriver here")
    b = Browser()
    yield b
    b.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(made_report(), *made_results()))
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 768, 390])
def test_page_renders(browser, written, width, dark):
    """No error in the console, nothing scrolls sideways but tables in their boxes, one of the two charts is shown, dark paper is dark."""
    browser.open(written, width, dark=dark)
    assert browser.send("/se/log", type="browser") == []
    assert browser.run("return document.querySelectorAll('.t').length") == len(NASTY)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    beyond = browser.run("return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && "
                         f"e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 80))")
    assert beyond == []
    for name, is_shown in (("wide", width > 640), ("narrow", width <= 640)):
        assert browser.run(f"return [...document.querySelectorAll('.chart.{name}')].every(e => (e.getClientRects().length > 0) === {str(is_shown).lower()})")
    paper = browser.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(paper) < 60) if dark else (min(paper) > 200)


@pytest.mark.parametrize("width", [1280, 390])
def test_hover_shows_the_token(browser, written, width):
    """Pointing at a token, going on with the arrow keys, and pointing at the map: token, place, who computed it; leaving hides it."""
    browser.open(written, width)
    assert browser.tip() is None
    browser.point(".t:nth-child(4)")
    assert browser.tip().startswith(f"4 of {len(NASTY)}") and "it's" in browser.tip()
    column = [row[3] for row in made_report()["kept"]]
    assert f"computed by {column.count('1')} of 4 blocks, skips {column.count('0')}" in browser.tip()
    assert browser.run("return [...document.querySelectorAll('#tip .strip i')].map(e => e.className)") == ["c" if c == "1" else "" for c in column]
    box = browser.run("const b = document.getElementById('tip').getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom]")
    assert box[0] >= 0 and box[1] <= width and box[2] >= 0 and box[3] <= 800
    browser.point("h1")
    assert browser.tip() is None

    browser.run("document.querySelector('.t').focus()")
    assert browser.tip().startswith("1 of")
    browser.press("\ue014")                                        # right
    assert browser.tip().startswith("2 of") and "<b>&amp;" in browser.tip()
    browser.press("\ue010")                                        # end
    assert browser.tip().startswith(f"{len(NASTY)} of")
    browser.press("\ue00c")                                        # escape
    assert browser.tip() is None
    browser.point(".grid")
    assert browser.tip().startswith(f"{len(NASTY) // 2 + 1} of")
    assert browser.send("/se/log", type="browser") == []
