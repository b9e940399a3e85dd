import numpy as np
import pytest
import torch

from model.evaluation import judge
from model.evaluation.judge import ClassifierConfig
from model.training.data import Dataset

CONFIG = ClassifierConfig(epochs=4, batch_size=20, width=4, features=8, learning_rate=1e-2)


def stripes(count, seed=0):
    """Three classes of 16×16 images, told apart by where the bright stripe is, on a noisy ground."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 100, (count, 1, 16, 16))
    for image, label in zip(images, labels, strict=True):
        image[0, :, 2 + 5 * label : 4 + 5 * label] += 150
    return Dataset(images.astype(np.uint8), labels.astype(np.int64), ("left", "middle", "right"))


@pytest.fixture(scope="module")
def net():
    return judge.train(stripes(300), CONFIG)


def test_it_learns_what_can_be_learnt(net):
    test_set = stripes(60, seed=1)
    judged = judge.judge(net, test_set.images)
    assert (judged.labels == test_set.labels).mean() > 0.9
    assert judged.features.shape == (60, CONFIG.features)
    assert judged.features.dtype == np.float64


def test_an_index_chooses_and_orders_the_images(net):
    images = stripes(60).images
    index = np.array([5, 3, 58])
    chosen = judge.judge(net, images, index)
    assert np.allclose(chosen.features, judge.judge(net, images).features[index], atol=1e-5)


def test_training_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(net):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = judge.train(stripes(300), CONFIG)
    assert torch.equal(before, torch.get_rng_state())
    for one, other in zip(net.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_shifting_moves_each_image_by_its_own_whole_pixels():
    x = torch.zeros(64, 2, 9, 9)
    x[:, :, 4, 4] = 1
    moved = judge.shifted(x, 2, torch.Generator().manual_seed(0))
    places = {tuple(np.argwhere(image[0].numpy())[0]) for image in moved}
    assert (moved.sum((2, 3)) == 1).all()
    assert torch.equal(moved[:, 0], moved[:, 1])  # channels move together
    assert len(places) > 10
    assert all(2 <= row <= 6 and 2 <= column <= 6 for row, column in places)
    assert torch.equal(judge.shifted(x, 0, torch.Generator()), x)


def test_the_kept_classifier_is_used_until_its_settings_change(tmp_path, monkeypatch):
    path = tmp_path / "training" / "classifier.safetensors"
    quick = ClassifierConfig(epochs=1, batch_size=20, width=4, features=8)
    data = stripes(40)
    first = judge.load_or_train(path, data, quick)
    assert sorted(p.name for p in path.parent.iterdir()) == ["classifier.safetensors"]

    trained = []

    def counted(*given):
        trained.append(given)
        return first

    monkeypatch.setattr(judge, "train", counted)
    again = judge.load_or_train(path, data, quick)
    assert not trained
    assert not again.training
    for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)

    judge.load_or_train(path, stripes(41), quick)  # other data
    path.write_bytes(b"not a safetensors file")
    judge.load_or_train(path, data, quick)
    assert len(trained) == 2
