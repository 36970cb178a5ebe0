"""common/success.py: what a classifier says of a frame, of an episode, and what its file must hold."""

import copy
import math
import pickle
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from common.success import (
    SuccessClassifier,
    SuccessDetector,
    SuccessReward,
    differences_of_pictures,
    log_odds,
)

CAMERA = {"name": "wrist", "crop": None, "fps": 30, "exposure": 1e4}
FINGERPRINT = {"name": "peg", "hz": 10.0, "image_size": 32, "cameras": [CAMERA | {"name": "front"}, CAMERA]}


class Brightness(SuccessClassifier):
    """Says what the mean of the wrist's picture is, in percent: log odds 0.01 * (mean - 100)."""

    def __init__(self):
        super().__init__(("front", "wrist"), 32)

    def forward(self, images):
        odds = 0.01 * (images[:, 1].float().mean((1, 2, 3)) - 100)
        return torch.stack([torch.zeros_like(odds), odds], -1)[:, None].expand(-1, 3, -1)


def observation(wrist: int, front: int = 0) -> dict:
    image = np.ones((32, 32, 3), np.uint8)
    return {"state": np.zeros(3), "wrist": wrist * image, "front": front * image}


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.manual_seed(0)
    detector = SuccessDetector(SuccessClassifier(("front", "wrist"), 32), 0.7, 3, FINGERPRINT, {"scores": {"a": 1.0}})
    torch.save(detector.contents(), tmp_path / "classifier.pt")
    return tmp_path / "classifier.pt"


def change(path: Path, **parts: object) -> None:
    contents = torch.load(path, weights_only=True)
    torch.save(contents | parts, path)


def test_success_is_hold_frames_in_a_row():
    detector = SuccessDetector(Brightness(), threshold=0.5, hold=3, fingerprint={}, about={})
    brightness = [200, 200, 50, 200, 100, 200, 200, 99]  # 100: as probable as the threshold
    assert [detector(observation(value)) for value in brightness] == [False] * 5 + [True, True, False]


def test_probability_and_extremes_since_the_reset():
    detector = SuccessDetector(Brightness(), threshold=0.5, hold=1, fingerprint={}, about={})
    assert math.isnan(detector.probability)
    for value in (150, 50, 120):
        detector(observation(value))
    assert detector.probability == pytest.approx(1 / (1 + math.exp(-0.2)))
    assert detector.lowest == pytest.approx(1 / (1 + math.exp(0.5)))
    assert detector.highest == pytest.approx(1 / (1 + math.exp(-0.5)))
    detector.reset()
    assert detector.streak == 0
    detector(observation(100))
    assert detector.lowest == detector.highest == pytest.approx(0.5)


def test_a_reset_forgets_the_frames_in_a_row():
    detector = SuccessDetector(Brightness(), threshold=0.5, hold=2, fingerprint={}, about={})
    detector(observation(200))
    detector.reset()
    assert not detector(observation(200))
    assert detector(observation(200))


class Slideshow(gym.Env):
    """Shows the wrist one brightness after another, and says nothing of success."""

    observation_space = action_space = spaces.Discrete(1)

    def __init__(self, brightness: list[int]):
        self.brightness = brightness

    def reset(self, **kwargs):
        self.t = 0
        return observation(self.brightness[0]), {}

    def step(self, action):
        self.t += 1
        return observation(self.brightness[self.t]), 7.0, False, self.t == len(self.brightness) - 1, {"a": 1}


def test_reward_of_the_detector():
    detector = SuccessDetector(Brightness(), threshold=0.5, hold=2, fingerprint={}, about={})
    env = SuccessReward(Slideshow([50, 200, 50, 200, 200]), detector)
    for _ in range(2):  # the second episode begins anew
        env.reset()
        steps = [env.step(0)[1:] for _ in range(4)]
        assert [step[0] for step in steps] == [0.0, 0.0, 0.0, 1.0]
        assert [step[1] for step in steps] == [False, False, False, True]
        assert steps[0][3] == {"a": 1, "success": False} and steps[-1][3] == {"a": 1, "success": True}
    env = SuccessReward(Slideshow([200, 200]), detector)
    env.reset()
    assert env.step(0)[1] == 1.0  # the first frame counts
    env = SuccessReward(Slideshow([200, 200, 200]), detector, only_reward=True)
    env.reset()
    assert env.step(0)[1:] == (1.0, False, False, {"a": 1})


def test_frame_that_stands_still_because_of_a_fault_is_no_success():
    detector = SuccessDetector(Brightness(), threshold=0.5, hold=1, fingerprint={}, about={})
    for fault in (None, "camera wrist: newest picture is 0.4 s old"):
        slides = Slideshow([50, 200])
        slides.step = lambda _, fault=fault: (observation(200), 0.0, False, True, {"fault": fault})
        env = SuccessReward(slides, detector)
        env.reset()
        _, reward, terminated, _, info = env.step(0)
        assert reward == terminated == info["success"] == (fault is None)


def test_log_odds_are_those_of_the_last_class():
    logits = torch.tensor([[0.3, -1.0, 2.0], [5.0, 0.0, -2.0]])
    probability = logits.softmax(-1)[:, -1]
    torch.testing.assert_close(log_odds(logits), torch.log(probability / (1 - probability)))


def test_images_are_stacked_by_camera_whatever_their_order():
    classifier = Brightness()
    images = classifier.images(observation(wrist=7, front=3))
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8
    assert images[0].max() == 3 and images[1].min() == 7
    episode = {name: np.stack([image] * 5) for name, image in observation(7, 3).items()}
    assert np.array_equal(classifier.images(episode), np.stack([images] * 5))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"wrist": None}, "camera 'wrist'; there is only state, front"),
        ({"wrist": np.zeros((48, 48, 3), np.uint8)}, "camera 'wrist' must give (32, 32, 3) uint8, gives (48, 48, 3)"),
        ({"front": np.zeros((32, 32, 3), np.float32)}, "camera 'front' must give (32, 32, 3) uint8"),
    ],
)
def test_images_name_the_camera_that_does_not_fit(change, fault):
    wrong = {name: image for name, image in (observation(0) | change).items() if image is not None}
    with pytest.raises(ValueError, match="camera") as error:
        Brightness().images(wrong)
    assert fault in str(error.value)


def test_cameras_alone_see_only_theirs():
    torch.manual_seed(0)
    classifier = SuccessClassifier(("front", "wrist"), 32).eval()
    images = torch.randint(256, (4, 2, 32, 32, 3), dtype=torch.uint8)
    other = images.clone()
    other[:, 1] = 255 - other[:, 1]
    with torch.no_grad():
        before, after = classifier(images), classifier(other)
    assert before.shape == (4, 3, 2)
    assert torch.equal(before[:, 0], after[:, 0])
    for head in (1, 2):  # the wrist alone, and together
        assert (before[:, head] - after[:, head]).abs().min() > 0


def test_a_frozen_trunk_is_one_for_all_cameras_and_has_no_gradients():
    classifier = SuccessClassifier(("front", "wrist"), 64, "resnet10", frozen=True)
    assert len(classifier.trunks) == 1
    classifier(torch.randint(256, (2, 2, 64, 64, 3), dtype=torch.uint8)).sum().backward()
    assert all(parameter.grad is None for parameter in classifier.trunks.parameters())
    assert all(parameter.grad is not None for parameter in classifier.heads.parameters())
    assert len(SuccessClassifier(("front", "wrist"), 64).trunks) == 2


def test_pictures_too_small_for_the_encoder():
    with pytest.raises(ValueError, match="images of 16 pixels are too small for the encoder resnet10"):
        SuccessClassifier(("front",), 16, "resnet10")


def test_a_file_gives_the_same_answers(saved):
    torch.manual_seed(0)
    classifier = SuccessClassifier(("front", "wrist"), 32).eval()
    detector = SuccessDetector.load(str(saved), FINGERPRINT)
    rng = np.random.default_rng(0)
    for _ in range(3):
        obs = {name: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for name in ("wrist", "front")}
        detector(obs)
        with torch.no_grad():
            logits = classifier(torch.from_numpy(classifier.images(obs))[None])[0, -1]
        assert detector.probability == log_odds(logits).double().sigmoid().item()
    assert (detector.threshold, detector.hold, detector.about) == (0.7, 3, {"scores": {"a": 1.0}})


def test_files_that_are_none(saved, tmp_path):
    (tmp_path / "text.pt").write_text("no weights\n")
    (tmp_path / "cut.pt").write_bytes(saved.read_bytes()[:2000])
    torch.save({"weights": {}}, tmp_path / "other.pt")
    for name, fault in (
        ("gone.pt", "not there"),
        ("text.pt", "no file of plain tensors"),
        ("cut.pt", "no file of plain tensors"),
        ("other.pt", "no success classifier ('kind')"),
    ):
        with pytest.raises(ValueError, match="reward_classifier.py trains one") as error:
            SuccessDetector.load(str(tmp_path / name))
        assert fault in str(error.value) and "\n" not in str(error.value)


class Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_hostile_file_runs_nothing(tmp_path):
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(ValueError, match="no file of plain tensors"):
        SuccessDetector.load(str(tmp_path / "hostile.pt"))
    assert not (tmp_path / "touched").exists()


def test_another_trunk_is_refused(saved):
    weights = torch.load(saved, weights_only=True)["weights"]
    weights["trunks.0.convs.0.weight"] += 0.1
    change(saved, weights=weights)
    with pytest.raises(ValueError, match="its trunk is not the one that it was trained on"):
        SuccessDetector.load(str(saved))


def test_a_file_of_another_kind(saved):
    change(saved, kind="success classifier, version 0")
    with pytest.raises(ValueError, match="it is of another kind: success classifier, version 0"):
        SuccessDetector.load(str(saved))


def test_weights_load_strictly(saved):
    weights = torch.load(saved, weights_only=True)["weights"]
    del weights["together.4.bias"]
    change(saved, weights=weights)
    with pytest.raises(ValueError, match="no success classifier"):
        SuccessDetector.load(str(saved))


@pytest.mark.parametrize(
    ("where", "value", "fault"),
    [
        (("cameras", 1, "crop"), [0.1, 0, 0.9, 1], "cameras.wrist.crop is null there, [0.1, 0, 0.9, 1] here"),
        (("cameras", 1, "name"), "side", "cameras.wrist is only there"),
        (("image_size",), 64, "image_size is 32 there, 64 here"),
        (("name",), "pick", 'name is "peg" there, "pick" here'),
        (("hz",), 20.0, ""),
        (("cameras", 0, "fps"), 60, ""),
        (("cameras", 1, "timeout_s"), 0.5, ""),
        (("cameras", 1, "warmup_frames"), 9, ""),
    ],
)
def test_what_pictures_depend_on_is_compared(saved, where, value, fault):
    here = copy.deepcopy(FINGERPRINT)
    part = here
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    if not fault:
        SuccessDetector.load(str(saved), here)
        return
    with pytest.raises(ValueError, match="was trained on other pictures") as error:
        SuccessDetector.load(str(saved), here)
    assert fault in str(error.value)


def test_cameras_that_it_does_not_look_through_may_differ():
    here = copy.deepcopy(FINGERPRINT)
    here["cameras"][0]["crop"] = [0, 0, 0.5, 0.5]
    here["cameras"].append(CAMERA | {"name": "side"})
    assert differences_of_pictures(FINGERPRINT, here, ("wrist",)) == []
    assert len(differences_of_pictures(FINGERPRINT, here, ("front", "wrist"))) == 1


def test_shapes_of_a_gymnasium_task():
    theirs = {"task": "Peg-v0", "observations": {"state": [7], "wrist": [64, 64, 3]}}
    ours = {"task": "Peg-v0", "observations": {"state": [9], "wrist": [32, 32, 3]}}
    assert differences_of_pictures(theirs, ours, ("wrist",)) == [
        "observations.wrist is [64, 64, 3] there, [32, 32, 3] here"
    ]
    assert differences_of_pictures({"env_id": "Peg-v0"}, {"env_id": "Cube-v0"}, ()) == [
        'env_id is "Peg-v0" there, "Cube-v0" here'
    ]


def test_a_detector_decides_as_the_report_at_large_odds():
    """The threshold was chosen in float64; in float32 a probability is 1 from log odds of 17 on."""
    classifier = SuccessClassifier(("front",), 48)
    with torch.no_grad():
        classifier.together[-1].weight.zero_()
        classifier.together[-1].bias.copy_(torch.tensor([0.0, 17.6]))
    picture = {"front": np.zeros((48, 48, 3), np.uint8)}
    for odds, succeeds in ((19.8, False), (17.5, True)):
        detector = SuccessDetector(classifier, 1 / (1 + math.exp(-odds)), hold=1, fingerprint={}, about={})
        assert detector(picture) == succeeds
