// Generate and chat: the prompt goes out, the text streams in, beside it route, timeline and rebuilds.

import { post, reason } from "./console.js";
import { inMs, keyOf, rangeOf, shortOf, Timeline } from "./timeline.js";

const at = (id) => document.getElementById(id);
const [transcript, form, prompt, send, stop] = ["transcript", "composer", "prompt", "send", "stop"].map(at);
const [chain, chainEmpty, numbers, events, eventsEmpty] =
  ["chain", "chain-empty", "numbers", "events", "events-empty"].map(at);
const empty = at("empty");
const ABOUT_CHAIN = chainEmpty.textContent;
const timeline = new Timeline(at("timeline"), at("readout"));
const MEMORY = "swarm-conversation";
const QUIET_S = 1; // without a token for so long, the page says so

let messages = [];
let running = null;

function add(name, className, content, parent) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = content;
  parent.append(made);
  return made;
}

// ---- the stream

async function* sentEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

function clearWork(aboutChain) {
  timeline.clear();
  events.replaceChildren();
  chain.replaceChildren();
  eventsEmpty.hidden = false;
  chainEmpty.hidden = false;
  chainEmpty.textContent = aboutChain;
  numbers.textContent = "";
}

class Run {
  constructor(answer, chat) {
    this.abort = new AbortController();
    this.answer = answer;
    this.chat = chat;
    this.forgotten = false; // somebody has begun anew meanwhile
    this.text = "";
    this.count = 0;
    this.rebuilds = 0;
    this.began = this.lastAt = performance.now();
    this.hops = [];
    this.open = null;
    clearWork("Looking for a route…");
    this.ticking = setInterval(() => this.tick(), 200);
  }

  async follow(body) {
    const response = await post("/api/generate", body, this.abort.signal);
    if (!response.ok) return this.fail(await reason(response));
    for await (const event of sentEvents(response)) {
      if (event.event === "route") this.route(event);
      else if (event.event === "token") this.token(event);
      else if (event.event === "error") return this.fail(event.message);
      else if (event.event === "done") return this.done(event);
    }
    this.fail("The gateway ended the stream.");
  }

  route(event) {
    this.hops = event.hops;
    timeline.route(event.hops);
    chainEmpty.hidden = true;
    if (event.changes.length) this.rebuilt(event);
    this.drawChain(event);
  }

  rebuilt(event) {
    this.rebuilds += 1;
    eventsEmpty.hidden = true;
    const words = event.changes.map(({ lost, taken_by: by }) => {
      const to = by.map((hop) => (by.length > 1 ? `${shortOf(hop.peer_id)} (${rangeOf(hop.layers)})` : shortOf(hop.peer_id)));
      return `lost ${shortOf(lost.peer_id)}, layers ${rangeOf(lost.layers)} taken by ${to.join(", ")}`;
    });
    const item = document.createElement("li");
    add("span", "at", `Token ${event.index}: `, item);
    add("span", "what", words.join("; "), item);
    const stall = add("span", "stall", `, stall ${event.stalled_s.toFixed(1)} s`, item);
    add("span", "why", event.reason, item);
    events.prepend(item);
    while (events.children.length > 50) events.lastChild.remove();
    const { lost, taken_by: by } = event.changes[0];
    const label = `${shortOf(lost.peer_id)} → ${by.map((hop) => shortOf(hop.peer_id)).join(", ")}`;
    this.open = { stall, mark: timeline.addBreak(event.index, label), label };
    const seam = add("span", "seam", "", this.answer);
    seam.title = words.join("; ");
  }

  token(event) {
    this.count = event.index + 1;
    this.lastAt = performance.now();
    this.text += event.text;
    const near = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 60;
    this.answer.append(event.text);
    if (near) transcript.scrollTop = transcript.scrollHeight;
    if (this.open) {
      const stall = `stall ${event.gap_s.toFixed(event.gap_s < 10 ? 2 : 1)} s`;
      this.open.stall.textContent = `, ${stall}`;
      this.open.mark.textContent = `${this.open.label}, ${stall}`;
      this.open = null;
    }
    if (event.index === 0) this.firstAt = performance.now();
    timeline.token(event);
    this.drawNumbers();
  }

  drawNumbers() {
    const rate = this.count > 1 ? (1e3 * (this.count - 1)) / (this.lastAt - this.firstAt) : 0;
    const said = [`${this.count} token${this.count === 1 ? "" : "s"}`];
    if (rate) said.push(`${rate.toFixed(1)} a second`);
    if (this.firstAt) said.push(`first after ${((this.firstAt - this.began) / 1e3).toFixed(2)} s`);
    if (this.rebuilds) said.push(`${this.rebuilds} rebuild${this.rebuilds === 1 ? "" : "s"}`);
    numbers.textContent = said.join(", ");
    for (const card of chain.querySelectorAll(".hop:not(.lost)"))
      card.querySelector(".ms").textContent = inMs(timeline.middle(card.hop));
  }

  drawChain(event) {
    chain.replaceChildren();
    const lost = event.changes.map((change) => change.lost);
    const fresh = new Set(event.changes.flatMap((change) => change.taken_by.map(keyOf)));
    const cards = [
      ...lost.map((hop) => ({ hop, kind: "lost" })),
      ...event.hops.map((hop) => ({ hop, kind: fresh.has(keyOf(hop)) ? "fresh" : "" })),
    ].sort((a, b) => a.hop.layers[0] - b.hop.layers[0] || (a.kind === "lost" ? -1 : 1));
    for (const { hop, kind } of cards) {
      const card = document.createElement("li");
      card.className = `hop ${kind}`;
      card.hop = hop;
      card.title = hop.peer_id;
      card.dataset.peer = hop.peer_id;
      const top = add("div", "line top-line", "", card);
      add("code", "", shortOf(hop.peer_id), top);
      if (hop.own && form.dataset.control && kind !== "lost") this.addKill(hop, top);
      const line = add("div", "line", "", card);
      add("span", "", rangeOf(hop.layers), line);
      add("span", kind === "lost" ? "" : "ms", kind === "lost" ? `lost at token ${event.index}` : "…", line);
      chain.append(card);
    }
  }

  addKill(hop, parent) {
    const button = add("button", "danger", `Kill ${hop.own}`, parent);
    button.type = "button";
    button.title = "Kill this peer, as if its power failed: this gateway started it";
    button.addEventListener("click", async () => {
      button.disabled = true;
      const response = await post(`/api/peers/${encodeURIComponent(hop.own)}/kill`).catch(() => null);
      if (response?.ok) return;
      eventsEmpty.hidden = true;
      const item = document.createElement("li");
      item.textContent = response ? await reason(response) : "The gateway does not answer.";
      events.prepend(item);
      button.disabled = false;
    });
  }

  tick() {
    const silent = (performance.now() - this.lastAt) / 1e3;
    const waiting = silent > QUIET_S;
    chain.classList.toggle("waiting", waiting);
    if (waiting && this.count) numbers.textContent = `no token for ${silent.toFixed(1)} s`;
    else if (waiting) numbers.textContent = `waiting for the first token, ${silent.toFixed(0)} s`;
    this.tellMissing(waiting ? document.querySelector(".pill [data-nobody]").dataset.nobody : "");
  }

  tellMissing(nobody) {
    const gaps = (nobody.match(/\d+:\d+/g) ?? []).map((gap) => gap.split(":").map(Number));
    for (const { hop, classList } of chain.children)
      classList.toggle("missing", gaps.some(([start, end]) => start < hop.layers[1] && hop.layers[0] < end));
    if (this.hops.length) chainEmpty.hidden = !nobody;
    const told = nobody && `Waiting: ${nobody}. The text goes on when a peer with them joins. `;
    if (!nobody || chainEmpty.textContent.startsWith(told)) return;
    chainEmpty.textContent = told;
    if (!form.dataset.control) return;
    const link = add("a", "", "Start one here", chainEmpty);
    link.href = `/peers?layers=${gaps[0].join(":")}`;
    link.target = "_blank"; // leaving this page would stop the text
  }

  done(event) {
    const ends = { length: "at the limit of tokens", stop: "", cancelled: "stopped" };
    this.close(ends[event.finish_reason] ?? event.finish_reason);
  }

  fail(message) {
    this.close("");
    if (this.forgotten) return;
    if (!this.text) this.answer.remove();
    add("div", "turn problem", message, transcript);
    if (!this.hops.length) chainEmpty.textContent = "No route.";
  }

  close(note) {
    clearInterval(this.ticking);
    if (this.forgotten) return;
    chain.classList.remove("waiting");
    if (this.hops.length) chainEmpty.hidden = true;
    this.answer.classList.remove("live");
    if (note) add("span", "end", note, this.answer);
    if (this.count) this.drawNumbers();
    else numbers.textContent = "";
  }
}

// ---- the form

async function start() {
  const text = prompt.value.trim();
  if (!text || running || !form.reportValidity()) return;
  const chat = form.elements.mode.value === "chat";
  empty.remove();
  if (!chat) clear();
  messages.push({ role: "user", content: text });
  add("div", chat ? "turn user" : "turn prompt", text, transcript);
  const answer = add("div", chat ? "turn answer live" : "turn answer inline live", "", transcript);
  transcript.scrollTop = transcript.scrollHeight;
  const body = { max_tokens: at("max-tokens").valueAsNumber, temperature: at("temperature").valueAsNumber };
  if (at("seed").value) body.seed = at("seed").valueAsNumber;
  if (chat) body.messages = messages;
  else body.prompt = text;
  prompt.value = "";
  const run = (running = new Run(answer, chat));
  busy(true);
  try {
    await run.follow(body);
  } catch (error) {
    if (error.name === "AbortError") run.close("stopped");
    else run.fail("The gateway does not answer.");
  }
  running = null;
  busy(false);
  if (run.forgotten) return;
  if (!run.text && !prompt.value) prompt.value = text; // to be sent again
  if (chat && run.text) messages.push({ role: "assistant", content: run.text });
  else if (chat) messages.pop();
  else messages = [];
  remember();
}

/** For when this page is loaded again in this tab: what was said, and of an answer under way what there is of it. */
function remember() {
  const answer = running?.text ? [{ role: "assistant", content: running.text }] : [];
  sessionStorage.setItem(MEMORY, JSON.stringify(running && !running.chat ? [] : [...messages, ...answer]));
}

function busy(is) {
  send.hidden = is;
  stop.hidden = !is;
  transcript.setAttribute("aria-busy", is);
  if (!is && !matchMedia("(pointer: coarse)").matches) prompt.focus();
}

function clear() {
  messages = [];
  transcript.replaceChildren();
  sessionStorage.removeItem(MEMORY);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    start();
  }
});
stop.addEventListener("click", () => running?.abort.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort.abort();
});
at("new").addEventListener("click", () => {
  if (running) {
    running.forgotten = true;
    running.abort.abort();
  }
  clear();
  clearWork(ABOUT_CHAIN);
  transcript.append(empty);
  prompt.focus();
});
addEventListener("pagehide", remember);

messages = JSON.parse(sessionStorage.getItem(MEMORY) ?? "[]");
if (messages.length) empty.remove();
for (const { role, content } of messages) add("div", role === "user" ? "turn user" : "turn answer", content, transcript);
