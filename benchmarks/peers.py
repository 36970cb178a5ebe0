"""Success of sac_state_sim.py beside SERL, LeRobot, SB3, SBX and CleanRL: over steps and over wall-clock, same task.

    python benchmarks/peers.py --seeds 1 2 3                        # ours alone, three seeds
    python benchmarks/peers.py --sb3-python SB3_VENV/bin/python --sbx-python SBX_VENV/bin/python \\
        --serl-path SERL --serl-python SERL_VENV/bin/python --lerobot-python LEROBOT_VENV/bin/python \\
        --cleanrl-path CLEANRL --cleanrl-python CLEANRL_VENV/bin/python       # one seed of all
    python benchmarks/peers.py --draw                               # only the picture, from the file

Each run is a process of its own on the same cores, one after the other, until its budget of wall-clock is used up (ours
ends by itself, at the steps of its row in benchmarks/run.py). All are evaluated alike: 10 episodes of the deterministic
policy, the same for all, every 1,000 steps and when the time is up; success is what info["success"] says at the last
step. The clock runs from the start of the process, with imports and compilation; it stands still during evaluations.

The settings are the authors' for the nearest task:
ours_demos, ours_mirror, ours: the rows sac_pick_default (the peg: sac_peg_default), sac_pick_mirror (the cube only) and
    sac_pick_scratch of benchmarks/run.py. None of the others is told that the task is symmetric.
serl_demos, serl: serl_launcher's make_sac_agent, with the flags of examples/async_sac_state_sim/run_*.sh: batches of
    256, eight critic updates for one of the actor, 1,000 random steps. That script names a flag it does not have
    (FLAGS.utd_ratio) and so never learns; its actor and learner are two processes whose ratio is left to chance; it has
    no demonstrations. Here one loop does both, one tick of the learner (eight critic updates, one of the actor) per
    --serl-steps environment steps; with demonstrations half of every minibatch is theirs, as in its scripts for images.
    They are those that ours collects with the same seed, made before the clock runs; ours collects within its time.
lerobot_demos, lerobot: the learner's loop of LeRobot's HIL-SERL as it is. SACConfig's defaults but for the discount
    (0.97), the first temperature (0.01), two critic updates per tick and batches of 256, which are those of its example
    for a real SO-100, train_config_hilserl_so100.json, read in a copy by others; the one for simulation was not at
    hand. Where it would take in what an actor has sent, it takes one environment step with its newest policy, so that a
    tick is a step. The gripper's action is continuous, as the task has it, not one of three. Demonstrations as for
    SERL; its own code takes half of every batch from them. Measured with torch 2.13, where lerobot 0.4.4 asks for less
    than 2.11, with a torchvision whose compiled operators were taken out, and with torch.compile's cache filled by a
    run before, which no first user has.
sb3, sbx: SAC's defaults and 10,000 random steps, as rl-baselines3-zoo has them for MuJoCo (hyperparams/sac.yml).
cleanrl: sac_continuous_action.py as it is, with its own task's defaults.

The peers are not part of this project. Give checkouts of SERL (https://github.com/rail-berkeley/serl) and CleanRL
(https://github.com/vwxyzjn/cleanrl), and interpreters that can import what each needs, and mujoco, gymnasium and tyro
for the task; SERL's needs agentlace too, and an old JAX (0.4.30 works); LeRobot's needs lerobot[hilserl], and a C++
compiler; CleanRL's needs gymnasium 0.29. Run it on a quiet machine: `others_cores` in the file says how many cores
other processes used since the run began. Two rows of contenders may go side by side, `taskset -c 0` and `taskset -c 1`,
with --threads 1 and an --output each. A run that is killed keeps its lines; one that is begun again, with the same
contender, task and seed, replaces them.
"""

import contextlib
import csv
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import tyro
from run import REPO, RESULTS, ROWS, commit, hardware
from speed import bind, busy_seconds, interpreter, versions, write_anew

EVERY = 1_000  # steps between evaluations
EPISODES = 10  # of an evaluation
DEMOS = "20"
DEMO_NOISE = 0.1  # sac_state_sim.py's default
COLUMNS = ["contender", "env_id", "seed", "step", "wall_s", "success", "return", "cores", "others_cores", "budget_s"]
COLUMNS += ["version", "date", "commit", "hardware"]
OURS = {
    ("ours_demos", "FrankaPickCube-v0"): ROWS["sac_pick_default"].command,
    ("ours_demos", "FrankaPegInsert-v0"): ROWS["sac_peg_default"].command,
    ("ours_mirror", "FrankaPickCube-v0"): ROWS["sac_pick_mirror"].command,
    ("ours", "FrankaPickCube-v0"): ROWS["sac_pick_scratch"].command,
    ("ours", "FrankaPegInsert-v0"): ROWS["sac_pick_scratch"].command + " --env-id FrankaPegInsert-v0",
}
# What a contender's process does: this file is imported by the contender's own interpreter.
CHILD = "import json, sys; sys.path.insert(0, sys.argv[1]); import peers; peers.compete(json.loads(sys.argv[2]))"


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    contenders: tuple[str, ...] = ()
    """which of them run (default: all whose paths are given)"""
    env_id: str = "FrankaPickCube-v0"
    """FrankaPickCube-v0 or FrankaPegInsert-v0"""
    seeds: tuple[int, ...] = (1,)
    """all contenders run with the first seed, then with the next"""
    budget_s: float = 1800.0
    """wall-clock that a run may use, evaluations apart (s)"""
    serl_path: Path | None = None
    """checkout of SERL: the folder that holds serl_launcher/"""
    serl_python: str = sys.executable
    """interpreter for SERL"""
    serl_steps: int = 1
    """environment steps per tick of SERL's learner"""
    lerobot_python: str | None = None
    """interpreter that can import lerobot.rl.learner"""
    sb3_python: str | None = None
    """interpreter that can import stable_baselines3"""
    sbx_python: str | None = None
    """interpreter that can import sbx"""
    cleanrl_path: Path | None = None
    """checkout of CleanRL: the folder that holds cleanrl/ and cleanrl_utils/"""
    cleanrl_python: str = sys.executable
    """interpreter for CleanRL"""
    threads: int = 2
    """cores that every process is bound to, and OMP_NUM_THREADS"""
    gpu: bool = False
    """let the contenders use a GPU"""
    output: Path = RESULTS / "peers.csv"
    """file that gets one line per evaluation"""
    picture: Path = REPO / "assets" / "peers.png"
    """picture of the file's curves, drawn when all have run"""
    draw: bool = False
    """only draw the picture"""


@dataclass
class Job:
    """What a contender's process must know."""

    contender: str
    env_id: str
    seed: int
    budget_s: float
    started: float
    """time.time() just before its process began"""
    folder: str
    """where it may write"""
    path: str = ""
    """its checkout"""
    serl_steps: int = 1
    threads: int = 2


# --- The same task and the same judge for all -------------------------------------------------------------------------
class TimeUpError(Exception):
    """The budget is used up."""


def import_tasks() -> None:
    """franka_sim registers them; common/ stands beside it."""
    sys.path.insert(0, str(REPO))
    import franka_sim  # noqa: F401


def make_task(env_id: str) -> gym.Env:
    """The task as sac_state_sim.py wraps it: flat observations (O,), actions (A,) in [-1, 1]."""
    import_tasks()
    from common import envs

    return gym.wrappers.FlattenObservation(envs.ScaledActions(envs.make(env_id)))


class Referee:
    """Stops the clock, evaluates, and prints a line for the process that records."""

    def __init__(self, job: Job):
        from common.envs import episode_seed

        self.env = make_task(job.env_id)
        self.seeds = [episode_seed(job.seed, 1, number) for number in range(EPISODES)]
        self.job = job
        self.paused_s = 0.0

    def wall_s(self) -> float:
        """The contender's time: since its process began, without evaluations."""
        return time.time() - self.job.started - self.paused_s

    def evaluate(self, policy: Callable[[np.ndarray], np.ndarray], step: int) -> dict[str, float]:
        """Means over the episodes; `policy` gives the action (A,) for an observation (O,)."""
        wall_s, pause = self.wall_s(), time.time()
        returns, successes = [], []
        for seed in self.seeds:
            obs, _ = self.env.reset(seed=seed)
            rewards, done = [], False
            while not done:
                obs, reward, terminated, truncated, info = self.env.step(policy(obs))
                rewards.append(float(reward))
                done = terminated or truncated
            returns.append(sum(rewards))
            successes.append(float(info["success"]))
        scores = {"success": float(np.mean(successes)), "return": float(np.mean(returns))}
        line = {"step": step, "wall_s": round(wall_s, 1), **scores, "cpu_s": time.process_time()}
        print("\n" + json.dumps(line), flush=True)
        self.paused_s += time.time() - pause
        return scores


class Training(gym.Wrapper):
    """The task that a peer learns on: interrupts it for evaluations, and ends it with TimeUpError."""

    def __init__(self, job: Job, referee: Referee):
        super().__init__(make_task(job.env_id))
        self.referee = referee
        self.budget_s = job.budget_s
        self.policy: Callable[[np.ndarray], np.ndarray] | None = None  # the peer's, deterministic
        self.steps = 0

    def step(self, action):
        outcome = self.env.step(action)
        self.steps += 1
        time_up = self.referee.wall_s() > self.budget_s
        if time_up or self.steps % EVERY == 0:
            self.referee.evaluate(self.policy, self.steps)
        if time_up:
            raise TimeUpError
        return outcome


def evaluation(line: str) -> dict[str, float] | None:
    """What a line of a contender's output says, if it is one of the referee's."""
    return json.loads(line) if line.startswith('{"step": ') else None


# --- Contenders, each in a process of its own -------------------------------------------------------------------------
def compete(job: dict) -> None:
    """The contender's process."""
    job = Job(**job)
    import_tasks()
    referee = Referee(job)
    name = job.contender.partition("_")[0]
    drivers = {"ours": run_ours, "serl": run_serl, "lerobot": run_lerobot}
    drivers |= {"sb3": run_sb3, "sbx": run_sb3, "cleanrl": run_cleanrl}
    with contextlib.suppress(TimeUpError):
        drivers[name](job, referee)


def run_ours(job: Job, referee: Referee) -> None:
    """sac_state_sim.py as it is, its evaluations made by the referee."""
    import sac_state_sim
    from common.setup import parse

    flags = OURS[job.contender, job.env_id].split()[1:]
    flags += ["--seed", str(job.seed), "--run-dir", f"{job.folder}/run", "--threads", str(job.threads)]
    flags += ["--eval-every", str(EVERY), "--final-eval-episodes", str(EPISODES), "--no-capture-video"]
    sys.argv = ["sac_state_sim.py", *flags]
    own = parse(sac_state_sim.Args, sac_state_sim.__doc__, sac_state_sim.Args.MAY_CHANGE)
    steps = count(EVERY, EVERY)

    def evaluate(policy, *_) -> dict[str, float]:
        step = min(next(steps), own.total_timesteps)
        scores = referee.evaluate(lambda obs: policy([obs], [None])[0], step)
        if referee.wall_s() > job.budget_s:
            raise TimeUpError
        return {"eval/success_rate": scores["success"], "eval/episodic_return": scores["return"]}

    sac_state_sim.evaluate = evaluate
    sac_state_sim.last_evaluation = evaluate
    sac_state_sim.main(own)


def run_sb3(job: Job, referee: Referee) -> None:
    """SB3 and SBX share their interface."""
    if job.contender == "sb3":
        from stable_baselines3 import SAC
    else:
        from sbx import SAC
    task = Training(job, referee)
    agent = SAC("MlpPolicy", task, learning_starts=10_000, seed=job.seed)
    task.policy = lambda obs: agent.predict(obs, deterministic=True)[0]
    agent.learn(10**9)


def run_cleanrl(job: Job, referee: Referee) -> None:
    """The script as it is, but that gym.make gives it the task whose clock runs."""
    import torch

    sys.path.insert(0, job.path)
    task = Training(job, referee)
    script = Path(job.path) / "cleanrl" / "sac_continuous_action.py"
    module = ModuleType("__main__")

    def policy(obs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            _, _, mean = module.actor.get_action(torch.Tensor(obs[None]).to(module.device))
        return mean[0].cpu().numpy()

    task.policy = policy
    gym.make = lambda *_, **__: task
    sys.argv = [str(script), "--seed", str(job.seed), "--total-timesteps", str(10**9)]
    sys.modules["__main__"] = module
    module.__file__ = str(script)
    exec(compile(script.read_text(), script, "exec"), vars(module))


def run_serl(job: Job, referee: Referee) -> None:
    """SERL's agent, buffer and settings in one loop; see the header."""
    sys.path.insert(0, str(Path(job.path) / "serl_launcher"))
    import jax
    from serl_launcher.utils.launcher import make_sac_agent

    batch_size, utd_ratio, random_steps = 256, 8, 1_000  # run_learner.sh, run_actor.sh
    task = Training(job, referee)
    task.action_space.seed(job.seed)
    agent = make_sac_agent(job.seed, task.observation_space.sample(), task.action_space.sample())
    agent = jax.tree_util.tree_map(jax.numpy.array, agent)
    task.policy = lambda obs: np.asarray(agent.sample_actions(observations=obs, argmax=True))
    buffers = [serl_buffer(task, 1_000_000, job.seed)]
    if job.contender.startswith("serl_demos"):
        demos = dict(np.load(f"{job.folder}/demos.npz"))
        buffers.append(serl_buffer(task, len(demos["rewards"]), job.seed))
        for row in range(len(demos["rewards"])):
            buffers[1].insert({name: column[row] for name, column in demos.items()})
    key = jax.random.PRNGKey(job.seed)
    obs, _ = task.reset(seed=job.seed)
    for step in count():
        if step < random_steps:
            action = task.action_space.sample()
        else:
            key, draw = jax.random.split(key)
            action = np.asarray(agent.sample_actions(observations=obs, seed=draw))
        next_obs, reward, terminated, truncated, _ = task.step(action)
        buffers[0].insert(transition(obs, action, next_obs, reward, terminated, terminated or truncated))
        obs = next_obs
        if terminated or truncated:
            obs, _ = task.reset()
        if step >= random_steps and step % job.serl_steps == 0:
            agent, _ = agent.update_high_utd(mixed(buffers, batch_size, utd_ratio), utd_ratio=utd_ratio)
            agent = jax.block_until_ready(agent)


def serl_buffer(task: gym.Env, capacity: int, seed: int):
    """A replay buffer of SERL's, whose spaces are those of the package `gym`."""
    from gym.spaces import Box
    from serl_launcher.data.replay_buffer import ReplayBuffer

    observations = Box(-np.inf, np.inf, task.observation_space.shape, np.float32)
    buffer = ReplayBuffer(observations, Box(-1, 1, task.action_space.shape, np.float32), capacity)
    buffer.seed(seed)
    return buffer


def transition(obs, action, next_obs, reward: float, terminated: bool, done: bool) -> dict[str, object]:
    """As SERL's buffers take it."""
    step = {"observations": obs, "actions": action, "next_observations": next_obs, "rewards": reward}
    return step | {"masks": 1.0 - terminated, "dones": done}


def mixed(buffers: list, batch_size: int, utd_ratio: int) -> dict[str, np.ndarray]:
    """`utd_ratio` minibatches in one (utd_ratio * batch_size, ...), with equal parts of each buffer in each of them."""
    share = batch_size // len(buffers)
    samples = [buffer.sample(utd_ratio * share) for buffer in buffers]
    batch = {}
    for name in samples[0]:
        parts = [sample[name].reshape(utd_ratio, share, *sample[name].shape[1:]) for sample in samples]
        minibatches = np.concatenate(parts, 1)  # (utd_ratio, batch_size, ...)
        batch[name] = minibatches.reshape(-1, *minibatches.shape[2:])
    return batch


def run_lerobot(job: Job, referee: Referee) -> None:
    """LeRobot's learner with an environment in the place of the queue that an actor fills; see the header."""
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.sac.configuration_sac import SACConfig
    from lerobot.policies.sac.modeling_sac import SACPolicy
    from lerobot.rl import learner

    task = Training(job, referee)
    torch.manual_seed(job.seed)
    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, task.observation_space.shape)}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, task.action_space.shape)}
    settings = {"discount": 0.97, "temperature_init": 0.01, "utd_ratio": 2, "device": "cpu", "push_to_hub": False}
    config = SACConfig(input_features=inputs, output_features=outputs, **settings)
    policy = SACPolicy(config)

    def seen(obs: np.ndarray) -> dict[str, torch.Tensor]:
        return {"observation.state": torch.as_tensor(obs)[None]}

    def deterministic(obs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            _, _, means = policy.actor(seen(obs))  # before tanh
        return means[0].tanh().numpy()

    task.policy = deterministic
    obs, _ = task.reset(seed=job.seed)

    def take_step(replay_buffer, **_) -> None:
        nonlocal obs
        action = policy.select_action(seen(obs))
        next_obs, reward, terminated, truncated, _ = task.step(action[0].numpy())
        replay_buffer.add(seen(obs), action, float(reward), seen(next_obs), terminated, truncated)
        obs = task.reset()[0] if terminated or truncated else next_obs

    def demonstrations(cfg, device, storage_device):
        buffer = learner.initialize_replay_buffer(cfg, device, storage_device)
        demos = dict(np.load(f"{job.folder}/demos.npz"))
        for row in range(len(demos["rewards"])):
            before, action, after = (demos[name][row] for name in ("observations", "actions", "next_observations"))
            terminated, over = bool(demos["masks"][row] == 0), bool(demos["dones"][row])
            reward = float(demos["rewards"][row])
            buffer.add(seen(before), torch.as_tensor(action)[None], reward, seen(after), terminated, over)
        return buffer

    learner.make_policy = lambda **_: policy
    learner.process_transitions = take_step
    learner.initialize_offline_replay_buffer = demonstrations
    facts = {"batch_size": 256, "log_freq": 200, "save_freq": 2_000, "save_checkpoint": False, "resume": False}
    dataset = SimpleNamespace(repo_id="demos") if job.contender == "lerobot_demos" else None
    env = SimpleNamespace(fps=10, task=job.env_id)
    cfg = SimpleNamespace(policy=config, env=env, dataset=dataset, output_dir=job.folder, **facts)
    nowhere = SimpleNamespace(put=lambda data: None)  # the policy's way to an actor
    learner.add_actor_information_and_train(cfg, None, threading.Event(), queue.Queue(), queue.Queue(), nowhere)


def write_demos(path: Path, env_id: str, seed: int) -> None:
    """The demonstrations that sac_state_sim.py collects with this seed, as SERL's buffer takes them."""
    import_tasks()
    from common import envs
    from common.episodes import as_live_steps, demonstrations

    task = envs.make(env_id)
    steps = []
    for episode in demonstrations(DEMOS, task, seed, DEMO_NOISE):
        last_obs = None
        for action, obs, reward, terminated in as_live_steps(episode, task, gym.wrappers.FlattenObservation):
            if action is not None:
                steps.append(transition(last_obs, np.float32(action), obs, reward, terminated, False))
            last_obs = obs
        steps[-1]["dones"] = True
    np.savez(path, **{name: np.array([step[name] for step in steps]) for name in steps[0]})


# --- Running and recording --------------------------------------------------------------------------------------------
def contenders(args: Args) -> dict[str, tuple[str, str, str]]:
    """Contender -> its interpreter, its checkout, its versions; of those that are given and asked for."""
    found = {name: (sys.executable, "", ["torch"]) for name, task in OURS if task == args.env_id}
    if args.serl_path:
        suffix = "" if args.serl_steps == 1 else f"_{args.serl_steps}"
        for name in ("serl_demos", "serl"):
            found[name + suffix] = (args.serl_python, str(args.serl_path.resolve()), ["jax", "flax"])
    if args.lerobot_python:
        for name in ("lerobot_demos", "lerobot"):
            found[name] = (args.lerobot_python, "", ["lerobot", "torch"])
    if args.sb3_python:
        found["sb3"] = (args.sb3_python, "", ["stable_baselines3", "torch"])
    if args.sbx_python:
        found["sbx"] = (args.sbx_python, "", ["sbx-rl", "jax"])
    if args.cleanrl_path:
        found["cleanrl"] = (args.cleanrl_python, str(args.cleanrl_path.resolve()), ["torch"])
    for name in args.contenders:
        if name not in found:
            raise SystemExit(f"--contenders {name}: not among those that are given paths: {', '.join(found)}")
    chosen = {}
    for name in args.contenders or found:
        python, path, packages = found[name]
        python = interpreter(python)
        version = versions(python, *packages, "gymnasium", "mujoco")
        if path:
            head = ["git", "-C", path, "rev-parse", "--short", "HEAD"]
            version = f"commit {subprocess.check_output(head, text=True).strip()}, {version}"
        chosen[name] = (python, path, version)
    return chosen


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def begin(path: Path, contender: str, env_id: str, seed: int) -> None:
    """Leaves an earlier run's lines out of the file, or makes the file."""
    run = (contender, env_id, str(seed))
    lines = [line for line in read(path) if (line["contender"], line["env_id"], line["seed"]) != run]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_anew(path, lines, COLUMNS)


def outcomes(command: list[str], folder: Path, args: Args) -> Iterator[dict[str, float]]:
    """The evaluations of a contender's process as it makes them. Raises SystemExit with the end of what it said when it
    fails."""
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "WANDB_MODE": "disabled"}
    if not args.gpu:
        env |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    start, busy_before = time.time(), busy_seconds()
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            for text in process.stdout:
                line = evaluation(text)
                if line:
                    others = busy_seconds() - busy_before - line.pop("cpu_s")
                    others = max(others, 0)  # both clocks tick
                    yield line | {"others_cores": round(others / (time.time() - start), 2)}
        finally:
            process.kill()  # where nobody listens any more; else it has ended
            process.wait()
    if process.returncode:
        said = (folder / "stderr").read_text()[-3000:]
        raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{said}")


def run_contender(contender: str, python: str, path: str, version: str, seed: int, args: Args) -> None:
    """One run: a line of the file for each evaluation, at once."""
    facts = {"contender": contender, "env_id": args.env_id, "seed": seed, "budget_s": args.budget_s}
    facts["cores"] = len(os.sched_getaffinity(0))
    facts |= {"version": version, "date": datetime.now(UTC).date().isoformat()}
    facts |= {"commit": commit(), "hardware": hardware()}
    begin(args.output, contender, args.env_id, seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if contender.startswith(("serl_demos", "lerobot_demos")):
            write_demos(folder / "demos.npz", args.env_id, seed)
        job = Job(contender, args.env_id, seed, args.budget_s, time.time(), temporary, path)
        job.serl_steps, job.threads = args.serl_steps, args.threads
        command = [python, "-c", CHILD, str(Path(__file__).parent.resolve()), json.dumps(asdict(job))]
        for line in outcomes(command, folder, args):
            with args.output.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(facts | line)
            numbers = f"step {line['step']:>7,} {line['wall_s']:>7.0f} s success {line['success']:.1f}"
            print(f"{contender:12} seed {seed} {numbers} return {line['return']:.1f}", flush=True)


# --- Picture ----------------------------------------------------------------------------------------------------------
def curve(lines: list[dict[str, str]], edges: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean success of the evaluations whose time lies between two edges, and their mean time (min)."""
    seconds = np.array([float(line["wall_s"]) for line in lines])
    success = np.array([float(line["success"]) for line in lines])
    interval = np.digitize(seconds, edges)
    inside = [interval == number for number in np.unique(interval)]
    return [seconds[mask].mean() / 60 for mask in inside], [success[mask].mean() for mask in inside]


def draw(lines: list[dict[str, str]], path: Path) -> None:
    """Success over wall-clock, a panel for each task and a curve for each contender, all seeds together."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(line["env_id"] for line in lines))
    names = list(dict.fromkeys(line["contender"] for line in lines))
    edges = np.geomspace(10, 10_000, 46)  # s; about 16% apart
    figure, axes = plt.subplots(1, len(tasks), figsize=(7 * len(tasks), 4), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        for number, name in enumerate(names):
            own = [line for line in lines if line["contender"] == name and line["env_id"] == task]
            if own:
                seeds = len({line["seed"] for line in own})
                label = f"{name} ({seeds} seed{'s' if seeds > 1 else ''})"
                style = {"color": f"C{number}", "linewidth": 2.5 if name.startswith("ours") else 1.5}
                axis.plot(*curve(own, edges), marker="o", markersize=3, label=label, **style)
        axis.set(xscale="log", xlabel="wall-clock without evaluations (min)", ylabel="success", title=task)
        axis.set_xticks([0.5, 1, 2, 5, 10, 20, 30], ["0.5", "1", "2", "5", "10", "20", "30"])
        axis.minorticks_off()
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    failures = []
    if not args.draw:
        bind(args.threads)
        chosen = contenders(args)
        for seed in args.seeds:
            for contender, (python, path, version) in chosen.items():
                try:
                    run_contender(contender, python, path, version, seed, args)
                except SystemExit as failure:  # the others' hours are not lost
                    failures.append(f"{contender} seed {seed}: {failure}")
                    print(failures[-1], file=sys.stderr, flush=True)
    lines = read(args.output)
    if not lines:
        raise SystemExit(f"{args.output} holds nothing to draw")
    draw(lines, args.picture)
    if failures:
        raise SystemExit(f"{len(failures)} runs failed; see above")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
