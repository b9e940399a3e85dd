import { connect, showShape, summarize } from "./connect.js";
import { copy, curl } from "./curl.js";
import { Form } from "./form.js";
import { Grid } from "./grid.js";
import { Player } from "./player.js";
import { Run } from "./run.js";

const $ = (id) => document.getElementById(id);

let info = null;
let form = null;
let run = null;
let running = false;
let scheduled = 0;

const grid = new Grid($("grid"), (seed) => {
  form.pin(seed);
  say(`Seed ${seed} pinned.`);
});
const player = new Player(
  { bar: $("player"), button: $("play"), range: $("scrubber"), label: $("step") },
  () => redraw(),
);

function say(text, failed = false) {
  $("status").textContent = text;
  $("status").classList.toggle("failed", failed);
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
  const failures = [];
  const request = form.read();
  run = new Run(request, info.model, {
    onData: redraw,
    onFailure: (text) => {
      failures.push(text);
      say(text, true);
    },
  });
  const count = run.trajectory.images.length;
  setRunning(true);
  say(`Generating ${count} image${count === 1 ? "" : "s"}.`);
  form.setUsed(request.fields.seed);
  grid.reset(run.trajectory.images);
  player.load(run.trajectory);
  $("curl").textContent = curl(new URL("generate", document.baseURI).href, request, info.model);
  $("reproduce").hidden = false;
  scrollToImages();
  redraw();
  const clock = setInterval(drawProgress, 500);
  try {
    await run.drain();
  } finally {
    clearInterval(clock);
    setRunning(false);
    draw(); // now, not in the next frame: the page must not say "Done" before the last image is shown
  }
  if (run.stopped) say("Stopped. The previews received so far can be replayed.");
  else if (failures.length > 1) say(`${failures[0]} (${failures.length - 1} more failed.)`, true);
  else if (!failures.length) say(`Done in ${run.seconds.toFixed(1)} s, seed ${request.fields.seed}.`);
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
  if ($("stage").getBoundingClientRect().top < window.innerHeight / 2) return;
  const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
  $("stage").scrollIntoView({ behavior: reducedMotion ? "auto" : "smooth" });
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
  form = new Form(info);
  showShape($("grid"), info.model);
  grid.setShape(info.model);
  grid.show("x0");
  grid.reset(form.placeholders());
  say("Ready.");
  $("generate").setAttribute("aria-disabled", "false");
  $("form").addEventListener("input", () => run || grid.reset(form.placeholders()));
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (form && !running) generate();
});
$("stop").addEventListener("click", () => run.stop());
$("view").addEventListener("change", (event) => grid.show(event.target.value));
$("copy").addEventListener("click", () =>
  copy($("curl")).then(
    () => say("Copied."),
    () => say("The browser refused to copy. The command is selected; copy it manually.", true),
  ),
);
start();
