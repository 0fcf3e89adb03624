"""The report's pictures: inline SVG and a PNG, made from plain numbers, without a library.

Text in an SVG that shrinks with the screen is not readable on a phone, so each chart is drawn for
two widths, of which the style sheet shows one. Colours come from the page: "hue" takes the
method's colour (--m) and mixes ink into it, which makes it fit light and dark paper.
"""
import base64
import math
import zlib
from html import escape

import numpy as np

WIDTHS = {"wide": 896, "narrow": 340}     # pixels of the page's column, and of a phone's
LETTER = 7.6                              # pixels of a letter of a label, a wide font's
LINE = 14                                 # pixels of a line of labels
LEFT = 44                                 # pixels for the numbers of a vertical axis

# ------------------------------------------------------------------------------------------------
# elements


def tag(name, content="", **attributes):
    """An element. class_ stands for class, text_anchor for text-anchor; numbers get one decimal."""
    said = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if isinstance(value, (int, float)):
            value = f"{value:.1f}".removesuffix(".0")
        said.append(f' {key}="{escape(value)}"')
    return f"<{name}{''.join(said)}>{content}</{name}>"


def words(x, y, text, anchor="start", **more):
    return tag("text", escape(text), x=x, y=y, text_anchor=anchor, **more)


def line(x1, y1, x2, y2, class_="grid"):
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def circle(x, y, radius, class_, title=None):
    """A dot; title: what a browser shows where a pointer rests on it."""
    content = tag("title", escape(title)) if title else ""
    return tag("circle", content, cx=x, cy=y, r=radius, class_=class_)


def polyline(points, class_):
    """points: [(x, y)]."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return tag("polyline", points=path, class_=class_)


def hue(ink, *parts):
    """Elements in a series' colour."""
    return tag("g", "".join(parts), class_="hue", style=f"--m:{ink}")


def for_widths(draw, label):
    """A chart for each of WIDTHS: draw(width) gives its elements and its height."""
    out = []
    for name, width in WIDTHS.items():
        parts, height = draw(width)
        box = f"0 0 {width} {height}"
        out.append(tag("svg", "".join(parts), class_=f"chart {name}", role="img",
                       aria_label=label, viewBox=box))
    return "".join(out)


# ------------------------------------------------------------------------------------------------
# ticks


def linear_ticks(low, high, about=5):
    """Round numbers within [low, high], some `about` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [m * power for m in (1, 2, 2.5, 5, 10)]
    step = next(s for s in steps if s >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low, high, most=6):
    """1, 2, 5, 10, ... within [low, high], or the powers of ten alone where these are enough."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    tens = [10.0 ** p for p in range(first, last + 1)]
    ticks = [m * ten for ten in tens for m in (1, 2, 5)]
    ticks, tens = ([t for t in some if low <= t <= high] for some in (ticks, tens))
    return ticks if len(ticks) <= most or len(tens) < 3 else tens


def plain(x):
    """A tick's number without needless digits."""
    return f"{x:.10g}" if abs(x) >= 1e-4 or x == 0 else f"{x:.0e}"


# ------------------------------------------------------------------------------------------------
# the map of tokens and blocks


def skip_map(kept, ink):
    """kept (n_layer, T) bool -> a PNG as data URI: ink where a token skips, clear elsewhere.

    Block 0 at the bottom. A cell is several pixels, so that a browser shrinks the picture, which
    looks better than what it does when it enlarges one.
    """
    wide = max(1, math.ceil(1800 / kept.shape[1]))
    high = 10
    cells = ~kept[::-1].repeat(high, 0).repeat(wide, 1)
    cells[high - 1::high] = False                              # a hair between blocks

    # 1 bit a pixel, an index into the palette; each row begins with the number of its filter, none
    rows = np.packbits(cells, axis=1)
    no_filter = np.zeros((len(rows), 1), np.uint8)
    pixels = np.hstack((no_filter, rows)).tobytes()
    height, width = cells.shape
    header = width.to_bytes(4) + height.to_bytes(4) + bytes((1, 3, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n"
    png += chunk(b"IHDR", header)
    png += chunk(b"PLTE", bytes(3) + bytes.fromhex(ink[1:]))
    png += chunk(b"tRNS", bytes((0, 255)))                     # the first colour is clear
    png += chunk(b"IDAT", zlib.compress(pixels, 9))
    png += chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


def chunk(kind, data):
    """A part of a PNG: length, kind, data, checksum."""
    checksum = zlib.crc32(kind + data)
    return len(data).to_bytes(4) + kind + data + checksum.to_bytes(4)


# ------------------------------------------------------------------------------------------------
# the schedule


def schedule_chart(sparsity, influence):
    """Bars of the share of tokens that skip a block, over the blocks' influence."""
    n = len(sparsity)
    every = 5 if n > 12 else 1                                 # blocks that get a number

    def draw(width):
        right = width - 6
        step = (right - LEFT) / n
        middle = [LEFT + (l + 0.5) * step for l in range(n)]
        parts = bars(sparsity, middle, right, 28, 190)
        parts += influence_line(influence, middle, right, 238, 318)
        for l in range(0, n, every):
            parts.append(words(middle[l], 336, str(l), "middle"))
        parts.append(words(right, 354, "block", "end", class_="soft"))
        return parts, 360
    return for_widths(draw, "Share of tokens that skip each block, and the blocks' influence")


def bars(sparsity, middle, right, top, bottom):
    """A bar a block, from 0 to 100 %. middle: the middle of each, pixels."""
    parts = [words(0, top - 14, "tokens that skip the block", class_="soft")]
    height = bottom - top
    for share in (0, 0.5, 1):
        y = bottom - share * height
        parts.append(line(LEFT, y, right, y))
        parts.append(words(LEFT - 6, y + 4, f"{100 * share:.0f} %", "end"))
    width = 0.72 * (right - LEFT) / len(sparsity)
    for l, (x, s) in enumerate(zip(middle, sparsity)):
        title = tag("title", f"block {l}: {100 * s:.1f} % of tokens skip it")
        y = bottom - s * height
        parts.append(tag("rect", title, x=x - width / 2, y=y, width=width, height=s * height,
                         class_="bar"))
    return parts


def influence_line(values, middle, right, top, bottom):
    """1 - cosine of each block's input and output, on a logarithmic scale."""
    parts = [words(0, top - 14, "how much it changes its tokens (1 - cosine)", class_="soft")]
    positive = [v for v in values if v > 0]                    # others have no logarithm
    if not positive:
        return parts
    low, high = min(positive) / 1.3, max(positive) * 1.3

    def height(v):
        return bottom - (bottom - top) * math.log(v / low) / math.log(high / low)

    for t in log_ticks(low, high, 4):
        y = height(t)
        parts.append(line(LEFT, y, right, y))
        parts.append(words(LEFT - 6, y + 4, plain(t), "end"))
    there = [l for l, v in enumerate(values) if v > 0]
    dots = {l: (middle[l], height(values[l])) for l in there}
    parts.append(polyline(dots.values(), "thread"))
    for l, (x, y) in dots.items():
        parts.append(circle(x, y, 2.6, "dot", f"block {l}: influence {values[l]:.3g}"))
    return parts


# ------------------------------------------------------------------------------------------------
# quality against speed


def speed_chart(points, about):
    """KL over measured speed-up, with error bars and names beside the points.

    points: dicts of name, series, ink, label ("" for no name), x, x_low, x_high, y, y_error. about:
    the label for those who can't see it.
    """
    low = min(1.0, *(p["x_low"] for p in points))
    high = max(p["x_high"] for p in points)
    pad = 0.06 * max(high - low, 0.1)
    across = low - pad, high + pad

    # rivals may be a hundred times farther from dense than the best: no line's height shows both
    ys = [p["y"] for p in points]
    log = min(ys) > 0 and max(ys) > 12 * min(ys)
    if log:
        up = min(ys) / 1.6, max(ys) * 1.6
    else:
        highest = max(p["y"] + p["y_error"] for p in points)
        up = 0.0, 1.12 * highest or 1.0

    def draw(width):
        frame = Frame(width, 400, across, up, log)
        parts = frame.grid() + frame.threads(points)
        parts += [frame.point(p) for p in points]
        boxes = [frame.box(p) for p in points]
        named = [p for p in points if p["label"]]
        parts += [frame.name(p, boxes) for p in named]
        return parts, frame.height
    return for_widths(draw, about)


class Frame:
    """The plane of a chart: numbers to pixels, grid, and labels that cover nothing."""

    def __init__(self, width, height, across, up, log):
        self.width, self.height = width, height
        self.across, self.up, self.log = across, up, log
        self.right = width - 8
        self.top, self.bottom = 26, height - 44

    def x(self, value):
        low, high = self.across
        return LEFT + (self.right - LEFT) * (value - low) / (high - low)

    def y(self, value):
        low, high = self.up
        value = min(max(value, low), high)
        if self.log:
            low, high, value = map(math.log, (low, high, value))
        return self.bottom - (self.bottom - self.top) * (value - low) / (high - low)

    def grid(self):
        """Axes with their names and ticks."""
        soft = {"class_": "soft"}
        one = self.x(1)
        parts = [
            words(0, 12, "KL to the dense model, nats a token", **soft),
            words(self.right, self.height - 6, "speed-up of the prompt's pass, by the clock",
                  "end", **soft)]
        ticks = log_ticks if self.log else linear_ticks
        for t in ticks(*self.up):
            y = self.y(t)
            parts.append(line(LEFT, y, self.right, y))
            parts.append(words(LEFT - 6, y + 4, plain(t), "end"))
        low, high = self.across
        for t in linear_ticks(low, high, 6 if self.width > 500 else 4):
            x = self.x(t)
            parts.append(line(x, self.top, x, self.bottom))
            parts.append(words(x, self.bottom + 18, f"{plain(t)}×", "middle"))
        parts.append(line(one, self.top, one, self.bottom, "one"))
        parts.append(words(one + 5, self.top + 10, "as fast as dense", **soft))
        if not self.log:                                       # else its 0 is nowhere
            parts.append(circle(one, self.y(0), 5, "dense"))
        parts.append(words(self.right - 4, self.bottom - 8, "better ↘", "end", **soft))
        return parts

    def threads(self, points):
        """A thin line through the points of each series."""
        series = {}
        for p in sorted(points, key=lambda p: p["x"]):
            series.setdefault(p["series"], []).append(p)
        parts = []
        for several in series.values():
            path = [(self.x(p["x"]), self.y(p["y"])) for p in several]
            parts.append(hue(several[0]["ink"], polyline(path, "series")))
        return parts

    def bars(self, p):
        """The ends of a point's error bars: left, top, right, bottom."""
        left, right = self.x(p["x_low"]), self.x(p["x_high"])
        top = self.y(p["y"] + p["y_error"])
        bottom = self.y(p["y"] - p["y_error"])
        return left, top, right, bottom

    def point(self, p):
        """A dot with its two error bars."""
        x, y = self.x(p["x"]), self.y(p["y"])
        left, top, right, bottom = self.bars(p)
        said = (f"{p['name']}: KL {p['y']:.4f} ± {p['y_error']:.4f}, {p['x']:.2f}× as fast "
                f"({p['x_low']:.2f} to {p['x_high']:.2f})")
        return hue(p["ink"], tag("title", escape(said)), line(left, y, right, y, "error"),
                   line(x, top, x, bottom, "error"), circle(x, y, 5, "dot"))

    def box(self, p):
        """What a point with its error bars covers: left, top, right, bottom."""
        x, y = self.x(p["x"]), self.y(p["y"])
        left, top, right, bottom = self.bars(p)
        return min(left, x - 5), min(top, y - 5), max(right, x + 5), max(bottom, y + 5)

    def name(self, p, boxes):
        """The label, where it covers least of `boxes`; its own is added to them."""
        size = LETTER * len(p["label"]) + 4
        frame = LEFT, self.top + LINE, self.right, self.bottom

        def cost(place):
            left, top, _, away = place
            covered = badness(left, top, size, boxes, frame)
            # two lines off its point a label may seem another's: rather let it touch something
            return covered + 60 * away

        left, top, anchor, _ = min(self.places(p, size), key=cost)
        boxes.append((left, top, left + size, top + LINE))
        held = {"start": left + 2, "middle": left + size / 2, "end": left + size - 2}
        said = words(held[anchor], top + LINE - 3, p["label"], anchor, class_="name")
        return hue(p["ink"], said)

    def places(self, p, size):
        """Where a label of this width may stand, better ones first.

        Each is (left, top, where its text is held, how far it is from its point, in lines).
        """
        left, top, right, bottom = self.box(p)
        x, y = self.x(p["x"]), self.y(p["y"])
        yield right + 5, y - LINE / 2, "start", 0
        yield left - 5 - size, y - LINE / 2, "end", 0
        aside = abs(self.right - size / 2 - x) / 100           # of one flush with the frame
        for away in (0, 0.5, 1):                               # ever farther below and above
            gap = LINE * away
            for height in (bottom + 1 + gap, top - 1 - LINE - gap):
                yield x - size / 2, height, "middle", away
                yield self.right - size, height, "end", away + aside
            for height in (y + 3 + gap, y - 3 - LINE - gap):
                yield x + 7, height, "start", away
                yield x - 7 - size, height, "end", away


def badness(left, top, width, boxes, frame):
    """How much a label covers of others, and how far it leaves the frame, in pixels.

    boxes, frame: left, top, right, bottom.
    """
    right, bottom = left + width, top + LINE
    covered = 0.0
    for a, b, c, d in boxes:
        wide = min(right, c) - max(left, a)
        high = min(bottom, d) - max(top, b)
        covered += max(0, wide) * max(0, high)
    over = (frame[0] - left, frame[1] - top, right - frame[2], bottom - frame[3])
    outside = sum(max(0, way) for way in over)
    return covered + 50 * outside
