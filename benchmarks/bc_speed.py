"""Updates per second of bc_flow_offline.py beside Q-chunking's JAX update, on one machine, in one go.

    python benchmarks/bc_speed.py                                                    # ours alone
    python benchmarks/bc_speed.py --qc-path QC --qc-python QC_VENV/bin/python        # the table

The same network, batch and data sizes for all: 4 x 512 units, 256 samples, HalfCheetah's 17 observations and 6 actions,
single actions (h1) and chunks of five (h5); the data are random numbers. Drawing the batch is part of an update.
Q-chunking is measured twice: `qc_update` is its whole update, critic included, as its main.py calls it; `qc_actor` is
an Adam step on its flow loss alone, compiled, which is all that cloning needs. Each measurement is a process of its own
on the same cores; the contenders take turns. Start and compilation are outside. Q-chunking is not part of this project:
give a checkout (https://github.com/ColinQiyangLi/qc) and an interpreter that can import jax, flax, optax, distrax and
ml_collections. Run it on a quiet machine; `others_cores` in the file says how many cores other processes used.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tyro
from run import REPO, RESULTS
from speed import bind, cloning_log, cloning_timing, interpreter, run_contender, take_turns, timing, versions

ROWS, OBS_DIM, ACTION_DIM = 100_000, 17, 6
OURS = "--env-name halfcheetah-medium-v2 --dataset-path {data} --run-dir run --offline-steps {total}"
OURS += " --log-interval {warmup} --eval-episodes 1 --no-capture-video --threads {threads} --horizon-length {horizon}"
# Prints the seconds that `updates` updates took.
QC = """
import json, sys, time
sys.path.insert(0, "{qc_path}")
import jax, jax.numpy as jnp, numpy as np, optax
from agents.acfql import ACFQLAgent, get_config
from utils.datasets import Dataset

rng, shape = np.random.default_rng(0), ({rows}, {obs_dim})
fields = dict(observations=rng.standard_normal(shape, np.float32), actions=rng.uniform(-1, 1, ({rows}, {action_dim})))
fields |= dict(next_observations=fields["observations"], rewards=np.ones({rows}, np.float32))
ends = (np.arange({rows}) % 1000 == 999).astype(np.float32)
data = Dataset.create(**fields | dict(actions=fields["actions"].astype(np.float32), terminals=ends, masks=1 - ends))
config = get_config()
config.horizon_length, config.action_chunking = {horizon}, {horizon} > 1
example = data.sample(())
agent = ACFQLAgent.create(0, example["observations"], example["actions"], config)
if {actor_only}:
    flow = "modules_actor_bc_flow"
    optimizer = optax.adam(3e-4)
    agent = agent.replace(config=agent.config.copy(dict(actor_type="best-of-n")))  # its actor loss is the flow's alone

    @jax.jit
    def step(params, state, batch, rng):
        def loss(part):
            return agent.actor_loss(batch, agent.network.params | {{flow: part}}, rng)[0]
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = agent.network.params[flow]
    state, key = optimizer.init(params), jax.random.PRNGKey(0)

for i in range({warmup} + {updates}):
    if i == {warmup}:
        jax.block_until_ready(agent.network.params if not {actor_only} else params)
        start = time.perf_counter()
    batch = data.sample_sequence(256, sequence_length={horizon}, discount=0.99)
    if {actor_only}:
        key, rng = jax.random.split(key)
        params, state = step(params, state, dict(batch), rng)
    else:
        agent, info = agent.update(batch)
jax.block_until_ready(agent.network.params if not {actor_only} else params)
print(json.dumps(time.perf_counter() - start))
"""


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    qc_path: Path | None = None
    """checkout of Q-chunking: the folder that holds agents/ and utils/"""
    qc_python: str = sys.executable
    """interpreter for Q-chunking"""
    horizons: tuple[int, ...] = (1, 5)
    """chunk lengths"""
    rounds: int = 5
    """measurements of each contender"""
    warmup: int = 100
    """updates before the clock starts"""
    updates: int = 1000
    """timed updates, a multiple of warmup (Q-chunking's whole update: a quarter of them)"""
    threads: int = 2
    """cores that every process is bound to, and OMP_NUM_THREADS"""
    gpu: bool = False
    """let the contenders use a GPU"""
    output: Path = RESULTS / "bc_speed.csv"
    """file that gets one line per measurement, after those that it holds"""


# --- Contenders -------------------------------------------------------------------------------------------------------
def write_data(path: Path) -> None:
    """A file of D4RL's layout with random numbers and episodes of 1000 steps."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.standard_normal((ROWS, OBS_DIM), np.float32)
        file["actions"] = rng.uniform(-1, 1, (ROWS, ACTION_DIM)).astype(np.float32)
        file["rewards"], file["terminals"] = np.ones(ROWS, np.float32), np.zeros(ROWS, bool)
        file["timeouts"] = np.arange(ROWS) % 1000 == 999


def commands(args: Args, data: Path) -> dict[str, list[str]]:
    """Contender -> command."""
    found = {}
    for horizon in args.horizons:
        values = {"data": data, "total": args.warmup + args.updates, "warmup": args.warmup, "threads": args.threads}
        flags = [*OURS.format(**values, horizon=horizon).split(), *(["--action-chunking"] if horizon > 1 else [])]
        found[f"ours_h{horizon}"] = [sys.executable, str(REPO / "bc_flow_offline.py"), *flags]
        found[f"ours_bf16_h{horizon}"] = [*found[f"ours_h{horizon}"], "--amp"]
        if args.qc_path:
            sizes = {"rows": ROWS, "obs_dim": OBS_DIM, "action_dim": ACTION_DIM, "qc_path": args.qc_path.resolve()}
            for name, actor_only in (("qc_actor", True), ("qc_update", False)):
                updates = args.updates if actor_only else args.updates // 4
                sizes |= {"horizon": horizon, "actor_only": actor_only, "warmup": args.warmup // 4, "updates": updates}
                found[f"{name}_h{horizon}"] = [interpreter(args.qc_python), "-c", QC.format(**sizes)]
    return found


# --- Measuring --------------------------------------------------------------------------------------------------------
def measure(contender: str, command: list[str], args: Args, folder: Path) -> dict[str, object]:
    """Runs one contender once: timed updates, their time (s), and the cores that other processes used meanwhile."""
    with tempfile.TemporaryDirectory() as temporary:
        env = {"MINARI_DATASETS_PATH": str(folder)}
        stdout, others = run_contender(command, Path(temporary), args.threads, args.gpu, **env)
        if contender.startswith("ours"):
            line = cloning_timing(cloning_log(Path(temporary) / "run"), args.warmup)
        else:
            updates = args.updates if contender.startswith("qc_actor") else args.updates // 4
            line = timing(updates, json.loads(stdout.splitlines()[-1]))
    return line | {"others_cores": others}


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    if args.updates % args.warmup:
        raise SystemExit("--updates: give a multiple of --warmup, the logs' interval")
    bind(args.threads)
    if not args.qc_path:
        print("Q-chunking is left out: --qc-path is not given")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "halfcheetah.hdf5")
        runs = commands(args, folder / "halfcheetah.hdf5")
        names = {}
        for contender, command in runs.items():
            packages = ["torch"] if contender.startswith("ours") else ["jax", "flax", "optax"]
            names[contender] = versions(command[0], *packages)

        def measured(contender: str, number: int) -> dict[str, object]:
            return measure(contender, runs[contender], args, folder) | {"version": names[contender]}

        command = f"python benchmarks/bc_speed.py, {args.updates} updates"
        take_turns(runs, args.rounds, measured, args.output, command, unit="updates/s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
