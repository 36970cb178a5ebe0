"""Tasks: made with one-line errors, checked at every step, wrapped, demonstrated, recorded."""

import copy
import ctypes.util
import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from common.setup import Fault, fail

LONGEST_EPISODE = 10_000  # steps, of a task without a time limit
HUGE = 1e10  # larger numbers are no measurements; their squares ruin float32


# --- Making -----------------------------------------------------------------------------------------------------------
def make(env_id: str, render: bool = False, option: str = "--env-id", **options) -> gym.Env:
    """gym.make, also of `module:Env-v0` with the module in the current folder; steps are `Checked`.

    Exits with one line that names `option` when gymnasium does not know the task. One without a registered time limit
    gets a long one.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if render:
        options["render_mode"] = "rgb_array"
    try:
        make_it = partial(gym.make, env_id, disable_env_checker=True, **options)
        env = with_opengl(make_it, f"{option} {env_id}", render)
    except (gym.error.Error, ImportError) as error:
        fail(f"{option} {env_id}: {error}")
    return Checked(time_limited(env, env_id), env_id)


def made_again(task: str, **options) -> gym.Env:
    """A recorded task whose entry point has no name of its own, by its id: `module:Env-v0`."""
    return gym.make(task, **options).unwrapped


def time_limited(env: gym.Env, name: str) -> gym.Env:
    """The task, with a long time limit if it has none: an evaluation would not end."""
    if env.spec is not None and env.spec.max_episode_steps is not None:
        return env
    say_once(f"{name} has no registered time limit; its episodes are cut after {LONGEST_EPISODE:,} steps")
    return gym.wrappers.TimeLimit(env, LONGEST_EPISODE)


def with_opengl(make_task: Callable[[], gym.Env], name: str, render: bool) -> gym.Env:
    """What `make_task` makes. Without a display it renders by EGL or OSMesa. Raises Fault when it cannot, and must."""
    choose_opengl(render)
    try:
        return make_task()
    except Exception as error:
        if not is_opengls(error):
            raise
        raise Fault(f"{name}: {with_remedy(error)}") from error


def choose_opengl(render: bool) -> None:
    """Without a display and MUJOCO_GL: what renders takes the library that is installed.

    Tasks that `render` look at MUJOCO_GL. mujoco.Renderer looked there when MuJoCo was imported; now it does when it is
    made (gym-hil makes one for states, too). Nothing is loaded before; a second try after a failure, MuJoCo aborts.
    """
    if sys.platform != "linux" or any(map(os.environ.get, ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"))):
        return
    installed = [name for name in ("EGL", "OSMesa") if ctypes.util.find_library(name)]
    if not installed:
        return
    if render:
        os.environ["MUJOCO_GL"] = installed[0].lower()
    gl_context = sys.modules.get("mujoco.rendering.classic.gl_context")

    def new_context(width: int, height: int):
        os.environ["MUJOCO_GL"] = installed[0].lower()
        try:
            return importlib.reload(gl_context).GLContext(width, height)
        except (AttributeError, ImportError, OSError, RuntimeError) as error:
            raise RuntimeError(f"OpenGL does not load with MUJOCO_GL={installed[0].lower()} ({error})") from error

    if gl_context:
        gl_context.GLContext = new_context


def is_opengls(error: Exception) -> bool:
    """Whether OpenGL is missing. FatalError is MuJoCo's, which need not be installed."""
    return "OpenGL" in str(error) or (type(error).__name__ == "FatalError" and "GL" in str(error))


def with_remedy(error: Exception) -> str:
    """An error's message, and how OpenGL is had if it is missing."""
    if not is_opengls(error) or "apt-get" in str(error):
        return str(error)
    return f"{error}; set MUJOCO_GL=egl; if that is missing: apt-get install -y libegl1 libgl1-mesa-dri"


@cache
def say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Checked(gym.Wrapper):
    """Passes on what a task says, and raises Fault, which names the culprit, where it breaks gymnasium's rules.

    Observations and actions are copies, so that a task may write into the same array in each step, or into what it is
    given. Rewards are floats. Wrappers of one's own are checked by another one around them.
    """

    RESET = "reset(self, *, seed=None, options=None) must return (observation, info)"
    STEP = "step(self, action) must return (observation, reward, terminated, truncated, info)"

    def __init__(self, env: gym.Env, name: str):
        super().__init__(env)
        self.name = name
        self.steps = 0  # of this episode

    def reset(self, **kwargs):
        self.steps = 0
        obs, info = self.called(self.RESET, 2, self.env.reset, **kwargs)
        return self.checked(obs), info

    def step(self, action):
        self.steps += 1
        obs, reward, terminated, truncated, info = self.called(self.STEP, 5, self.env.step, copy.copy(action))
        obs = self.checked(obs)
        if np.size(reward) != 1 or np.asarray(reward).dtype.kind not in "fiub":
            raise Fault(f"{self.name}: the reward of step {self.steps} is {reward!r}, not a number")
        reward = float(np.asarray(reward).item())
        self.check_number("the reward", reward)
        for name, value in (("terminated", terminated), ("truncated", truncated)):
            if np.size(value) != 1 or np.asarray(value).dtype.kind not in "biu":
                raise Fault(f"{self.name}: {name} of step {self.steps} is {value!r}, not True or False")
        return obs, reward, bool(terminated), bool(truncated), info

    def called(self, rule: str, length: int, function: Callable, *args, **kwargs) -> tuple:
        """What a method of the task returns. Raises Fault when that, or what it takes, is not by the rule."""
        try:
            result = function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            # Raised in gymnasium's wrappers or here, not in the task: it was called or unpacked in vain.
            where = traceback.extract_tb(error.__traceback__)[-1].filename
            if "gymnasium" not in where and where != __file__:
                raise
            raise Fault(f"{self.name}: {rule} ({error}); is it written for gym before 0.26?") from error
        if not (isinstance(result, tuple) and len(result) == length and isinstance(result[-1], dict)):
            raise Fault(f"{self.name}: {rule}; is it written for gym before 0.26?")
        info = {key: value for key, value in result[-1].items() if key != "episode"}  # ours: RecordEpisodeStatistics
        return *result[:-1], info

    def checked(self, obs):
        """A copy of the observation. Raises Fault when it does not fit its space."""
        return self.checked_part(self.env.observation_space, obs, "the observation")

    def checked_part(self, space: spaces.Space, value, name: str):
        if isinstance(space, spaces.Dict):
            if not isinstance(value, dict) or value.keys() != space.keys():
                given = sorted(value) if isinstance(value, dict) else type(value).__name__
                raise Fault(f"{self.name}: {name} is {given}, its space has {sorted(space)}")
            return {key: self.checked_part(part, value[key], f"{name}[{key!r}]") for key, part in space.items()}
        if isinstance(space, spaces.Tuple) and isinstance(value, tuple) and len(value) == len(space):
            return tuple(self.checked_part(part, value[i], f"{name}[{i}]") for i, part in enumerate(space))
        if not isinstance(space, spaces.Box):
            if not space.contains(value):
                raise Fault(f"{self.name}: {name} is {value!r}, which is not in {space}")
            return copy.deepcopy(value)
        try:
            array = np.array(value)  # a copy
        except (TypeError, ValueError) as error:
            raise Fault(f"{self.name}: {name} is no array ({error})") from error
        if array.dtype.kind not in "fiub":
            raise Fault(f"{self.name}: {name} is {value!r}, not numbers")
        if array.shape != space.shape:
            raise Fault(f"{self.name}: {name} has shape {array.shape}, its space has {space.shape}")
        if array.dtype.itemsize > 1:  # not images
            wrong = ~(np.abs(array) <= HUGE)  # NaN as well
            if wrong.any():
                where = np.argwhere(wrong)[0].tolist()
                self.check_number(f"{name}{where if where else ''}", float(array[tuple(where)]))
        return array

    def check_number(self, name: str, value: float) -> None:
        if not abs(value) <= HUGE:
            raise Fault(
                f"{self.name}: {name} is {value:.4g} at step {self.steps} of an episode; "
                "give a number in its place in a wrapper (make_env)"
            )


def truth(info: dict, *names: str) -> float:
    """What the first of `names` that a task's info has says, 0 or 1 or between; NaN where it has none of them.

    Raises Fault when that is something else: text, for one, is never false.
    """
    for name in names:
        if name in info:
            value = np.asarray(info[name])
            if (
                value.size == 1
                and value.dtype.kind in "biuf"
                and (0 <= value.item() <= 1 or value.item() != value.item())
            ):
                return float(value.item())
            raise Fault(f"the task's info[{name!r}] is {info[name]!r}, not True or False; change success() (TASK)")
    return math.nan


def check_actions(env: gym.Env, env_id: str) -> None:
    """Exits with one line unless actions are a vector with bounds that can be scaled to [-1, 1]."""
    space = env.action_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f" or not space.shape[0]:
        remedy = "change them in a wrapper (make_env)"
        fail(f"--env-id {env_id}: actions must be a Box of floats of shape (A,), not {space}; {remedy}")
    low, high = np.float64(space.low), np.float64(space.high)
    if not (np.isfinite(high - low) & (high - low < HUGE)).all():
        fail(f"--env-id {env_id}: actions need bounds, not {space}; set them in a wrapper (make_env)")


def leaves(space: spaces.Space) -> Iterator[spaces.Space]:
    """The spaces inside Dicts and Tuples at any depth."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        for part in space.values() if isinstance(space, spaces.Dict) else space:
            yield from leaves(part)
    else:
        yield space


def looks_like_image(space: spaces.Space) -> bool:
    """Whether a Box has rows and columns of its own: a matrix (not one row or column) of bytes, or large."""
    if not isinstance(space, spaces.Box):
        return False
    sides = [side for side in space.shape if side > 1]
    return len(sides) >= 2 and (space.dtype == np.uint8 or int(np.prod(sides)) > 256)


def picture(env: gym.Env):
    """The newest frame that a task renders; some give a list."""
    image = env.render()
    return image[-1] if isinstance(image, list | tuple) else image


def episode_seed(seed: int, stream: int, episode: int) -> int:
    """The seed of an episode's reset; streams keep training (0), evaluation (1), demonstrations (2) apart."""
    return int(np.random.SeedSequence([seed, stream, episode]).generate_state(1)[0])


# --- Wrappers ---------------------------------------------------------------------------------------------------------
class ScaledActions(gym.ActionWrapper):
    """Actions in [-1, 1], scaled to the task's bounds; a dimension whose bounds are equal keeps their value."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.low, self.high = env.action_space.low, env.action_space.high
        self.action_space = spaces.Box(-1, 1, env.action_space.shape, env.action_space.dtype)

    def action(self, action):
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        return np.clip(middle + half * action, self.low, self.high).astype(self.action_space.dtype)


class AnySuccess(gym.Wrapper):
    """An episode that succeeds in any of its steps is a success, as Meta-World counts; else the last step's counts."""

    def __init__(self, env: gym.Env, success: Callable[[dict], float]):
        super().__init__(env)
        self.success = success

    def reset(self, **kwargs):
        self.succeeded = False
        return self.env.reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.succeeded = self.succeeded or self.success(info) == 1
        return obs, reward, terminated, truncated, info | {"success": self.succeeded}


class GripperPenalty(gym.Wrapper):
    """Subtracts a penalty when the gripper command, the last action, switches between opening and closing."""

    def __init__(self, env: gym.Env, penalty: float):
        super().__init__(env)
        self.penalty = penalty
        self.command = 0.0

    def reset(self, **kwargs):
        self.command = 0.0
        return self.env.reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if abs(action[-1]) > 0.5:
            reward -= self.penalty * (action[-1] * self.command < 0)
            self.command = action[-1]
        return obs, reward, terminated, truncated, info


class ActionChunk(gym.Wrapper):
    """Executes several actions, given as one vector (length * A,), one after the other; rewards are summed."""

    def __init__(self, env: gym.Env, length: int):
        super().__init__(env)
        self.length = length
        low, high = (np.tile(bound, length) for bound in (env.action_space.low, env.action_space.high))
        self.action_space = spaces.Box(low, high, dtype=env.action_space.dtype)

    def step(self, actions):
        rewards = 0.0
        for action in np.split(np.asarray(actions), self.length):
            obs, reward, terminated, truncated, info = self.env.step(action)
            rewards += reward
            if terminated or truncated:
                break
        return obs, rewards, terminated, truncated, info


class Episode(NamedTuple):
    """A recorded episode of T steps, in the task's own observations and actions."""

    observations: list  # T + 1
    actions: np.ndarray  # (T, A)
    rewards: np.ndarray  # (T,)
    terminations: np.ndarray  # (T,) bool
    truncations: np.ndarray  # (T,) bool
    info: dict  # of the last step


class Recorder(gym.Wrapper):
    """Keeps every episode that ends, in `episodes`."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.episodes: list[Episode] = []

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.observations = [copy.deepcopy(obs)]
        self.steps = []
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.observations.append(copy.deepcopy(obs))
        self.steps.append((np.array(action), float(reward), bool(terminated), bool(truncated)))
        if terminated or truncated:
            columns = [np.array(column) for column in zip(*self.steps)]
            self.episodes.append(Episode(self.observations, *columns, info))
        return obs, reward, terminated, truncated, info


class Playback(gym.Env):
    """A recorded episode as an environment, so that demonstrations pass through the same wrappers as live steps."""

    def __init__(self, env: gym.Env, episode: Episode):
        self.observation_space = env.observation_space
        self.action_space = env.action_space
        self.spec = env.spec
        self.episode = episode

    def reset(self, **kwargs):
        self.t = 0
        return self.episode.observations[0], {}

    def step(self, action):
        reward = float(self.episode.rewards[self.t])
        terminated = bool(self.episode.terminations[self.t])
        self.t += 1
        return self.episode.observations[self.t], reward, terminated, self.t == len(self.episode.rewards), {}


# --- Demonstrations ---------------------------------------------------------------------------------------------------
def demonstrations(source: str, env: gym.Env, seed: int, noise: float) -> Iterator[Episode]:
    """Episodes for the task `env`: `source` of them by its scripted expert, or those of the Minari dataset `source`.

    `noise` is the standard deviation on the expert's actions, relative to their range [-1, 1]. Exits with one line when
    the task has no expert, or the dataset is not of this task.
    """
    if source.isdecimal():
        return expert_episodes(int(source), env, seed, noise)
    return minari_episodes(source, env)


def expert_of(env: gym.Env, option: str) -> Callable[[], np.ndarray]:
    """The method expert_action() of the task or of a wrapper of one's own. Exits with one line when there is none.

    A wrapper that changes actions must have one of its own: the task's are not what the wrapper takes.
    """
    layer = env
    while True:
        if "expert_action" in dir(type(layer)):
            return layer.expert_action
        changes = isinstance(layer, gym.ActionWrapper) or (
            isinstance(layer, gym.Wrapper) and layer.action_space != layer.env.action_space
        )
        if changes:
            name = type(layer).__name__
            fail(f"{option}: {name} changes actions, so it needs an expert_action() of its own; or give --demos 0")
        if not isinstance(layer, gym.Wrapper):
            name = layer.spec.id if layer.spec else layer
            fail(f"{option}: {name} has no expert_action(); give a dataset, or --demos 0")
        layer = layer.env


def expert_episodes(count: int, env: gym.Env, seed: int, noise: float) -> Iterator[Episode]:
    expert = expert_of(env, f"--demos {count}")
    recorder, space = Recorder(env), env.action_space
    rng = np.random.default_rng(seed)
    for number in range(count):
        recorder.reset(seed=episode_seed(seed, 2, number))
        done = False
        while not done:
            eps = noise * (space.high - space.low) / 2 * rng.standard_normal(space.shape)
            action = np.asarray(expert(), float)
            if action.shape != space.shape or not np.isfinite(action).all():
                fail(f"--demos {count}: expert_action() gives {action}, actions are {space}")
            action = np.clip(action + eps, space.low, space.high).astype(space.dtype)
            _, _, terminated, truncated, _ = recorder.step(action)
            done = terminated or truncated
        yield recorder.episodes.pop()


def minari_episodes(dataset_id: str, env: gym.Env) -> Iterator[Episode]:
    import minari

    try:
        dataset = minari.load_dataset(dataset_id)
    except (FileNotFoundError, ValueError) as error:
        fail(f"--demos {dataset_id}: {error}; `minari list local` shows what is there")
    ours, theirs = env.action_space, dataset.action_space
    same_actions = ours.shape == theirs.shape and np.allclose([ours.low, ours.high], [theirs.low, theirs.high])
    if not same_actions:
        fail(f"--demos {dataset_id}: is not of this task; its actions are {theirs}, the task's {ours}")
    if layout(env.observation_space) != layout(dataset.observation_space):
        spaces_of = f"{dataset.observation_space}, the task's {env.observation_space}"
        fail(f"--demos {dataset_id}: is not of this task; its observations are {spaces_of}")
    about = dataset.storage.metadata
    if "fingerprint" in about:
        check_fingerprint(f"--demos {dataset_id}", about["fingerprint"], fingerprint(env))
    try:
        for episode in dataset.iterate_episodes():
            yield minari_episode(f"--demos {dataset_id}: episode {episode.id}", episode, ours.shape)
    except (OSError, KeyError, TypeError, ValueError, IndexError) as error:  # h5py's, for damaged parts
        fail(f"--demos {dataset_id}: is damaged, cannot be read ({error}); fetch or record it again")


def minari_episode(name: str, episode, action_shape: tuple[int, ...]) -> Episode:
    """An episode of Minari's. Exits with one line when its parts do not fit together, or are no finite numbers."""
    actions = np.asarray(episode.actions)
    steps = len(actions)
    if actions.shape[1:] != action_shape:  # they might broadcast
        fail(f"{name}: actions have shape {actions.shape[1:]}, the task's {action_shape}; leave it out")
    columns = {"rewards": episode.rewards, "terminations": episode.terminations, "truncations": episode.truncations}
    for part, values in columns.items():
        if np.size(values) != steps:
            fail(f"{name} has {steps} actions and {np.size(values)} {part}; leave it out")
        columns[part] = np.reshape(values, steps)
    for part, values in (columns | {"actions": actions}).items():
        if values.dtype.kind not in "fiub" or not np.isfinite(values).all():
            fail(f"{name}: {part} hold something else than finite numbers; leave it out")
    infos = episode.infos or {}
    info = {key: values[-1] for key, values in infos.items() if not isinstance(values, dict) and len(values)}
    observations = [step_of(episode.observations, t) for t in range(steps + 1)]
    return Episode(observations, actions, *columns.values(), info)


def summary(episodes: list[Episode], success: Callable[[dict], float]) -> str:
    """Episodes, steps and successes, in words."""
    verdicts = [success(episode.info) for episode in episodes]
    known = "success unknown" if any(map(math.isnan, verdicts)) else f"{int(sum(verdicts))} successful"
    return f"{len(episodes)} episodes, {sum(len(episode.rewards) for episode in episodes)} steps, {known}"


def layout(space: spaces.Space) -> object:
    """The shapes of a space's parts, to compare two spaces by."""
    return {key: layout(part) for key, part in space.items()} if isinstance(space, spaces.Dict) else space.shape


def step_of(observations, t: int):
    """Step t of observations with a leading time axis, at any depth."""
    return (
        {key: step_of(part, t) for key, part in observations.items()}
        if isinstance(observations, dict)
        else observations[t]
    )


def replay(episode: Episode, env: gym.Env, wrap: Callable[[gym.Env], gym.Env], chunk: int = 1) -> Iterator[tuple]:
    """An episode of the task `env` as the wrapped task would give it: (action, obs, reward, terminated), from the reset
    on, whose action is None. Actions are in [-1, 1]; with `chunk` > 1 the last chunk is filled up by its last action.
    """
    playback = wrap(Checked(Playback(env, episode), "a demonstration"))
    low, high = env.action_space.low, env.action_space.high
    width = np.where(high > low, high - low, 1)
    actions = np.clip(2 * (episode.actions - low) / width - 1, -1, 1)  # (T, A)
    padding = np.repeat(actions[-1:], -len(actions) % chunk, 0)
    obs, _ = playback.reset()
    yield None, obs, 0.0, False
    for action in np.concatenate([actions, padding]).reshape(-1, chunk * actions.shape[1]):
        obs, reward, terminated, truncated, _ = playback.step(action)
        yield action, obs, reward, terminated
        if terminated or truncated:
            return


# --- Fingerprints -----------------------------------------------------------------------------------------------------
def fingerprint(env: gym.Env) -> dict:
    """What gives a task's observations and actions their meaning, in plain JSON values.

    A task says it itself (`config.fingerprint()`, as FrankaEnv does), or it is gymnasium's id and options, the rate,
    and the shapes and bounds of its spaces. Data, classifier and policy belong together only where it is the same.
    """
    config = getattr(env.unwrapped, "config", None)
    if hasattr(config, "fingerprint"):
        return config.fingerprint()
    task = env.unwrapped.spec
    options = {name: value for name, value in task.kwargs.items() if name != "render_mode"}
    values = {
        "version": 1,
        "task": task.id,
        "options": options,
        "hz": env.metadata.get("render_fps"),
        "observations": layout(env.observation_space),
        "actions": [env.action_space.low.tolist(), env.action_space.high.tolist()],
    }
    return json.loads(json.dumps(values, default=str))


def check_fingerprint(what: str, theirs: dict, ours: dict) -> None:
    """Exits with one line that names what differs between the fingerprint of `what` and that of the task here."""
    wrong = list(differences(theirs, ours))
    if wrong:
        fail(f"{what}: is of another set-up: {'; '.join(wrong)}")


def differences(theirs: object, ours: object, name: str = "") -> Iterator[str]:
    """What differs between two fingerprints, at any depth: "cameras.wrist.fps is 30 there, 60 here"."""
    theirs, ours = by_name(theirs), by_name(ours)
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            part = f"{name}.{key}" if name else key
            if key not in ours:
                yield f"{part} is only there"
            elif key not in theirs:
                yield f"{part} is only here"
            else:
                yield from differences(theirs[key], ours[key], part)
    elif theirs != ours:
        yield f"{name} is {json.dumps(theirs)} there, {json.dumps(ours)} here"


def by_name(value: object) -> object:
    """A list of dicts with names, such as cameras, as a dict; other values as they are."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "name" in part for part in value):
        return {part["name"]: part for part in value}
    return value
