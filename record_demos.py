"""Demonstrations, or labelled frames for a success classifier: steered by hand or by the scripted expert, through the
robot (robot_server.py, real or simulated) or a simulated gymnasium task.

    python record_demos.py --env-id FrankaPegInsert-v0 --teleop expert --episodes 3 --dataset sim/peg-v0
    python record_demos.py --teleop expert                # needs robot_server.py --env-id FrankaPegInsert-v0
    python record_demos.py --teleop spacemouse            # needs robot_server.py and a SpaceMouse
    python record_demos.py --mode classifier              # needs robot_server.py and a terminal
    python record_demos.py --classifier classifier.pt     # needs robot_server.py, a terminal, a classifier

Keys, typed into the terminal; those of --teleop keyboard that move the arm are shown at the start:
    y success   n failure   x discard   z undo the last episode   t label   p pause   Enter go on   q quit

A person's verdict ends an episode; where nobody steers (--teleop expert), the task's does. Then the episode is written,
whole or not at all, so that after a crash, or kill -9, every finished one is there, and the same command goes on. Kept
are successes and failures; discarded episodes, and those that a fault ended, are not. What comes out is an ordinary
Minari dataset with pictures, states, the actions as they were executed and as they were asked for, who steered, and a
fingerprint of the set-up, by which everything that reads it refuses another one. Beside it stand a contact sheet and a
video of every episode: look at them.

In --mode classifier a key toggles the label, which is that of the frame the robot is in; frames close to a change of
label are left out. Linger in the success, leave it, come back, and miss it closely, in many positions and lights.

Sources: HIL-SERL arXiv:2410.21845 (commit 5d02aed, examples/record_demos.py and record_success_fail.py).
Differs from them: a person's verdict counts, the classifier's is a suggestion; each episode is written when it ends,
not all of them after the last; undo, discard, pause; time limits truncate; labels are a state, not key presses.
New task: `grep -n TASK: record_demos.py` shows the place to edit.
"""

import contextlib
import datetime
import errno
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np

import franka_sim  # noqa: F401  registers the simulated tasks
import robot_client as rc
from common import envs
from common.recording import Recording, Step, dataset_folder, fields_of, settled
from common.setup import Fault, fail, flag, git_commit, parse

NEGATIVES = 2.0  # mode classifier: frames without success that are asked for, per frame with it
NEAR_MISSES = 0.5  # and how many of them shortly before or after a success
NEAR_S = 2.0  # what "shortly" is
ENDINGS = ("success", "failure", "discard")
TERMINAL_KEYS = "keys: y success   n failure   x discard   z undo the last   t label   p pause   Enter go on   q quit"


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    # recording
    dataset: str | None = None
    """local Minari dataset to begin or go on with (default: hil/demos-v0; classifier: hil/frames-v0)"""
    mode: Literal["demos", "classifier"] = "demos"
    """demonstrations, or frames with labels for reward_classifier.py"""
    episodes: int = 20
    """mode demos: it ends when the dataset has this many successes"""
    frames: int = 200
    """mode classifier: it ends when the dataset has this many frames of each label, twice as many without success"""
    classes: int = 2
    """mode classifier: number of labels, the last one is success"""
    margin: int = 3
    """mode classifier: steps on either side of a change of label that get no label"""
    classifier: str | None = None
    """file of reward_classifier.py: it suggests a verdict; disagreements are counted"""
    wait_for_key: bool = False
    """an episode begins with Enter, when the scene is restored, instead of with the first input"""
    seed: int = 1
    """seed of the episodes' resets and of the expert's noise"""
    # environment
    env_id: str = "robot_client:FrankaReal-v0"
    """gymnasium id: the robot, or a simulated task, also module:Env-v0"""
    max_episode_steps: int | None = None
    """the longest episode (default: the task's); people need longer than a policy will"""
    image_size: int = 128
    """rows and columns of a simulated Franka's pictures (sac_pixel_sim.py learns from 48)"""
    # robot
    teleop: Literal["keyboard", "spacemouse", "expert"] = "keyboard"
    """who steers; the expert is the simulated task's"""
    noise: float = 0.05
    """standard deviation of noise on the expert's actions, in [-1, 1]: shows how to recover"""
    task: str = "peg"
    """which task on the robot: one of TASKS in robot_client.py"""
    server: str = rc.SERVER
    """address of robot_server.py"""
    keys: str | None = None
    """directory with the CURVE keys of robot_server.py --keygen"""

    MAY_CHANGE = ""  # of a run that goes on: there is none

    def check(self) -> None:
        """Exits with one line when a value is out of its range or contradicts another."""
        datasets = {"demos": "hil/demos-v0", "classifier": "hil/frames-v0"}
        self.dataset = self.dataset or datasets[self.mode]
        least_of = {"episodes": 1, "frames": 1, "classes": 2, "margin": 0, "seed": 0, "image_size": 8}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                fail(f"{flag(name)} {getattr(self, name)}: give at least {least}")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            fail(f"--max-episode-steps {self.max_episode_steps}: give at least 1")
        if not 0 <= self.noise <= 1:
            fail(f"--noise {self.noise}: give a number from 0 to 1")
        if self.classes > 2 and self.teleop == "expert":
            fail(f"--classes {self.classes}: a person labels them; the expert's task knows success only")
        rc.task_named(self.task)


# --- Environment ------------------------------------------------------------------------------------------------------
def make_env(args: Args) -> gym.Env:
    """The task, with the observations and actions that are recorded."""
    if args.env_id == "robot_client:FrankaReal-v0":
        rc.check_server(args.server, args.keys)
        config = rc.task_named(
            args.task,  # TASK: yours
            server=args.server,
            keys=args.keys,
            reward="task" if args.teleop == "expert" else "none",  # or a person says
            terminate_on_success=args.mode == "demos",
        )
        if args.max_episode_steps:
            config.max_episode_steps = args.max_episode_steps
        return envs.make(args.env_id, config=config, max_episode_steps=config.max_episode_steps)
    # TASK: keyword options of your task
    options = {"image_obs": True, "image_size": args.image_size} if args.env_id.startswith("Franka") else {}
    env = envs.make(args.env_id, max_episode_steps=args.max_episode_steps, **options)
    return envs.learnable(env, args.env_id)


def success(info: dict) -> float:
    """Whether the episode whose last info this is was a success, NaN where the task does not say.
    Where any step's success counts: `envs.AnySuccess(env, success)` in make_env."""
    return envs.truth(info, "success", "is_success", "succeed")  # TASK: yours


# --- Hands ------------------------------------------------------------------------------------------------------------
class Rover(rc.ScriptedExpert):
    """For frames of all kinds: the expert steers, to success and on in it; now and then the arm wanders off."""

    TOWARDS = (15, 45)  # steps
    AWAY = (4, 12)

    def forget(self) -> None:
        self.drift: np.ndarray | None = None  # (6,) motion in the base's axes; none: towards success
        self.until_turn = int(self.rng.integers(*self.TOWARDS))  # steps

    def read(self, env: gym.Env) -> np.ndarray | None:
        action = super().read(env)
        if self.until_turn == 0 and self.drift is None:
            self.drift = np.zeros(6)
            self.drift[:3] = self.rng.uniform((-0.5, -0.5, -0.2), (0.5, 0.5, 0.8))
            self.until_turn = int(self.rng.integers(*self.AWAY))
        elif self.until_turn == 0:
            self.forget()
        self.until_turn -= 1
        if action is not None and self.drift is not None:
            turn = getattr(env.unwrapped, "base_to_action", np.asarray)  # into the relative frame
            action[:3] = turn(self.drift)[:3]
        return action


def make_hand(args: Args, env: gym.Env) -> tuple[rc.Teleop, rc.Terminal | None]:
    """Who steers, and where keys are typed: nowhere, if the expert steers without a terminal."""
    numbers = env.action_space.shape[0]
    if args.teleop != "expert" and numbers not in (3, 4, 6, 7):
        fail(f"--teleop {args.teleop}: {args.env_id} has {numbers} actions; a hand gives 3 or 6, and one of a gripper")
    terminal = rc.Terminal() if args.teleop != "expert" or sys.stdin.isatty() else None
    if terminal:
        print(rc.KEYS if args.teleop == "keyboard" else TERMINAL_KEYS)
    if args.teleop != "expert":
        return rc.open_teleop(args.teleop, terminal), terminal
    if not hasattr(env.unwrapped, "expert_action"):
        fail(f"--teleop expert: {args.env_id} has no expert_action(); steer it by --teleop keyboard")
    if args.wait_for_key and terminal is None:
        fail("--wait-for-key: standard input is no terminal; start the script in one, or leave the flag out")
    kind = rc.ScriptedExpert if args.mode == "demos" else Rover
    return kind(seed=args.seed, noise=args.noise), terminal


# --- Labels -----------------------------------------------------------------------------------------------------------
def near_misses(labels: np.ndarray, success: int, steps: int) -> np.ndarray:
    """(T,) whether a frame shows no success, but is at most so many steps before or after one."""
    near = np.zeros(len(labels), bool)
    for t in np.flatnonzero(labels == success):
        near[max(t - steps, 0) : t + steps + 1] = True
    return near & (labels >= 0) & (labels != success)


def count_labels(labels: list[np.ndarray], classes: int, hz: float) -> dict[str, int]:
    """Frames of each kind in the labels (T,) of several episodes."""
    together = np.concatenate([np.zeros(0, np.int8), *labels])
    counts = {f"label {label}": int((together == label).sum()) for label in range(classes)}
    near = [near_misses(part, classes - 1, round(NEAR_S * hz)) for part in labels]
    counts["near misses"] = sum(int(part.sum()) for part in near)
    return counts


# --- Recording --------------------------------------------------------------------------------------------------------
class Session:
    """Episode after episode, until there are enough or somebody quits."""

    def __init__(self, args: Args, env: gym.Env, recording: Recording, hand: rc.Teleop, terminal: rc.Terminal | None):
        self.args = args
        self.env = env
        self.recording = recording
        self.hand = hand
        self.terminal = terminal
        self.detector = None
        if args.classifier:
            from common.success import open_detector  # here: PyTorch takes seconds

            self.detector = open_detector(args.classifier, "--classifier", env)
        self.person = args.teleop != "expert"
        self.paces_itself = hasattr(env.unwrapped, "stand_still")
        self.hz = float(env.metadata.get("render_fps", 10))
        self.pace = None if self.paces_itself or not self.person else rc.Pace(self.hz)
        most = (round(NEAR_S * self.hz) - 1) // 2  # steps that leave a near miss beside a success
        if args.mode == "classifier" and args.margin > most:
            fail(f"--margin {args.margin}: leaves no near misses, {NEAR_S:g} s around a success; give at most {most}")
        self.first = len(recording.episodes)  # of this session: older ones are not undone
        self.attempt = 1 + max([int(episode["attempt"]) for episode in recording.episodes], default=-1)
        self.label = 0
        self.decided_by = "task"
        self.stopped = False
        self.commit = git_commit(Path(__file__).parent)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, *_) -> None:
        """Ctrl-C is as the key q; a second one ends the program at once."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        os.write(2, b"\nstopping; Ctrl-C again stops at once\n")

    def run(self) -> None:
        while not self.stopped and self.missing():
            self.recording.check_disk(self.env)
            try:
                self.episode()
            except rc.RobotError as error:  # server away, reflex at rest, stop button
                if self.quits():
                    say(str(error))
                    return
                if self.terminal is None or self.terminal.fault:
                    raise
                self.wait(f"{error}. Enter goes on with the next episode, q ends", None, "go on")

    def episode(self) -> None:
        obs = self.wait_for_start(self.reset())
        if self.stopped:
            return
        observations, steps, verdict = self.record(obs)
        if verdict in ("discard", "fault"):
            say(f"episode {len(self.recording.episodes)} is not kept")
        else:
            self.keep(observations, steps, verdict)
        self.attempt += 1

    def missing(self) -> str:
        """What is still to be recorded; nothing when there is enough."""
        if self.args.mode == "demos":
            successes = sum(bool(episode["success"]) for episode in self.recording.episodes)
            left = self.args.episodes - successes
            return f"{left} successes" if left > 0 else ""
        wanted = {f"label {label}": self.args.frames for label in range(self.args.classes)}
        wanted["label 0"] = round(NEGATIVES * self.args.frames)
        wanted["near misses"] = round(NEAR_MISSES * self.args.frames)
        there = count_labels(self.recording.labels, self.args.classes, self.hz)
        left = {name: count - there[name] for name, count in wanted.items() if count > there[name]}
        return ", ".join(f"{count} of {name}" for name, count in left.items())

    # --- keys ---
    def commands(self) -> list[str]:
        if self.terminal is None:
            return []
        if self.terminal.fault:
            raise rc.RobotError(self.terminal.fault)
        commands = self.terminal.commands()
        self.stopped |= "quit" in commands
        return commands

    def quits(self) -> bool:
        """Whether somebody has asked it to end."""
        return self.stopped or bool(self.terminal and self.terminal.quits())

    def obey(self, command: str) -> None:
        """What a key does at any time."""
        if command == "label":
            self.label = (self.label + 1) % self.args.classes
        elif command == "undo" and len(self.recording.episodes) == self.first:
            say("nothing of this session to undo")
        elif command == "undo":
            undone = self.recording.undo()
            say(f"undone: episode {undone['id']} ({undone['verdict']}, {undone['total_steps']} steps)")

    def wait(self, text: str, obs: dict | None, *ends: str) -> tuple[str, dict | None]:
        """The arm stands still until one of these commands comes, or "input", the first motion of the hand.

        Returns it, "discard" when somebody quits, and the newest observation.
        """
        say(f"\a{text}")
        while not self.stopped:
            for command in self.commands():
                if command in ends:
                    return command, self.stand_still(obs)
                self.obey(command)
            if "input" in ends and self.hand.read(self.env) is not None:
                return "input", obs
            obs = self.stand_still(obs)
            motion, gripper = self.hand.motion()
            show(f"{self.label_text()}hand {np.round(motion, 2)} {gripper:+.0f} {self.hand.fault}")
        return "discard", obs

    def stand_still(self, obs: dict | None) -> dict | None:
        """One period without a step. Returns the newest observation, where there is one."""
        if obs is None or not self.paces_itself:
            time.sleep(1 / self.hz)  # a simulated task stands still by itself
            return obs
        obs, fault = self.env.unwrapped.stand_still()
        if fault:
            raise rc.RobotError(fault)
        return obs

    # --- before an episode ---
    def reset(self) -> dict:
        """The first observation: FrankaEnv has seen the arm stand still at its pose, and new pictures since then.

        What was typed meanwhile has no effect, but for pause, and for quit, which ends the robot's reset on its way.
        """
        show("reset ...")
        options = {"give_up": self.quits} if self.paces_itself else None
        obs, _ = self.env.reset(seed=self.seed(), options=options)
        lost = self.terminal.forget() if self.terminal else []
        if lost:
            say(f"pressed during the reset, so without effect: {', '.join(lost)}")
        self.hand.forget()
        self.label = 0
        if "pause" in self.commands():
            _, obs = self.wait("paused: Enter goes on", obs, "go on")
        return obs

    def seed(self) -> int:
        return envs.episode_seed(self.args.seed, 2, self.attempt)

    def wait_for_start(self, obs: dict) -> dict:
        """Waits for Enter or the first input, so that idling before it is no part of the episode."""
        if not (self.person or self.args.wait_for_key):
            return obs
        if self.args.wait_for_key:
            return self.wait(f"ready: restore the scene, then Enter; to go: {self.missing()}", obs, "go on")[1]
        return self.wait(f"ready: move to begin; to go: {self.missing()}", obs, "go on", "input")[1]

    # --- an episode ---
    def record(self, obs: dict) -> tuple[list, list[Step], str]:
        """T + 1 observations, T steps, and the verdict: one of ENDINGS, "none" (mode classifier) or "fault"."""
        if self.pace:
            self.pace.restart()
        space = self.env.action_space
        observations = [obs]
        steps: list[Step] = []
        verdict = ""
        if self.detector:
            self.detector.reset()
        while not verdict:
            steered = self.hand.read(self.env)
            asked = np.zeros(space.shape, space.dtype) if steered is None else steered
            obs, reward, terminated, truncated, info = self.env.step(asked)
            late_s = self.pace.wait()[1] if self.pace else info.get("late_s", 0.0)
            suggested = bool(self.detector(obs)) if self.detector else False
            observations.append(obs)
            verdict = self.judge(observations, len(steps) + 1, terminated or truncated, info)
            step = Step(
                action=info.get("executed_action", np.clip(asked, space.low, space.high)),
                asked=info.get("asked_action", asked),
                reward=reward,
                terminated=terminated,
                intervened=steered is not None,
                suggested=suggested,
                period_s=info.get("period_s", 1 / self.hz),
                late_s=late_s,
                label=self.label if self.person else int(success(info) == 1),
            )
            steps.append(step)
            show(self.status(len(steps)))
        return observations, steps, verdict

    def judge(self, observations: list, step: int, ended: bool, info: dict) -> str:
        """The verdict, if there is one: a fault's, a person's, or where nobody steers the task's."""
        if info.get("fault"):
            say(f"episode {len(self.recording.episodes)}, step {step}: {info['fault']}")
            return "fault"
        verdict = self.heed(observations)
        self.decided_by = "person" if self.person or verdict else "task"
        if ended and self.decided_by == "task" and math.isnan(success(info)):
            fail(f"--env-id {self.args.env_id}: does not say what success is; say it in success()")
        if verdict or self.args.mode == "classifier":
            return verdict or ("none" if ended else "")
        if self.person:
            if not ended:
                return ""
            return self.wait("it has ended: y success, n failure, x discard", None, *ENDINGS)[0]
        return "success" if success(info) == 1 else "failure" if ended else ""

    def heed(self, observations: list) -> str:
        """A person's verdict, if there is one; "discard" when somebody quits.

        After a pause the episode goes on from what is seen then.
        """
        commands = self.commands()
        if self.person and self.hand.fault:
            commands.append("pause")
        for command in commands:
            if command == "pause":
                text = f"{self.hand.fault or 'paused'}: Enter goes on"
                command, observations[-1] = self.wait(text, observations[-1], "go on", "pause", *ENDINGS)
                self.hand.forget()
                if self.pace:  # the next step is not late
                    self.pace.restart()
            if command in ENDINGS:
                return command
            self.obey(command)
        return "discard" if self.stopped else ""

    def status(self, step: int) -> str:
        probability = f" | classifier {self.detector.probability:.2f}" if self.detector else ""
        return f"{self.label_text()}episode {len(self.recording.episodes)} | step {step}{probability}"

    def label_text(self) -> str:
        return f"LABEL {self.label} | " if self.args.mode == "classifier" else ""

    # --- after an episode ---
    def keep(self, observations: list, steps: list[Step], verdict: str) -> None:
        """Writes the episode and says so."""
        demos = self.args.mode == "demos"
        won = demos and verdict == "success"
        fields = fields_of(observations, steps, won)
        infos = fields["infos"]
        attributes = {
            "seed": self.seed(),
            "attempt": self.attempt,
            "verdict": verdict if demos else "none",
            "success": won,
            "decided_by": self.decided_by,
            "recorded_at": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "git_commit": self.commit,
        }
        if not demos:
            labels = np.array([step.label for step in steps], np.int8)
            infos["label"] = settled(labels, self.args.margin)
            fields["rewards"] = (infos["label"] == self.args.classes - 1).astype(float)
        elif self.decided_by == "task":  # the task says what it rewards, and whether it ends
            fields["rewards"] = np.array([step.reward for step in steps])
            fields["terminations"] = np.array([step.terminated for step in steps])
            fields["truncations"][-1] = not steps[-1].terminated
        if self.detector:
            attributes["suggested"] = bool(infos["suggestion"].any())
            attributes["disagreement"] = demos and attributes["suggested"] != won
        else:
            del infos["suggestion"]
        self.recording.add(fields, attributes)
        opinion = "; THE CLASSIFIER DISAGREES" if attributes.get("disagreement") else ""
        what = verdict if demos else "labelled"
        done = f"episode {len(self.recording.episodes) - 1}: {what}, {len(steps)} steps{opinion}"
        say(f"{done}; to go: {self.missing() or 'nothing'}")


def show(text: str) -> None:
    """A line that the next one overwrites; only in a terminal."""
    if sys.stdout.isatty():
        print(f"\r{text}\033[K", end="", flush=True)


def say(text: str) -> None:
    """A line that stays."""
    print(f"\r{text}\033[K" if sys.stdout.isatty() else text.strip("\a"), flush=True)


# --- Summary ----------------------------------------------------------------------------------------------------------
def sum_up(recording: Recording, env: gym.Env) -> None:
    """What was recorded, in numbers, as a contact sheet, and as videos: they show what is wrong with it."""
    import minari

    if not recording.episodes:
        print("nothing is recorded yet")
        return
    hz = float(env.metadata.get("render_fps", 10))
    episodes = list(minari.load_dataset(recording.name).iterate_episodes())
    lengths = np.array([int(episode["total_steps"]) for episode in recording.episodes])
    print(f"{recording.name}: {len(lengths)} episodes, {lengths.sum():,} steps, {lengths.sum() / hz:.0f} s")
    if recording.metadata["mode"] == "demos":
        won = [bool(episode["success"]) for episode in recording.episodes]
        sum_up_demos(lengths, np.array(won), np.array([episode.rewards.sum() for episode in episodes]))
    else:
        sum_up_labels(recording, hz)
    if any("suggested" in episode for episode in recording.episodes):
        others = [int(episode["id"]) for episode in recording.episodes if episode.get("disagreement")]
        print(f"classifier and verdict disagree in {len(others)} episodes: {others}")
    actions = np.concatenate([episode.actions for episode in episodes])
    late_s = np.concatenate([episode.infos["late_s"] for episode in episodes])
    sum_up_actions(actions, 1000 * late_s)
    sheet = recording.write_pictures(episodes, env)
    print(f"look at {sheet} and the videos beside it" if sheet else "no pictures are observed: no videos")


def sum_up_demos(lengths: np.ndarray, won: np.ndarray, returns: np.ndarray) -> None:
    """`lengths` (N,) of the episodes, whether they succeeded, and their returns."""
    print(f"successes: {won.sum()} of {len(won)}")
    if not won.any():
        print("warning: no success is among them, so nothing can be learned from them", file=sys.stderr)
        return
    median = float(np.median(lengths[won]))
    print(f"length of a success: median {median:g}, {lengths[won].min()} to {lengths[won].max()} steps")
    print(f"episodes of twice the median leave time to recover: max_episode_steps = {math.ceil(2 * median)}")
    if won.all():
        return
    if returns[won].min() > returns[~won].max():
        print(f"to clone the successes only: bc_flow_offline.py --top-fraction {math.floor(1000 * won.mean()) / 1000}")
    else:  # dense rewards: who takes longer, collects more
        print("some failures have the return of a success, or more: --top-fraction cannot tell them apart")


def sum_up_labels(recording: Recording, hz: float) -> None:
    counts = count_labels(recording.labels, recording.metadata["classes"], hz)
    print("frames: " + ", ".join(f"{count} of {name}" for name, count in counts.items()))
    print(f"near misses are at most {NEAR_S:g} s before or after label {recording.metadata['classes'] - 1}, success")
    left_out = sum(int((labels < 0).sum()) for labels in recording.labels)
    print(f"left out, close to a change of label: {left_out} frames")


def sum_up_actions(actions: np.ndarray, late_ms: np.ndarray) -> None:
    """`actions` (N, A), and how late (N,) the steps were."""
    saturated = (np.abs(actions) > 0.99).mean(0)
    print(f"saturated actions, of each entry: {' '.join(f'{share:.0%}' for share in saturated)}")
    if late_ms.any():
        median, slow = np.percentile(late_ms, (50, 99))
        print(f"steps come {median:.1f} ms late at the median, {slow:.1f} ms at p99, {late_ms.max():.1f} ms at most")
    with_gripper = actions.shape[1] in (4, 7)  # as for robot_client.Teleop
    if with_gripper and actions[:, -1].max() < 0.5:
        print("warning: the gripper is never told to close, in none of the episodes", file=sys.stderr)


# --- Main -------------------------------------------------------------------------------------------------------------
def work(args: Args) -> None:
    """Records, then sums up what is there."""
    rc.keep_the_beat()
    env = make_env(args)
    about = {"mode": args.mode, "classes": args.classes}
    recording = Recording(dataset_folder(args.dataset, "--dataset"), args.dataset, env, about)
    if recording.episodes:
        print(f"{args.dataset}: {len(recording.episodes)} episodes are there; recording goes on")
    hand = None
    try:
        hand, terminal = make_hand(args, env)
        Session(args, env, recording, hand, terminal).run()
    except KeyboardInterrupt:
        say("stopped at once")
    except (rc.RobotError, Fault) as error:
        fail(f"{error}; the {len(recording.episodes)} episodes that have ended are kept, the same command goes on")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"--dataset {args.dataset}: {error}; make room and go on: the episodes that ended before are there")
    finally:
        if hand:
            hand.close()
        env.close()
        if not recording.episodes:  # it would bind the next command to this task, and keep the name from others
            shutil.rmtree(recording.data)
            (recording.folder / "record.lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there is something else in it
                recording.folder.rmdir()
    show("")
    sum_up(recording, env)


def main(args: Args) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until there is a Session
    try:
        work(args)
    except Fault as error:  # before there is a recording
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on with what is recorded") from None


if __name__ == "__main__":
    main(parse(Args, __doc__, Args.MAY_CHANGE))
