import { GuidanceComparison, SamplerComparison } from "./comparison.js";
import { connect, showShape, summarize } from "./connect.js";
import { DenoisePanel } from "./denoise.js";
import { snappedSize } from "./picture.js";

const FIRST_SEED = 7;
const DEBOUNCE_MS = 150; // a moving slider passes values that nobody waits for
// The images of a panel: how many in a row, the width taken by row labels, and their maximum size, in CSS pixels.
const LAYOUT = {
  comparison: { columns: 4, gap: 8, labels: 104, maxSize: 160 },
  guided: { columns: 6, gap: 8, labels: 0, maxSize: 160 },
};

const $ = (id) => document.getElementById(id);

function say(element, text, failed = false) {
  element.textContent = text;
  element.classList.toggle("failed", failed);
}

// Runs `work(signal)` and reports its state; a new run cancels the one before it.
function latestOnly(status, work) {
  let controller = new AbortController();
  return async () => {
    controller.abort();
    const { signal } = (controller = new AbortController());
    const started = performance.now();
    say(status, "Generating…");
    try {
      await work(signal);
      say(status, `Done in ${((performance.now() - started) / 1000).toFixed(1)} s.`);
    } catch (error) {
      if (!signal.aborted) say(status, error.message, true);
    }
  };
}

function debounced(work) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, DEBOUNCE_MS);
  };
}

// Images cost the service work, so nothing is generated before it scrolls into view.
function onceVisible(element, work) {
  const observer = new IntersectionObserver(([{ isIntersecting }]) => {
    if (!isIntersecting) return;
    observer.disconnect();
    work();
  });
  observer.observe(element);
}

function layout({ model }) {
  for (const [id, { columns, gap, labels, maxSize }] of Object.entries(LAYOUT)) {
    const results = $(id).querySelector(".results");
    const narrow = results.clientWidth < 560;
    const across = id === "guided" && narrow ? columns / 2 : columns;
    const available = results.clientWidth - (narrow ? 0 : labels);
    results.style.setProperty("--columns", across);
    results.style.setProperty("--size", `${snappedSize(available, across, gap, model.picture.width, maxSize)}px`);
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
  const samplers = new SamplerComparison(info);
  const guided = new GuidanceComparison(info);
  const drawSamplers = latestOnly($("comparison-status"), (signal) => samplers.run(fields(), signal));
  const drawGuided = latestOnly($("guided-status"), (signal) =>
    guided.run(fields(), $("guidance").valueAsNumber, signal),
  );
  const visible = new Set();
  const whenVisible = (id, work) =>
    onceVisible($(id), () => {
      visible.add(id);
      work();
    });
  whenVisible("comparison", drawSamplers);
  if (model.guidance) whenVisible("guided", drawGuided);

  const showScale = () => ($("guidance-value").textContent = $("guidance").valueAsNumber.toFixed(1));
  const redrawGuided = debounced(drawGuided);
  const redrawBoth = debounced(() => {
    if (visible.has("comparison")) drawSamplers();
    if (visible.has("guided")) drawGuided();
  });
  $("guidance").addEventListener("input", showScale);
  $("guidance").addEventListener("input", redrawGuided);
  $("class").addEventListener("change", redrawBoth);
  $("seed").addEventListener("input", redrawBoth);
  showScale();
}

async function start() {
  const setStatus = (text, failed) => say($("status"), text, failed);
  let info;
  try {
    info = await connect($("panels"), setStatus);
  } catch (error) {
    setStatus(error.message, true);
    return;
  }
  document.title = `Explore ${info.model.name}`;
  $("name").textContent = info.model.name;
  $("summary").textContent = summarize(info);
  showShape($("panels"), info.model);
  const scored = info.scoring.max_images > 0; // a distilled model has no x₀ predictions to show
  $("denoise").hidden = !scored;
  const denoise = scored ? new DenoisePanel(info, setStatus) : null;
  new ResizeObserver(() => layout(info)).observe($("panels"));
  layout(info);
  compare(info);
  denoise?.sample(FIRST_SEED);
}

start();
