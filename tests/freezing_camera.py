"""The robot's peg task with a camera that stands still in the second episode: `--env-id freezing_camera:Peg-v0`."""

import dataclasses
import os
import time

import gymnasium as gym
import numpy as np

import robot_client
from robot_client import PEG, Camera, CameraConfig, FrankaEnv


class Freezing(Camera):
    """A new picture every 20 ms, but none until `frozen_until`."""

    frozen_until = 0.0
    number = 0

    def open(self):
        self.picture = np.zeros((128, 128, 3), np.uint8)

    def grab(self):
        time.sleep(0.02)
        if time.monotonic() > Freezing.frozen_until:
            Freezing.number += 1
            self.picture[:] = Freezing.number % 200
        return self.picture, Freezing.number


class Peg(FrankaEnv):
    def step(self, action):
        if self.episodes == 2 and self.elapsed_steps == 3:
            Freezing.frozen_until = time.monotonic() + 1.5
            time.sleep(0.4)
        return super().step(action)


robot_client.CAMERAS["freezing"] = Freezing
CONFIG = dataclasses.replace(
    PEG, server=os.environ.get("SERVER", ""), reward="task", cameras=(CameraConfig("freezing", kind="freezing"),)
)
gym.register("Peg-v0", f"{__name__}:Peg", kwargs={"config": CONFIG}, max_episode_steps=CONFIG.max_episode_steps)
