import { Contest, Guided } from "./contest.js";
import { enter, facts } from "./door.js";
import { snapped } from "./picture.js";
import { Walkthrough } from "./walkthrough.js";

const FIRST_SEED = 7;
const SETTLE_MS = 150; // a slider on its way passes values that nobody wants to see
// The pictures of a study: how many abreast, what is left of them, and how large they get, in screen pixels.
const CELLS = {
  contest: { columns: 4, gap: 8, aside: 104, most: 160 },
  guided: { columns: 6, gap: 8, aside: 0, most: 160 },
};

const $ = (id) => document.getElementById(id);

function say(element, text, failed = false) {
  element.textContent = text;
  element.classList.toggle("failed", failed);
}

// Runs `work(signal)` and tells how it goes; a newer run takes the place of an older one.
function latest(status, work) {
  let controller = new AbortController();
  return async () => {
    controller.abort();
    const { signal } = (controller = new AbortController());
    const started = performance.now();
    say(status, "Drawing.");
    try {
      await work(signal);
      say(status, `Drawn in ${((performance.now() - started) / 1000).toFixed(1)} s.`);
    } catch (error) {
      if (!signal.aborted) say(status, error.message, true);
    }
  };
}

function later(work) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, SETTLE_MS);
  };
}

// Not before somebody looks: every picture costs the service work.
function onceSeen(element, work) {
  const observer = new IntersectionObserver(([{ isIntersecting }]) => {
    if (!isIntersecting) return;
    observer.disconnect();
    work();
  });
  observer.observe(element);
}

function layout({ model }) {
  for (const [id, { columns, gap, aside, most }] of Object.entries(CELLS)) {
    const board = $(id).querySelector(".board");
    const narrow = board.clientWidth < 560;
    const across = id === "guided" && narrow ? columns / 2 : columns;
    const room = board.clientWidth - (narrow ? 0 : aside);
    board.style.setProperty("--columns", across);
    board.style.setProperty("--size", `${snapped(room, across, gap, model.width, most)}px`);
  }
}

function compare(info) {
  const { model, defaults } = info;
  $("class").replaceChildren(...model.classes.map((name, index) => new Option(name, index)));
  $("class-field").hidden = !model.classes.length;
  $("guided").hidden = !model.guidance;
  $("guidance").value = defaults.guidance_scale;

  const fields = () => {
    const seed = $("seed").validity.valid ? $("seed").valueAsNumber : FIRST_SEED;
    return model.classes.length ? { seed, class_label: Number($("class").value) } : { seed };
  };
  const contest = new Contest(info);
  const guided = new Guided(info);
  const drawContest = latest($("contest-status"), (signal) => contest.run(fields(), signal));
  const drawGuided = latest($("guided-status"), (signal) => guided.run(fields(), $("guidance").valueAsNumber, signal));
  const seen = new Set();
  const look = (id, work) =>
    onceSeen($(id), () => {
      seen.add(id);
      work();
    });
  look("contest", drawContest);
  if (model.guidance) look("guided", drawGuided);

  const name = () => ($("guidance-value").textContent = $("guidance").valueAsNumber.toFixed(1));
  const redrawGuided = later(drawGuided);
  const redrawBoth = later(() => {
    if (seen.has("contest")) drawContest();
    if (seen.has("guided")) drawGuided();
  });
  $("guidance").addEventListener("input", name);
  $("guidance").addEventListener("input", redrawGuided);
  $("class").addEventListener("change", redrawBoth);
  $("seed").addEventListener("input", redrawBoth);
  name();
}

async function start() {
  const tell = (text, failed) => say($("status"), text, failed);
  let info;
  try {
    info = await enter($("studies"), tell);
  } catch (error) {
    tell(error.message, true);
    return;
  }
  document.title = `Explore ${info.model.name}`;
  $("name").textContent = info.model.name;
  $("facts").textContent = facts(info);
  const walkthrough = new Walkthrough(info, tell);
  new ResizeObserver(() => layout(info)).observe($("studies"));
  layout(info);
  compare(info);
  walkthrough.sample(FIRST_SEED);
}

start();
