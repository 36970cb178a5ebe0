"""The reward on a real robot: a classifier of images that says whether the task is done; HIL-SERL's, checked.

    python reward_classifier.py                                     # simulated peg: collects, trains, reports, minutes
    python reward_classifier.py --resume RUN_DIR                    # go on after Ctrl-C or a crash
    python reward_classifier.py --data hil/frames-v0                # needs record_demos.py --mode classifier before
    python reward_classifier.py --data hil/frames-v0 --encoder resnet10 --pretrained resnet10_params.pkl  # needs both
    python reward_classifier.py --data hil/frames-v0 --add RUN      # needs a run where person and classifier disagreed
    python reward_classifier.py --watch FILE                        # needs a classifier; its answers live, as a bar
    python reward_classifier.py --watch FILE --env-id robot_client:FrankaReal-v0 --teleop keyboard  # needs a robot

Expect: eval/frames_right >= 0.99 (in lights that it has not seen) [benchmarks/results/reward_classifier.csv]

The run folder gets classifier.pt (one file: network, threshold, scores; sac_pixel_sim.py --reward FILE and
record_demos.py --classifier FILE take it), scores.json, errors.png (the worst frames: look at them), curve.png.
Read the two tables: a camera that tells nothing alone is the wrong one, or looks at the wrong place. Then add data for
every error that you see, rather than move the threshold.

Sources: HIL-SERL arXiv:2410.21845 (commit 5d02aed: networks/reward_classifier.py, examples/train_reward_classifier.py),
SERL arXiv:2401.16013.
Differs from them: episodes are held out; training stops at the best held-out loss, not after 100 or 150 steps; the
threshold is chosen for a budget of false successes per episode instead of 0.5 to 0.9 by hand, and several frames in a
row must say so; a head for each camera alone; training and serving read images with the same code.
New task: `grep -n TASK: reward_classifier.py` lists the places to edit.
"""

import copy
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve others

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import franka_sim  # noqa: F401  registers the Franka tasks  # TASK: import what registers yours
import robot_client as rc
from common import envs, recording, vision
from common.datasets import local_dataset
from common.episodes import expert_of
from common.recording import cameras_of, settled
from common.run import Run
from common.setup import ends_well, fail, flag, parse, write_atomically
from common.success import SuccessClassifier, SuccessDetector, differences_of_pictures, log_odds, open_detector
from common.tensors import check_memory, set_up_torch

SIMULATED = "FrankaPegInsert-v0"
MARGIN = 2  # frames before and after a change of label that are left out
BEFORE_SUCCESS = 5  # frames before a demonstration's last one that are left out
HELD_OUT = 0.3  # share of episodes not learned from; they end the training and set the threshold
BATCH_SIZE = 96  # frames, of each class as many
LEARNING_RATE = 3e-4
LOOK_EVERY = 20  # updates between two looks at the held-out loss
PATIENCE = 5  # looks without a better held-out loss, then training ends


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    # experiment
    seed: int = 1
    """seed of everything: the split of episodes, batches, networks, simulated episodes"""
    run_dir: str | None = None
    """directory to write to (default: a new one under runs/)"""
    resume: str | None = None
    """run directory to continue"""
    threads: int = 2
    """CPU threads for PyTorch"""

    # data
    data: tuple[str, ...] = ()
    """Minari datasets of record_demos.py, labelled frames or demonstrations (none: the simulated peg)"""
    add: tuple[str, ...] = ()
    """runs or datasets of which the episodes are added where person and classifier disagreed"""
    cameras: tuple[str, ...] = ()
    """cameras that the classifier looks through (none: all in the data)"""
    classes: tuple[str, ...] = ("failure", "success")
    """names of the labels 0, 1, ...; the last one is success"""
    simulated_episodes: int = 80
    """of the simulated peg, to learn from, without --data"""
    test_episodes: int = 40
    """of the simulated peg in another light, to look at in the end"""
    image_size: int = 64
    """pixels, of the simulated peg"""

    # training
    encoder: Literal["small", "resnet10", "mobilenet"] = "small"
    """convolutions that look at the images"""
    pretrained: str | None = None
    """file of the encoder's parameters, which then stay as they are; without it they are learned"""
    augmentations: tuple[Literal["crop", "jitter", "blur", "flip"], ...] = ("crop", "jitter")
    """random changes of the training images"""
    updates: int = 400
    """gradient steps, at most; without a better held-out loss it ends earlier"""

    # decision
    hold: int = 2
    """frames in a row that must look like success"""
    false_successes: float = 0.01
    """share of the held-out episodes that may have a success where there is none"""

    # a finished classifier
    watch: str | None = None
    """file of a classifier whose answers are shown live"""
    env_id: str = SIMULATED
    """task to watch: a simulated one, or robot_client:FrankaReal-v0, the robot"""
    teleop: Literal["expert", "keyboard", "spacemouse"] = "expert"
    """who moves the arm meanwhile; the expert is the simulated task's"""
    task: str = "peg"
    """which task on the robot: one of TASKS in robot_client.py"""
    server: str = rc.SERVER
    """address of robot_server.py"""
    keys: str | None = None
    """directory with the CURVE keys of robot_server.py --keygen"""
    episodes: int = 5
    """how many to watch"""

    MAY_CHANGE = "run_dir resume updates threads"
    eval_only = None  # no flags of this script, but a Run asks for them
    track = False

    def check(self) -> None:
        """Exits with one line when a value is out of its range or contradicts another."""
        for name in ("simulated_episodes", "test_episodes", "updates", "hold", "episodes"):
            if getattr(self, name) < 1:
                fail(f"{flag(name)} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.false_successes < 1:
            fail(f"--false-successes {self.false_successes}: must be at least 0 and below 1")
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            fail(f"--classes {' '.join(self.classes)}: at least two different names, the last is success")
        if self.pretrained and self.encoder == "small":
            fail(f"--pretrained {self.pretrained}: no such file is known for --encoder small; take resnet10")
        if self.watch and (self.resume or self.run_dir):
            fail("--watch: shows a finished classifier, give neither --resume nor --run-dir")
        if self.add and not self.data:
            fail("--add: give the first classifier's --data DATASET, too")


# --- Simulated episodes -----------------------------------------------------------------------------------------------
class Clip(NamedTuple):
    """An episode as the classifier sees it."""

    name: str
    images: np.ndarray  # (T, K, H, W, 3) uint8
    labels: np.ndarray  # (T,) number of the class, or -1: left out
    added: bool = False  # by --add


class Lights(gym.Wrapper):
    """Another light in every episode of a simulated task, and a camera's noise in every picture.

    `elsewhere`: from the other side, darker or brighter, more coloured, with more noise than it ever is without.
    """

    def __init__(self, env: gym.Env, seed: int, elsewhere: bool):
        super().__init__(env)
        self.rng = np.random.default_rng([seed, elsewhere])
        self.elsewhere = elsewhere
        self.noise = 0.0
        model = env.unwrapped.sim.model
        self.diffuse = model.light_diffuse.copy()
        self.ambient = model.vis.headlight.ambient.copy()

    def reset(self, **kwargs):
        draw = self.rng.uniform
        model = self.env.unwrapped.sim.model
        angle = math.radians(draw(30, 150) if self.elsewhere else draw(-150, -30))
        brightness = draw(0.65, 1.2)
        if self.elsewhere:
            brightness = draw(0.5, 0.65) if draw() < 0.5 else draw(1.2, 1.35)
        strength = 0.15 if self.elsewhere else 0.07
        color = brightness * draw(1 - strength, 1 + strength, 3)
        model.light_dir[0] = -math.cos(angle), -math.sin(angle), -1.3
        model.light_diffuse[:] = self.diffuse * color
        model.vis.headlight.ambient[:] = self.ambient * color
        self.noise = draw(6, 10) if self.elsewhere else draw(0, 6)
        obs, info = self.env.reset(**kwargs)
        return self.noisy(obs), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        return self.noisy(obs), *rest

    def noisy(self, obs: dict) -> dict:
        result = dict(obs)
        for name in cameras_of(self.env.observation_space):
            pixels = obs[name] + self.noise * self.rng.standard_normal(obs[name].shape)
            result[name] = pixels.clip(0, 255).astype(np.uint8)
        return result


KINDS = ("success", "beside", "stops", "success", "out again")
KINDS += ("stops", "success", "beside", "wanders", "success")


class Script:
    """The scripted expert with noise, and failures like a policy's. TASK: those of your simulated task.

    beside: presses the peg onto the block; stops: half way in; out again: pulls the peg out after the success;
    wanders: anywhere.
    """

    def __init__(self, env: gym.Env, kind: str, rng: np.random.Generator):
        self.task = env.unwrapped
        self.kind = kind
        self.rng = rng
        side = rng.uniform(0, 2 * math.pi)
        self.beside = np.array([0.7 * math.cos(side), 0.7 * math.sin(side), -0.8, 0, 0, 0])  # 14 mm
        self.depth = rng.uniform(0, 0.01)  # m; by the time it stands it is up to 15 mm deeper
        self.drift = np.zeros(6)
        self.successes = 0  # steps

    def action(self, success: bool) -> np.ndarray:
        """(6,) the next action, after a step that was a success or not."""
        self.successes += success
        tip = self.task.tip_in_hole()[2]  # m above the hole
        # With more it would not find the hole.
        noise = (0.02 if tip < 0.01 else 0.3) * self.rng.standard_normal(6)
        action = self.task.expert_action() + noise
        if self.kind == "beside":
            action += self.beside
        elif self.kind == "stops":
            action *= 0.4 if tip > -self.depth else 0.0
        elif self.kind == "out again" and self.successes > 8:
            action = np.array([0, 0, 0.5, 0, 0, 0])
        elif self.kind == "wanders":
            self.drift = 0.8 * self.drift + 0.6 * self.rng.standard_normal(6)
            action = self.drift
        return np.clip(action, -1, 1).astype(np.float32)


def simulated_clips(args: Args, classifier: SuccessClassifier, env: Lights, count: int) -> Iterator[Clip]:
    """`count` episodes of the simulated peg; their seeds are those of demonstrations."""
    from tqdm import tqdm

    name = "in another light" if env.elsewhere else "simulated peg"
    interval = 0.2 if sys.stderr.isatty() else 10.0
    for number in tqdm(range(count), name, unit="episode", mininterval=interval):
        rng = np.random.default_rng([args.seed, env.elsewhere, number])
        kind = KINDS[number % len(KINDS)]
        obs, info = env.reset(seed=envs.episode_seed(args.seed, 2 + env.elsewhere, number))
        script = Script(env, kind, rng)
        images = [classifier.images(obs)]
        labels = [0]
        successes = 32 if kind == "out again" else 12
        while len(labels) < 50 and script.successes < successes:
            obs, _, _, _, info = env.step(script.action(info["success"]))
            images.append(classifier.images(obs))
            labels.append(int(info["success"]))
        yield Clip(f"{kind} {number}", np.stack(images), settled(np.array(labels), MARGIN))


# --- Dataset ----------------------------------------------------------------------------------------------------------
def fingerprint_of(dataset) -> dict:
    """That of its task, or, where it has none, the shapes of its pictures."""
    found = dataset.storage.metadata.get("fingerprint")
    shapes = {name: [size, size, 3] for name, size in cameras_of(dataset.observation_space).items()}
    return found or {"observations": shapes}


def frame_labels(infos: dict, frames: int, classes: int) -> np.ndarray:
    """Labels (T + 1,) of an episode's frames, -1: left out. Raises ValueError when it tells nothing of success.

    Of labelled frames theirs. Of a demonstration that ends in success its last frame is a success, those just before
    are left out; all others are failures.
    """
    if "label" in infos:
        labels = np.full(frames, -1)
        labels[-len(infos["label"]) :] = infos["label"]  # steps' are of the observations after
        if not -1 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"has the labels {np.unique(labels).tolist()}; --classes names {classes}")
        return labels
    if "success" not in infos:
        raise ValueError("says nothing of success (infos/label, infos/success); record it with record_demos.py")
    labels = np.zeros(frames, int)
    if infos["success"][-1]:
        labels[-1 - BEFORE_SUCCESS : -1] = -1
        labels[-1] = classes - 1
    return labels


def recorded_clips(option: str, source: str, classifier: SuccessClassifier, fingerprint: dict) -> list[Clip]:
    """Episodes of a dataset; of --add those that the person called otherwise than the classifier.

    Exits with one line when their pictures are others than those that `fingerprint` tells of, or have no labels.
    """
    dataset = local_dataset(option, source)
    wrong = differences_of_pictures(fingerprint_of(dataset), fingerprint, classifier.cameras)
    if wrong:
        fail(f"{option} {source}: its pictures are others: {'; '.join(wrong)}")
    frames = int(dataset.total_steps) + int(dataset.total_episodes)
    size = 2 * frames * len(classifier.cameras) * classifier.image_size**2 * 3  # as episodes, and to draw batches from
    check_memory(size, f"{option} {source}", "give fewer episodes, or smaller pictures")
    clips = []
    try:
        for episode in dataset.iterate_episodes():
            infos = episode.infos or {}
            if option == "--add" and not disagreement(infos):
                continue
            images = classifier.images(episode.observations)
            labels = frame_labels(infos, len(images), len(classifier.classes))
            clips.append(Clip(f"{source} {episode.id}", images, labels, option == "--add"))
    except ValueError as error:
        fail(f"{option} {source}: {error}")
    if not clips and option == "--add":
        fail(f"--add {source}: person and classifier agree in all of its {dataset.total_episodes} episodes")
    return clips


def disagreement(infos: dict) -> bool:
    """Whether the person's verdict differs from the classifier's. Raises ValueError when one of them is not told."""
    if not {"success", "suggestion"} <= infos.keys():
        raise ValueError("does not tell both verdicts (infos/success, infos/suggestion); record it with a classifier")
    return bool(np.any(infos["suggestion"])) != bool(infos["success"][-1])


def split(clips: list[Clip], share: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Episodes to learn from and held-out ones, `share` of each kind: with success, without, with it added, without."""
    groups: dict[tuple, list[Clip]] = {}
    for clip in clips:
        groups.setdefault((clip.added, int(clip.labels.max())), []).append(clip)
    learned, held_out = [], []
    rng = np.random.default_rng(seed)
    for _, group in sorted(groups.items()):
        count = min(max(1, round(share * len(group))), len(group) - 1)
        order = rng.permutation(len(group))
        held_out += [group[i] for i in order[:count]]
        learned += [group[i] for i in order[count:]]
    return learned, held_out


class Frames(NamedTuple):
    """All labelled frames of some episodes."""

    images: Tensor  # (N, K, H, W, 3) uint8
    labels: Tensor  # (N,)

    @classmethod
    def of(cls, clips: list[Clip], device: torch.device) -> "Frames":
        images = np.concatenate([clip.images[clip.labels >= 0] for clip in clips])
        labels = np.concatenate([clip.labels[clip.labels >= 0] for clip in clips])
        return cls(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device))

    def sample(self, batch_size: int, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As many frames of each class, (B, K, H, W, 3) and (B,)"""
        picks = []
        for label in range(classes):
            there = (self.labels == label).nonzero().squeeze(1)
            shape = (batch_size // classes,)
            draws = torch.randint(len(there), shape, generator=generator, device=there.device)
            picks.append(there[draws])
        picks = torch.cat(picks)
        return self.images[picks], self.labels[picks]


def show_counts(parts: dict[str, list[Clip]], classes: tuple[str, ...]) -> None:
    """Prints episodes and frames of each part. Exits with one line when a class is missing where it is needed."""
    print(f"{'':18}{'episodes':>10}" + "".join(f"{name:>12}" for name in (*classes, "left out")))
    for name, clips in parts.items():
        labels = np.concatenate([np.empty(0, int), *(clip.labels for clip in clips)])
        counts = [int((labels == label).sum()) for label in (*range(len(classes)), -1)]
        print(f"{name:18}{len(clips):>10}" + "".join(f"{count:>12,}" for count in counts))
        for label, count in zip(classes, counts, strict=False):
            if count == 0 and name != "another light":
                fail(f"no frame of {label} in the episodes {name}: record at least two episodes with it, better 20")
    labels = np.concatenate([clip.labels for clip in parts["to learn from"]])
    success = len(classes) - 1
    if (labels == success).sum() > ((labels >= 0) & (labels < success)).sum() / 2:
        print("few frames without success: HIL-SERL advises two to three times as many, near misses above all")


# --- Training ---------------------------------------------------------------------------------------------------------
class Trainer:
    """Network, optimizer, and the best weights so far by the loss of held-out episodes."""

    def __init__(self, classifier: SuccessClassifier, args: Args, device: torch.device, held_out: list[str]):
        """`held_out`: names of the episodes that nothing may be learned from."""
        self.classifier = classifier.to(device)
        self.args = args
        self.held_out = held_out
        self.generator = torch.Generator(device).manual_seed(args.seed)
        parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
        self.best_loss = math.inf
        self.best_weights = copy.deepcopy(classifier.state_dict())
        self.looks = 0  # since the best

    def update(self, frames: Frames) -> Tensor:
        """One gradient step; the loss."""
        args = self.args
        images, labels = frames.sample(BATCH_SIZE, len(args.classes), self.generator)
        padding = max(1, self.classifier.image_size // 32)
        images = vision.augment(images, args.augmentations, padding, self.generator)
        self.classifier.train()
        logits = self.classifier(images)  # (B, K + 1, C)
        labels = labels[:, None].expand(logits.shape[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def look(self, frames: Frames) -> float:
        """Loss of all cameras together on held-out frames, each class counted alike; keeps the best weights."""
        logits = answers(self.classifier, frames.images)[:, -1]
        losses = F.cross_entropy(logits, frames.labels, reduction="none")
        means = [losses[frames.labels == label].mean() for label in range(len(self.args.classes))]
        loss = torch.stack(means).mean().item()
        self.looks += 1
        if loss < self.best_loss:
            self.best_loss = loss
            self.looks = 0
            self.best_weights = copy.deepcopy(self.classifier.state_dict())
        return loss

    def state_dict(self) -> dict:
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state().cpu(),
            "dropout": torch.get_rng_state(),
            "best_loss": self.best_loss,
            "best_weights": self.best_weights,
            "looks": self.looks,
            "held_out": self.held_out,
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError when it may have learned from what is held out now."""
        if state["held_out"] != self.held_out:
            raise ValueError("--data has other episodes now, so that others are held out; start a new run")
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["dropout"].cpu())
        self.best_loss = state["best_loss"]
        self.best_weights = state["best_weights"]
        self.looks = state["looks"]


@torch.no_grad()
def answers(classifier: SuccessClassifier, images: Tensor) -> Tensor:
    """Logits (N, K + 1, C) of images (N, K, H, W, 3), as in serving."""
    classifier.eval()
    device = next(classifier.parameters()).device
    return torch.cat([classifier(part.to(device)) for part in images.split(256)])


# --- Evaluation -------------------------------------------------------------------------------------------------------
class Scored(NamedTuple):
    """What one head of a classifier says of an episode's frames."""

    odds: np.ndarray  # (T,) log odds of success
    success: np.ndarray  # (T,) bool: frames of success
    failure: np.ndarray  # (T,) bool: frames of failure; those in neither were left out


def score(classifier: SuccessClassifier, clips: list[Clip]) -> list[list[Scored]]:
    """For each head (each camera alone, then all together) what it says of every episode."""
    heads: list[list[Scored]] = [[] for _ in range(len(classifier.cameras) + 1)]
    last = len(classifier.classes) - 1
    for clip in clips:
        logits = answers(classifier, torch.from_numpy(clip.images))
        odds = log_odds(logits).double().cpu().numpy()  # (T, K + 1)
        success = clip.labels == last
        failure = (clip.labels >= 0) & ~success
        for head, column in zip(heads, odds.T, strict=True):
            head.append(Scored(column, success, failure))
    return heads


def lowest_in_a_row(odds: np.ndarray, hold: int) -> np.ndarray:
    """(T,) the lowest of each frame and the hold - 1 before it; -inf where there are not as many."""
    lowest = np.full(len(odds), -np.inf)
    if len(odds) >= hold:
        lowest[hold - 1 :] = np.lib.stride_tricks.sliding_window_view(odds, hold).min(1)
    return lowest


def choose_threshold(scored: list[Scored], hold: int, budget: float) -> float:
    """Log odds above which at most a share `budget` of the episodes has a success where there is none.

    Of the thresholds that keep to it the one with the most frames right, each class counted alike; of several the
    middle of the widest gap.
    """
    peaks = [lowest_in_a_row(clip.odds, hold)[clip.failure] for clip in scored if clip.failure.any()]
    peaks = sorted((float(peak.max()) for peak in peaks), reverse=True)
    odds = np.concatenate([clip.odds[clip.success | clip.failure] for clip in scored])
    least = max(peaks[int(budget * len(peaks))], float(odds.min()))
    edges = np.unique(np.append(odds[odds > least], [least, max(least, float(odds.max())) + 1]))
    candidates = (edges[1:] + edges[:-1]) / 2
    success = np.sort(np.concatenate([clip.odds[clip.success] for clip in scored]))
    failure = np.sort(np.concatenate([clip.odds[clip.failure] for clip in scored]))
    seen = 1 - np.searchsorted(success, candidates) / len(success)
    refused = np.searchsorted(failure, candidates) / len(failure)
    best = np.isclose(seen + refused, (seen + refused).max())
    widest = np.argmax(np.where(best, np.diff(edges), -1))
    return float(candidates[widest])


def measure(scored: list[Scored], threshold: float, hold: int) -> dict[str, float]:
    """How good a threshold (log odds) is, on frames, and on episodes with `hold` frames in a row."""
    odds = np.concatenate([clip.odds for clip in scored])
    success = np.concatenate([clip.success for clip in scored])
    failure = np.concatenate([clip.failure for clip in scored])
    probability = 1 / (1 + np.exp(-odds))
    right = np.where(success, odds >= threshold, odds < threshold)[success | failure]
    failed = [clip for clip in scored if not clip.success.any()]
    succeeded = [clip for clip in scored if clip.success.any()]

    def fires(clip: Scored, where: np.ndarray, hold: int) -> bool:
        return bool((lowest_in_a_row(clip.odds, hold)[where] >= threshold).any())

    def seen(clip: Scored) -> bool:  # a demonstration may end before `hold` frames of success
        return fires(clip, clip.success, min(hold, int(clip.success.sum())))

    return {
        "frames": float(len(right)),
        "frames_right": float(right.mean()),
        "separation": float(probability[success].mean() - probability[failure].mean()) if success.any() else math.nan,
        "failed_episodes": len(failed),
        "false_successes": sum(fires(clip, clip.failure, hold) for clip in failed),
        "successful_episodes": len(succeeded),
        "too_early": sum(fires(clip, clip.failure, hold) for clip in succeeded),
        "seen_successes": sum(map(seen, succeeded)),
    }


def show_scores(name: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints a table: what each camera sees alone, and all together."""
    headings = ("separation", "frames right", "false successes", "too early", "successes seen")
    print(f"\n{name:18}" + "".join(f"{heading:>17}" for heading in headings))
    for camera, row in rows.items():
        failed, succeeded = row["failed_episodes"], row["successful_episodes"]
        cells = [
            f"{row['separation']:.2f}",
            f"{row['frames_right']:.2%}",
            f"{row['false_successes']} of {failed}",
            f"{row['too_early']} of {succeeded}",
            f"{row['seen_successes']} of {succeeded}",
        ]
        print(f"{camera:18}" + "".join(f"{cell:>17}" for cell in cells))


def draw_errors(path: Path, clips: list[Clip], scored: list[Scored], threshold: float, count: int = 16) -> None:
    """Writes the frames furthest on the wrong side of the threshold, or least far on the right one; two an episode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    worst = []
    for clip, head in zip(clips, scored, strict=True):
        wrongness = np.where(head.success, threshold - head.odds, head.odds - threshold)
        wrongness[~(head.success | head.failure)] = -np.inf
        for t in np.argsort(-wrongness)[:2]:
            worst.append((wrongness[t], clip, head, t))
    worst.sort(key=lambda item: -item[0])
    shown = [item for item in worst[:count] if np.isfinite(item[0])]
    columns = 4
    rows = math.ceil(len(shown) / columns)
    size = (3.6 * columns, 2.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (wrongness, clip, head, t) in zip(axes.flat, shown, strict=False):
        axis.imshow(np.concatenate(list(clip.images[t]), 1))
        label = "success" if head.success[t] else "failure"
        said = f"p {1 / (1 + math.exp(-head.odds[t])):.4f}, is {label}"
        color = "crimson" if wrongness > 0 else "black"
        axis.set_title(f"{said}\n{clip.name}, frame {t}", fontsize=8, color=color)
    limit = 1 / (1 + math.exp(-threshold))
    figure.suptitle(
        f"the worst frames, at most two of an episode; wrong ones in red, threshold {limit:.4f}", fontsize=9
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --- Live -------------------------------------------------------------------------------------------------------------
def make_env(args: Args) -> gym.Env:
    """The task to watch; a person may move the arm."""
    if args.env_id == "robot_client:FrankaReal-v0":
        config = rc.task_named(args.task, server=args.server, keys=args.keys, reward="none")
        env = envs.make(args.env_id, config=config, max_episode_steps=config.max_episode_steps)
    else:
        options = {"image_obs": True, "image_size": args.image_size}
        env = envs.make(args.env_id, **options if args.env_id.startswith("Franka") else {})  # TASK: options of yours
    return env if args.teleop == "expert" else rc.Intervention(env, rc.open_teleop(args.teleop))


def watch(args: Args) -> None:
    """Shows, step by step, what a finished classifier says of a task."""
    env = make_env(args)
    detector = open_detector(args.watch, "--watch", env)
    expert = expert_of(env, "--teleop expert") if args.teleop == "expert" else None
    terminal = env.teleop.terminal if args.teleop == "keyboard" else None
    if terminal:
        print(rc.KEYS.partition("    y success")[0] + "    q quit", flush=True)
    live = sys.stdout.isatty()
    for number in range(args.episodes):
        obs, info = env.reset(seed=envs.episode_seed(args.seed, 1, number))
        detector.reset()
        done = False
        step = 0
        while not (done or (terminal and terminal.quits())):
            success = detector(obs)
            print(f"step {step:3}  {read_out(detector, success)}", end="\r" if live else "\n", flush=True)
            action = np.zeros(env.action_space.shape, np.float32) if expert is None else expert()
            obs, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            step += 1
            if live and "period_s" not in info:  # a simulation, which does not wait
                time.sleep(1 / env.metadata.get("render_fps", 10))
        if info.get("fault"):
            raise rc.RobotError(info["fault"])
        print(f"episode {number + 1}: {step} steps, in the end {read_out(detector, detector(obs))}")
        if terminal and terminal.quits():
            break
    env.close()


def read_out(detector: SuccessDetector, success: bool) -> str:
    """Probability and bar of the newest frame, smallest and largest since the reset, and the verdict."""
    bar = "#" * round(20 * detector.probability)
    extremes = f"since reset {detector.lowest:.3f} to {detector.highest:.3f}"
    return f"p {detector.probability:.3f} |{bar:<20}| {extremes}  {'SUCCESS' if success else 'no     '}"


# --- Main -------------------------------------------------------------------------------------------------------------
def make_classifier(args: Args, space: gym.Space, where: str) -> SuccessClassifier:
    """A new network for the pictures of a space of observations, which `where` has."""
    there = cameras_of(space)
    cameras = args.cameras or tuple(there)
    missing = [camera for camera in cameras if camera not in there]
    if not there:
        fail(f"{where}: has no images; record some with record_demos.py --mode classifier")
    if missing:
        fail(f"--cameras {' '.join(missing)}: {where} has the cameras {', '.join(there)}")
    frozen = args.pretrained is not None
    torch.manual_seed(args.seed)
    try:
        classifier = SuccessClassifier(cameras, there[cameras[0]], args.encoder, frozen, args.classes)
    except ValueError as error:
        fail(f"--encoder {args.encoder}: {error}")
    try:
        if args.pretrained:
            vision.load_trunk(classifier.trunks[0], args.pretrained)
    except ValueError as error:
        fail(f"--pretrained {error}")
    return classifier


def gather(args: Args) -> tuple[SuccessClassifier, dict, list[Clip], list[Clip]]:
    """A new network, the fingerprint of its pictures, the episodes for it, and those in another light."""
    if args.data:
        first = local_dataset("--data", args.data[0])
        fingerprint = fingerprint_of(first)
        classifier = make_classifier(args, first.observation_space, args.data[0])
        clips = []
        for source in args.data:
            clips += recorded_clips("--data", source, classifier, fingerprint)
        for source in args.add:
            clips += recorded_clips("--add", source, classifier, fingerprint)
        clips = list({clip.name: clip for clip in clips}.values())  # an added one may be in both
        return classifier, fingerprint, clips, []
    options = {"image_obs": True, "image_size": args.image_size}
    if args.cameras:
        options["cameras"] = args.cameras
    env = envs.make(SIMULATED, **options)
    classifier = make_classifier(args, env.observation_space, SIMULATED)
    here = Lights(env, args.seed, False)
    elsewhere = Lights(env, args.seed, True)
    clips = list(simulated_clips(args, classifier, here, args.simulated_episodes))
    tests = list(simulated_clips(args, classifier, elsewhere, args.test_episodes))
    return classifier, recording.fingerprint(env), clips, tests


def fit(run: Run, trainer: Trainer, learned: list[Clip], held_out: list[Clip], device: torch.device) -> None:
    """Trains until the held-out loss has not become better for a while."""
    frames, others = Frames.of(learned, device), Frames.of(held_out, device)
    run.keep(trainer=trainer)
    run.open(run.args.updates, "update", "--updates", waits_for="the update")
    losses = []
    while run.step < run.args.updates and trainer.looks < PATIENCE and not run.signals:
        with run.phase("update"):
            losses.append(trainer.update(frames))
        run.advance()
        if run.due(LOOK_EVERY) or run.step == run.args.updates:
            with run.phase("eval"):
                held_out_loss = trainer.look(others)
            scalars = {"losses/learned": torch.stack(losses).mean(), "losses/held_out": held_out_loss}
            run.log("train", scalars | run.speed())
            losses = []
            run.save()
    run.end_of_training()


def grade(run: Run, classifier: SuccessClassifier, parts: dict[str, list[Clip]]) -> tuple[float, dict]:
    """Chooses the threshold on the held-out episodes, shows and writes what it does; log odds, and all scores."""
    args = run.args
    scored = {name: score(classifier, clips) for name, clips in parts.items()}
    heads = [*classifier.cameras, "together"]
    thresholds = [choose_threshold(head, args.hold, args.false_successes) for head in scored["held out"]]
    scores = {}
    for name in parts:
        rows = {}
        for head, threshold, episodes in zip(heads, thresholds, scored[name], strict=True):
            rows[head] = measure(episodes, threshold, args.hold)
        show_scores(name, rows)
        scores[name] = rows
    for camera in classifier.cameras:
        if scores["held out"][camera]["separation"] < 0.2:
            print(f"camera {camera} tells next to nothing: is it the right one, and does it see the success?")
    write_atomically(run.dir / "scores.json", json.dumps(scores, indent=2).encode())
    alone = {f"eval/{camera}_frames_right": rows[camera]["frames_right"] for camera in classifier.cameras}
    run.log("eval", {f"eval/{key}": value for key, value in rows["together"].items()} | alone)
    shown = []
    for name in parts:
        shown += zip(parts[name], scored[name][-1], strict=True)
    draw_errors(run.dir / "errors.png", *map(list, zip(*shown, strict=True)), thresholds[-1])
    run.plot("updates", "train", ("losses/learned", "losses/held_out"))
    return thresholds[-1], scores


def delay_ms(detector: SuccessDetector) -> float:
    """How long an answer takes, between two steps of the robot: the median of 20, on this CPU."""
    classifier = detector.classifier
    delays = []
    frame = np.zeros((classifier.image_size, classifier.image_size, 3), np.uint8)
    for _ in range(20):
        start = time.perf_counter()
        detector(dict.fromkeys(classifier.cameras, frame))
        delays.append(1e3 * (time.perf_counter() - start))
    return float(np.median(delays))


def train(args: Args, device: torch.device) -> None:
    classifier, fingerprint, clips, elsewhere = gather(args)
    learned, held_out = split(clips, HELD_OUT, args.seed)
    parts = {"to learn from": learned, "held out": held_out}
    if elsewhere:
        parts["another light"] = elsewhere
    show_counts(parts, args.classes)
    run = Run(args, "classifier", __file__, device)
    trainer = Trainer(classifier, args, device, [clip.name for clip in held_out])
    fit(run, trainer, learned, held_out, device)
    classifier.load_state_dict(trainer.best_weights)
    del parts["to learn from"]
    threshold, scores = grade(run, classifier, parts)
    together = scores["held out"]["together"]
    seen, succeeded = together["seen_successes"], together["successful_episodes"]
    wrong, failed = together["false_successes"], together["failed_episodes"]
    if seen == 0:
        fail(f"these pictures do not tell success from failure: see the table above and {args.run_dir}/errors.png")
    about = {"scores": scores, "trained_on": [*args.data, *args.add] or [SIMULATED]}
    probability = 1 / (1 + math.exp(-threshold))
    detector = SuccessDetector(classifier.cpu(), probability, args.hold, fingerprint, about)
    file = io.BytesIO()
    torch.save(detector.contents(), file)
    write_atomically(run.dir / "classifier.pt", file.getvalue())
    run.save(finished=True)
    run.close()
    print(f"\nsuccess: p >= {probability:.4f} in {args.hold} frames in a row")
    recall = f"{seen} of {succeeded} successes seen (recall {seen / succeeded:.0%})"
    print(f"held out: {recall}, {wrong} false ones in {failed} failed episodes; {delay_ms(detector):.1f} ms a frame")
    if seen < 0.9 * succeeded:
        print("a reward that is often missing slows learning: record more frames like those in errors.png")
    print(f"wrote {args.run_dir}/classifier.pt; look at {args.run_dir}/errors.png")


def main(args: Args) -> None:
    device = set_up_torch(args.threads, amp=False)
    with ends_well(args):
        if not args.watch:
            return train(args, device)
        try:
            watch(args)
        except rc.RobotError as error:
            fail(f"--watch: {error}")


if __name__ == "__main__":
    main(parse(Args, __doc__, Args.MAY_CHANGE))
