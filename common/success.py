"""Success as a classifier of images sees it; reward_classifier.py trains it.

detector = SuccessDetector.load("classifier.pt", recording.fingerprint(env))
detector.reset()  # at every reset of the environment
success = detector(obs)  # obs: {camera: (H, W, 3) uint8, ...}
"""

import math
import warnings

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from common import recording, vision
from common.setup import fail


class SuccessClassifier(nn.Module):
    """What the images of all cameras show: logits of each camera alone, and of all together; the last class is success.

    HIL-SERL networks/reward_classifier.py, with a head for each camera alone besides. A frozen trunk is the same for
    all cameras; otherwise each camera trains its own. Raises ValueError when the images are too small for the encoder.
    """

    def __init__(
        self,
        cameras: tuple[str, ...],
        image_size: int,
        encoder: str = "small",
        frozen: bool = False,
        classes: tuple[str, ...] = ("failure", "success"),
        latent_dim: int = 64,
    ):
        super().__init__()
        self.cameras, self.image_size, self.frozen, self.classes = tuple(cameras), image_size, frozen, tuple(classes)
        self.arguments = {
            "cameras": self.cameras,
            "image_size": image_size,
            "encoder": encoder,
            "frozen": frozen,
            "classes": self.classes,
            "latent_dim": latent_dim,
        }
        pretrained = "from the classifier's own file" if frozen else None
        self.trunks = nn.ModuleList()
        for _ in self.cameras[:1] if frozen else self.cameras:
            self.trunks.append(vision.make_trunk(encoder, 3, pretrained, load=False))
        self.trunks.requires_grad_(not frozen)
        shape = vision.map_shape(self.trunks[0], 3, image_size)
        if min(shape[1:]) < 2:
            raise ValueError(f"images of {image_size} pixels are too small for the encoder {encoder}")
        self.heads, self.alone = nn.ModuleList(), nn.ModuleList()
        for _ in self.cameras:
            pooling, pooled = vision.make_pooling("embeddings", shape)
            linear, norm = nn.Linear(pooled, latent_dim), nn.LayerNorm(latent_dim)
            self.heads.append(nn.Sequential(pooling, nn.Dropout(0.1), linear, norm, nn.Tanh()))
            self.alone.append(nn.Linear(latent_dim, len(classes)))
        hidden = nn.Linear(len(self.cameras) * latent_dim, latent_dim)
        last = nn.Linear(latent_dim, len(classes))
        self.together = nn.Sequential(hidden, nn.Dropout(0.1), nn.LayerNorm(latent_dim), nn.ReLU(), last)

    def images(self, observation: dict) -> np.ndarray:
        """The cameras' images (..., K, H, W, 3) of an observation {camera: (..., H, W, 3) uint8, ...}.

        Training and serving both begin here. Raises ValueError, which names the camera, when one is missing or differs.
        """
        frames = []
        for camera in self.cameras:
            if camera not in observation:
                there = ", ".join(observation) or "nothing"
                raise ValueError(f"the classifier looks through the camera {camera!r}; there is only {there}")
            frame = np.asarray(observation[camera])
            if frame.dtype != np.uint8 or frame.shape[-3:] != (self.image_size, self.image_size, 3):
                wanted = f"({self.image_size}, {self.image_size}, 3) uint8"
                raise ValueError(f"camera {camera!r} must give {wanted}, gives {frame.shape[-3:]} {frame.dtype}")
            frames.append(frame)
        return np.stack(frames, -4)

    def features(self, images: Tensor) -> Tensor:
        """(B, K, H, W, 3) -> (B, K, latent_dim)"""
        features = []
        for k, head in enumerate(self.heads):
            trunk = self.trunks[0] if self.frozen else self.trunks[k]
            features.append(head(trunk(images[:, k])))
        return torch.stack(features, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, K, H, W, 3) in 0 ... 255 -> logits (B, K + 1, C): each camera alone, and last all together."""
        features = self.features(images)
        logits = [alone(features[:, k]) for k, alone in enumerate(self.alone)]
        return torch.stack([*logits, self.together(features.flatten(1))], 1)


def log_odds(logits: Tensor) -> Tensor:
    """Of success, the last class, against all others: (..., C) -> (...); its sigmoid is the probability."""
    return logits[..., -1] - logits[..., :-1].logsumexp(-1)


class SuccessDetector:
    """Whether an episode has succeeded: in each of its last `hold` frames, success is as probable as `threshold`.

    `probability` is the newest frame's; `lowest` and `highest` are the extremes since `reset`.
    """

    KIND = "success classifier, version 1"

    def __init__(self, classifier: SuccessClassifier, threshold: float, hold: int, fingerprint: dict, about: dict):
        """`fingerprint`: of the data it learned from. `about`: whatever else its file should say, in plain values."""
        self.classifier = classifier.eval()
        self.threshold, self.hold, self.fingerprint, self.about = threshold, hold, fingerprint, about
        self.reset()

    def reset(self) -> None:
        """An episode begins."""
        self.streak = 0  # frames in a row, up to the newest, that look like success
        self.probability, self.lowest, self.highest = math.nan, math.inf, -math.inf

    def __call__(self, observation: dict) -> bool:
        """Takes in the newest {camera: (H, W, 3) uint8, ...}; ValueError as `SuccessClassifier.images`."""
        images = torch.from_numpy(self.classifier.images(observation))[None]
        with torch.no_grad():
            logits = self.classifier(images.to(next(self.classifier.parameters()).device))[0, -1]
        self.probability = log_odds(logits).double().sigmoid().item()  # float32 is 1 from 17 log odds on
        self.lowest = min(self.lowest, self.probability)
        self.highest = max(self.highest, self.probability)
        self.streak = self.streak + 1 if self.probability >= self.threshold else 0
        return self.streak >= self.hold

    def contents(self) -> dict:
        """What its file holds, for torch.save."""
        return {
            "kind": self.KIND,
            "arguments": self.classifier.arguments,
            "weights": {name: tensor.cpu() for name, tensor in self.classifier.state_dict().items()},
            "trunk_hash": vision.trunk_hash(self.classifier.trunks),
            "fingerprint": self.fingerprint,
            "threshold": self.threshold,
            "hold": self.hold,
            "about": self.about,
        }

    @classmethod
    def load(cls, path: str, expected: dict | None = None, device: torch.device | str = "cpu") -> "SuccessDetector":
        """From its file. Raises ValueError in one line: no such file, damaged, or of pictures that differ from those of
        `expected`, the fingerprint of the task here."""
        try:
            with warnings.catch_warnings(action="ignore"):  # it advises to load without weights_only
                saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file raises what it likes
            what = (
                "not there"
                if isinstance(error, FileNotFoundError)
                else f"no file of plain tensors ({type(error).__name__})"
            )
            raise ValueError(f"{path}: {what}; reward_classifier.py trains one") from error
        try:
            if saved["kind"] != cls.KIND:
                raise ValueError(f"it is of another kind: {saved['kind']}")
            classifier = SuccessClassifier(**saved["arguments"])
            classifier.load_state_dict(saved["weights"])
            if vision.trunk_hash(classifier.trunks) != saved["trunk_hash"]:
                raise ValueError("its trunk is not the one that it was trained on")
            detector = cls(classifier, saved["threshold"], saved["hold"], saved["fingerprint"], saved["about"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            what = str(error).splitlines()[0]
            raise ValueError(f"{path}: no success classifier ({what}); reward_classifier.py trains one") from error
        wrong = differences_of_pictures(saved["fingerprint"], expected or {}, classifier.cameras)
        if wrong:
            raise ValueError(f"{path}: was trained on other pictures: {'; '.join(wrong)}")
        classifier.to(device)
        return detector


def open_detector(path: str, option: str, env: gym.Env) -> SuccessDetector:
    """The detector in a file. Exits with one line that names `option` when there is none, or it is of another task."""
    try:
        return SuccessDetector.load(path, recording.fingerprint(env))
    except ValueError as error:
        fail(f"{option} {error}")


class SuccessReward(gym.Wrapper):
    """Reward 1 at every step after which the detector sees success, else 0; the first one ends the episode.

    With `only_reward` ends and info["success"] stay the task's own, so that an evaluation is not the classifier's.
    """

    def __init__(self, env: gym.Env, detector: SuccessDetector, only_reward: bool = False):
        super().__init__(env)
        self.detector = detector
        self.only_reward = only_reward

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.detector.reset()
        self.detector(obs)
        return obs, info

    def step(self, action):
        obs, _, terminated, truncated, info = self.env.step(action)
        success = self.detector(obs) and not info.get("fault")  # a fault's frame is an old one
        if not self.only_reward:
            terminated = terminated or success
            info = info | {"success": success}
        return obs, float(success), terminated, truncated, info


def rewarded(env: gym.Env, path: str) -> SuccessReward:
    """The task with rewards, and only these, of the detector in a file. Exits with one line when it is of another."""
    return SuccessReward(env, open_detector(path, "--reward", env), only_reward=True)


PICTURES_DEPEND_ON = ("task", "name", "env_id", "image_size", "cameras", "observations")  # of a fingerprint
NOT_SEEN = ("fps", "timeout_s", "warmup_frames")  # of a camera's settings


def differences_of_pictures(theirs: dict, ours: dict, cameras: tuple[str, ...]) -> list[str]:
    """What differs between two fingerprints that these cameras' pictures depend on, where both say something."""
    common = [name for name in PICTURES_DEPEND_ON if name in theirs and name in ours]
    a, b = ({name: of_cameras(part[name], cameras) for name in common} for part in (theirs, ours))
    return list(recording.differences(a, b))


def of_cameras(value: object, cameras: tuple[str, ...]) -> object:
    """A fingerprint's settings of cameras, or shapes of observations, without what these cameras do not see."""
    if isinstance(value, list):
        seen = [camera for camera in value if isinstance(camera, dict) and camera["name"] in cameras]
        return [{key: setting for key, setting in camera.items() if key not in NOT_SEEN} for camera in seen]
    if isinstance(value, dict):
        return {key: shape for key, shape in value.items() if key in cameras}
    return value
