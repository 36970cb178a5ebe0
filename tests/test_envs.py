"""common/envs.py: tasks by gymnasium's rules and against them, wrappers."""

import math
import random
import re
import types
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import probe_envs
import pytest
import torch
from gymnasium import spaces

from common import envs
from common.envs import ActionChunk, AnySuccess, Checked, GripperPenalty, ScaledActions, episode_seed
from common.episodes import Recorder
from common.setup import Fault

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


# --- Making -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("NoSuchTask-v0", "NoSuchTask"),
        ("no_such_module:Task-v0", "no_such_module"),
        ("probe_envs:NoSuchTask-v0", "NoSuchTask"),
        ("not an id", "id"),
        ("", "id"),
    ],
)
def test_tasks_that_are_not_there(env_id, words):
    with pytest.raises(SystemExit, match=f"--env-id {re.escape(env_id)}: ") as error:
        envs.make(env_id)
    assert words in error.value.code and "\n" not in error.value.code


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    """R5: module:Env-v0 with the module where one works; also module:namespace/Env-v0."""
    source = 'import gymnasium\ngymnasium.register("Here-v0", "probe_envs:Point", max_episode_steps=9)\n'
    (tmp_path / "tasks_here.py").write_text(source + source.replace("Here", "lab/Here"))
    monkeypatch.chdir(tmp_path)
    for env_id in ("tasks_here:Here-v0", "tasks_here:lab/Here-v0"):
        env = envs.make(env_id)
        assert isinstance(env.unwrapped, probe_envs.Point) and env.spec.max_episode_steps == 9


def test_a_task_without_a_time_limit_gets_one(monkeypatch, capsys):
    """R3: said once, though a run makes it several times; a task with a limit keeps it in silence."""
    monkeypatch.setattr(envs, "LONGEST_EPISODE", 7)
    monkeypatch.setattr(probe_envs.time, "sleep", lambda seconds: None)
    envs.say_once.cache_clear()
    for _ in range(2):
        env = envs.make("probe_envs:Endless-v0")
        env.reset(seed=0)
        assert [env.step(np.zeros(1))[3] for _ in range(7)] == [False] * 6 + [True]
    envs.make("probe_envs:Point-v0")
    errors = capsys.readouterr().err.splitlines()
    assert errors == ["probe_envs:Endless-v0 has no registered time limit; its episodes are cut after 7 steps"]


# --- Checked ----------------------------------------------------------------------------------------------------------
gym.register("Wrapped-v0", lambda **options: gym.wrappers.TimeLimit(probe_envs.Endless(**options), 5))


def test_a_time_limit_that_only_its_wrapper_knows(monkeypatch, capsys):
    """R3: nothing is said, and nothing is added."""
    monkeypatch.setattr(probe_envs.time, "sleep", lambda seconds: None)
    envs.say_once.cache_clear()
    env = envs.make("Wrapped-v0")
    env.reset(seed=0)
    assert [env.step(np.zeros(1))[3] for _ in range(5)] == [False] * 4 + [True]
    assert capsys.readouterr().err == ""


# --- OpenGL -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("variables", "libraries", "chosen"),
    [
        ({}, ("EGL", "OSMesa"), "egl"),
        ({}, ("OSMesa",), "osmesa"),
        ({}, (), None),
        ({"DISPLAY": ":0"}, ("EGL",), None),
        ({"WAYLAND_DISPLAY": "wayland-0"}, ("EGL",), None),
        ({"MUJOCO_GL": "osmesa"}, ("EGL",), "osmesa"),
    ],
)
def test_the_library_that_renders_without_a_display(monkeypatch, variables, libraries, chosen):
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(envs.sys, "platform", "linux")
    monkeypatch.setattr(envs.ctypes.util, "find_library", lambda name: name if name in libraries else None)
    gl_context = types.ModuleType("mujoco.rendering.classic.gl_context")
    gl_context.GLContext = "glfw's"
    monkeypatch.setitem(envs.sys.modules, gl_context.__name__, gl_context)
    envs.choose_opengl(render=False)
    assert envs.os.environ["MUJOCO_GL"] == variables.get("MUJOCO_GL", "")  # for states nothing changes
    if chosen and not variables:
        monkeypatch.setattr(
            envs.importlib, "reload", lambda module: types.SimpleNamespace(GLContext=lambda *size: size)
        )
        assert gl_context.GLContext(64, 48) == (64, 48) and envs.os.environ["MUJOCO_GL"] == chosen
    else:
        assert gl_context.GLContext == "glfw's"
    monkeypatch.setenv("MUJOCO_GL", variables.get("MUJOCO_GL", ""))
    envs.choose_opengl(render=True)
    assert envs.os.environ["MUJOCO_GL"] == (chosen or "")


def test_a_library_that_does_not_load_is_named(monkeypatch):
    """gym-hil makes a renderer for states, too."""
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")
    gl_context = types.ModuleType("mujoco.rendering.classic.gl_context")
    monkeypatch.setitem(envs.sys.modules, gl_context.__name__, gl_context)
    monkeypatch.setattr(envs.sys, "platform", "linux")
    monkeypatch.setattr(envs.ctypes.util, "find_library", lambda name: name)
    monkeypatch.setattr(envs.importlib, "reload", lambda module: module.no_such_attribute)
    with pytest.raises(Fault, match=r"Arm-v0: OpenGL does not load with MUJOCO_GL=egl \(.*no_such.*apt-get install"):
        envs.with_opengl(lambda: gl_context.GLContext(64, 48), "Arm-v0", render=False)


class FatalError(Exception):
    """Stands for MuJoCo's."""


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (
            FatalError("an OpenGL platform library has not been loaded"),
            "Arm-v0: an OpenGL .* set MUJOCO_GL=egl; .*: apt",
        ),
        (FatalError("gladLoadGL error"), "Arm-v0: gladLoadGL error; set MUJOCO_GL=egl"),
        (RuntimeError("OpenGL, run: apt-get install x"), "^Arm-v0: OpenGL, run: apt-get install x$"),
        (Fault("Arm-v0 has no OpenGL"), "^Arm-v0 has no OpenGL$"),
        (gym.error.DependencyNotInstalled("pygame is not installed"), "^Arm-v0: pygame is not installed$"),
        (FatalError("the simulation is unstable"), "^the simulation is unstable$"),
        (ValueError("gear"), "^gear$"),
    ],
)
def test_only_opengls_errors_get_its_remedy(monkeypatch, error, outcome):
    def make():
        raise error

    monkeypatch.setattr(envs, "choose_opengl", lambda render: None)
    with pytest.raises((Fault, FatalError, ValueError), match=outcome):
        envs.with_opengl(make, "Arm-v0", render=False)


class Odd(gym.Env):
    """A task whose reset and step return what a test gives."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, space: spaces.Space, obs: object, reward=0.0, terminated=False, truncated=False, info=None):
        self.observation_space = space
        self.obs = obs
        self.result = (obs, reward, terminated, truncated, info if info is not None else {})

    def reset(self, *, seed=None, options=None):
        return self.obs, {}

    def step(self, action):
        return self.result


BOX = spaces.Box(-1, 1, (3,))
ZEROS = np.zeros(3, np.float32)


def odd(**result) -> Checked:
    return Checked(Odd(BOX, ZEROS, **result), "Odd-v0")


def fault_of(call: Callable) -> str:
    with pytest.raises(Fault) as error:
        call()
    assert str(error.value).startswith("Odd-v0: ") and "\n" not in str(error.value)
    return str(error.value)


def step_of(env: gym.Env) -> tuple:
    env.reset(seed=0)
    return env.step(np.zeros(1, np.float32))


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (np.float64(0.5), 0.5),
        (np.array(0.5), 0.5),
        (np.array([0.5], np.float32), 0.5),
        (np.int64(-3), -3.0),
    ],
)
def test_rewards_become_floats(reward, expected):
    """S6: of whatever type a task gives."""
    reward = step_of(odd(reward=reward))[1]
    assert type(reward) is float and reward == expected


GRADIENT = torch.ones(3, requires_grad=True)


@pytest.mark.parametrize(
    "reward", [math.nan, math.inf, 1e300, -1e11, None, "1", np.zeros(2), [1, 2], [[1], [1, 2]], 1j, GRADIENT[0]]
)
def test_rewards_that_are_none(reward):
    """S6: the reward is named, not the observation."""
    assert "the reward" in fault_of(lambda: step_of(odd(reward=reward)))


@pytest.mark.parametrize("end", [True, 1, np.True_, np.array(True), np.array([1])])
def test_ends_become_bools(end):
    for name in ("terminated", "truncated"):
        result = step_of(odd(**{name: end}))
        assert result[2:4] == (name == "terminated", name == "truncated")
        assert type(result[2]) is type(result[3]) is bool


@pytest.mark.parametrize("end", [1.0, math.nan, None, "yes", np.zeros(2, bool)])
def test_ends_that_are_none(end):
    for name in ("terminated", "truncated"):
        assert f"{name} of step 1" in fault_of(lambda name=name: step_of(odd(**{name: end})))


@pytest.mark.parametrize(
    ("terminated", "truncated", "info", "expected"),
    [
        (True, False, {"TimeLimit.truncated": True}, (False, True)),
        (True, False, {"TimeLimit.truncated": False}, (True, False)),
        (False, False, {"TimeLimit.truncated": True}, (False, False)),
        (False, True, {"TimeLimit.truncated": True}, (False, True)),
    ],
)
def test_a_time_limit_as_old_gym_tells_it(terminated, truncated, info, expected):
    """S7: `done` handed on as terminated; its values would be cut off at the time limit."""
    assert step_of(odd(terminated=terminated, truncated=truncated, info=info))[2:4] == expected


NESTED = spaces.Dict({"robot": spaces.Dict({"q": BOX}), "cams": spaces.Tuple([spaces.Box(0, 255, (2, 2), np.uint8)])})


def nested(q: object) -> dict:
    return {"robot": {"q": q}, "cams": (np.zeros((2, 2), np.uint8),)}


@pytest.mark.parametrize(
    ("space", "obs", "words"),
    [
        (BOX, np.array([0, math.nan, 0]), "the observation[1] is nan at step 0"),
        (BOX, np.array([0, 0, -math.inf]), "the observation[2] is -inf"),
        (BOX, np.array([1e20, 0, 0]), "the observation[0] is 1e+20"),
        (BOX, np.array([0, 3.4e38, 0], np.float32), "the observation[1] is 3.4e+38"),
        (BOX, np.array([0, 2**62, 0]), "the observation[1] is 4.612e+18"),
        (BOX, np.zeros(4), "the observation has shape (4,), its space has (3,)"),
        (BOX, 0.0, "the observation has shape (), its space has (3,)"),
        (BOX, np.array(["a", "b", "c"]), "not numbers"),
        (BOX, [[1], [2, 3]], "the observation"),
        (BOX, None, "the observation"),
        (BOX, {"a": ZEROS}, "the observation"),
        (spaces.Box(-1, 1, ()), math.nan, "the observation is nan"),
        (NESTED, nested(np.array([0, math.nan, 0])), "the observation['robot']['q'][1] is nan"),
        (NESTED, nested(np.zeros(2)), "the observation['robot']['q'] has shape (2,)"),
        (NESTED, {"robot": {"q": ZEROS}}, "the observation is ['robot'], its space has ['cams', 'robot']"),
        (NESTED, ZEROS, "the observation is ndarray, its space has ['cams', 'robot']"),
        (spaces.Discrete(3), 5, "the observation is 5, which is not in Discrete(3)"),
        (spaces.Tuple([BOX]), (ZEROS, ZEROS), "the observation is"),
        (spaces.Tuple([BOX]), (np.array([math.nan, 0, 0]),), "the observation[0][0] is nan"),
        (BOX, GRADIENT, "the observation is no array"),
        (spaces.Box(-1, 1, (3,), np.int32), np.array([0, 0.5, 1]), "holds 0.5, a space of int32 cannot"),
        (spaces.Box(0, 255, (3,), np.uint8), np.array([0, -3, 1]), "holds -3, a space of uint8 cannot"),
        (spaces.Box(0, 255, (3,), np.uint8), np.array([0, 300, 1]), "holds 300, a space of uint8 cannot"),
        (spaces.Box(0, 1, (3,), bool), np.array([0, 0.25, 1]), "holds 0.25, a space of bool cannot"),
        (spaces.Box(-1, 1, (3,), np.float16), np.array([0, 1e5, 1]), "holds 1e+05, a space of float16 cannot"),
        (spaces.Box(-1, 1, (3,), np.float16), np.array([0, math.inf, 1], np.float16), "the observation[1] is inf"),
    ],
)
def test_observations_that_break_their_space(space, obs, words):
    """S4, S6, S7: the culprit is named with its place, from a reset as from a step."""
    env = Checked(Odd(space, obs), "Odd-v0")
    assert words in fault_of(lambda: env.reset(seed=0))
    env.env.reset(seed=0)
    assert words.replace("step 0", "step 1") in fault_of(lambda: env.step(np.zeros(1)))


@pytest.mark.parametrize(
    ("space", "obs"),
    [
        (BOX, [0.0, 1.0, 2.0]),
        (BOX, np.float64([0, 1e9, -5])),
        (spaces.Box(0, 9, (3,), np.int64), np.array([1, 2, 3])),
        (spaces.Box(0, 1, (3,), np.int8), np.array([True, False, True])),
        (spaces.Box(0, 9, (3,), np.uint8), np.array([1.0, 2.0, 9.0])),
        (BOX, torch.tensor([0.5, 1, 2])),
        (spaces.Box(-1, 1, ()), 0.5),
        (spaces.Box(0, 255, (2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)[::-1, ::-1]),
        (spaces.MultiBinary(3), np.array([1, 0, 1], np.int8)),
        (spaces.Discrete(3), np.int64(2)),
        (NESTED, nested(ZEROS)),
    ],
)
def test_observations_pass_unchanged(space, obs):
    seen, _ = Checked(Odd(space, obs), "Odd-v0").reset(seed=0)
    ours, theirs = (spaces.flatten(space, each) for each in (seen, obs))
    np.testing.assert_array_equal(ours, theirs)


def test_observations_are_copies():
    """S1: also of arrays inside dicts and tuples."""
    space, obs = NESTED, nested(np.zeros(3))
    env = Checked(Odd(space, obs), "Odd-v0")
    seen, _ = env.reset(seed=0)
    obs["robot"]["q"][:] = 7
    obs["cams"][0][:] = 7
    later = env.step(np.zeros(1))[0]
    assert seen["robot"]["q"].tolist() == [0, 0, 0] and not seen["cams"][0].any()
    assert later["robot"]["q"].tolist() == [7, 7, 7] and later["cams"][0].all()
    bits = np.zeros(3, np.int8)
    seen, _ = Checked(Odd(spaces.MultiBinary(3), bits), "Odd-v0").reset(seed=0)
    bits[:] = 1
    assert not seen.any()


class Grows(probe_envs.Probe):
    """Makes its space anew, larger, in the second reset."""

    def reset(self, *, seed=None, options=None):
        self.size = 1 if self.observation_space is probe_envs.Probe.observation_space else 2
        self.observation_space = spaces.Box(-1, 1, (self.size,))
        return super().reset(seed=seed)

    def observe(self):
        return np.zeros(self.size)


def test_a_space_stays_what_it_was():
    """S7: the networks' shapes are those of the space that there was first."""
    env = Checked(Grows(), "Odd-v0")
    env.reset(seed=0)
    assert env.observation_space.shape == (1,)
    assert "has shape (2,), its space has (1,)" in fault_of(lambda: env.reset(seed=1))


@pytest.mark.parametrize("space", [None, (3,), types.SimpleNamespace(shape=(3,))])
def test_a_space_that_is_none(space):
    """S7: of old gym's spaces, too."""
    assert "not one of gymnasium.spaces" in fault_of(lambda: Checked(Odd(space, ZEROS), "Odd-v0"))


def test_infos_are_copies():
    """S1's kind: the verdicts of an evaluation are read when all its episodes are over."""
    info = {"success": np.ones(1)}
    env = odd(truncated=True, info=info)
    kept = step_of(env)[4]
    info["success"][:] = 0
    assert kept["success"].tolist() == [1]


class Careless(probe_envs.Probe):
    """Draws from the global generators, as tasks from before gym 0.26 do."""

    def observe(self):
        return np.array([np.random.uniform() + random.random()])  # noqa: NPY002


def test_global_generators_are_seeded_with_the_episode():
    """A run can be repeated, and goes on as if it had not ended, also with a task that ignores its own generator."""
    env = Checked(Careless(), "Odd-v0")
    first, other, again = (env.reset(seed=seed)[0].item() for seed in (3, 2**40, 3))
    assert first == again != other


class OldGym(probe_envs.Probe):
    """reset and step as gym had them before 0.26."""

    def reset(self, *, seed=None, options=None):
        return self.observe() if hasattr(self, "t") else super().reset(seed=seed)[0]

    def step(self, action):
        return self.observe(), 0.0, False, {}


class OldStep(OldGym):
    def reset(self, *, seed=None, options=None):
        return probe_envs.Probe.reset(self, seed=seed)


class NoSeed(probe_envs.Probe):
    def reset(self):
        return super().reset()


class WrongInfo(probe_envs.Probe):
    def step(self, action):
        return self.observe(), 0.0, False, False, None


class OwnBug(probe_envs.Probe):
    """Its own mistakes keep their tracebacks."""

    def reset(self, *, seed=None, options=None):
        _, _ = [1]

    def step(self, action):
        return np.zeros(2) + np.zeros(3)


for task in (OldGym, OldStep, NoSeed, WrongInfo, OwnBug):
    gym.register(f"{task.__name__}-v0", task, max_episode_steps=5)
    gym.register(f"{task.__name__}-v1", task)


@pytest.mark.parametrize("version", [0, 1])  # with and without a time limit, which unpacks what a step returns
@pytest.mark.parametrize("name", ["OldGym", "OldStep", "NoSeed", "WrongInfo"])
def test_tasks_against_gymnasiums_rules(name, version):
    """S7: one line that shows what reset and step must be."""
    env = envs.make(f"{name}-v{version}")
    with pytest.raises(Fault) as error:
        step_of(env)
    rule = Checked.RESET if name in ("OldGym", "NoSeed") else Checked.STEP
    assert str(error.value).startswith(f"{name}-v{version}: {rule}") and "gym before 0.26" in str(error.value)


def test_a_tasks_own_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="unpack") as error:
        envs.make("OwnBug-v0").reset(seed=0)
    assert error.traceback[-1].name == "reset" and "test_envs" in str(error.traceback[-1].path)


class NeedsOptions(probe_envs.Probe):
    def __init__(self, robot: str, render_mode: str | None = None):
        pass


class NoRenderMode(probe_envs.Probe):
    def __init__(self):
        pass


class NoTask:
    pass


class BrokenInside(probe_envs.Probe):
    def __init__(self):
        self.size = None + 1


for task in (NeedsOptions, NoRenderMode, NoTask, BrokenInside):
    gym.register(f"{task.__name__}-v0", task, max_episode_steps=5)


@pytest.mark.parametrize(
    ("env_id", "render", "words"),
    [
        ("NeedsOptions-v0", False, "missing 1 required positional argument: 'robot'"),
        ("NoRenderMode-v0", True, "unexpected keyword argument 'render_mode'"),
        ("NoTask-v0", False, "must inherit from the gymnasium.Env class"),
    ],
)
def test_options_that_a_task_does_not_take(env_id, render, words):
    """S7: gymnasium's TypeError is one line; a Fault, for a video that cannot be made does not end a run."""
    with pytest.raises(Fault, match=rf"^--env-id {env_id}: .*{words}.*\(TASK\)$"):
        envs.make(env_id, render)


def test_a_constructors_own_bug_keeps_its_traceback():
    with pytest.raises(TypeError, match="NoneType") as error:
        envs.make("BrokenInside-v0")
    assert "test_envs" in str(error.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_filename)


def test_a_bug_in_a_folder_that_is_called_gymnasium(monkeypatch):
    """S7: only gymnasium's own wrappers call in vain; gymnasium_robotics and the like raise errors of their own."""
    code = compile("def step(self, action):\n    raise ValueError('singular')", "/gymnasium_tasks/arm.py", "exec")
    scope: dict = {}
    exec(code, scope)
    monkeypatch.setattr(probe_envs.Point, "step", scope["step"])
    with pytest.raises(ValueError, match="^singular$"):
        step_of(envs.make("probe_envs:Point-v0"))


def test_a_task_may_have_statistics_of_its_own():
    env = gym.wrappers.RecordEpisodeStatistics(odd(truncated=True, info={"episode": 7, "success": True}))
    info = step_of(env)[4]
    assert info["episode"]["l"] == 1 and info["success"] is True


# --- Spaces -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("space", "image"),
    [
        (spaces.Box(0, 255, (64, 64, 3), np.uint8), True),
        (spaces.Box(0, 255, (3, 64, 64), np.uint8), True),
        (spaces.Box(0, 255, (64, 64), np.uint8), True),
        (spaces.Box(0, 1, (64, 64, 3), np.float32), True),
        (spaces.Box(0, 255, (1, 12), np.uint8), False),
        (spaces.Box(-1, 1, (1, 12)), False),
        (spaces.Box(-1, 1, (4096,)), False),
        (spaces.Box(-1, 1, (4, 4)), False),
        (spaces.Box(-1, 1, (10, 30)), True),
        (spaces.MultiBinary((64, 64)), True),
        (spaces.MultiBinary(64), False),
        (spaces.MultiDiscrete(np.full((20, 20), 3)), True),
        (spaces.MultiDiscrete([3, 2]), False),
        (spaces.Discrete(3), False),
    ],
)
def test_what_looks_like_an_image(space, image):
    """S3, S9"""
    assert envs.looks_like_image(space) is image


def test_episode_seeds_of_all_streams_differ():
    keys = [(seed, stream, episode) for seed in (1, 2) for stream in range(3) for episode in range(500)]
    assert len({episode_seed(*key) for key in keys}) == len(keys)
    assert episode_seed(1, 0, 7) == episode_seed(1, 0, 7)


# --- Wrappers ---------------------------------------------------------------------------------------------------------
class Echo(probe_envs.Probe):
    """Its info is the action that it was given."""

    def __init__(self, low: list, high: list):
        self.action_space = spaces.Box(np.float32(low), np.float32(high))

    def step(self, action):
        assert self.action_space.contains(action), action
        return self.observe(), 0.0, False, False, {"action": action.tolist()}


def test_actions_are_scaled_to_the_tasks_bounds():
    """Also where a dimension has one value only; rounding does not leave the bounds."""
    env = ScaledActions(Echo([-2, 0, 3, -0.1], [2, 5, 3, 0.3]))
    assert env.action_space == spaces.Box(-1, 1, (4,), np.float32)
    for action, expected in (([-1] * 4, [-2, 0, 3, -0.1]), ([0] * 4, [0, 2.5, 3, 0.1]), ([1] * 4, [2, 5, 3, 0.3])):
        assert env.step(np.float32(action))[4]["action"] == pytest.approx(expected, abs=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        bounds = np.sort(rng.normal(0, 10, (2, 3)), 0)
        ScaledActions(Echo(*bounds)).step(np.sign(rng.normal(size=3)).astype(np.float32))


def test_gripper_penalty():
    env = GripperPenalty(gym.make("probe_envs:Point-v0"), 0.1)
    penalties = []
    for episode in range(2):
        env.reset(seed=episode)
        for gripper in (1, 0.2, 0.9, -0.3, -0.9, -1, 0.6, -1):
            _, reward, *_ = env.step(np.array([0, 0, gripper], np.float32))
            distance = np.linalg.norm(env.unwrapped.goal - env.unwrapped.point)
            penalties.append(round(-distance - reward, 6))
    # the first command is free, small ones count for nothing, each switch costs once; a new episode starts afresh
    assert penalties == [0, 0, 0, 0, 0.1, 0, 0.1, 0.1] * 2


def test_action_chunk_sums_rewards_and_stops_at_the_end():
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    actions[:, 0] = abs(actions[:, 0])  # away from the termination
    one, chunked = envs.make("probe_envs:Point-v0"), ActionChunk(envs.make("probe_envs:Point-v0"), 8)
    assert chunked.action_space.shape == (24,)
    obs, _ = one.reset(seed=1)
    assert np.array_equal(obs["point"], chunked.reset(seed=1)[0]["point"])
    steps = [one.step(action) for action in actions]
    for first, count in ((0, 8), (8, 8), (16, 4)):
        chunk = np.resize(actions[first : first + count], (8, 3))
        obs, reward, terminated, truncated, info = chunked.step(chunk.ravel())
        assert np.array_equal(obs["point"], steps[first + count - 1][0]["point"])
        assert reward == pytest.approx(sum(step[1] for step in steps[first : first + count]))
        assert (terminated, truncated) == (False, first == 16)
        assert info["success"] == steps[first + count - 1][4]["success"]
    left = np.float32([-2, 0, 0])
    rewards, terminated = [], False
    for env in (one, chunked):
        env.reset(seed=1)
    while not terminated:
        _, reward, terminated, *_ = one.step(left)
        rewards.append(reward)
    assert len(rewards) < 8 and chunked.step(np.tile(left, 8))[1:3] == (pytest.approx(sum(rewards)), True)


class Verdicts(probe_envs.Probe):
    """Successful in the second of four steps, as Meta-World goes on after it."""

    def step(self, action):
        self.t += 1
        return self.observe(), 0.0, False, self.t == 4, {"success": float(self.t == 2)}


def test_any_steps_success_counts_with_a_wrapper():
    """S10: which step's success counts is chosen in make_env."""
    env = AnySuccess(Verdicts(), lambda info: info["success"])
    for _ in range(2):
        env.reset(seed=0)
        assert [env.step(np.zeros(1))[4]["success"] for _ in range(4)] == [False, True, True, True]


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"success": True}, 1),
        ({"success": np.False_, "is_success": True}, 0),
        ({"is_success": np.array([1.0])}, 1),
        ({"succeed": np.float32(0.25)}, 0.25),
        ({"success": math.nan}, math.nan),
        ({"other": "yes"}, math.nan),
    ],
)
def test_success_as_tasks_tell_it(info, expected):
    """S10"""
    assert envs.truth(info, "success", "is_success", "succeed") == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("value", ["yes", "False", None, 3, -1.0, [True, False], [[1], [1, 0]], {}])
def test_success_that_is_no_truth_value(value):
    """S10: text is never false, a count is no rate."""
    with pytest.raises(Fault, match=r"the task's info\['success'\] is .*success\(\) \(TASK\)"):
        envs.truth({"success": value}, "success")


class WritesIntoActions(probe_envs.Point):
    """Scales its action in place."""

    def step(self, action):
        action *= 3
        return super().step(action)


def test_a_task_may_write_into_its_action():
    """S1's kind: recorded is what was given."""
    env = Recorder(Checked(WritesIntoActions(), "Writes-v0"))
    env.reset(seed=1)
    given = np.full(3, 0.25, np.float32)
    for _ in range(20):
        env.step(given)
    (episode,) = env.episodes
    assert given.tolist() == [0.25] * 3 and set(episode.actions.ravel()) == {0.25}
