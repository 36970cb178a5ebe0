"""Tasks: made with one-line errors, checked at every step, wrapped, compared by fingerprints."""

import copy
import ctypes.util
import importlib
import math
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from common.setup import Fault, fail

LONGEST_EPISODE = 10_000  # steps, of a task without a time limit
HUGE = 1e10  # larger numbers are no measurements; their squares ruin float32
WRAPPERS = os.path.join(os.path.dirname(gym.__file__), "wrappers")
MAKE = gym.envs.registration.__file__
Wrap = Callable[[gym.Env], gym.Env]  # a task in a script's wrappers


# --- Making -----------------------------------------------------------------------------------------------------------
def make(env_id: str, render: bool = False, option: str = "--env-id", **options) -> gym.Env:
    """gym.make, also of `module:Env-v0` with the module in the current folder; steps are `Checked`.

    Exits with one line that names `option`, or raises Fault, when there is none such. One without a registered time
    limit gets a long one.
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
    except TypeError as error:
        if raised_in(error.__cause__ or error) != MAKE:  # in the task
            raise
        raise Fault(f"{option} {env_id}: {error}; make_env gives its options (TASK)") from error
    return Checked(time_limited(env, env_id), env_id)


def raised_in(error: BaseException) -> str:
    """The file in which it was raised."""
    return traceback.extract_tb(error.__traceback__)[-1].filename


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
    """What `make_task` makes, by EGL or OSMesa without a display. Raises Fault where these, or pygame, are missing."""
    choose_opengl(render)
    try:
        return make_task()
    except Exception as error:
        if isinstance(error, Fault) or not (is_opengls(error) or isinstance(error, gym.error.DependencyNotInstalled)):
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

    Observations and actions are copies, so that a task may write into the same array in each step, or into its action.
    Rewards are floats. The global generators are seeded, too. Wrappers of one's own are checked by another one.
    """

    RESET = "reset(self, *, seed=None, options=None) must return (observation, info)"
    STEP = "step(self, action) must return (observation, reward, terminated, truncated, info)"

    def __init__(self, env: gym.Env, name: str):
        super().__init__(env)
        self.name = name
        self.steps = 0  # of this episode
        space = getattr(env, "observation_space", None)
        if not isinstance(space, spaces.Space):
            raise Fault(f"{name}: observation_space is {space!r}, not one of gymnasium.spaces")
        self.observation_space = space  # from now on, whatever the task makes of it

    def reset(self, **kwargs):
        self.steps = 0
        if kwargs.get("seed") is not None:
            random.seed(kwargs["seed"])
            np.random.seed(kwargs["seed"] % 2**32)  # noqa: NPY002
        obs, info = self.called(self.RESET, 2, self.env.reset, **kwargs)
        return self.checked(self.observation_space, obs), info

    def step(self, action):
        self.steps += 1
        obs, reward, terminated, truncated, info = self.called(self.STEP, 5, self.env.step, copy.copy(action))
        obs = self.checked(self.observation_space, obs)
        reward = float(self.scalar("the reward", reward, "fiub", "a number"))
        self.check_number("the reward", reward)
        terminated = bool(self.scalar("terminated", terminated, "biu", "True or False"))
        truncated = bool(self.scalar("truncated", truncated, "biu", "True or False"))
        cut = terminated and bool(info.get("TimeLimit.truncated"))  # as gym before 0.26 said it
        return obs, reward, terminated and not cut, truncated or cut, info

    def scalar(self, name: str, value, kinds: str, wanted: str):
        if (number := single(value, kinds)) is None:
            raise Fault(f"{self.name}: {name} of step {self.steps} is {value!r}, not {wanted}")
        return number

    def called(self, rule: str, length: int, function: Callable, *args, **kwargs) -> tuple:
        """What a method of the task returns. Raises Fault when that, or what it takes, is not by the rule."""
        try:
            result = function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            # Raised in gymnasium's wrappers or here, not in the task: it was called or unpacked in vain.
            if not raised_in(error).startswith((WRAPPERS, gym.core.__file__, __file__)):
                raise
            raise Fault(f"{self.name}: {rule} ({error}); is it written for gym before 0.26?") from error
        if not (isinstance(result, tuple) and len(result) == length and isinstance(result[-1], dict)):
            raise Fault(f"{self.name}: {rule}; is it written for gym before 0.26?")
        info = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in result[-1].items()}
        info.pop("episode", None)  # ours: RecordEpisodeStatistics
        return *result[:-1], info

    def checked(self, space: spaces.Space, value, name: str = "the observation"):
        """A copy of the observation. Raises Fault when it does not fit its space."""
        if isinstance(space, spaces.Dict):
            if not isinstance(value, dict) or value.keys() != space.keys():
                given = sorted(value) if isinstance(value, dict) else type(value).__name__
                raise Fault(f"{self.name}: {name} is {given}, its space has {sorted(space)}")
            return {key: self.checked(part, value[key], f"{name}[{key!r}]") for key, part in space.items()}
        if isinstance(space, spaces.Tuple) and isinstance(value, tuple) and len(value) == len(space):
            return tuple(self.checked(part, value[i], f"{name}[{i}]") for i, part in enumerate(space))
        if not isinstance(space, spaces.Box):
            if not space.contains(value):
                raise Fault(f"{self.name}: {name} is {value!r}, which is not in {space}")
            return copy.deepcopy(value)
        try:
            array = np.array(value)  # a copy
        except (TypeError, ValueError, RuntimeError) as error:
            raise Fault(f"{self.name}: {name} is no array ({error})") from error
        if array.dtype.kind not in "fiub":
            raise Fault(f"{self.name}: {name} is {value!r}, not numbers")
        if array.shape != space.shape:
            raise Fault(f"{self.name}: {name} has shape {array.shape}, its space has {space.shape}")
        if array.dtype.itemsize > 1:  # not images
            wrong = ~(np.abs(array, dtype=float) <= HUGE)  # NaN as well; in float16 HUGE would be infinite
            if wrong.any():
                where = np.argwhere(wrong)[0].tolist()
                self.check_number(f"{name}{where if where else ''}", float(array[tuple(where)]))
        if array.dtype != space.dtype:
            with np.errstate(all="ignore"):
                stored = array.astype(space.dtype)
            lost = ~np.isfinite(stored) if space.dtype.kind == "f" else stored != array
            if lost.any():
                raise Fault(f"{self.name}: {name} holds {array[lost][0]:.4g}, a space of {space.dtype} cannot")
        return array

    def check_number(self, name: str, value: float) -> None:
        if not abs(value) <= HUGE:
            raise Fault(
                f"{self.name}: {name} is {value:.4g} at step {self.steps} of an episode; "
                "give a number in its place in a wrapper (make_env)"
            )


def single(value, kinds: str):
    """The number in `value`; None unless it is one, of these kinds of dtype."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # lists of several lengths; tensors on a GPU, or with gradients
        return None
    return array.item() if array.size == 1 and array.dtype.kind in kinds else None


def truth(info: dict, *names: str) -> float:
    """What the first of `names` that a task's info has says, 0 or 1 or between; NaN where it has none of them.

    Raises Fault when that is something else: text, for one, is never false.
    """
    for name in names:
        if name in info:
            value = single(info[name], "biuf")
            if value is not None and (0 <= value <= 1 or math.isnan(value)):
                return float(value)
            raise Fault(f"the task's info[{name!r}] is {info[name]!r}, not True or False; change success() (TASK)")
    return math.nan


def learnable(env: gym.Env, env_id: str) -> Checked:
    """The task, `Checked` also in wrappers of one's own. Exits unless actions can be scaled, and no wrapper learns."""
    space = env.action_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f" or not space.shape[0]:
        fail(f"--env-id {env_id}: actions must be a Box of floats of shape (A,), not {space}; change it in make_env")
    low, high = np.float64(space.low), np.float64(space.high)
    if not (high - low < HUGE).all():  # NaN as well, where both are infinite
        fail(f"--env-id {env_id}: actions need bounds, not {space}; set them in a wrapper (make_env)")
    layer = env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, gym.wrappers.NormalizeObservation | gym.wrappers.NormalizeReward):
            fail(f"--env-id {env_id}: no checkpoint keeps what {type(layer).__name__} learns; leave it out of make_env")
        layer = layer.env
    return env if isinstance(env, Checked) else Checked(env, env_id)


def leaves(space: spaces.Space, path: tuple = ()) -> Iterator[tuple[tuple, spaces.Space]]:
    """The spaces in Dicts and Tuples at any depth, each with its keys and indices."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        for key, part in space.items() if isinstance(space, spaces.Dict) else enumerate(space):
            yield from leaves(part, (*path, key))
    else:
        yield path, space


def looks_like_image(space: spaces.Space) -> bool:
    """Whether a space has rows and columns of its own: a matrix (not one row or column) of bytes, or large."""
    if not isinstance(space, spaces.Box | spaces.MultiBinary | spaces.MultiDiscrete):
        return False
    sides = [side for side in space.shape if side > 1]
    return len(sides) >= 2 and (space.dtype == np.uint8 or int(np.prod(sides)) > 256)


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
