"""The script and the style of the page: tokens to choose from, and what belongs to the chosen one."""

STYLE = """
.tokens { display: flex; flex-wrap: wrap; gap: 2px;
  font: .95rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.tokens button { all: unset; white-space: pre; padding: .08rem .22rem; border-radius: .25rem; cursor: default;
  outline: 1px solid var(--grid); outline-offset: -1px; min-width: .5rem; color: var(--ink); }
.tokens button.asked { cursor: pointer; }
.tokens button.asked:hover, .tokens button:focus-visible { outline: 2px solid var(--accent); }
.tokens button.chosen { outline: 3px solid var(--ink); }
.panel { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; padding: .8rem 1rem; }
.lens td { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .78rem; white-space: pre;
  padding: .1rem .35rem; border: 1px solid var(--grid); max-width: 8rem; overflow: hidden; text-overflow: ellipsis; }
.lens th { font-size: .78rem; padding: .1rem .35rem; white-space: pre; }
.lens td.right { font-weight: 700; text-decoration: underline; }
.lens .chosen { box-shadow: inset 0 0 0 2px var(--ink); }
.heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .5rem; }
.heads figure { padding: .35rem; cursor: pointer; }
.heads figure.chosen { outline: 3px solid var(--accent); }
.heads canvas { width: 100%; image-rendering: pixelated; display: block; }
.heads figcaption { font-size: .72rem; color: var(--soft); margin-top: .15rem; }
.bar { display: flex; gap: .4rem; flex-wrap: wrap; margin: 0 0 .6rem; align-items: center; }
.bar button { font: inherit; padding: .15rem .7rem; border-radius: 1rem; border: 1px solid var(--grid);
  background: var(--card); color: var(--ink); cursor: pointer; }
.bar button.chosen { border-color: var(--accent); box-shadow: inset 0 0 0 1px var(--accent); }
.scale { display: inline-block; width: 8rem; height: .7rem; border-radius: .2rem; border: 1px solid var(--grid); }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .8rem; }
h3.small { font-size: .85rem; color: var(--soft); margin: .8rem 0 .3rem; font-weight: 600; }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("seen").textContent);
const $ = id => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
};
const dots = blanks => "\u00b7".repeat(blanks.length);
const show = text => text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/^ +| +$/g, dots);
const percent = logprob => {
  const p = 100 * Math.exp(logprob);
  return (p >= 10 ? p.toFixed(0) : p >= 0.1 ? p.toFixed(1) : p.toExponential(0)) + "%";
};
const warm = share => `color-mix(in srgb, #e07b1a ${(100 * Math.min(1, share)).toFixed(0)}%, transparent)`;
const cool = share => `color-mix(in srgb, #2f7fd6 ${(100 * Math.min(1, share)).toFixed(0)}%, transparent)`;
const surprise = logprob => warm(-logprob / 12);
const sure = logprob => cool(0.85 * Math.exp(logprob));
const about = Object.fromEntries(data.predictions.map((p, i) => [p.place, i]));
let chosen = Math.max(0, data.predictions.findLastIndex(p => p.known));
let head = null;

function told(p) {
  const known = p.known ? "" : " (likeliest)";
  return `${show(p.token.text)}${known}: ${percent(p.logprob)}, log-probability ${p.logprob.toFixed(3)}, ` +
    `rank ${p.rank + 1}, entropy ${p.entropy.toFixed(2)} nats`;
}

function drawTokens() {
  const places = data.tokens.map((token, place) => ({ token, p: data.predictions[about[place]] }));
  const next = data.predictions[about[data.tokens.length]];
  if (next) places.push({ token: next.token, p: next });
  $("tokens").replaceChildren(...places.map(({ token, p }) => {
    const text = show(p && !p.known ? p.token.text + "?" : token.text);
    const node = make("button", { textContent: text, type: "button", title: p ? told(p) : `token ${token.id}` });
    if (!p) return node;
    node.className = "asked" + (data.predictions[chosen] === p ? " chosen" : "");
    node.style.background = surprise(p.logprob);
    node.onclick = () => choose(data.predictions.indexOf(p));
    return node;
  }));
}

function drawChosen() {
  const p = data.predictions[chosen];
  $("told").textContent = told(p);
  $("top").replaceChildren(...p.top.map(t => make("tr", {},
    make("td", { textContent: show(t.text) }), make("td", { textContent: percent(t.logprob) }),
    make("td", { textContent: t.logprob.toFixed(3) }))));
  const all = [...p.attribution, ...(p.source_attribution || [])].map(Math.abs);
  const most = Math.max(...all, 1e-9);
  const colored = (tokens, values) => tokens.map((token, i) => {
    const v = values[i];
    const node = make("button", { textContent: show(token.text), type: "button", title: `${v.toFixed(4)} nats` });
    node.style.background = (v < 0 ? warm : cool)(Math.abs(v) / most);
    return node;
  });
  $("attribution").replaceChildren(...colored(data.tokens, p.attribution));
  $("most").textContent = most.toPrecision(3);
  if (data.source) $("source-attribution").replaceChildren(...colored(data.source, p.source_attribution));
}

function drawLens() {
  const layers = data.predictions[0].lens.length;
  const rows = [make("tr", {}, make("th", { textContent: "layer" }),
    ...data.predictions.map(p => make("th", { textContent: show(p.token.text), title: told(p) })))];
  for (let layer = layers - 1; layer >= 0; layer--) {
    const name = layer ? String(layer) : "embedding";
    rows.push(make("tr", {}, make("th", { textContent: name }), ...data.predictions.map((p, i) => {
      const own = p.lens[layer], best = own.top[0];
      const cell = make("td", { textContent: show(best.text) });
      cell.title = `layer ${name}\n` + own.top.map(t => `${show(t.text)}  ${percent(t.logprob)}`).join("\n") +
        `\n${show(p.token.text)}: ${percent(own.logprob)}, rank ${own.rank + 1}`;
      cell.style.background = sure(best.logprob);
      cell.className = (own.rank === 0 ? "right" : "") + (i === chosen ? " chosen" : "");
      cell.onclick = () => choose(i);
      return cell;
    })));
  }
  $("lens").replaceChildren(...rows);
}

const KINDS = { self: "in the text", cross: "from the target to the source", encoder: "in the source" };
const KEYS = { self: () => data.tokens, cross: () => data.source, encoder: () => data.source };
const QUERIES = { self: () => data.tokens, cross: () => data.tokens, encoder: () => data.source };
const maps = Object.fromEntries(Object.entries(data.attention).map(([kind, m]) =>
  [kind, { shape: m.shape, bytes: Uint8Array.from(atob(m.bytes), c => c.charCodeAt(0)) }]));
let kind = Object.keys(maps)[0];

function drawMap(canvas, layer, which) {
  const [, heads, queries, keys] = maps[kind].shape, size = queries * keys;
  const start = (layer * heads + which) * size;
  canvas.width = keys;
  canvas.height = queries;
  const context = canvas.getContext("2d"), image = context.createImageData(keys, queries);
  for (let i = 0; i < size; i++) {
    const v = maps[kind].bytes[start + i];
    image.data.set([47, 127, 214, Math.round(255 * Math.sqrt(v / 255))], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

function drawHeads() {
  if (!kind) return;
  $("kinds").replaceChildren(...Object.keys(maps).map(k => make("button", {
    textContent: KINDS[k], type: "button", className: k === kind ? "chosen" : "",
    onclick: () => { kind = k; head = null; drawHeads(); } })));
  const [layers, heads] = maps[kind].shape;
  const figures = [];
  for (let layer = 0; layer < layers; layer++) {
    for (let which = 0; which < heads; which++) {
      const canvas = make("canvas");
      drawMap(canvas, layer, which);
      const caption = make("figcaption", { textContent: `layer ${layer + 1}, head ${which + 1}` });
      const figure = make("figure", {}, canvas, caption);
      figure.className = head && head[0] === layer && head[1] === which ? "chosen" : "";
      figure.onclick = () => { head = [layer, which]; drawHeads(); };
      figures.push(figure);
    }
  }
  $("heads").replaceChildren(...figures);
  drawSeen();
}

function drawSeen() {
  const p = data.predictions[chosen], [layers, heads, queries, keys] = maps[kind].shape;
  const query = Math.min(p.row, queries - 1);
  const values = new Float64Array(keys);
  const among = head ? [head] : Array.from({ length: layers * heads }, (_, i) => [Math.floor(i / heads), i % heads]);
  for (const [layer, which] of among)
    for (let k = 0; k < keys; k++)
      values[k] += maps[kind].bytes[((layer * heads + which) * queries + query) * keys + k] / 255 / among.length;
  const most = Math.max(...values, 1e-9);
  const where = show(QUERIES[kind]()[query].text);
  $("seen-from").textContent = `What "${where}" (place ${query + 1}) attends to, ` +
    (head ? `layer ${head[0] + 1}, head ${head[1] + 1}` : "the mean over all heads; choose one below");
  $("seen-tokens").replaceChildren(...KEYS[kind]().map((token, k) => {
    const node = make("button", { textContent: show(token.text), type: "button", title: percent(Math.log(values[k])) });
    node.style.background = cool(values[k] / most);
    return node;
  }));
}

function choose(index) {
  chosen = index;
  drawTokens();
  drawChosen();
  drawLens();
  if (kind) drawSeen();
}

choose(chosen);
drawHeads();
"""
