import { copy, curl } from "./curl.js";
import { enter, facts } from "./door.js";
import { Form } from "./form.js";
import { Grid } from "./grid.js";
import { Player } from "./player.js";
import { Run } from "./run.js";

const $ = (id) => document.getElementById(id);

let info = null;
let form = null;
let run = null;
let running = false;
let drawing = 0;

const grid = new Grid($("grid"), (seed) => {
  form.pin(seed);
  say(`Seed ${seed} is pinned.`);
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
  drawing ||= requestAnimationFrame(draw);
}

function draw() {
  cancelAnimationFrame(drawing);
  drawing = 0;
  grid.draw(run.trajectory, player.step);
  player.draw();
  tell();
}

function tell() {
  const { left, position } = run;
  $("progress").value = running || !run.stopped ? run.trajectory.fraction : 0;
  if (!running) $("left").textContent = "";
  else if (position !== null) $("left").textContent = `place ${position} in the queue`;
  else $("left").textContent = left === null ? "" : duration(left);
}

function duration(seconds) {
  const whole = Math.ceil(seconds);
  return whole < 60 ? `${whole} s left` : `${Math.floor(whole / 60)} min ${whole % 60} s left`;
}

async function generate() {
  const failures = [];
  const order = form.read();
  run = new Run(order, info.model, {
    onData: redraw,
    onFailure: (text) => {
      failures.push(text);
      say(text, true);
    },
  });
  const count = run.trajectory.images.length;
  setRunning(true);
  say(`Making ${count} image${count === 1 ? "" : "s"}.`);
  form.setUsed(order.fields.seed);
  grid.reset(run.trajectory.images);
  player.load(run.trajectory);
  $("curl").textContent = curl(new URL("generate", document.baseURI).href, order);
  $("again").hidden = false;
  reveal();
  redraw();
  const clock = setInterval(tell, 500);
  try {
    await run.drain();
  } finally {
    clearInterval(clock);
    setRunning(false);
    draw(); // now, not with the next frame: what says that it is done shows all of it
  }
  if (run.stopped) say("Stopped. What had arrived can be replayed.");
  else if (failures.length > 1) say(`${failures[0]} (${failures.length - 1} more failed.)`, true);
  else if (!failures.length) say(`Done in ${run.seconds.toFixed(1)} s, seed ${order.fields.seed}.`);
}

// Not `disabled`: that would drop the keyboard's focus on the floor.
function setRunning(now) {
  running = now;
  $("generate").setAttribute("aria-disabled", now);
  $("stage").classList.toggle("running", now);
  if (!now && document.activeElement === $("stop")) $("generate").focus();
  $("stop").hidden = !now;
}

// On a phone the images are below the form.
function reveal() {
  if ($("stage").getBoundingClientRect().top < window.innerHeight / 2) return;
  const gentle = matchMedia("(prefers-reduced-motion: reduce)").matches;
  $("stage").scrollIntoView({ behavior: gentle ? "auto" : "smooth" });
}

function describe({ version, model, batch_invariance: invariance }) {
  $("name").textContent = document.title = model.name;
  $("facts").textContent = facts(info);
  const difference = invariance.max_abs_difference;
  $("invariance").textContent =
    (invariance.invariant
      ? "Measured: an image does not depend on what else is in its batch."
      : `Measured: batch mates change a result by at most ${difference.toExponential(1)}.`) + ` Version ${version}.`;
}

async function start() {
  try {
    info = await enter($("form"), say);
  } catch (error) {
    say(error.message, true);
    return;
  }
  describe(info);
  form = new Form(info);
  grid.setShape(info.model);
  grid.show("x0");
  grid.reset(form.places());
  say("Noise, waiting.");
  $("generate").setAttribute("aria-disabled", "false");
  $("form").addEventListener("input", () => run || grid.reset(form.places()));
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
    () => say("The browser refused to copy. The command is selected: copy it by hand.", true),
  ),
);
start();
