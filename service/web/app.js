import * as address from "./address.js";
import { connect, showShape, summarize } from "./connect.js";
import { curl, fileName } from "./curl.js";
import { Form } from "./form.js";
import { Grid } from "./grid.js";
import { Player } from "./player.js";
import { Run } from "./run.js";
import { copyText, download, sheet } from "./save.js";
import { Source } from "./source.js";
import { Problem } from "./stream.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);

let info = null;
let form = null;
let source = null;
let viewer = null;
let run = null;
let running = false;
let scheduled = 0;

const grid = new Grid($("grid"), { onSeed: pin, onOpen: view });
const player = new Player(
  { bar: $("player"), button: $("play"), range: $("scrubber"), label: $("step") },
  () => redraw(),
);

function say(text, failed = false) {
  $("status").textContent = text;
  $("status").classList.toggle("failed", failed);
}

function pin(seed) {
  form.pin(seed);
  say(`Seed ${seed} pinned.`);
}

// The finished image, or what is shown of it now.
function view(index) {
  const { label, seed, url } = run.trajectory.images[index];
  const frame = run.trajectory.frame(index, player.step);
  viewer.open({ label, seed, url: url ?? frame.x0 ?? frame.xt }, Boolean(url));
}

function edit({ label, url }) {
  source.set(url);
  form.choose(label);
  $("editor").scrollIntoView({ block: "nearest" });
  $("strength").focus();
  say("Paint what is to change, or change all of it.");
}

// Many events arrive between two frames of the screen; they are drawn once.
function redraw() {
  scheduled ||= requestAnimationFrame(draw);
}

function draw() {
  cancelAnimationFrame(scheduled);
  scheduled = 0;
  grid.draw(run.trajectory, player.step);
  player.draw();
  drawProgress();
}

function drawProgress() {
  const { remaining, position } = run;
  $("progress").value = running || !run.stopped ? run.trajectory.fraction : 0;
  if (!running) $("eta-text").textContent = "";
  else if (position !== null) $("eta-text").textContent = `position ${position} in the queue`;
  else $("eta-text").textContent = remaining === null ? "" : duration(remaining);
}

function duration(seconds) {
  const whole = Math.ceil(seconds);
  return whole < 60 ? `${whole} s left` : `${Math.floor(whole / 60)} min ${whole % 60} s left`;
}

async function generate() {
  if (source.missing) return say(source.missing, true);
  const request = form.read();
  const { seed } = request.values;
  run = new Run(request, info.model, info.limits.max_images, redraw);
  const { images } = run.trajectory;
  setRunning(true);
  say(`Generating ${images.length} image${images.length === 1 ? "" : "s"}.`);
  form.setUsed(seed);
  grid.reset(images.map((image) => ({ ...image, label: request.values.each ? image.label : "" })));
  player.load(run.trajectory);
  share(request);
  scrollToImages();
  redraw();
  const clock = setInterval(drawProgress, 500);
  let failure = "";
  try {
    await run.drain();
  } catch (error) {
    failure = error instanceof Problem ? error.message : `Error in the page: ${error.message}`;
  }
  clearInterval(clock);
  setRunning(false);
  draw(); // now, not in the next frame: the page must not say "Done" before the last image is shown
  $("save").disabled = !images.some(({ url }) => url);
  if (failure) say(failure, true);
  else if (run.stopped) say("Stopped. The previews received so far can be replayed.");
  else say(`Done in ${run.seconds.toFixed(1)} s, seed ${seed}.`);
}

// The address and the command that make the same images.
function share(request) {
  history.replaceState(null, "", `?${address.write(request.values)}`);
  $("curl").textContent = curl(document.baseURI, request, info.model, info.limits.max_images);
  const { image, mask } = request.source?.fields ?? {};
  for (const [id, url] of [["image-file", image], ["mask-file", mask]]) {
    $(id).hidden = !url;
    if (url) $(id).href = url;
  }
  $("save").disabled = true;
  $("reproduce").hidden = false;
}

// Not `disabled`: that would lose the keyboard focus.
function setRunning(now) {
  running = now;
  $("generate").setAttribute("aria-disabled", now);
  $("stage").classList.toggle("running", now);
  if (!now && document.activeElement === $("stop")) $("generate").focus();
  $("stop").hidden = !now;
}

// On a phone the images are below the form.
function scrollToImages() {
  if ($("state").getBoundingClientRect().top < window.innerHeight / 2) return;
  const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
  $("state").scrollIntoView({ behavior: reducedMotion ? "auto" : "smooth" });
}

function describe({ version, model, batch_invariance: invariance }) {
  $("name").textContent = document.title = model.name;
  $("summary").textContent = summarize(info);
  const difference = invariance.max_abs_difference;
  $("invariance").textContent =
    (invariance.invariant
      ? "Measured at start-up: results do not depend on the batch."
      : `Measured at start-up: batch neighbours change a result by at most ${difference.toExponential(1)}.`) + ` Version ${version}.`;
}

async function start() {
  try {
    info = await connect($("form"), say);
  } catch (error) {
    say(error.message, true);
    return;
  }
  describe(info);
  source = new Source(info.model, info.editing.edit.strength, { onChange: () => form?.update(), say });
  form = new Form(info, source);
  viewer = new Viewer({ onEdit: edit, onPin: pin, editable: source.mode === "edit" });
  showShape(document.body, info.model);
  grid.setShape(info.model);
  grid.show("x0");
  $("generate").setAttribute("aria-disabled", "false");
  $("form").addEventListener("input", () => run || grid.reset(form.placeholders()));
  open(address.read(location.search));
}

// values: those of the address, or null.
function open(values) {
  const wrong = values ? form.restore(values) : "";
  grid.reset(form.placeholders());
  if (wrong) say(wrong, true);
  else if (values?.source) say("The address has all but the picture. Choose one, then generate.");
  else if (source.missing) say(source.missing);
  else if (values) generate();
  else say("Ready.");
}

const reportCopy = (done) => [() => say(done), () => say("The browser refused to copy. The text is selected; copy it manually.", true)];

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (form && !running) generate();
});
$("stop").addEventListener("click", () => run.stop());
$("view").addEventListener("change", (event) => grid.show(event.target.value));
$("copy").addEventListener("click", () => copyText($("curl")).then(...reportCopy("Copied.")));
$("link").addEventListener("click", () => {
  $("address").textContent = location.href;
  copyText($("address")).then(...reportCopy("The link was copied. It makes the same images."));
});
$("save").addEventListener("click", async () => {
  const images = run.trajectory.images.filter(({ url }) => url);
  download(await sheet(images.map(({ url }) => url)), `${fileName(images)}.png`);
});
start();
