// Prometheus' text format, and what follows from two readings of it. No DOM in here.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)",?/g;
const ESCAPED = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

// The samples by name: [{labels, value}].
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const [, name, given = "", value] = (!line.startsWith("#") && SAMPLE.exec(line)) || [];
    if (!name) continue;
    const labels = {};
    for (const [, label, quoted] of given.matchAll(LABEL)) labels[label] = quoted.replace(/\\[n"\\]/g, (pair) => ESCAPED[pair]);
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push({ labels, value: Number(value.replace("Inf", "Infinity")) });
  }
  return samples;
}

// One reading: `at` in seconds, of a clock that does not jump.
export class Reading {
  constructor(text, at) {
    this.samples = parse(text);
    this.at = at;
  }

  // The sum over all samples with these labels; null where there is none.
  sum(name, labels = {}) {
    const found = this.matching(name, labels);
    return found.length ? found.reduce((sum, { value }) => sum + value, 0) : null;
  }

  matching(name, labels) {
    const wanted = Object.entries(labels);
    return (this.samples.get(name) ?? []).filter((sample) => wanted.every(([label, value]) => sample.labels[label] === value));
  }

  labels(name) {
    return (this.samples.get(name) ?? []).map((sample) => sample.labels);
  }
}

// What a counter grew by; null where it is missing, or began again because the service was restarted. One that is not
// in the earlier reading began after it.
export function increase(before, now, name, labels) {
  const [earlier, later] = [before.sum(name, labels) ?? 0, now.sum(name, labels)];
  return later === null || later < earlier ? null : later - earlier;
}

// The same per second.
export function rate(before, now, name, labels) {
  const grown = increase(before, now, name, labels);
  const seconds = now.at - before.at;
  return grown === null || seconds <= 0 ? null : grown / seconds;
}

// The mean of what a histogram observed between two readings; null where that is nothing.
export function mean(before, now, name, labels) {
  const count = increase(before, now, `${name}_count`, labels);
  return count ? increase(before, now, `${name}_sum`, labels) / count : null;
}

// The quantile (0 … 1) of what a histogram observed between two readings, interpolated within its bucket as Prometheus
// does; null where that is nothing. Above the last bound it is that bound.
export function quantile(share, before, now, name, labels) {
  const bounds = now.matching(`${name}_bucket`, labels).map((sample) => sample.labels.le);
  const buckets = bounds
    .map((le) => ({ bound: Number(le.replace("Inf", "Infinity")), count: increase(before, now, `${name}_bucket`, { ...labels, le }) }))
    .sort((a, b) => a.bound - b.bound);
  const total = buckets.at(-1)?.count;
  if (!total) return null;
  const rank = share * total;
  const at = buckets.findIndex(({ count }) => count >= rank);
  const lower = buckets[at - 1] ?? { bound: 0, count: 0 };
  const { bound, count } = buckets[at];
  if (bound === Infinity) return lower.bound;
  return lower.bound + ((bound - lower.bound) * (rank - lower.count)) / (count - lower.count || 1);
}
