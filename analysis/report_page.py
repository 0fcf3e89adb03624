"""The report's page: JSON in, one HTML text out. Nothing here runs a model or reads an artefact.

    html = page(report, evals, benches)      # contents of report.json, eval.json, bench.json files

A section without its data is left out. The look and the little script are in page.html.
"""
import json
import re
from html import escape
from pathlib import Path

import numpy as np

from analysis.report_charts import schedule_chart, skip_map, speed_chart
from analysis.style import colour, labelled, method
from lib.worth import LEAST, spans_of

TEMPLATE = Path(__file__).with_name("page.html")
DEEPEST = 64      # per cent of the method's colour behind the token that skips most: still readable
NEAR = 0.03       # shares of skips this close are of one level
GREY = "#9a9a9a"  # series without a name

NAMES = {
    "dense": "dense",
    "ftp": "FTP",
    "ftp_decode": "FTP, decoding too",
    "rule": "FTP, decoding by rule",
    "late": "late keys and values",
    "static": "first + recent",
    "forecast": "forecasts",
    "uniform": "uniform schedule",
    "random": "at random",
    "attention": "most attended",
    "hidden": "hidden-state router",
    "shortgpt": "ShortGPT",
    "blockpruner": "BlockPruner",
    "lazyllm": "LazyLLM-like",
    "slicegpt": "SliceGPT",
    "laco": "LaCo",
    "width": "narrower MLPs",
    "transformers": "transformers, dense",
}
HOW = {
    "ftp": "Before every block a small trained router decides, token by token, who computes it; "
           "the others pass unchanged.",
    "late": "The last blocks run for two tokens of the prompt alone; a linear map a block stands "
            "in for the keys and values that the others would have left.",
    "static": "Every block computes the prompt's first token and its most recent ones; the others "
              "pass unchanged.",
    "forecast": "Tokens that skip a block get a forecast of what it would have done, by a linear "
                "map.",
    "random": "Every block computes tokens drawn at random; the others pass unchanged.",
    "attention": "Every block computes the tokens that were attended most; the others pass "
                 "unchanged.",
}
TEXTS = {"responses": "held-out answers", "passages": "held-out passages",
         "self": "held-out passages"}     # as older files name them


def page(report, evals=(), benches=()):
    """One self-contained HTML page.

    report: the content of report.json. evals, benches: contents of eval.json and bench.json files,
    each with a "label" for its rows, "" for none.
    """
    scores, times = eval_rows(evals), bench_rows(benches)
    mine = mine_of(report, scores, times)
    sections = [
        head(report, *mine),
        prompt_section(report),
        worth_section(report),
        map_section(report),
        answers_section(report),
        schedule_section(report),
        speed_section(report, scores, times),
        eval_section(evals, scores, mine[0]),
        bench_section(benches, mine[1]),
        settings_section(report, evals, benches),
    ]
    parts = {
        "title": escape(f"{short(report['config']['model'])}, {shown(report['method'])}"),
        "colour": colour(report["method"]),
        "deepest": str(DEEPEST),
        "body": "\n".join(filter(None, sections)),
        # in a script "<" could end it
        "data": json.dumps({k: report[k] for k in ("tokens", "kept")}).replace("<", "\\u003c"),
    }
    # all at once: what a prompt says is never looked through for marks
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]],
                  TEMPLATE.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------
# rows of eval.json and bench.json


def named(result):
    """The rows of one file under the names that the page knows them by, see analysis/report.py."""
    settings, label = result["config"]["settings"], result["label"]
    plain = [row["name"] for row in result["rows"] if is_routed(row)]
    late = settings.get("forecaster") and settings.get("kv") == "keep"
    rows = []
    for row in result["rows"]:
        name = row["name"]
        if is_routed(row) and label:
            name = label if len(set(plain)) == 1 else f"{label} {name}"
        elif name == "static" and late:
            name = "late"
        # a bench row without a schedule carries its level: "static 0.3"
        rows.append(row | {"name": re.sub(r" 0?\.\d+$", "", name)})
    return rows


def is_routed(row):
    return row["name"] not in ("dense", "transformers")


def eval_rows(evals):
    """Rows of all files, the dense one once; "ppl_ratio" {text: perplexity, times dense}."""
    out = []
    for result in evals:
        rows = named(result)
        dense = rows[0]["ppl"]
        for row in rows:
            if is_routed(row) or not out:
                ratios = {text: ppl / dense[text] for text, ppl in row["ppl"].items()}
                out.append(row | {"ppl_ratio": ratios})
    return out


def bench_rows(benches):
    """Rows of all files, with "dense_ms" of the dense row beside each."""
    out = []
    for result in benches:
        rows = named(result)
        dense = {shape(row): row for row in rows if row["name"] == "dense"}
        out += [row | {"dense_ms": dense[shape(row)]["median_ms"]} for row in rows
                if shape(row) in dense]
    return out


def shape(row):
    return row["phase"], row["batch_size"], row["prompt_len"]


def longest(times):
    """Of single prompts read, the rows of the longest."""
    rows = [row for row in times if row["phase"] == "prefill" and row["batch_size"] == 1]
    length = max((row["prompt_len"] for row in rows), default=0)
    return [row for row in rows if row["prompt_len"] == length]


def nearest(rows, name, level):
    """Of the rows of this name, or method, the one whose share of skips is nearest, if near."""
    known = [row for row in rows if name in (row["name"], method(row["name"]))
             and row["sparsity_prefill"] is not None]
    near = [row for row in known if abs(row["sparsity_prefill"] - level) <= NEAR]
    return min(near, key=lambda row: abs(row["sparsity_prefill"] - level), default=None)


def mine_of(report, scores, times):
    """The eval row and the bench row of the report's own method, None where there is none."""
    own = [row for row in scores if row.get("artefacts") == report["artefacts"]
           and method(row["name"]) == report["method"]]
    score = own[0] if own else nearest(scores, report["method"], report["skipped"])
    return score, nearest(longest(times), report["method"], report["skipped"])


# ------------------------------------------------------------------------------------------------
# words and numbers


def shown(name):
    """A row's name for readers."""
    return NAMES.get(name) or name


def short(model):
    """The last part of a model's path or hub id."""
    return str(model).rstrip("/").rpartition("/")[2]


def percent(share, digits=1):
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def figure(x):
    """Three significant digits, without an exponent."""
    if x is None:
        return "–"
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}" if abs(x) < 1000 else f"{x:.0f}"


def text_name(text):
    return TEXTS.get(text, text)


def section(title, *content):
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(content) + "\n</section>"


# ------------------------------------------------------------------------------------------------
# the head


def head(report, score, timing):
    """What was pruned, by which method, and the three numbers that matter."""
    saved = percent(report["flops_saved"], 0 if report["flops_saved"] >= 0.1 else 1)
    model = escape(short(report["config"]["model"]))
    what = escape(f"{shown(report['method'])} ({short(report['what'])})")
    n = len(report["tokens"])
    tiles = kl_tile(report, score) + ppl_tile(report, score) + speed_tile(report, timing)
    return f"""<header>
<p class="kicker">FTP · fine-grained token-wise pruning via token routing</p>
<h1>{model} reads this prompt with <b>{saved} fewer FLOPs</b></h1>
<p>Pruned by {what}. {escape(HOW.get(report['method'], ''))} Of {n} prompt tokens
<b>{percent(report['skipped'])}</b> skip a block, on average over {len(report['kept'])} blocks.
The answer is then decoded with all blocks: only the reading of the prompt gets faster.</p>
<dl class="tiles">{tiles}</dl>
</header>"""


def tile(title, big, below):
    return (f'<div class="tile"><dt>{title}</dt><dd class="big">{big}</dd>'
            f"<dd>{below}</dd></div>")


def kl_tile(report, score):
    """How far from the dense model."""
    if score is None:
        return tile("KL to the dense model", figure(report["quality"]["kl"]),
                    "nats a token, along the dense answer below")
    n = len(score.get("kl_items", []))
    over = f", {n} held-out answers" if n else ""
    return tile("KL to the dense model", figure(score["kl"]),
                f"± {figure(score['kl_stderr'])} nats a token{over}")


def ppl_tile(report, score):
    """How much worse it predicts text."""
    if score is None:
        return tile("perplexity, times dense", f"{report['quality']['ppl_ratio']:.3f}×",
                    "along the dense answer below")
    # a text, where there is one beside the answers
    text = [*[t for t in score["ppl_ratio"] if t != "responses"], "responses"][0]
    return tile("perplexity, times dense", f"{score['ppl_ratio'][text]:.3f}×",
                escape(f"on {text_name(text)}"))


def speed_tile(report, timing):
    """How much faster a prompt is read, beside what the FLOPs allow."""
    if timing is None:
        speed = report["speed"]
        times, bound = speed["dense_ms"] / speed["pruned_ms"], speed["bound"]
        below = f"this prompt, {speed['dense_ms']:.0f} → {speed['pruned_ms']:.0f} ms"
    else:
        times, bound = timing["speedup_vs_dense"], timing["flops_bound"]
        below = (f"{timing['prompt_len']} tokens, {timing['dense_ms']:.0f} → "
                 f"{timing['median_ms']:.0f} ms")
    share = (times - 1) / (bound - 1) if bound > 1 else 0
    gauge = f'<div class="gauge"><i style="width:{100 * min(max(share, 0), 1):.0f}%"></i></div>'
    return tile("faster through the prompt", f"{times:.2f}×",
                f"{gauge}{below}; the FLOPs allow {bound:.2f}×")


# ------------------------------------------------------------------------------------------------
# the prompt, the map, the answers


def skipped_blocks(report):
    """How many blocks each token skips, a list of T."""
    return [column.count("0") for column in zip(*report["kept"])]


def prompt_section(report):
    """The text, every token shaded by how many blocks it skips."""
    skips = skipped_blocks(report)
    most, blocks = max(skips), len(report["kept"])
    special = set(report["special"])
    spans = [token_span(text, skip / max(most, 1), i in special)
             for i, (text, skip) in enumerate(zip(report["tokens"], skips))]
    scale = (f'<div class="scale"><span>computes all blocks</span><i></i>'
             f"<span>skips {most} of {blocks}</span></div>")
    return section(
        "Which words does it skip?",
        '<p class="note">Point at a token to see which blocks compute it, or press Tab and go on '
        "with the arrow keys.</p>", scale,
        '<div class="prompt" role="group" aria-label="the prompt, token by token">'
        + "".join(spans) + "</div>")


def token_span(text, share, special):
    """One token; the shade is left out where it skips nothing."""
    shade = f" style=--a:{DEEPEST * share:.0f}%" if share else ""
    if text == "":                                     # the first bytes of a character
        return f'<i class="t part"{shade}></i>'
    body = escape(text).replace("\n", '<span class=nl>↵</span>\n')
    return f'<i class="{"t sp" if special else "t"}"{shade}>{body}</i>'


def worth_section(report):
    """The text again, every span shaded by how far the dense answer moves without it."""
    size, worth = report["worth"]["size"], np.array(report["worth"]["values"])
    if not len(worth):
        return None
    tokens, blocks = report["tokens"], len(report["kept"])
    spans = spans_of(len(tokens), size)
    skipped = np.array(skipped_blocks(report)) / blocks
    on_spans = np.array([skipped[a:b].mean() for a, b in spans])
    worth = worth.clip(min=LEAST)                      # below is the noise of rounding
    # from the least to the most, in orders of magnitude
    shade = np.log(worth / worth.min()) / max(np.log(worth.max() / worth.min()), 1e-9)
    parts = [escape(tokens[0])]
    for (a, b), value, share in zip(spans, worth, shade):
        parts.append(f'<i class="w" style=--a:{DEEPEST * share:.0f}% title="{value:.2g} nats">'
                     f'{escape("".join(tokens[a:b]))}</i>')
    parts += [escape(t) for t in tokens[spans[-1][1]:]]
    richest = np.sort(worth)[::-1][:-(-len(worth) // 3)].sum() / worth.sum()
    lost = (on_spans * worth).sum() / worth.sum()
    note = (f"A span of {size} tokens alone skips all blocks but the first: how far does the dense "
            "answer move? No router can know, as it asks the answer. The worthiest third of the "
            f"spans has {percent(richest, 0)} of the worth. What was skipped above holds "
            f"<b>{percent(lost, 0)}</b> of the worth and {percent(on_spans.mean(), 0)} of the "
            "tokens; the less worth, the better the choice.")
    scale = (f'<div class="scale worth"><span>{worth.min():.1g} nats a token</span><i></i>'
             f"<span>{worth.max():.2g}</span></div>")
    return section("What did the answer need?", f'<p class="note">{note}</p>', scale,
                   f'<div class="prompt worth">{"".join(parts)}</div>')


def map_section(report):
    """Tokens and blocks, a pixel each."""
    kept = np.array([[letter == "1" for letter in row] for row in report["kept"]])
    blocks, tokens = kept.shape
    picture = skip_map(kept, colour(report["method"]))
    said = f"map of {tokens} tokens and {blocks} blocks: {percent(1 - kept.mean())} are skipped"
    return section(
        "Which blocks do they skip?",
        '<p class="note"><span class="legend"><span class="key"></span>skipped: '
        f'{percent(1 - kept.mean())} of all tokens and blocks</span>'
        '<span class="legend"><span class="key c"></span>computed</span></p>',
        f"""<div class="map">
<div class="y"><span>block {blocks - 1}</span><span>block 0</span></div>
<div class="grid"><img src="{picture}" alt="{said}"><i></i></div>
<div class="x"><span>first token</span><span>in the order of the prompt</span>
<span>last ({tokens})</span></div>
</div>""")


def answers_section(report):
    """What the dense and the pruned model answer, greedily."""
    dense, pruned = (report["answers"][name] for name in ("dense", "pruned"))
    same = common(dense["ids"], pruned["ids"])
    letters = common(dense["text"], pruned["text"])
    letters = max(0, dense["text"].rfind(" ", 0, letters + 1))     # no mark ends within a word
    counted = "token is" if same == 1 else f"{same} tokens are"
    if dense["ids"] == pruned["ids"]:
        note, letters = f"Word for word the same: {len(dense['ids'])} tokens.", 0
    elif letters:
        note = (f"The first {counted} the same (marked); from there on each goes on from its own "
                "words. Both are greedy.")
    else:
        note = "They differ from the start. Both are greedy."
    speed, columns = report["speed"], []
    for title, name, answer in (("dense", "dense", dense),
                                (shown(report["method"]), "pruned", pruned)):
        text = escape(answer["text"][letters:])
        if letters:
            text = f"<mark>{escape(answer['text'][:letters])}</mark>{text}"
        columns.append(
            f'<div class="answer {name}"><h3>{escape(title)}</h3><p class="text">{text}</p>'
            f"<footer>{len(answer['ids'])} tokens; prompt read in {speed[f'{name}_ms']:.0f} ms"
            "</footer></div>")
    return section("What does it answer?", f'<p class="note">{note}</p>',
                   f'<div class="answers">{"".join(columns)}</div>')


def common(a, b):
    """How many items two sequences begin with alike."""
    n = 0
    for one, other in zip(a, b):
        if one != other:
            break
        n += 1
    return n


# ------------------------------------------------------------------------------------------------
# charts and tables


def schedule_section(report):
    schedule = report["schedule"]
    mean = sum(schedule["sparsity"]) / len(schedule["sparsity"])
    return section("Which blocks can spare their tokens?",
                   f'<p class="note">The schedule, {percent(mean)} on average, over how much each '
                   "block changes what goes through it.</p>",
                   schedule_chart(schedule["sparsity"], schedule["block_influence"]))


def speed_section(report, scores, times):
    """Quality against measured speed, where a method has both."""
    rows = longest(times)
    pairs = [(score, nearest(rows, score["name"], score["sparsity_prefill"] or 0))
             for score in scores if is_routed(score)]
    pairs = [(score, timing) for score, timing in pairs if timing]
    if not pairs:
        return None
    series = list(dict.fromkeys(score["name"] for score, _ in pairs))
    chosen = labelled(series)
    points = []
    for score, timing in pairs:
        name, ms = score["name"], timing["dense_ms"]
        points.append({
            "name": shown(name), "series": name, "ink": colour(name) if name in chosen else GREY,
            "x": timing["speedup_vs_dense"], "x_low": ms / timing["p90_ms"],
            "x_high": ms / timing["p10_ms"], "y": score["kl"], "y_error": score["kl_stderr"],
            "label": ""})
    for name in chosen:                                # named once, at its fastest point
        fastest = max((p for p in points if p["series"] == name), key=lambda p: p["x"])
        fastest["label"] = fastest["name"]
    points.sort(key=lambda p: p["series"] == report["method"])     # the page's own on top
    grey = [shown(name) for name in series if name not in chosen]
    note = (f"A prompt of {rows[0]['prompt_len']} tokens alone, "
            f"{escape(rows[0]['dtype'])}. Bars: one standard error of the KL; the 10th to 90th "
            "percentile of the time, against the dense median.")
    if grey:
        note += f" Grey: {escape(', '.join(grey))}."
    return section("How much quality does the speed cost?", f'<p class="note">{note}</p>',
                   speed_chart(points, "KL to the dense model against measured speed-up"))


def table(columns, rows, caption, mine=None):
    """An HTML table in a box that scrolls by itself.

    columns: [(head, function of a row that gives its HTML)]. rows: dicts, or a text, which heads
    the rows after it. mine: the row that is set in bold.
    """
    heads = "".join(f'<th scope="col">{name}</th>' for name, _ in columns)
    lines = []
    for row in rows:
        if isinstance(row, str):
            lines.append(f'<tr><th class="group" colspan="{len(columns)}">{row}</th></tr>')
            continue
        first, *others = (of(row) for _, of in columns)
        cells = f'<th scope="row">{first}</th>' + "".join(f"<td>{c}</td>" for c in others)
        lines.append(f'<tr class="mine">{cells}</tr>' if row is mine else f"<tr>{cells}</tr>")
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
            f"<table><caption><span>{escape(caption)}</span></caption><thead><tr>{heads}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></div>")


def method_cell(row):
    ink = "var(--ink)" if row["name"] == "dense" else colour(row["name"])
    return f'<span class="key hue" style="--m:{ink}"></span>{escape(shown(row["name"]))}'


def small(value):
    return f"<small>{value}</small>"


def plus_minus(x, digits):
    return f"± {x:.{digits}f}"


def eval_section(evals, scores, mine):
    """The readable columns of eval.json: means; items and per-block figures stay in the file."""
    if not evals:
        return None
    first = scores[0]
    columns = [
        ("method", method_cell),
        ("KL, nats a token", lambda r: f"{r['kl']:.4f} {small(plus_minus(r['kl_stderr'], 4))}"),
        ("same likeliest token", lambda r: percent(r["top1_agreement"])),
    ]
    for text in first["ppl_ratio"]:
        columns.append((f"perplexity, {escape(text_name(text))}", ppl_cell(text)))
    columns += [("FLOPs saved", lambda r: percent(r["flops_saved_prefill"])),
                ("tokens skipped", lambda r: percent(r["sparsity_prefill"]))]
    for task, got in first["tasks"].items():
        columns.append((escape(task), task_cell(task, figure_of(got))))
    if any(row.get("retention_pooled") is not None for row in scores):
        columns.append(("kept above chance", lambda r: percent(r.get("retention_pooled"))))
    config = evals[0]["config"]
    settings = config["settings"]
    n = len(first.get("kl_items", []))
    said = [f"{n} held-out samples" if n else "", f"protocol {settings.get('protocol', 'causal')}",
            str(config.get("dtype", "")), "perplexity beside its ratio to dense"]
    return section("How good is it?",
                   table(columns, scores, ", ".join(filter(None, said)), mine))


def ppl_cell(text):
    """The perplexity of a text, and how many times the dense one it is."""
    def cell(row):
        if text not in row["ppl"]:
            return "–"
        times = f"{row['ppl_ratio'][text]:.3f}×" if row["name"] != "dense" else ""
        return f"{figure(row['ppl'][text])} {small(times)}"
    return cell


def figure_of(got):
    """The name of a task's accuracy: normalised by length, where it has that."""
    return "acc" if got.get("acc_norm") is None else "acc_norm"


def task_cell(task, key):
    """The accuracy of a task, with its standard error."""
    def cell(row):
        got = row["tasks"].get(task)
        if got is None or got.get(key) is None:
            return "–"
        return f"{percent(got[key])} {small(plus_minus(100 * got['stderr'], 1))}"
    return cell


BENCH_COLUMNS = [
    ("method", method_cell),
    ("median ms", lambda r: figure_ms(r["median_ms"])),
    ("speed-up", lambda r: f"{r['speedup_vs_dense']:.2f}×" if r["name"] != "dense" else "1"),
    ("the FLOPs allow", lambda r: f"{r['flops_bound']:.2f}×" if is_routed(r) else "–"),
    ("10 to 90 %", lambda r: small(f"{figure_ms(r['p10_ms'])} – {figure_ms(r['p90_ms'])}")),
    ("tokens a second", lambda r: f"{r['tokens_per_s']:.0f}"),
    ("tokens skipped", lambda r: percent(r[f"sparsity_{r['phase']}"])),
    ("K/V, MB", lambda r: f"{r['kv_bytes'] / 2**20:.1f}"),
]


def figure_ms(ms):
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}"


def bench_section(benches, mine):
    """A table a bench.json: each has a dense model of its own, measured in turns with the rest."""
    if not benches:
        return None
    tables = []
    for result in benches:
        config = result["config"]
        said = [config.get("device", ""), config.get("dtype", "")]
        caption = ", ".join(str(s) for s in said if s)
        if len(benches) > 1 and result["label"]:
            caption = f"{shown(result['label'])}: {caption}"
        tables.append(table(BENCH_COLUMNS, grouped(result, mine), caption))
    return section("How fast is it?", *tables)


def grouped(result, mine):
    """Rows of a bench.json, a heading before those of each phase, batch and prompt length."""
    out, last = [], None
    rows = named(result)
    for row in sorted(rows, key=lambda r: (r["phase"] == "decode", *shape(r)[1:])):
        if shape(row) != last:
            batch = "one prompt" if row["batch_size"] == 1 else f"{row['batch_size']} prompts"
            doing = "reading" if row["phase"] == "prefill" else "a decoded token after"
            out.append(f"{doing} {batch} of {row['prompt_len']} tokens")
            last = shape(row)
        out.append(row)
    return out


# ------------------------------------------------------------------------------------------------
# settings and versions


def settings_section(report, evals, benches):
    files = [("this page", report["config"])]
    for kind, results in (("eval.json", evals), ("bench.json", benches)):
        files += [(f"{kind} {result['label']}".strip(), result["config"]) for result in results]
    parts = [config_list(name, config) for name, config in files]
    date = str(report["config"].get("date", ""))[:10]
    commit = report["config"].get("commit", "unknown")
    made = escape(f"Made by analysis/report.py at commit {commit}, {date}.")
    return ("<section>\n<details><summary>Settings and versions</summary>\n" + "\n".join(parts)
            + f"</details>\n</section>\n<footer>{made}</footer>")


def config_list(name, config):
    """Versions as a list, settings as they would be typed."""
    pairs = [(key, value) for key, value in config.items()
             if not isinstance(value, dict) and value not in (None, "")]
    rows = "".join(f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
                   for key, value in pairs)
    flags = [f"--{key} {value}" for key, value in config.get("settings", {}).items()
             if value not in (None, False, [], "")]
    return (f"<h3>{escape(name)}</h3><dl class=\"pairs\">{rows}</dl>"
            f'<p class="flags">{escape("  ".join(flags))}</p>')
