// The dashboard: asks for what is new while it is seen, keeps it, and draws it.

const SVG = "http://www.w3.org/2000/svg";
const MIN_RATED_SECONDS = 0.5;
const MAX_POINTS = 2048;
const MAX_UPDATES = 256;
const MAX_SAMPLES = 64;
const SHOWN_UPDATES = 12;
const RETRY_MS = 2000;
const FIGURE_SECONDS = 5;

const seen = { source: "", last: 0, points: {}, updates: [], samples: new Map(), state: null };

function forget() {
  Object.assign(seen, { source: "", last: 0, points: {}, updates: [], samples: new Map(), state: null });
}

// ---- what is kept

/** Take an answer in; false if it continues another history than the one that is kept. */
function take(state) {
  const part = state.history;
  const goesOn = seen.source === part.source;
  if (!goesOn && seen.last) {
    forget();
    return false;
  }
  seen.source = part.source;
  seen.last = part.last;
  seen.state = state;
  for (const [name, values] of Object.entries(part.points)) {
    seen.points[name] = (seen.points[name] || []).concat(values);
  }
  while (seen.points.time.length > MAX_POINTS) {
    for (const name of Object.keys(seen.points)) seen.points[name] = seen.points[name].filter((_, i) => i % 2 === 0);
  }
  seen.updates = seen.updates.concat(part.updates).sort((a, b) => a.time - b.time).slice(-MAX_UPDATES);
  for (const sample of part.samples) seen.samples.set(`${sample.replica || ""} ${sample.request_id} ${sample.index}`, sample);
  const byTime = [...seen.samples].sort((a, b) => b[1].time - a[1].time);
  seen.samples = new Map(byTime.slice(0, MAX_SAMPLES));
  return true;
}

/** The points of the chosen range, as columns; and the first of its seconds. */
function chosen() {
  const times = seen.points.time || [];
  const seconds = Number(byId("range").value);
  const first = seconds && times.length ? times[times.length - 1] - seconds : 0;
  let start = times.findIndex((time) => time >= first);
  if (start < 0) start = times.length;
  const columns = {};
  for (const [name, values] of Object.entries(seen.points)) columns[name] = values.slice(start);
  return columns;
}

/** How fast a counter grew before each point; null for one too soon after another. One that fell is of another core. */
function ratesOf(times, counts) {
  let base = 0;
  return counts.map((count, i) => {
    const seconds = times[i] - times[base];
    if (seconds < MIN_RATED_SECONDS) return null;
    const rate = Math.max(0, count - counts[base]) / seconds;
    base = i;
    return rate;
  });
}

/** The growth of one counter by that of another, null where the second did not grow. */
function sharesOf(parts, wholes) {
  return wholes.map((whole, i) => (i && whole > wholes[i - 1] ? (parts[i] - parts[i - 1]) / (whole - wholes[i - 1]) : null));
}

/** The mean of what was seen in the last seconds. */
function lately(times, values) {
  const since = times[times.length - 1] - FIGURE_SECONDS;
  const recent = values.filter((value, i) => value !== null && times[i] >= since);
  return recent.length ? recent.reduce((a, b) => a + b, 0) / recent.length : null;
}

// ---- words

function short(number, digits = 3) {
  if (number === null || number === undefined || Number.isNaN(number)) return "–";
  for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(number) >= size) {
      const unit = letter === "k" ? 1e3 : size;
      return `${Number((number / unit).toPrecision(digits))}${letter}`;
    }
  }
  return String(Number.isInteger(number) ? number : Number(number.toPrecision(digits)));
}

function percent(share) {
  return share === null ? "–" : `${Math.round(100 * share)} %`;
}

function clock(time) {
  return new Date(1000 * time).toLocaleTimeString();
}

// ---- drawing

function shape(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** A drawing as wide as its place; nothing in it is scaled. */
function canvas(id, height, label) {
  const width = byId(id).clientWidth;
  const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  byId(id).replaceChildren(drawing);
  return [drawing, width];
}

function placer(times, width) {
  const first = times[0];
  const span = Math.max(1e-3, times[times.length - 1] - first);
  return (time) => ((time - first) / span) * width;
}

function addClock(drawing, times, width, y) {
  drawing.append(shape("text", { x: 2, y }, clock(times[0])));
  drawing.append(shape("text", { x: width - 2, y, "text-anchor": "end" }, clock(times[times.length - 1])));
}

/** A path through the points that have a value. */
function pathOf(times, values, x, y) {
  const places = values.flatMap((value, i) => (value === null ? [] : [`${x(times[i]).toFixed(1)} ${y(value).toFixed(1)}`]));
  return places.length ? `M${places.join("L")}h0.01` : "";
}

/** Lines over time: `lines` are {ink, values}. The floor is 0, or the least value where that is below it. */
function drawLines(id, label, times, lines, top = 0) {
  const height = 110;
  const [drawing, width] = canvas(id, height + 14, label);
  const values = lines.flatMap((line) => line.values.filter((value) => value !== null));
  const most = Math.max(top, ...values) || 1;
  const least = Math.min(0, ...values);
  if (times.length > 1 && values.length) {
    const x = placer(times, width);
    const y = (value) => height - ((value - least) / (most - least)) * (height - 12);
    for (const level of [least, most]) {
      drawing.append(shape("line", { class: "grid", x1: 0, x2: width, y1: y(level), y2: y(level) }));
    }
    drawing.append(shape("text", { x: 2, y: 9 }, short(most)));
    addClock(drawing, times, width, height + 12);
    for (const line of lines) drawing.append(shape("path", { class: `line ${line.ink}`, d: pathOf(times, line.values, x, y) }));
  }
}

/** Parts of a whole, side by side. */
function drawBar(id, label, parts) {
  const [drawing, wholeWidth] = canvas(id, 14, label);
  const whole = Math.max(1, parts.reduce((sum, part) => sum + part.size, 0));
  let x = 0;
  for (const part of parts) {
    const width = (part.size / whole) * wholeWidth;
    drawing.append(shape("rect", { class: `fill-${part.ink}`, x, y: 2, width, height: 10 }));
    x += width;
  }
}

/** Runs of equal values: [{value, first, last}]. */
function runsOf(times, values) {
  const runs = [];
  values.forEach((value, i) => {
    const run = runs[runs.length - 1];
    if (run && run.value === value) run.last = times[i];
    else {
      if (run) run.last = times[i];
      runs.push({ value, first: times[i], last: times[i] });
    }
  });
  return runs;
}

/** Versions as bands, and the pause of each update as a bar over them. */
function drawVersions(times, versions, updates) {
  const height = 74;
  const [drawing, wholeWidth] = canvas("version-chart", height + 14, "versions over time, with the pauses of updates");
  if (times.length > 1) {
    const x = placer(times, wholeWidth);
    runsOf(times, versions).forEach((run, i) => {
      const [left, width] = [x(run.first), x(run.last) - x(run.first)];
      drawing.append(shape("rect", { class: i % 2 ? "band odd" : "band", x: left, y: height - 18, width, height: 18 }));
      const words = run.value || "none whole";
      if (width > 7 * words.length) drawing.append(shape("text", { x: left + 4, y: height - 5 }, words));
    });
    const inRange = updates.filter((update) => update.time >= times[0]);
    const most = Math.max(1e-9, ...inRange.map((update) => update.pause_ms));
    for (const update of inRange) {
      const size = 2 + (update.pause_ms / most) * (height - 34);
      const bar = shape("rect", { class: "fill-b", x: x(update.time) - 1.5, y: height - 20 - size, width: 3, height: size });
      bar.append(shape("title", {}, `${update.version}: ${update.pause_ms.toFixed(2)} ms without a step`));
      drawing.append(bar);
    }
    if (inRange.length) drawing.append(shape("text", { x: 2, y: 9 }, `${short(most)} ms`));
    addClock(drawing, times, wholeWidth, height + 12);
  }
}

function row(tag, cells) {
  return make("tr", {}, ...cells.map((cell) => (cell instanceof Node ? make(tag, {}, cell) : make(tag, {}, String(cell)))));
}

// ---- the cards

function drawHead(state, points) {
  const last = points.time.length - 1;
  const word = last < 0 ? "no news" : points.state[last];
  const isGood = state.is_ready;
  byId("state").className = `pill ${isGood ? "good" : "bad"}`;
  byId("state").textContent = isGood ? "ready" : word === "ready" ? "not ready" : word;
  const what = state.kind === "router" ? `a router of ${state.replicas.length} replicas` : state.model;
  byId("about").textContent = `${what} · Headrace ${state.version}`;
}

function drawRate(points) {
  const sampled = ratesOf(points.time, points.num_generated_tokens);
  byId("rate").textContent = short(lately(points.time, sampled));
  drawLines("rate-chart", "tokens per second", points.time, [
    { ink: "b", values: ratesOf(points.time, points.num_prompt_tokens) },
    { ink: "a", values: sampled },
  ]);
}

function drawRequests(points) {
  const last = points.time.length - 1;
  byId("requests").textContent = `${points.num_running[last]} running, ${points.num_waiting[last]} waiting`;
  byId("ended").textContent =
    `${short(points.num_finished[last])} finished, ${short(points.num_aborted[last])} aborted, ${short(points.num_failed[last])} failed`;
  drawLines("requests-chart", "requests", points.time, [
    { ink: "b", values: points.num_waiting },
    { ink: "a", values: points.num_running },
  ]);
}

function drawKv(points) {
  const last = points.time.length - 1;
  const whole = points.max_total_num_tokens[last];
  const [free, cached] = [points.num_free_tokens[last], points.num_evictable_tokens[last]];
  const used = points.time.map((_, i) =>
    Math.max(0, points.max_total_num_tokens[i] - points.num_free_tokens[i] - points.num_evictable_tokens[i]));
  byId("kv").textContent = `${percent(whole ? used[last] / whole : null)} of ${short(whole)} tokens in use`;
  drawBar("kv-bar", "the pool now", [
    { ink: "a", size: used[last] },
    { ink: "b", size: cached },
    { ink: "c", size: free },
  ]);
  drawLines("kv-chart", "tokens of KV", points.time, [
    { ink: "b", values: points.num_evictable_tokens },
    { ink: "a", values: used },
  ]);
}

function drawPrefixes(points) {
  const last = points.time.length - 1;
  const whole = points.num_prompt_tokens[last];
  byId("hits").textContent = `${percent(whole ? points.num_cached_tokens[last] / whole : null)} since the start`;
  byId("tree").textContent =
    `${short(points.num_published_tokens[last])} tokens in ${short(points.num_prefix_nodes[last])} nodes, ` +
    `${short(points.num_evictable_tokens[last])} of them unused now · ${short(points.num_shared_prefills[last])} requests began with a hit · ` +
    `${short(points.num_evicted_pages[last])} pages evicted`;
  const shares = sharesOf(points.num_cached_tokens, points.num_prompt_tokens);
  drawLines("hits-chart", "share of prompt tokens found in the cache", points.time, [{ ink: "a", values: shares }], 1);
}

function drawRewards(points) {
  const last = points.time.length - 1;
  byId("reward-card").hidden = !points.num_rewards[last];
  const means = sharesOf(points.reward_total, points.num_rewards);
  const given = means.filter((mean) => mean !== null);
  byId("reward").textContent = short(given.length ? given[given.length - 1] : null);
  byId("reward-count").textContent = `${short(points.num_rewards[last])} in all`;
  drawLines("reward-chart", "mean reward", points.time, [{ ink: "a", values: means }]);
}

function drawWeights(points) {
  const last = points.time.length - 1;
  byId("version").textContent = points.version[last] || "no whole weights";
  drawVersions(points.time, points.version, seen.updates);
  const hasReplicas = seen.state.kind === "router";
  const words = ["when", "version", "epoch", "mode", "by", "tensors", "MB", "took", "pause", "aborted"];
  const rows = seen.updates.slice(-SHOWN_UPDATES).reverse().map((update) => row("td", [
    clock(update.time), update.version, update.epoch, update.mode, update.road, update.num_tensors,
    short(update.num_bytes / 1e6), `${short(1e3 * update.seconds)} ms`, `${update.pause_ms.toFixed(2)} ms`, update.num_aborted,
    ...(hasReplicas ? [update.replica] : []),
  ]));
  byId("updates").replaceChildren(...(rows.length ? [row("th", hasReplicas ? [...words, "replica"] : words), ...rows] : []));
}

function drawReplicas(state) {
  byId("replicas-card").hidden = !state.replicas;
  if (!state.replicas) return;
  const words = ["replica", "", "address", "version", "running", "waiting", "KV", "asked now", "asked so far", "why not"];
  const rows = state.replicas.map((replica) => {
    const [now, word] = [replica.now, replica.is_ready ? "ready" : replica.is_healthy ? "not ready" : "not healthy"];
    return row("td", [
      replica.id, make("span", { class: replica.is_ready ? "good" : "bad" }, word), replica.url,
      now ? now.version || "none whole" : replica.weight_version || "–", now ? now.num_running : "–", now ? now.num_waiting : "–",
      now && now.max_total_num_tokens ? percent(1 - (now.num_free_tokens + now.num_evictable_tokens) / now.max_total_num_tokens) : "–",
      replica.num_requests, short(replica.num_sent), replica.ailment,
    ]);
  });
  byId("replicas").replaceChildren(row("th", words), ...rows);
}

// ---- samples

/** From orange (the least) over grey to blue (the most): told apart by eyes that know no red and green. */
function toneOf(reward, least, most) {
  const place = most > least ? (reward - least) / (most - least) : 0.5;
  const strength = Math.round(85 * Math.abs(2 * place - 1));
  return `hsl(${place < 0.5 ? 28 : 212} ${strength}% 46%)`;
}

function sampleOf(sample, least, most) {
  const versions = (sample.versions || []).map(([version, count]) => `${version}×${count}`).join(", ");
  const rate = sample.seconds ? `${short(sample.num_tokens / sample.seconds)} tokens/s` : "";
  const hasReward = sample.reward !== null && sample.reward !== undefined;
  const facts = [
    make("span", { class: "reward" }, hasReward ? short(sample.reward) : "–"),
    make("span", { class: "mono" }, sample.index ? `${sample.request_id} #${sample.index}` : sample.request_id),
    make("span", {}, `${sample.num_prompt_tokens} + ${sample.num_tokens} tokens`),
    make("span", { class: sample.finish === "error" ? "bad" : "dull" }, sample.finish),
    make("span", { class: "dull" }, versions),
    make("span", { class: "dull" }, [rate, sample.replica].filter(Boolean).join(" · ")),
    make("span", { class: "peek" }, sample.output || ""),
  ];
  const more = [
    clock(sample.time),
    `first token after ${short(1e3 * (sample.first_token_s || 0))} ms`,
    `${sample.num_cached_tokens || 0} prompt tokens cached`,
    `mean log-probability ${sample.mean_logprob === undefined || sample.mean_logprob === null ? "–" : sample.mean_logprob.toFixed(3)}`,
  ].join(" · ");
  const text = make("pre", {}, make("span", { class: "prompt" }, sample.prompt || ""), make("span", {}, sample.output || ""));
  const item = make("details", { class: "sample" }, make("summary", {}, ...facts), make("div", { class: "note" }, more), text);
  if (hasReward) {
    item.style.setProperty("--tone", toneOf(sample.reward, least, most));
    item.style.setProperty("--on-tone", "#fff");
  }
  return item;
}

let drawnSamples = -1;

function drawSamples() {
  const samples = [...seen.samples];
  const newest = Math.max(0, ...samples.map(([, sample]) => sample.number));
  if (newest === drawnSamples) return; // or an open one would close while it is read
  drawnSamples = newest;
  const open = new Set([...byId("samples").children].filter((item) => item.open).map((item) => item.dataset.name));
  const rewards = samples.map(([, sample]) => sample.reward).filter((reward) => reward !== null && reward !== undefined);
  const [least, most] = [Math.min(...rewards), Math.max(...rewards)];
  byId("samples-note").textContent = rewards.length
    ? `rewards of those shown: ${short(least)} to ${short(most)}`
    : "POST /rewards, or give_rewards of an engine or client, colours them by reward";
  byId("samples").replaceChildren(...samples.map(([name, sample]) => {
    const item = sampleOf(sample, least, most);
    item.dataset.name = name;
    item.open = open.has(name);
    return item;
  }));
}

function draw() {
  if (!seen.state) return;
  const points = chosen();
  drawHead(seen.state, points);
  drawReplicas(seen.state);
  drawSamples();
  if (!points.time.length) return;
  for (const card of [drawRate, drawRequests, drawKv, drawPrefixes, drawRewards, drawWeights]) card(points);
}

// ---- the rhythm

let timer = 0;
let isAsking = false;

async function look() {
  clearTimeout(timer);
  if (document.hidden || isAsking) return;
  isAsking = true;
  let pause = RETRY_MS;
  try {
    const state = await ask(`dashboard/state?since=${seen.last}`);
    pause = take(state) ? 1000 * state.look_seconds : 0;
    showKeyForm(false);
    draw();
  } catch (error) {
    if (error instanceof NoKeyError) {
      showKeyForm(true, error.message);
      pause = -1;
    } else {
      byId("state").className = "pill bad";
      byId("state").textContent = `no answer (${error.message})`;
    }
  } finally {
    isAsking = false;
  }
  if (pause >= 0) timer = setTimeout(look, pause);
}

watchKey(look);
byId("range").addEventListener("change", draw);
document.addEventListener("visibilitychange", look);
look();
