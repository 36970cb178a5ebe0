"""Small datasets of labelled frames, as record_demos.py writes them: the wrist camera sees the success, front does not.

write_frames("hil/frames-v0", episodes=12)     # before: MINARI_DATASETS_PATH
"""

import minari
import numpy as np
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

SIZE = 32
STEPS = 12
FINGERPRINT = {
    "version": 1,
    "name": "peg",
    "image_size": SIZE,
    "action_scale": [0.02],
    "cameras": [{"name": "front", "crop": None, "fps": 30}, {"name": "wrist", "crop": None, "fps": 30}],
}


def picture(rng: np.random.Generator, brightness: float) -> np.ndarray:
    """(SIZE, SIZE, 3) noise with a square of this brightness in the middle."""
    image = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
    image[12:20, 12:20] = brightness + rng.integers(0, 20)
    return image


def frames(rng: np.random.Generator, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Pictures (T, SIZE, SIZE, 3) of both cameras; the brighter wrist's square, the higher the label."""
    wrist = [picture(rng, 30 + 90 * max(label, 0)) for label in labels]
    front = [picture(rng, 30) for _ in labels]
    state = np.zeros((len(labels), 1), np.float32)
    return {"front": np.stack(front), "wrist": np.stack(wrist), "state": state}


def write_frames(
    name: str,
    episodes: int = 12,
    labelled: bool = True,
    successes: bool = True,
    suggestion: str | None = None,
    classes: int = 2,
    fingerprint: dict | None = FINGERPRINT,
    seed: int = 0,
) -> None:
    """A local dataset; every second episode ends in success, half of it long.

    Without `labelled` they are demonstrations: a success is their last frame only. `suggestion`: the classifier's
    answers, "right", or "wrong" in every fourth episode, one failure after one success.
    """
    rng = np.random.default_rng(seed)
    image = spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    space = spaces.Dict({"front": image, "wrist": image, "state": spaces.Box(-1, 1, (1,), np.float32)})
    buffers = []
    for number in range(episodes):
        success = successes and number % 2 == 0
        labels = np.zeros(STEPS + 1, int)
        if classes > 2:
            labels[4:] = 1
        if success:
            labels[-6 if labelled else -1 :] = classes - 1
        infos = {"success": np.arange(STEPS) == (STEPS - 1 if success else -1)}
        if labelled:
            infos["label"] = labels[1:].astype(np.int8)
        if suggestion:
            wrong = suggestion == "wrong" and number % 4 == 1
            infos["suggestion"] = infos["success"] | (wrong & (np.arange(STEPS) == 5))
        ends = np.arange(STEPS) == STEPS - 1
        columns = (np.zeros((STEPS, 1), np.float32), np.zeros(STEPS), ends & success, ends & (not success))
        buffers.append(EpisodeBuffer(number, None, None, frames(rng, labels), *columns, infos))
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    dataset = minari.create_dataset_from_buffers(name, buffers, observation_space=space, action_space=action_space)
    if fingerprint:
        dataset.storage.update_metadata({"fingerprint": fingerprint})
