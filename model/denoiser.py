"""One batched reverse step: gather the samples, call the network once, guide, update each by its own plan.

Three layers, as for any loop: `Denoiser.launch` is one step for many samples, `trajectory` a generator of
steps for samples that start together, `generate` the drain of it. The engine uses only the step.

A step is one function of tensors on the device, from the gather out of the slots to the scatter back into
them, which comes last: a step that fails changes nothing. It is queued and not waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import noise
from model.chain import Chain, Image, InitialLatent
from model.checkpoint import Checkpoint
from model.device_noise import Normals, as_int64, normals_on
from model.diffusion import dynamic_threshold, guided_output, vlb_terms
from model.interpolation import angle_between, spherical
from model.noise import NoiseStream
from model.runtimes import Pending, Runtime, to_device
from model.samplers import COEFFICIENTS
from model.schedule import DATA_RANGE, DataRange, NoiseSchedule
from model.state import INTEGERS, Columns, Row, Slots, SnapshotKind, pack, place, places_of, unpack

Places = list[int] | slice
"""Rows that something is done for; all of them where shapes are fixed."""
ALL = slice(None)


@dataclass(slots=True)
class Latent:
    """The state of a sample between steps: x_t and the latest x₀ prediction, both [C, H, W] float32."""

    x: Tensor
    x0: Tensor


@dataclass(slots=True)
class Stepped:
    """What a step left, by row of it. pictures: [H, W, C] uint8; arrays: [C, H, W] float32."""

    finite: bool
    pictures: dict[SnapshotKind, NDArray[np.uint8]]
    arrays: dict[SnapshotKind, Image]


FINE, BROKEN = Stepped(True, {}, {}), Stepped(False, {}, {})
"""Of rows of which nothing is wanted."""


class Launched:
    """A step on its way."""

    def __init__(self, rows: Sequence[Row], pending: Pending) -> None:
        self._rows, self._pending = rows, pending

    def read(self) -> list[Stepped]:
        """Wait for the step. Raises what it raised, or SkippedError; its samples are then as before it."""
        finite, pixels, values = self._pending.result()
        pictures, arrays = iter(pixels), iter(values)
        return [
            (FINE if fine else BROKEN)
            if not row.pictures and not row.arrays
            else Stepped(
                fine,
                {kind: next(pictures) for kind in row.pictures},
                {kind: next(arrays) for kind in row.arrays},
            )
            for row, fine in zip(self._rows, finite.tolist(), strict=True)
        ]


class ClassGradient(Protocol):
    """A noise-aware classifier, as guidance needs it."""

    def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """∇ₓ log p(y | x_t): x [B, C, H, W], t and y [B] int64. Returns as x."""


@dataclass(frozen=True)
class _Parts:
    """Which rows need what. samples: how many rows are samples; the rest are their unconditional rows.

    lookback: those that use the x₀ prediction of the step before. unclipped: those that use x₀ as it is
    before it is bounded. thresholded, rescaled: whether any is bounded dynamically, or its guidance rescaled.
    recorded: whether the step is replayed.
    """

    samples: int
    guided: bool
    lookback: Places
    noisy: Places
    known: Places
    classified: list[int]
    unclipped: Places
    thresholded: bool = False
    rescaled: bool = False
    recorded: bool = False


@dataclass(frozen=True)
class _Updated:
    """Of the samples of a step: x before it, and x, x₀ and whether they are finite after it."""

    before: Tensor
    x: Tensor
    x0: Tensor
    finite: Tensor


class Denoiser:
    """Advances samples by one step of their plans, many in one network call.

    shape: (C, H, W) of a sample. null_class: label index of the unconditional branch. conditional: whether
    the network takes labels at all. classifier: for plans with classifier guidance. schedule: for `measure`,
    and for what timesteps and pixels are to the network. normals: where noise comes from, if not from its own
    place (a benchmark's stand-in). conditions: channels that the network takes beside x.
    A network with 2C outputs predicts its variance in the second C (Nichol & Dhariwal 2021).
    """

    def __init__(
        self,
        runtime: Runtime,
        shape: tuple[int, int, int],
        *,
        conditional: bool,
        null_class: int | None,
        classifier: ClassGradient | None = None,
        schedule: NoiseSchedule | None = None,
        normals: Normals | None = None,
        conditions: int = 0,
    ) -> None:
        self.runtime, self.shape = runtime, shape
        self.conditional, self.null_class = conditional, null_class
        self.classifier, self.schedule = classifier, schedule
        self.data_range = DATA_RANGE if schedule is None else schedule.data_range
        self.timestep_scale = 1.0 if schedule is None else schedule.timestep_scale
        self.slots = Slots(shape, runtime.device, conditions)
        self._normals = normals or normals_on(runtime.device, shape)
        self._recordings: dict[tuple[int, bool, bool, bool], Callable[[Tensor], _Updated]] = {}

    @classmethod
    def of(cls, model: Checkpoint, runtime: Runtime, normals: Normals | None = None) -> Denoiser:
        """The denoiser of a checkpoint whose network `runtime` runs."""
        config = model.unet.config
        classifier = deepcopy(model.classifier)  # like the runtime's network, independent of the caller's
        if classifier is not None:
            classifier.to(runtime.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(
            runtime,
            model.shape,
            conditional=config.conditional,
            null_class=model.null_class,
            classifier=classifier,
            schedule=model.schedule,
            normals=normals,
            conditions=config.in_channels - model.shape[0],
        )

    def reserve(self, slots: int) -> None:
        """Have room for so many samples at once."""
        if self.slots.reserve(slots):
            self._forget()

    def latent(self, slot: int) -> Latent:
        """A copy of what a slot holds, once the steps launched so far have been read."""
        return Latent(self.slots.x[place(slot)].clone(), self.slots.x0[place(slot)].clone())

    def start(self, chain: Chain, carried: Sequence[Image] = ()) -> Image:
        """Where a chain begins: noise from its own seed, or as its `start` says.

        carried: the latents that the stage before this one left. Raises ValueError for a label or guidance
        that the network has no class or null class for, and for classifier guidance without a classifier or
        a label.
        """
        self._check(chain)
        if chain.start is not None and chain.start.carried is not None:
            mix = chain.start.carried
            ends = carried[mix.first], carried[mix.second]
            weights = spherical(mix.share, angle_between(*ends))
            terms = [(weight, end) for weight, end in zip(weights, ends, strict=True) if weight]
        else:
            start = chain.start or InitialLatent(noises=((1.0, chain.seed),))
            seeds = [seed for _, seed in start.noises]
            drawn = noise.normals(seeds, [noise.START] * len(seeds), self.shape)
            noises = [(weight, z) for (weight, _), z in zip(start.noises, drawn, strict=True)]
            terms = [*start.images, *noises]
        if len(terms) == 1 and terms[0][0] == 1:
            return terms[0][1]
        weighted = [np.float32(weight) * value for weight, value in terms]
        return np.asarray(np.sum(weighted, axis=0, dtype=np.float32))

    def _check(self, chain: Chain) -> None:
        guided = max(chain.plan.evaluations) == 2
        if (chain.condition is None) != (self.slots.condition is None):
            wanted = "needs" if chain.condition is None else "takes no"
            raise ValueError(f"the network {wanted} picture beside x")
        if chain.label is not None and not self.conditional:
            raise ValueError("the network takes no class labels")
        if guided and chain.label is None:
            raise ValueError("guidance needs a label")
        if self.conditional and self.null_class is None and (chain.label is None or guided):
            raise ValueError("the network has no null class: it needs a label, and guidance_scale 1")
        if chain.plan.table["a_g"].any() and (self.classifier is None or chain.label is None):
            raise ValueError("classifier guidance needs a classifier and a label")

    def launch(self, rows: Sequence[Row]) -> Launched:
        """Queue one step of each sample in one network call, of Σ chain.plan.evaluations[step] rows."""
        guided = [index for index, row in enumerate(rows) if row.chain.plan.evaluations[row.step] == 2]
        used = len(rows) + len(guided)
        coefficients = np.frombuffer(
            b"".join([row.chain.plan.coefficients[row.step] for row in rows]), np.float32
        ).reshape(len(rows), len(COEFFICIENTS))
        known = [index for index, row in enumerate(rows) if row.chain.known is not None]
        classified = np.flatnonzero(coefficients[:, COEFFICIENTS.index("a_g")]).tolist()
        q, r = (bool(coefficients[:, COEFFICIENTS.index(name)].any()) for name in "qr")
        width = 0 if classified else self._width(used)
        if width:
            parts = _Parts(width, True, ALL, ALL, ALL if known else [], [], ALL, q, r, True)
        else:
            lookback, noisy, unclipped = (_places(coefficients, name) for name in ("c_p", "c_n", "c_u"))
            parts = _Parts(len(rows), bool(guided), lookback, noisy, known, classified, unclipped, q, r)
        upload = torch.from_numpy(pack(rows, coefficients, guided, self.null_class or 0, width or used))
        return Launched(rows, self.runtime.queue.submit(lambda: self._step(rows, upload, parts)))

    def _width(self, used: int) -> int:
        """Rows of the recorded step that these fit into; 0 where steps are not recorded."""
        if self.runtime.recorder is None:
            return 0
        return next((size for size in self.runtime.batch_sizes if size >= used), 0)

    def recover(self) -> None:
        """Step again after one has failed. What was launched before this stays skipped."""
        self.runtime.queue.recover()

    def probe(self) -> None:
        """Call the network once, for no sample. Raises whatever that does: then no sample is to blame."""
        self.runtime.queue.submit(self._probe).result()

    @torch.inference_mode()
    def _probe(self) -> Sequence[Tensor]:
        given = self.slots.x[:1]
        if self.slots.condition is not None:
            given = torch.cat((given, self.slots.condition[:1]), 1)
        zero = torch.zeros(1, dtype=torch.int64, device=self.slots.device)
        return [self.runtime.forward(given, zero, zero if self.conditional else None)]

    @torch.inference_mode()
    def _step(self, rows: Sequence[Row], upload: Tensor, parts: _Parts) -> Sequence[Tensor]:
        """The whole step: (finite [B], pictures [P, H, W, C], arrays [A, C, H, W])."""
        self.reserve(1 + max(row.slot for row in rows))
        self._begin([row for row in rows if row.step == 0])
        if parts.recorded:
            done = self._recorded(parts, upload)(upload)
        else:
            done = self._update(to_device(upload, self.runtime.device), parts)
        try:
            shown = render(_picked(done, rows, [row.pictures for row in rows]), self.data_range)
            kept = _picked(done, rows, [row.arrays for row in rows])
        except Exception as error:  # the step counts, so it must not be tried again
            raise torch.AcceleratorError(f"the results cannot be picked out: {error}") from error
        return done.finite[: len(rows)], shown, kept

    def _recorded(self, parts: _Parts, upload: Tensor) -> Callable[[Tensor], _Updated]:
        assert self.runtime.recorder is not None
        key = parts.samples, parts.known == ALL, parts.thresholded, parts.rescaled
        if any(width not in self.runtime.batch_sizes for width, *_ in self._recordings):
            self._forget()  # all of them, since they share what memory the largest takes
        if key not in self._recordings:
            harmless = upload.clone()
            harmless[:, INTEGERS.index("target")] = 0
            # Steps run one after the other, and what is wanted of one is copied before the next.
            beside = next(iter(self._recordings.values()), None)
            self._recordings[key] = self.runtime.recorder(
                lambda given: self._update(given, parts), harmless, beside
            )
        return self._recordings[key]

    def _forget(self) -> None:
        """Free the recordings, once none of them is running."""
        if self._recordings and self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        self._recordings.clear()

    def _begin(self, rows: Sequence[Row]) -> None:
        """Put samples that begin into their slots."""
        slots = self.slots
        for row in rows:
            self._check(row.chain)
            slots.know(row.slot, row.chain.known)
            slots.give(row.slot, row.chain.condition)
            if row.chain.start is not None:
                slots.put(row.slot, self.start(row.chain, row.carried))
        plain = [row for row in rows if row.chain.start is None]
        if plain:
            drawn = as_int64([row.chain.seed for row in plain]), places_of(plain)
            seeds, places = to_device(torch.stack(drawn), slots.device)
            steps = torch.full_like(seeds, noise.START)
            slots.x.index_copy_(0, places, self._normals(seeds, steps, NoiseStream.STEP))
        if rows:  # whatever was there, NaN included
            slots.x0.index_fill_(0, to_device(places_of(rows), slots.device), 0.0)

    def _update(self, upload: Tensor, parts: _Parts) -> _Updated:
        """Gather, network, guidance, update, scatter. upload: as `pack` made it, on the device."""
        slots, count = self.slots, parts.samples
        columns = unpack(upload)
        target = columns["target"][:count]
        x = given = slots.x.index_select(0, columns["source"])
        if slots.condition is not None:
            given = torch.cat((x, slots.condition.index_select(0, columns["source"])), 1)
        y = columns["y"] if self.conditional else None
        if self.timestep_scale != 1:
            columns["t"] = columns["t"] * self.timestep_scale
        out, variance_frac = self._split(self.runtime.forward(given, columns["t"], y))
        before, columns = x[:count], {name: column[:count] for name, column in columns.items()}
        if parts.guided:
            rescale = columns["r"] if parts.rescaled else None
            out = guided_output(out[:count], out[columns["pair"]], columns["w"], rescale)
        else:
            out = out[:count]
        # In place wherever it can be: on a processor memory is what this takes.
        x0 = columns["a_x"] * before
        term = columns["a_o"] * out
        x0 += term
        if parts.classified:
            x0[parts.classified] += self._class_term(before, columns, parts.classified)
        # Before it is bounded, which would make a picture of an infinity. A sum is finite if all of it is.
        total = x0.sum((1, 2, 3))
        if variance_frac is not None:
            total = total + variance_frac[:count].sum((1, 2, 3))
        new = columns["c_x"] * before
        if some := parts.unclipped:
            new[some] += columns["c_u"][some] * x0[some]
        bound = columns["clip"]
        if parts.thresholded:
            bound = dynamic_threshold(x0, columns["q"], bound)
        torch.minimum(x0, bound, out=x0)
        torch.maximum(x0, -bound, out=x0)
        if parts.thresholded:
            x0 /= torch.where(columns["q"] > 0, bound, 1.0)
        new += torch.mul(columns["c_0"], x0, out=term)
        if some := parts.lookback:
            new[some] += columns["c_p"][some] * slots.x0.index_select(0, target[some])
        if some := parts.noisy:
            scale = columns["c_n"][some]
            if variance_frac is not None:
                scale = scale * torch.exp(columns["c_v"][some] * variance_frac[:count][some])
            z = self._normals(columns["seed"][some], columns["step"][some], NoiseStream.STEP)
            new[some] += z.mul_(scale)
        if parts.known:
            new[parts.known] = self._with_known(new, columns, parts.known)
        finite = (total + new.sum((1, 2, 3))).isfinite()
        slots.x.index_copy_(0, target, new)
        slots.x0.index_copy_(0, target, x0)
        return _Updated(before, new, x0, finite)

    def measure(
        self, chains: Sequence[Chain], steps: Sequence[int], x0_preds: Sequence[Image]
    ) -> list[tuple[float, float]]:
        """What these steps found about known images: (bits per dimension, squared error) of each.

        x0_preds: their x₀ predictions. The bits are L_t with the schedule's variance, the small one where it
        is learned; the mean squared error is that of the x₀ prediction, as if pixels were in [-1, 1].
        """
        assert self.schedule is not None
        known = [chain.known for chain in chains if chain.known is not None]
        image = torch.from_numpy(np.stack([each.image for each in known]))
        x0_pred = torch.from_numpy(np.stack(x0_preds))
        t = torch.tensor([chain.plan.timesteps[step] for chain, step in zip(chains, steps, strict=True)])
        bits = vlb_terms(self.schedule, image, x0_pred, t, self.schedule.variance_type)
        low, high = self.data_range
        errors = ((image - x0_pred).double() * (2 / (high - low))).square().flatten(1).mean(1)
        return list(zip(bits.tolist(), errors.tolist(), strict=True))

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """(output, position between the small variance and the large one, 0 to 1, if predicted)."""
        channels = self.shape[0]
        if out.shape[1] == channels:
            return out, None
        return out[:, :channels], (out[:, channels:] + 1) / 2

    def _class_term(self, x: Tensor, columns: Columns, some: list[int]) -> Tensor:
        assert self.classifier is not None  # `_check` has seen to this
        gradient = self.classifier.gradient(x[some], columns["t"][some], columns["y"][some])
        return columns["a_g"][some] * gradient

    def _with_known(self, x: Tensor, columns: Columns, some: Places) -> Tensor:
        """Where pixels are known, the forward process's at the end of the step."""
        assert self.slots.image is not None
        assert self.slots.mask is not None
        place = columns["source"][some]
        z = self._normals(columns["seed"][some], columns["step"][some], NoiseStream.KNOWN_PIXELS)
        known = columns["k_0"][some] * self.slots.image[place] + columns["k_n"][some] * z
        return torch.where(self.slots.mask[place], known, x[some])


def _places(coefficients: NDArray[np.float32], name: str) -> Places:
    """The rows that have a coefficient."""
    some = np.flatnonzero(coefficients[:, COEFFICIENTS.index(name)]).tolist()
    return ALL if len(some) == len(coefficients) else some


def _picked(done: _Updated, rows: Sequence[Row], kinds: Sequence[Sequence[SnapshotKind]]) -> Tensor:
    """The asked-for tensors of each row, in order: [N, C, H, W]."""
    of = {"x0": done.x0, "xt": done.x, "before": done.before}
    wanted = [of[kind][index] for index in range(len(rows)) for kind in kinds[index]]
    return torch.stack(wanted) if wanted else done.x[:0]


def trajectory(denoiser: Denoiser, chains: Sequence[Chain]) -> Iterator[Sequence[Latent]]:
    """Run chains with plans of one length side by side, yielding the latents after every step.

    It uses the first slots of the denoiser: one trajectory at a time.
    """
    for step in range(len(chains[0].plan)):
        denoiser.launch([Row(chain, slot, step) for slot, chain in enumerate(chains)]).read()
        yield [denoiser.latent(slot) for slot in range(len(chains))]


def generate(denoiser: Denoiser, chains: Sequence[Chain]) -> Tensor:
    """The finished samples of `trajectory`: [B, C, H, W] float32, pixels in the model's data range."""
    latents: Sequence[Latent] = []
    for latents in trajectory(denoiser, chains):  # noqa: B007 (the last one is the result)
        pass
    return torch.stack([latent.x for latent in latents])


def to_pixels(x: Tensor, data_range: DataRange = DATA_RANGE) -> NDArray[np.uint8]:
    """Samples as 8-bit images: [..., C, H, W] in data_range, clamped → the same shape, uint8 in [0, 255]."""
    return np.asarray(_levels(x, data_range).cpu().numpy())


def render(x: Tensor, data_range: DataRange = DATA_RANGE) -> Tensor:
    """The same as pictures, on the device: [B, C, H, W] → [B, H, W, C] uint8."""
    return _levels(x, data_range).permute(0, 2, 3, 1).contiguous()


def _levels(x: Tensor, data_range: DataRange) -> Tensor:
    low, high = data_range
    return ((x.clamp(low, high) - low) * (255 / (high - low))).round().to(torch.uint8)
