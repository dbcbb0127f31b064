// The hop timeline: for each token a bar of queue, compute and wire, for all hops together and for each hop in a lane.
// Bars are drawn in milliseconds in the SVG's own units, so that a change of scale is a change of its viewBox.

const SVG = "http://www.w3.org/2000/svg";
const STEP = 8; // pixels a token
const KEPT = 1024; // tokens that are drawn
const WINDOW = 64; // tokens of a running median
const NICE = [1, 2, 3, 5, 8, 10];
const KINDS = ["queue", "compute", "wire", "other"];

export const shortOf = (peerId) => peerId.slice(-6);
export const rangeOf = (layers) => `${layers[0]}:${layers[1]}`;
export const keyOf = (hop) => `${hop.peer_id} ${rangeOf(hop.layers)}`;
export const inMs = (ms) => (ms < 10 ? ms.toFixed(1) : Math.round(ms).toLocaleString("en")) + " ms";

export function median(values) {
  if (!values.length) return 0;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function nice(ms) {
  const power = 10 ** Math.floor(Math.log10(Math.max(ms, 0.1)));
  return NICE.find((n) => n * power >= ms) * power;
}

function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
}

function text(name, className, parent) {
  const made = document.createElement(name);
  made.className = className;
  parent.append(made);
  return made;
}

class Lane {
  constructor(box, height, before) {
    this.box = document.createElement("div");
    this.box.className = "lane";
    box.insertBefore(this.box, before);
    const label = text("div", "lane-label", this.box);
    this.name = text("b", "", label);
    this.range = text("span", "range", label);
    this.middle = text("span", "", label);
    this.parts = text("span", "", label);
    this.svg = element("svg", { height, preserveAspectRatio: "none", "aria-hidden": "true" }, this.box);
    this.cursor = element("rect", { class: "cursor", width: 1, visibility: "hidden" }, this.svg);
    this.bars = element("g", {}, this.svg);
    this.marks = element("g", {}, this.svg);
    this.recent = [];
    this.scale = 1;
  }

  /** parts: milliseconds by KINDS, from the bottom up. */
  add(index, parts) {
    const bar = element("g", {}, this.bars);
    bar.index = index;
    let height = 0;
    parts.forEach((ms, kind) => {
      if (ms <= 0) return;
      element("rect", { class: `bar-${KINDS[kind]}`, x: index + 0.1, y: -(height + ms), width: 0.8, height: ms }, bar);
      height += ms;
    });
    this.recent.push([...parts, height]);
    if (this.recent.length > WINDOW) this.recent.shift();
    this.last = index;
  }

  /** A token that was guessed ahead, and came with the pass of the one before. */
  addGuess(index) {
    const mark = element("line", { class: "guess", x1: index + 0.1, x2: index + 0.9, y1: 0, y2: 0 }, this.bars);
    mark.index = index;
  }

  addBreak(index) {
    const line = element("line", { class: "break", x1: index, x2: index, y1: -1e6, y2: 0 }, this.marks);
    line.index = index;
  }

  medians() {
    return [0, 1, 2, 3, 4].map((part) => median(this.recent.map((values) => values[part])));
  }

  /** Draw tokens first ... first + count - 1. */
  fit(first, count) {
    const heights = this.recent.map((values) => values[4]).sort((a, b) => a - b);
    const wanted = nice(1.15 * (heights[Math.floor(0.9 * (heights.length - 1))] ?? 1));
    if (wanted > this.scale || wanted < 0.6 * this.scale) this.scale = wanted;
    this.svg.setAttribute("viewBox", `${first} ${-this.scale} ${count} ${this.scale}`);
    this.svg.setAttribute("width", count * STEP);
    this.cursor.setAttribute("y", -this.scale);
    this.cursor.setAttribute("height", this.scale);
    for (const group of [this.bars, this.marks])
      while (group.firstChild && group.firstChild.index < first) group.firstChild.remove();
  }
}

export class Timeline {
  constructor(box, readout) {
    this.box = box;
    this.readout = readout;
    box.addEventListener("pointermove", (event) => {
      const x = event.clientX - box.getBoundingClientRect().left + box.scrollLeft;
      this.select(this.first + Math.floor(x / STEP));
    });
    box.addEventListener("scroll", () => this.label());
    box.addEventListener("pointerleave", () => this.select(null));
    box.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const from = this.selected ?? this.first + this.tokens.length;
      const to = Math.min(this.first + this.tokens.length - 1, Math.max(this.first, from + moves[event.key]));
      this.select(to);
      const x = (to - this.first) * STEP;
      if (x < box.scrollLeft || x > box.scrollLeft + box.clientWidth - STEP) box.scrollLeft = x - box.clientWidth / 2;
    });
    new ResizeObserver(() => this.box.style.setProperty("--seen", `${this.box.clientWidth}px`)).observe(box);
    this.clear();
  }

  clear() {
    this.box.replaceChildren();
    this.tokens = [];
    this.first = 0;
    this.selected = null;
    this.lanes = new Map();
    this.breaks = [];
    this.readout.textContent = "\u00a0";
    const strip = text("div", "lane", this.box);
    this.strip = element("svg", { class: "strip", height: 16, "aria-hidden": "true" }, strip);
    this.total = new Lane(this.box, 72, null);
    this.total.name.textContent = "all hops";
    this.total.range.hidden = true;
    this.total.box.hidden = true;
    this.empty = text("p", "empty", this.box);
    this.empty.textContent = "A bar for each token stands here, for all hops together and for each of them.";
  }

  /** Lanes of hops that are no longer on the route stay, marked, for as long as they have bars. */
  route(hops) {
    this.total.box.hidden = false;
    this.empty.remove();
    const current = new Set(hops.map(keyOf));
    for (const [key, lane] of this.lanes) lane.box.classList.toggle("gone", !current.has(key));
    for (const hop of hops) {
      if (this.lanes.has(keyOf(hop))) continue;
      const after = [...this.lanes.values()].find((lane) => lane.start > hop.layers[0]);
      const lane = new Lane(this.box, 46, after ? after.box : null);
      lane.start = hop.layers[0];
      lane.box.dataset.peer = hop.peer_id;
      lane.name.textContent = shortOf(hop.peer_id);
      lane.name.title = hop.peer_id;
      lane.range.textContent = `layers ${rangeOf(hop.layers)}`;
      this.lanes.set(keyOf(hop), lane);
      this.lanes = new Map([...this.lanes].sort(([, a], [, b]) => a.start - b.start));
    }
    this.later();
  }

  addBreak(index, label) {
    const mark = element("text", { y: 12 }, this.strip);
    mark.textContent = label;
    this.breaks.push({ index, mark });
    for (const lane of [this.total, ...this.lanes.values()]) lane.addBreak(index);
    this.later();
    return mark;
  }

  token(token) {
    const sums = [0, 0, 0, 0];
    for (const hop of token.hops) {
      const parts = [1e3 * hop.queue_s, 1e3 * hop.compute_s, 1e3 * hop.link_s];
      parts.forEach((ms, kind) => (sums[kind] += ms));
      this.lanes.get(keyOf(hop))?.add(token.index, [...parts, 0]);
    }
    const guessed = token.index > 0 && !token.hops.length;
    sums[3] = Math.max(0, 1e3 * token.gap_s - sums[0] - sums[1] - sums[2]);
    // The first token's bar is the whole prefill, which would hide all others.
    if (guessed) this.total.addGuess(token.index);
    else if (token.index > 0) this.total.add(token.index, sums);
    this.tokens.push(token);
    if (this.tokens.length > KEPT) {
      this.tokens.shift();
      this.first += 1;
    }
    this.later();
  }

  /** The median of a hop's time for a token, in milliseconds; 0 if it has none yet. */
  middle(hop) {
    return this.lanes.get(keyOf(hop))?.medians()[4] ?? 0;
  }

  later() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.draw();
    });
  }

  draw() {
    const atEnd = this.box.scrollLeft + this.box.clientWidth >= this.box.scrollWidth - 2 * STEP;
    const count = Math.max(this.tokens.length, 1);
    for (const [key, lane] of this.lanes) {
      if (lane.box.classList.contains("gone") && (lane.last ?? -1) < this.first) {
        lane.box.remove();
        this.lanes.delete(key);
      }
    }
    for (const lane of [this.total, ...this.lanes.values()]) {
      lane.fit(this.first, count);
      const [queue, compute, wire, , all] = lane.medians();
      if (!lane.recent.length) continue;
      lane.middle.textContent = `p50 ${inMs(all)}`;
      lane.parts.textContent = `queue ${queue.toFixed(1)}, compute ${compute.toFixed(1)}, wire ${wire.toFixed(1)}`;
    }
    this.strip.setAttribute("width", count * STEP);
    this.breaks = this.breaks.filter(({ index, mark }) => index >= this.first || mark.remove());
    if (atEnd) this.box.scrollLeft = this.box.scrollWidth;
    this.label();
  }

  /** The words to each break stand right of it, or left where only there is room for them in what is seen. */
  label() {
    const seen = this.box.scrollLeft;
    for (const { index, mark } of this.breaks) {
      const x = (index - this.first) * STEP;
      const width = mark.getComputedTextLength() + 4;
      const left = x + width > seen + this.box.clientWidth && x - width >= seen;
      mark.setAttribute("x", left ? x - 4 : x + 4);
      mark.setAttribute("text-anchor", left ? "end" : "start");
    }
  }

  select(index) {
    const token = index === null ? undefined : this.tokens[index - this.first];
    this.selected = token ? index : null;
    for (const lane of [this.total, ...this.lanes.values()]) {
      lane.cursor.setAttribute("visibility", token ? "visible" : "hidden");
      if (token) lane.cursor.setAttribute("x", index);
    }
    if (!token) {
      this.readout.textContent = "\u00a0";
      return;
    }
    const hops = token.hops.map(
      (hop) =>
        `${shortOf(hop.peer_id)} ${rangeOf(hop.layers)} queue ${(1e3 * hop.queue_s).toFixed(1)}, ` +
        `compute ${(1e3 * hop.compute_s).toFixed(1)}, wire ${(1e3 * hop.link_s).toFixed(1)}` +
        (hop.batch > 1 ? `, with ${hop.batch - 1} others` : ""),
    );
    const since = token.index ? "after the one before" : "after the request";
    if (!hops.length) hops.push("guessed ahead, it came with the pass of the one before");
    this.readout.textContent = [
      `Token ${token.index} ${JSON.stringify(token.text)}, ${inMs(1e3 * token.gap_s)} ${since}`,
      ...hops,
    ].join(" · ");
  }
}
