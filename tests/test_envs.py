"""common/envs.py: tasks by gymnasium's rules and against them, wrappers, demonstrations, recordings."""

import math
import re
import types
from collections.abc import Callable
from functools import partial

import gymnasium as gym
import h5py
import minari
import numpy as np
import probe_envs
import pytest
from gymnasium import spaces

from common import envs, evaluation
from common.envs import ActionChunk, AnySuccess, Checked, GripperPenalty, Recorder, ScaledActions, episode_seed
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


@pytest.mark.parametrize("reward", [math.nan, math.inf, 1e300, -1e11, None, "1", np.zeros(2), [1, 2], 1j])
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
        for gripper in (1, 0.2, 0.9, -0.3, -0.9, -1, 0.6):
            _, reward, *_ = env.step(np.array([0, 0, gripper], np.float32))
            distance = np.linalg.norm(env.unwrapped.goal - env.unwrapped.point)
            penalties.append(round(-distance - reward, 6))
    # the first command is free, small ones count for nothing, each switch costs once; a new episode starts afresh
    assert penalties == [0, 0, 0, 0, 0.1, 0, 0.1] * 2


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


def test_recorder_keeps_episodes_and_copies():
    env = Recorder(probe_envs.InPlace())
    for length in (20, 3):
        env.reset(seed=1)
        for t in range(length):
            action = np.full(3, 0.1 * t, np.float32)
            env.step(action)
            action[:] = 9
    (episode,) = env.episodes  # the other one has not ended
    assert len(episode.observations) == 21 and episode.actions.max() == np.float32(1.9)
    assert len({obs["point"].tobytes() for obs in episode.observations}) > 10
    assert episode.truncations.tolist() == [False] * 19 + [True] and not episode.terminations.any()
    assert episode.rewards.shape == (20,) and episode.info == {"success": episode.info["success"]}


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


@pytest.mark.parametrize("value", ["yes", "False", None, 3, -1.0, [True, False], {}])
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


# --- Demonstrations ---------------------------------------------------------------------------------------------------
def point() -> gym.Env:
    return envs.make("probe_envs:Point-v0")


class Reversed(gym.ActionWrapper):
    """Changes actions without saying what the expert would do."""

    def action(self, action):
        return -action


class ReversedToo(Reversed):
    def expert_action(self):
        return -self.env.unwrapped.expert_action()


class Half(gym.Wrapper):
    """Changes the action space only."""

    action_space = spaces.Box(-1, 1, (3,))


def test_experts_behind_wrappers():
    """R1: a wrapper that changes actions has an expert of its own, or is named; others are looked through."""
    for wrap in (ReversedToo, lambda env: ReversedToo(gym.wrappers.TimeLimit(env, 50)), Recorder):
        episodes = list(envs.demonstrations("2", wrap(point()), seed=1, noise=0.0))
        assert [episode.info["success"] for episode in episodes] == [True, True]
        assert len({episode.observations[0]["goal"].tobytes() for episode in episodes}) == 2
    for wrap, name in ((Reversed, "Reversed"), (Half, "Half")):
        with pytest.raises(SystemExit, match=f"--demos 2: {name} changes actions, so it needs an expert_action"):
            next(envs.demonstrations("2", wrap(point()), seed=1, noise=0.0))
    with pytest.raises(SystemExit, match="--demos 5: Pendulum-v1 has no expert_action"):
        next(envs.demonstrations("5", envs.make("Pendulum-v1"), seed=1, noise=0.0))


@pytest.mark.parametrize("action", [np.zeros(2), 0.0, np.full(3, math.nan), None])
def test_experts_that_say_no_action(monkeypatch, action):
    monkeypatch.setattr(probe_envs.Point, "expert_action", lambda self: action)
    with pytest.raises(SystemExit, match=r"--demos 1: expert_action\(\) gives"):
        next(envs.demonstrations("1", point(), seed=1, noise=0.0))


def test_recorded_episodes_become_demonstrations(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    recorded = list(envs.demonstrations("3", point(), seed=5, noise=0.1))
    evaluation.record("point/expert-v0", recorded, point(), lambda info: info["success"], algorithm_name="expert")
    dataset = minari.load_dataset("point/expert-v0")
    assert isinstance(dataset.recover_environment().unwrapped, probe_envs.Point)
    assert isinstance(dataset.recover_environment(eval_env=True).unwrapped, probe_envs.Point)
    for ours, theirs in zip(recorded, envs.demonstrations("point/expert-v0", point(), seed=0, noise=0.0), strict=True):
        for name in ("actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name))
        for one, other in zip(theirs.observations, ours.observations, strict=True):
            assert np.array_equal(one["goal"], other["goal"]) and np.array_equal(one["point"], other["point"])
        assert theirs.info["success"] == ours.info["success"]
    with pytest.raises(SystemExit, match="--record-dataset point/expert-v0: exists"):
        evaluation.check_new_dataset("point/expert-v0")
    with pytest.raises(SystemExit, match="--record-dataset"):
        evaluation.check_new_dataset("no version")


gym.register("Limited-v0", "probe_envs:Endless", max_episode_steps=5)


def endless(render_mode: str | None = None) -> gym.Env:
    return probe_envs.Endless()


gym.register("Partial-v0", partial(endless), max_episode_steps=5)


@pytest.mark.parametrize("task", ["Limited-v0", "Partial-v0"])  # dm_control's tasks are partials in shimmy
def test_a_recording_knows_the_time_limit(tmp_path, monkeypatch, task):
    """R3: the task itself never ends an episode; evaluated from the recording it would not end."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = Recorder(envs.make(task))
    env.reset(seed=0)
    while not env.step(np.zeros(1, np.float32))[3]:
        pass
    evaluation.record("own/limited-v0", env.episodes, env, lambda info: math.nan)
    again = minari.load_dataset("own/limited-v0").recover_environment()
    again.reset(seed=0)
    assert [again.step(np.zeros(1))[3] for _ in range(5)] == [False] * 4 + [True]


class OtherKeys(probe_envs.Point):
    observation_space = spaces.Dict({"place": spaces.Box(-1, 1, (2,)), "goal": spaces.Box(-1, 1, (2,))})

    def observe(self):
        return {"place": np.float32(self.point), "goal": np.float32(self.goal)}


class OtherBounds(probe_envs.Point):
    action_space = spaces.Box(-1, 1, (3,), np.float32)

    def expert_action(self):
        return super().expert_action() / 2


@pytest.mark.parametrize("task", [probe_envs.OtherPoint, OtherKeys, OtherBounds])
def test_demonstrations_of_another_task_are_refused(tmp_path, monkeypatch, task):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = f"{task.__name__}-v7"
    gym.register(name, task, max_episode_steps=20)  # a class, not the name of one
    other = envs.make(name)
    evaluation.record(
        "other/expert-v0", envs.demonstrations("1", other, seed=1, noise=0.0), other, lambda info: math.nan
    )
    with pytest.raises(SystemExit, match="--demos other/expert-v0: is not of this task"):
        next(envs.demonstrations("other/expert-v0", point(), seed=0, noise=0.0))
    with pytest.raises(SystemExit, match="--demos no/such-v0: "):
        next(envs.demonstrations("no/such-v0", point(), seed=0, noise=0.0))


def test_demonstrations_with_numbers_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (episode,) = envs.demonstrations("1", point(), seed=1, noise=0.0)
    episode.rewards[3] = math.nan
    evaluation.record("point/nan-v0", [episode], point(), lambda info: math.nan)
    with pytest.raises(SystemExit, match="--demos point/nan-v0: episode 0: rewards hold something else than finite"):
        list(envs.demonstrations("point/nan-v0", point(), seed=0, noise=0.0))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("rewards", lambda x: x[:-1], "episode 0 has 20 actions and 19 rewards"),
        ("rewards", lambda x: x[:, None], None),
        ("terminations", lambda x: x[:-1], "episode 0 has 20 actions and 19 terminations"),
        ("truncations", lambda x: np.array([b"False"] * 20), "episode 0: truncations hold something else"),
        ("actions", lambda x: x[:, :1], r"episode 0: actions have shape \(1,\), the task's \(3,\)"),
        ("observations/goal", lambda x: x[:-1], "is damaged, cannot be read"),
        ("observations/goal", None, "is damaged, cannot be read"),
    ],
)
def test_demonstrations_whose_file_is_damaged(tmp_path, monkeypatch, part, change, words):
    """B9's and B15's kinds, of --demos: parts that do not fit together, and a file that is cut off."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    recorded = list(envs.demonstrations("2", point(), seed=1, noise=0.0))
    evaluation.record("point/bad-v0", recorded, point(), lambda info: math.nan)
    path = tmp_path / "point/bad-v0/data/main_data.hdf5"
    if change is None:
        path.write_bytes(path.read_bytes()[:5000])
    else:
        with h5py.File(path, "a") as file:
            values = change(file[f"episode_0/{part}"][:])
            del file[f"episode_0/{part}"]
            file[f"episode_0/{part}"] = values
    if words is None:
        read = list(envs.demonstrations("point/bad-v0", point(), seed=0, noise=0.0))
        np.testing.assert_array_equal(read[0].rewards, recorded[0].rewards)
        return
    with pytest.raises(SystemExit, match=f"--demos point/bad-v0: {words}"):
        list(envs.demonstrations("point/bad-v0", point(), seed=0, noise=0.0))
