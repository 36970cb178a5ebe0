"""Updates per second of sac_pixel_sim.py beside SERL's JAX DrQ update, on one machine, in one go.

    python benchmarks/sac_pixel_speed.py                                                      # ours alone
    python benchmarks/sac_pixel_speed.py --serl-path SERL --serl-python SERL_VENV/bin/python  # the table

The same encoder, batch and cameras for both: SERL's small encoder or its ResNet-10 from scratch, two cameras, 256
transitions, ten critics, one random crop per frame, and SERL's rhythm, an update of actor and temperature with every
fourth of the critics (examples/async_drq_sim). An update here is one of the critics. Ours draws its batch from the
replay memory within the time; SERL gets the same batch again and again, which costs it nothing. Each measurement is a
process of its own on the same cores; the contenders take turns. Start and compilation are outside.

SERL is not part of this project: give a checkout (https://github.com/rail-berkeley/serl, commit cd5f7e7) and an
interpreter that can import jax, flax, optax, distrax, chex, einops, requests and wandb. At that commit its encoders
other than the frozen one fail, for they do not know the argument `encode`; the script below takes it from them. A
stand-in for tensorflow, of which only a type's name is used, saves its installation. Run it on a quiet machine;
`others_cores` in the file says how many cores other processes used.
"""

import csv
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from run import REPO, RESULTS
from speed import bind, interpreter, run_contender, take_turns, timing, versions

RANDOM_STEPS = 100  # at least
OURS = """--demos 0 --learning-starts {random} --total-timesteps {total} --image-size {size} --eval-every {twice}
    --latent-dim 256 --batch-size 256 --num-qs 10 --num-min-qs 2 --utd-ratio 4 --policy-delay 4 --activation tanh
    --no-normalize-observations --bc-weight 0 --actor-ema 0 --gamma 0.96 --eval-episodes 1 --final-eval-episodes 1
    --no-capture-video --run-dir run --threads {threads}"""
ENCODERS = {"small": "--encoder small --small-channels 32 64 128 256 --pooling average", "resnet": "--encoder resnet10"}
# Prints the seconds that `rounds` times four updates of the critics and one of the actor took.
SERL = """
import json, sys, time, types
sys.modules["tensorflow"] = types.SimpleNamespace(Tensor=object)
sys.path.insert(0, "{serl_path}/serl_launcher")
import jax, numpy as np
from flax.core import freeze
from serl_launcher.agents.continuous.drq import DrQAgent
from serl_launcher.vision import resnet_v1, small_encoders

del sys.modules["tensorflow"]  # einops would ask it for more
for encoder in (resnet_v1.ResNetEncoder, small_encoders.SmallEncoder):
    encoder.__call__ = lambda self, *a, call=encoder.__call__, encode=True, **k: call(self, *a, **k)
rng = np.random.default_rng(0)

def observations(*lead):
    frames = {{name: rng.integers(0, 255, (*lead, 1, {size}, {size}, 3), np.uint8) for name in ("front", "wrist")}}
    return frames | dict(state=rng.standard_normal((*lead, 1, 7), np.float32))

mlp = dict(activations=jax.nn.tanh, use_layer_norm=True, hidden_dims=[256, 256])
policy = dict(tanh_squash_distribution=True, std_parameterization="exp", std_min=1e-5, std_max=5)
agent = DrQAgent.create_drq(
    jax.random.PRNGKey(0), observations(), np.zeros(4, np.float32), encoder_type="{encoder}", use_proprio=True,
    image_keys=("front", "wrist"), policy_kwargs=policy, critic_network_kwargs=mlp, policy_network_kwargs=dict(mlp),
    temperature_init=1e-2, discount=0.96, critic_ensemble_size=10, critic_subsample_size=2)
ones = np.ones(256, np.float32)
batch = freeze(dict(observations=observations(256), next_observations=observations(256), rewards=ones, masks=ones,
                    actions=rng.uniform(-1, 1, (256, 4)).astype(np.float32), dones=np.zeros(256, bool)))
for i in range(1 + {rounds}):
    if i == 1:
        jax.block_until_ready(agent.state.params)
        start = time.perf_counter()
    for _ in range(3):
        agent, _ = agent.update_critics(batch)
    agent, _ = agent.update_high_utd(batch, utd_ratio=1)
jax.block_until_ready(agent.state.params)
print(json.dumps(time.perf_counter() - start))
"""


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    serl_path: Path | None = None
    """checkout of SERL: the folder that holds serl_launcher/"""
    serl_python: str = sys.executable
    """interpreter for SERL"""
    encoders: tuple[str, ...] = ("small",)
    """small, resnet"""
    image_size: int = 128
    """height and width of the two cameras' images (pixels)"""
    rounds: int = 3
    """measurements of each contender"""
    updates: int = 40
    """timed updates of the critics, a multiple of 4 (SERL on a CPU: a tenth of them, at least 4)"""
    threads: int = 2
    """cores that every process is bound to, and OMP_NUM_THREADS"""
    gpu: bool = False
    """let the contenders use a GPU"""
    output: Path = RESULTS / "sac_pixel_speed.csv"
    """file that gets one line per measurement, after those that it holds"""


# --- Contenders -------------------------------------------------------------------------------------------------------
def commands(args: Args) -> dict[str, tuple[list[str], int]]:
    """Contender -> command and timed updates."""
    found = {}
    for encoder in args.encoders:
        name, steps = f"{encoder}_{args.image_size}", args.updates // 4
        first = (
            -(-RANDOM_STEPS // steps) * steps
        )  # its row has the first update, which compiles, the next row the others
        values = {"random": first - 1, "total": first + steps, "size": args.image_size, "twice": 2 * steps}
        flags = f"{OURS.format(**values, threads=args.threads)} {ENCODERS[encoder]}".split()
        ours = [sys.executable, str(REPO / "sac_pixel_sim.py"), *flags]
        found[f"ours_{name}"] = ours, 4 * steps
        found[f"ours_bf16_{name}"] = [*ours, "--amp"], 4 * steps
        if args.serl_path:
            rounds = steps if args.gpu else max(steps // 10, 1)
            values |= {"encoder": encoder, "rounds": rounds, "serl_path": args.serl_path.resolve()}
            found[f"serl_{name}"] = [interpreter(args.serl_python), "-c", SERL.format(**values)], 4 * rounds
    return found


# --- Measuring --------------------------------------------------------------------------------------------------------
def measure(contender: str, command: list[str], updates: int, args: Args) -> dict[str, object]:
    """Runs one contender once: timed updates, their time (s), and the cores that other processes used meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, others = run_contender(command, Path(folder), args.threads, args.gpu)
        if contender.startswith("ours"):
            with (Path(folder) / "run" / "train.csv").open(newline="") as file:
                last = list(csv.DictReader(file))[-1]
            seconds = float(last["time/update_ms"]) * updates / 4 / 1e3  # of as many steps
        else:
            seconds = json.loads(stdout.splitlines()[-1])
    return timing(updates, seconds) | {"others_cores": others}


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    if args.updates % 4 or args.updates < 4 or not set(args.encoders) <= set(ENCODERS):
        raise SystemExit("--updates: a multiple of 4; --encoders: " + " ".join(ENCODERS))
    bind(args.threads)
    if not args.serl_path:
        print("SERL is left out: --serl-path is not given")
    runs = commands(args)
    names = {}
    for contender, (command, _) in runs.items():
        packages = ["torch"] if contender.startswith("ours") else ["jax", "flax", "optax"]
        names[contender] = versions(command[0], *packages)

    def measured(contender: str, number: int) -> dict[str, object]:
        command, updates = runs[contender]
        return measure(contender, command, updates, args) | {"version": names[contender]}

    command = f"python benchmarks/sac_pixel_speed.py, {args.updates} updates"
    take_turns(runs, args.rounds, measured, args.output, command, unit="updates/s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
