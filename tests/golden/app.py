"""Models made for the golden file, and the service in front of each: the one place that knows the code.

All else in this folder speaks HTTP. When the code is put together otherwise, `build_app` changes and nothing
beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.golden.network import SIZE, Gradient, Network


@dataclass(frozen=True)
class Made:
    """A model of 8×8 pixels and T = 100, and the settings of the service in front of it.

    classes: names of them. null: whether there is a null class. scheduler: options of its
    `scheduler_config.json`. breaks: see Network. typical: whether typicality is known of it.
    """

    channels: int = 1
    classes: tuple[str, ...] = ("cat", "dog", "Ankle Boot")
    null: bool = True
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    classifier: bool = False
    breaks: tuple[int, int] | None = None
    typical: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


MODELS: dict[str, Made] = {
    "grey": Made(classifier=True, typical=True),
    "colour": Made(channels=3, scheduler={"prediction_type": "sample", "variance_type": "fixed_large"}),
    "plain": Made(
        classes=(),
        null=False,
        scheduler={
            "prediction_type": "v_prediction",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "clip_sample": False,
        },
        settings={"max_images": 1100, "max_queue": 1100},
    ),
    "learned": Made(null=False, scheduler={"variance_type": "learned_range"}, breaks=(1, 40)),
    "keyed": Made(
        scheduler={"prediction_type": "posterior_mean", "beta_schedule": "scaled_linear"},
        settings={"api_keys": "secret"},
    ),
}


def build_app(name: str) -> Any:
    """The ASGI application that serves one of MODELS, with the fake network in the place of the real one.

    Everything else is real: the scheduler, the denoiser, the engine, the worker and the routes.
    """
    import numpy as np

    from model.checkpoint import Checkpoint
    from model.denoiser import Denoiser
    from model.encoder import EncoderConfig, NoiseClassifier
    from model.schedule import NoiseSchedule
    from model.typicality import Typicality
    from model.unet import UNet, UNetConfig
    from service.app import create_app
    from service.engine.engine import Engine
    from service.engine.estimates import StepTimes
    from service.engine.messages import EngineConfig, EngineInfo, Invariance
    from service.engine.scheduler import Scheduler
    from service.engine.warmup import Warm, model_info
    from service.settings import Settings
    from tests.service.threads import ThreadConnection

    made = MODELS[name]
    scheduler = {"num_train_timesteps": 100, "timestep_spacing": "trailing", **made.scheduler}
    learned = scheduler.get("variance_type") == "learned_range"
    labels = len(made.classes) + made.null
    config = UNetConfig(
        sample_size=(SIZE, SIZE),
        in_channels=made.channels,
        out_channels=made.channels * (1 + learned),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=labels or None,
    )
    typicality = Typicality(
        edges=np.array([0.0, 5.0, 20.0, 50.0, 100.0]),
        knots=np.array([0.0, 1.0, 2.5, 4.0, 5.0]),
        curve=np.array([-9.0, -7.0, -5.0, -3.0, -2.0]),
        mean=np.array([0.25, -0.5, 0.125, 0.0]),
        precision=np.eye(4) + 0.25,
        quantiles=np.linspace(0.0, 8.0, 101),
        images=80,
        weights_sha256="",
    )
    checkpoint = Checkpoint(
        f"golden-{name}",
        UNet(config).eval(),
        NoiseSchedule.from_diffusers(scheduler),
        scheduler,
        made.classes,
        len(made.classes) if made.null else None,
        # Never run: it only says that there is a classifier.
        classifier=NoiseClassifier(EncoderConfig((SIZE, SIZE), made.channels, len(made.classes), (8, 16)))
        if made.classifier
        else None,
        typicality=typicality if made.typical else None,
    )

    def warm(config: EngineConfig) -> Warm:
        denoiser = Denoiser(
            Network(
                made.channels,
                labels,
                learned=learned,
                near=checkpoint.schedule.prediction_type == "posterior_mean",
                breaks=made.breaks,
            ),
            (made.channels, SIZE, SIZE),
            conditional=labels > 0,
            null_class=checkpoint.null_class,
            classifier=Gradient(made.channels, len(made.classes)) if made.classifier else None,
            schedule=checkpoint.schedule,
        )
        times = ((1, 0.001), (8, 0.002))
        engine = Engine(denoiser, Scheduler(8, StepTimes(times)))
        info = EngineInfo(checkpoint.name, "golden", "cpu", "float32", 8, times, Invariance((2,), 0.0))
        return Warm(engine, info, model_info(checkpoint))

    settings = Settings(_env_file=None, port=0, **made.settings)
    return create_app(settings, lambda config: ThreadConnection(config, warm))
