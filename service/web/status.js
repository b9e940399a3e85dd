// The metrics of the service as they change.

import { Reading, increase, mean, quantile, rate } from "./metrics.js";
import { Timeline } from "./timeline.js";

const EVERY_MS = 1000;
const TIMEOUT_MS = 5000;
const WINDOW_S = 120;
const OWN_ROUTES = ["/metrics", "/web", "/swagger", "unmatched"]; // of the pages themselves, and of nothing

const $ = (id) => document.getElementById(id);

// Each takes the reading before and this one.
const CHARTS = [
  {
    title: "Images in flight",
    series: [
      { name: "running", unit: "", of: (_, now) => now.sum("ddpm_samples_running") },
      { name: "waiting", unit: "", of: (_, now) => now.sum("ddpm_samples_waiting") },
    ],
  },
  {
    title: "Slots",
    series: [
      { name: "in use", unit: "", of: (_, now) => now.sum("ddpm_slots_in_use") },
      { name: "capacity", unit: "", of: (_, now) => now.sum("ddpm_slots") },
    ],
  },
  { title: "Batch size", series: [{ name: "rows per network call", unit: "rows", of: (before, now) => mean(before, now, "ddpm_batch_rows") }] },
  { title: "Network evaluations", series: [{ name: "evaluations", unit: "/s", of: (before, now) => rate(before, now, "ddpm_network_evaluations_total") }] },
  { title: "Images finished", series: [{ name: "images", unit: "/s", of: (before, now) => rate(before, now, "ddpm_images_generated_total") }] },
  { title: "Step duration", series: [{ name: "mean of a step", unit: "ms", of: (before, now) => scaled(mean(before, now, "ddpm_step_duration_seconds"), 1000) }] },
];
const FACTS = {
  "Images finished": "ddpm_images_generated_total",
  "Network evaluations": "ddpm_network_evaluations_total",
  "Engine restarts": "ddpm_engine_restarts_total",
  "Jobs replayed": "ddpm_jobs_replayed_total",
  "Jobs refused": "ddpm_rejected_total",
  "Jobs cancelled": "ddpm_cancelled_total",
};

const scaled = (value, factor) => (value === null ? null : value * factor);
const timelines = CHARTS.map((chart) => new Timeline({ ...chart, seconds: WINDOW_S }));
const readings = []; // of the last WINDOW_S seconds
let described = "";

async function read() {
  const response = await fetch("metrics", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (!response.ok) throw new Error(`the service answered ${response.status}`);
  return new Reading(await response.text(), performance.now() / 1000);
}

function take(now) {
  const before = readings.at(-1);
  readings.push(now);
  while (readings[0].at < now.at - WINDOW_S) readings.shift();
  describe(now);
  if (before) {
    CHARTS.forEach(({ series }, i) => timelines[i].add(now.at, series.map(({ of }) => of(before, now))));
    showRoutes(readings[0], now);
    showFigures();
  }
  showFacts(now);
}

// Said when it changes: a screen reader would repeat it every second.
function say(text, failed = false) {
  if (described === text) return;
  described = $("state-text").textContent = text;
  $("state-text").classList.toggle("failed", failed);
}

function describe(now) {
  const [{ model, runtime, device, dtype, version } = {}] = now.labels("ddpm_model_info");
  if (model) {
    $("name").textContent = model;
    document.title = `Status of ${model}`;
    $("summary").textContent = `${runtime} ${dtype} on ${device} · version ${version}`;
  }
  say(now.sum("ddpm_ready") ? "The service accepts jobs." : "The service accepts no jobs now: it is loading, or draining.");
}

function showRoutes(first, now) {
  const name = "ddpm_request_duration_seconds";
  const routes = now.labels(`${name}_count`).map(({ route }) => route).filter((route) => !OWN_ROUTES.includes(route));
  const rows = routes
    .map((route) => ({ route, count: increase(first, now, `${name}_count`, { route }) }))
    .filter(({ count }) => count)
    .sort((a, b) => b.count - a.count)
    .map(({ route, count }) => [route, String(count), ...[0.5, 0.95].map((share) => seconds(quantile(share, first, now, name, { route })))]);
  fill($("routes"), rows.length ? rows : [["none", "0", "–", "–"]]);
}

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`;
}

function showFigures() {
  const rows = CHARTS.flatMap(({ title, series }, chart) =>
    series.map(({ name }, i) => {
      const { now, least, most } = timelines[chart].figures(i);
      return [`${title}: ${name}`, now, least, most];
    }),
  );
  fill($("figures"), rows);
}

function showFacts(now) {
  const pairs = Object.entries(FACTS).map(([title, name]) => {
    const item = document.createElement("div");
    const value = now.sum(name);
    const texts = { dt: title, dd: value === null ? "–" : value.toLocaleString("en") };
    item.append(...Object.entries(texts).map(([tag, textContent]) => Object.assign(document.createElement(tag), { textContent })));
    return item;
  });
  $("facts").replaceChildren(...pairs);
}

// rows: texts; the first of each is its header.
function fill(body, rows) {
  const elements = rows.map((texts) => {
    const row = document.createElement("tr");
    row.append(
      ...texts.map((textContent, i) => Object.assign(document.createElement(i ? "td" : "th"), i ? { textContent } : { textContent, scope: "row" })),
    );
    return row;
  });
  body.replaceChildren(...elements);
}

// The next reading begins a second after the end of this one; none while nobody sees the page.
async function poll() {
  try {
    if (!document.hidden) take(await read());
  } catch {
    say("The service does not answer. The figures are the last that came.", true);
  }
  setTimeout(poll, EVERY_MS);
}

$("charts").replaceChildren(...timelines.map(({ element }) => element));
poll();
