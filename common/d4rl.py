"""D4RL: its names, files and reference scores, and its robots in today's simulator."""

import importlib
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Family(NamedTuple):
    """One of D4RL's robots; scores 0 and 100 are the returns of a random policy and of an expert, d4rl/infos.py:106."""

    dims: tuple[int, int]  # numbers in an observation and in an action
    steps: int  # per episode
    worst: float
    best: float
    task: str | None = None  # today's environment with the same robot, to be made D4RL's by `make_robot`


# Compared body by body with D4RL's own models. Not v5: Hopper and Walker2d lack the alive bonus of the step that falls,
# Walker2d has another foot, Ant observes other forces. No environment of today has D4RL's mazes and kitchen.
FAMILIES = {
    "halfcheetah": Family((17, 6), 1000, -280.178953, 12135.0, "HalfCheetah-v4"),
    "hopper": Family((11, 3), 1000, -20.272305, 3234.3, "Hopper-v4"),
    "walker2d": Family((17, 6), 1000, 1.629008, 4592.3, "Walker2d-v4"),
    # -325.6 is a random policy's return over 1,000 steps whose falls do not end the episode (measured here: -342 +- 8,
    # 1 alive and -1.33 control per step). As the task is defined, they do end it: -70 +- 16, a score of 6, not of 0.
    "ant": Family((111, 8), 1000, -325.6, 3879.7, "Ant-v4"),
    "antmaze": Family((29, 8), 1000, 0.0, 1.0),
    "kitchen": Family((60, 9), 280, 0.0, 4.0),
    "pen": Family((45, 24), 100, 96.262799, 3076.8331, "gymnasium_robotics:AdroitHandPen-v1"),
    "hammer": Family((46, 26), 200, -274.856578, 12794.1348, "gymnasium_robotics:AdroitHandHammer-v1"),
    "relocate": Family((39, 30), 200, -6.425911, 4233.8778, "gymnasium_robotics:AdroitHandRelocate-v1"),
    "door": Family((39, 28), 200, -56.512833, 2880.5693, "gymnasium_robotics:AdroitHandDoor-v1"),
    "maze2d-umaze": Family((4, 2), 300, 23.85, 161.86),
    "maze2d-medium": Family((4, 2), 600, 13.13, 277.39),
    "maze2d-large": Family((4, 2), 800, 6.7, 273.99),
    "maze2d-umaze-dense": Family((4, 2), 300, 68.537689, 193.662856),
    "maze2d-medium-dense": Family((4, 2), 600, 44.264742, 297.455274),
    "maze2d-large-dense": Family((4, 2), 800, 30.569041, 303.485738),
}


def files() -> dict[str, str]:
    """D4RL's names and the paths of their files on its server; Farama-Foundation/D4RL d4rl/infos.py."""
    found = {}
    for robot in ("halfcheetah", "hopper", "walker2d", "ant"):
        for kind in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
            for version in ("v1", "v2"):
                file = f"{robot}_{kind.replace('-', '_')}-{version}.hdf5"
                found[f"{robot}-{kind}-{version}"] = f"gym_mujoco_{version}/{file}"
    for task in ("pen", "hammer", "relocate", "door"):
        for kind in ("human", "cloned", "expert"):
            found[f"{task}-{kind}-v1"] = f"hand_dapg_v1/{task}-{kind}-v1.hdf5"
    mazes = {
        "umaze": "u-maze_noisy_multistart_False_multigoal_False",
        "umaze-diverse": "u-maze_noisy_multistart_True_multigoal_True",
        "medium-play": "big-maze_noisy_multistart_True_multigoal_False",
        "medium-diverse": "big-maze_noisy_multistart_True_multigoal_True",
        "large-play": "hardest-maze_noisy_multistart_True_multigoal_False",
        "large-diverse": "hardest-maze_noisy_multistart_True_multigoal_True",
    }
    for kind, file in mazes.items():
        found[f"antmaze-{kind}-v2"] = f"ant_maze_v2/Ant_maze_{file}_sparse_fixed.hdf5"
    for maze in ("umaze", "medium", "large"):
        found[f"maze2d-{maze}-v1"] = f"maze2d/maze2d-{maze}-sparse-v1.hdf5"
        found[f"maze2d-{maze}-dense-v1"] = f"maze2d/maze2d-{maze}-dense-v1.hdf5"
    kitchens = {
        "complete": "mini_kitchen_microwave_kettle_light_slider",
        "partial": "kitchen_microwave_kettle_light_slider",
        "mixed": "kitchen_microwave_kettle_bottomburner_light",
    }
    for kind, file in kitchens.items():
        found[f"kitchen-{kind}-v0"] = f"kitchen/{file}-v0.hdf5"
    return found


def is_d4rl(name: str) -> bool:
    """Whether this is a D4RL name, of any version."""
    return name.rpartition("-v")[0] in {known.rpartition("-v")[0] for known in files()}


def kind_of(name: str) -> str | None:
    """hopper-medium-v2 -> hopper; maze2d-umaze-dense-v1 -> maze2d-umaze-dense; None where D4RL has no such name."""
    if not is_d4rl(name):
        return None
    return name.rpartition("-")[0] if name.startswith("maze2d") else name.partition("-")[0]


def make_robot(kind: str, contact_forces: bool, options: dict) -> gym.Env:
    """The task of a D4RL family in today's simulator; `contact_forces`: Ant's are not 0 in the data.

    Raises gymnasium's error where there is none.
    """
    family = FAMILIES[kind]
    if family.task is None:
        raise gym.error.UnregisteredEnv(f"no environment of today is that of D4RL's {kind}")
    module, _, _ = family.task.rpartition(":")
    if module:
        importlib.import_module(module)
    if contact_forces:
        options = options | {"use_contact_forces": True}
    env = gym.make(family.task, max_episode_steps=family.steps, **options)
    if not module:
        weigh_as_mujoco_2_0(env)
    return AsD4RL(env, "" if contact_forces else kind)


def weigh_as_mujoco_2_0(env: gym.Env) -> None:
    """Masses and inertias of before MuJoCo 2.1.2 (its changelog: "Computed capsule inertias are now exact"): a capsule
    was a cylinder with half a radius more at each end. D4RL's data is from 2.0; today's limbs weigh up to 8% more."""
    import mujoco

    spec = mujoco.MjSpec.from_file(env.unwrapped.fullpath)
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:
            geom.type = mujoco.mjtGeom.mjGEOM_CYLINDER
            radius = geom.size[0]
            start, end = geom.fromto[:3], geom.fromto[3:]
            if np.isfinite(start).all():
                longer = radius / 2 * (end - start) / np.linalg.norm(end - start)
                geom.fromto = np.concatenate([start - longer, end + longer])
            else:
                geom.size = geom.size + [0, radius / 2, 0]
    old = spec.compile()
    model = env.unwrapped.model
    for name in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, name)[:] = getattr(old, name)
    mujoco.mj_setConst(model, env.unwrapped.data)


class AsD4RL(gym.Wrapper):
    """What D4RL's tasks do otherwise: Ant's observations end in 84 contact forces, all 0; Adroit's rewards take off a
    tenth of the hand's distance, where gymnasium-robotics adds it (its PR 220); a pen that falls ends the episode."""

    def __init__(self, env: gym.Env, kind: str):
        super().__init__(env)
        self.kind = kind
        if kind == "ant":
            self.observation_space = spaces.Box(-np.inf, np.inf, (111,), np.float64)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.observed(obs), info

    def observed(self, obs: np.ndarray) -> np.ndarray:
        return np.concatenate([obs, np.zeros(84)]) if self.kind == "ant" else obs

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        hand = {
            "door": lambda: obs[35:38],
            "hammer": lambda: obs[33:36] - obs[36:39],
            "relocate": lambda: obs[30:33],
        }
        if self.kind in hand:
            reward -= 0.2 * np.linalg.norm(hand[self.kind]())
        terminated = terminated or (self.kind == "pen" and obs[26] < 0.075)
        return self.observed(obs), reward, terminated, truncated, info
