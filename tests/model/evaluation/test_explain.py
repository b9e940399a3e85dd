import numpy as np
import pytest

from model import checkpoint
from model.evaluation import explain, plots
from model.samplers import SAMPLERS
from model.schedule import SPACINGS, NoiseSchedule
from model.sheets import GAP
from tests.model.conftest import SCHEDULER
from tests.model.evaluation.test_plots import tiny_model

SCHEDULE = NoiseSchedule.from_diffusers(SCHEDULER)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, before they are pixels."""
    drawn = []

    def keep(figure):
        drawn.append(figure)
        return plots.drawn(figure)

    monkeypatch.setattr(explain, "drawn", keep)
    return drawn


def test_the_schedule_is_drawn_as_signal_ratio_and_levels(figures):
    explain.schedule_curves(SCHEDULE, steps=5)
    signal, ratio, levels = figures[0].axes
    ac = SCHEDULE.alphas_cumprod
    curves = [line.get_ydata() for line in signal.lines]
    assert np.allclose(curves, [ac**0.5, (1 - ac) ** 0.5, ac])
    assert np.allclose(ratio.lines[0].get_ydata(), ac / (1 - ac))
    assert [line.get_label() for line in levels.lines] == list(SPACINGS)
    for line in levels.lines:
        assert (np.diff(line.get_ydata()) < 0).all()


def test_every_sampler_ends_with_its_prediction(figures):
    explain.sampler_tables(SCHEDULE, steps=6)
    ends = {panel.get_title(): [line.get_ydata()[-1] for line in panel.lines] for panel in figures[0].axes}
    assert ends == {column: pytest.approx([end] * len(SAMPLERS)) for column, end in
                    {"c_x": 0, "c_0": 1, "c_p": 0, "c_n": 0}.items()}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_covers_an_image_more_and_more(channels):
    model = tiny_model(channels=channels)
    sheet = np.asarray(explain.forward_sheet(model, 1, columns=4, runtime="torch", scale=1), np.float64)
    _, height, width = model.shape
    lefts = [sheet.shape[1] - (4 - column) * (width + GAP) for column in range(4)]
    bottom = sheet.shape[0] - 2 * (height + GAP)
    cells = [sheet[bottom : bottom + height, left : left + width] for left in lefts]
    changes = [np.abs(cell - cells[0]).mean() for cell in cells]
    assert changes == sorted(changes)
    assert changes[1] > 0
    assert changes[-1] > 20


def test_the_command_draws_all_three(tmp_path):
    checkpoint.save(tmp_path / "model", tiny_model())
    explain.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "schedule.png",
        "samplers.png",
        "forward.png",
    }
