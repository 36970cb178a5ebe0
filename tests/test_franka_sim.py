"""franka_sim.py: the robot against Franka's data sheet and mechanics, the tasks against SERL's definition."""

import subprocess
import sys

import gymnasium as gym
import imageio
import mujoco
import numpy as np
import pytest
from conftest import REPO, run_script, script_env
from gymnasium.utils.env_checker import check_env

import franka_sim
from franka_sim import FrankaSim, Impedance, downwards

TASKS = ["FrankaPickCube-v0", "FrankaPegInsert-v0"]
CUBE = franka_sim.FrankaPickCube.scene


@pytest.fixture(scope="module")
def opengl():
    """Skip what needs images where there is no OpenGL."""
    sim = FrankaSim()
    try:
        sim.render("front", 8, 8)
    except RuntimeError as error:
        pytest.skip(str(error))
    sim.close()


def flat(obs: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([value.ravel() for value in obs.values()])


def rollout(env: gym.Env, actions: np.ndarray) -> np.ndarray:
    """(T, ...) observations and rewards."""
    steps = [env.step(action) for action in actions]
    return np.array([np.append(flat(obs), reward) for obs, reward, *_ in steps])


def random_actions(env: gym.Env, steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)


# --- Robot ------------------------------------------------------------------------------------------------------------
def dh_product(q) -> np.ndarray:
    """(4, 4) pose of the tcp from the modified DH table of Franka's documentation, written out independently."""
    a = [0, 0, 0, 0.0825, -0.0825, 0, 0.088]
    d = [0.333, 0, 0.316, 0, 0.384, 0, 0]
    alpha = np.deg2rad([0, -90, 90, 90, -90, 90, 90])
    pose = np.eye(4)
    for i in range(7):
        ct, st, ca, sa = np.cos(q[i]), np.sin(q[i]), np.cos(alpha[i]), np.sin(alpha[i])
        rows = [ct, -st, 0, a[i]], [st * ca, ct * ca, -sa, -d[i] * sa], [st * sa, ct * sa, ca, d[i] * ca], [0, 0, 0, 1]
        pose = pose @ np.array(rows)
    turn = np.eye(4)
    turn[:2, :2] = np.array([[1, 1], [-1, 1]]) / np.sqrt(2)  # hand on flange: -45 degrees
    turn[2, 3] = 0.107 + 0.1034
    return pose @ turn


def rotation(quaternion) -> np.ndarray:
    """(3, 3) from x, y, z, w."""
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, np.array(quaternion)[[3, 0, 1, 2]])
    return matrix.reshape(3, 3)


def test_kinematics_are_those_of_the_data_sheet():
    sim, random = FrankaSim(), np.random.default_rng(0)
    for _ in range(20):
        q = random.uniform(franka_sim.MIN_JOINT_POSITION, franka_sim.MAX_JOINT_POSITION)
        sim.reset_joints(q)
        pose = dh_product(q)
        np.testing.assert_allclose(sim.tcp_pose[:3], pose[:3, 3], atol=1e-9)
        np.testing.assert_allclose(rotation(sim.tcp_pose[3:]), pose[:3, :3], atol=1e-9)
    sim.reset_joints([0, -np.pi / 4, 0, -3 * np.pi / 4, 0, np.pi / 2, np.pi / 4])  # libfranka's examples start here
    np.testing.assert_allclose(sim.tcp_pose[:3], [0.3069, 0, 0.4869], atol=1e-4)
    sim.reset_joints(franka_sim.HOME)
    np.testing.assert_allclose(sim.tcp_pose, [0.45, 0, 0.3, 1, 0, 0, 0], atol=2e-3)


def test_reset_pose_inverts_the_kinematics():
    sim = FrankaSim()
    quaternion = downwards(0.1, -0.2, 0.5)
    (cx, cy, cz), (sx, sy, sz) = np.cos([0.1, -0.2, 0.5]), np.sin([0.1, -0.2, 0.5])
    roll, pitch = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]), np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    yaw = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    np.testing.assert_allclose(rotation(quaternion), yaw @ pitch @ roll @ np.diag([1, -1, -1]), atol=1e-9)
    sim.reset_pose([0.5, -0.2, 0.2], quaternion)
    np.testing.assert_allclose(sim.tcp_pose, [0.5, -0.2, 0.2, *quaternion], atol=1e-6)
    np.testing.assert_allclose(sim.target_pose, sim.tcp_pose)
    assert sim.q[2] == franka_sim.HOME[2]
    with pytest.raises(ValueError, match="cannot reach"):
        sim.reset_pose([1.5, 0, 0.2], quaternion)
    with pytest.raises(ValueError, match="cannot reach"):  # but for joint 7, beyond its limit
        sim.reset_pose([0.5, 0, 0.2], downwards(yaw=-2.5))


def test_after_a_reset_nothing_is_left_of_what_was_before():
    used, fresh = FrankaSim(CUBE), FrankaSim(CUBE)
    used.set_gripper(0.0)
    used.set_target_pose([0.5, 0.1, -0.05])  # against the table
    used.step(400)
    for sim in (used, fresh):
        sim.reset_joints(franka_sim.HOME)
        sim.data.qpos[9:12] = 0.5, 0.3, 0.02
        assert not sim.dq.any()
        sim.set_target_pose([0.45, 0, 0.0])
        sim.step(400)
    assert np.array_equal(used.q, fresh.q)


def test_masses_are_the_published_ones():
    model = FrankaSim().model
    arm = sum(model.body(f"link{i}").mass[0] for i in range(1, 8))
    assert arm == pytest.approx(4.970684 + 0.646926 + 3.228604 + 3.587895 + 1.225946 + 1.666555 + 0.735522)
    assert model.body("hand").mass[0] == 0.73
    sim, inertia = FrankaSim(), np.zeros((9, 9))
    mujoco.mj_forward(sim.model, sim.data)
    mujoco.mj_fullM(sim.model, inertia, sim.data.qM)  # at home, with 0.1 of each motor
    expected = [1.0119, 1.6882, 1.1359, 1.1275, 0.1289, 0.1546, 0.1068, 0.115, 0.115]
    assert np.diag(inertia) == pytest.approx(expected, abs=2e-4)


def test_gravity_compensation_holds_still_without_any_control():
    sim = FrankaSim()
    sim.set_impedance(stiffness=0, damping=0, rotational_stiffness=0, rotational_damping=0, nullspace_stiffness=0)
    sim.reset_joints([0.3, -0.2, 0.4, -2.0, 0.3, 1.8, 0.5])
    start = sim.q
    sim.step(1000)
    np.testing.assert_allclose(sim.q, start, atol=1e-9)
    sim.model.body_gravcomp[:] = 0  # the arm does fall without
    sim.step(100)
    assert np.abs(sim.q - start).max() > 0.01


@pytest.mark.parametrize("dt", [0.002, 0.001])
def test_target_is_reached_exactly(dt):
    sim = FrankaSim(dt=dt)
    position, quaternion = [0.5, 0.2, 0.25], downwards(0.1, -0.1, 0.4)
    sim.set_target_pose(position, quaternion)
    sim.step(round(4 / dt))
    np.testing.assert_allclose(sim.tcp_pose, [*position, *quaternion], atol=1e-4)
    assert np.abs(sim.tcp_velocity).max() < 1e-3 and np.abs(sim.tcp_wrench).max() < 1e-2
    assert sim.data.time == pytest.approx(4)


def test_velocity_is_that_of_the_pose():
    sim = FrankaSim()
    sim.set_target_pose([0.5, 0.1, 0.25], downwards(yaw=0.5))
    sim.step(100)
    before, velocity = sim.tcp_pose, sim.tcp_velocity
    sim.step(1)
    np.testing.assert_allclose((sim.tcp_pose[:3] - before[:3]) / 0.002, velocity[:3], atol=5e-3)
    turn = rotation(sim.tcp_pose[3:]) @ rotation(before[3:]).T / 0.002
    np.testing.assert_allclose([turn[2, 1], turn[0, 2], turn[1, 0]], velocity[3:], atol=2e-2)
    assert velocity[1] > 0.1 and velocity[5] > 0.1  # it was moving


@pytest.mark.parametrize("clip", [0.01, 0.005])
def test_steady_force_on_the_table_is_stiffness_times_clip(clip):
    sim = FrankaSim(impedance=Impedance(clip=(clip, clip, clip)))
    sim.reset_pose([0.45, 0, 0.02], downwards(), width=0.0)
    assert np.abs(sim.tcp_wrench).max() < 1e-9
    sim.set_target_pose([0.45, 0, -0.05])
    sim.step(1000)
    assert sim.tcp_wrench[2] == pytest.approx(2000 * clip, rel=0.02)  # up: what the table does to the arm
    assert np.abs(sim.tcp_wrench[:2]).max() < 0.2 * 2000 * clip  # friction
    sim.set_impedance(stiffness=500.0)
    sim.step(1000)
    assert sim.tcp_wrench[2] == pytest.approx(500 * clip, rel=0.02)


def test_a_push_is_measured_and_gives_by_the_stiffness():
    sim = FrankaSim()
    hand, start = sim.model.body("hand").id, sim.tcp_pose
    force = np.array([3.0, -10.0, 5.0])
    lever = sim.tcp_position - sim.data.xipos[hand]
    sim.data.xfrc_applied[hand] = [*force, *np.cross(lever, force)]  # so that it acts at the tcp
    sim.step(3000)
    np.testing.assert_allclose(sim.tcp_wrench[:3], force, atol=0.01)
    np.testing.assert_allclose(sim.tcp_wrench[3:], 0, atol=0.02)
    np.testing.assert_allclose(sim.tcp_pose[:3] - start[:3], force / 2000, atol=2e-4)


def test_free_speed_is_stiffness_times_clip_over_damping():
    sim = FrankaSim()
    sim.set_target_pose([0.45, 0.3, 0.3])
    sim.step(300)
    assert 0.85 < sim.tcp_velocity[1] / (2000 * 0.01 / 89) < 1.01


def test_a_turn_gives_and_is_clipped_and_damped_by_its_own_gains():
    sim = FrankaSim()
    sim.data.xfrc_applied[sim.model.body("hand").id] = [0, 0, 0, 0, 0, 3.0]
    sim.step(3000)
    angle = 2 * np.arctan2(sim.tcp_pose[4], sim.tcp_pose[3])
    assert sim.tcp_wrench[5] == pytest.approx(3.0, abs=0.01) and angle == pytest.approx(3.0 / 150, rel=0.01)
    sim = FrankaSim()
    sim.set_target_pose([0.45, 0, 0.3], downwards(yaw=1.5))
    sim.step(300)
    assert 0.82 < sim.tcp_velocity[5] / (150 * 0.05 / 7) < 1.01


def test_a_spring_holds_the_elbow():
    sim = FrankaSim()
    sim.set_impedance(stiffness=0, damping=0, rotational_stiffness=0, rotational_damping=0)
    sim.data.qfrc_applied[2] = 1.0
    sim.step(3000)
    assert sim.q[2] == pytest.approx(1.0 / 10, abs=2e-3)
    assert sim.model.dof_damping[2] == pytest.approx(2 * np.sqrt(10))


def test_joint_torques_are_limited():
    sim = FrankaSim(impedance=Impedance(10_000, 100, 1000, 10, clip=(1, 1, 1), rotational_clip=(3, 3, 3)))
    sim.set_target_pose([0.2, 0.5, 0.7], [0, 1, 0, 0])
    largest = np.zeros(7)
    for _ in range(300):
        sim.step()
        largest = np.maximum(largest, np.abs(sim.data.qfrc_actuator[:7]))
    assert np.all(largest <= franka_sim.MAX_JOINT_TORQUE)
    np.testing.assert_allclose(largest[[0, 5]], [87, 12])


def test_joint_positions_and_velocities_are_limited():
    env = gym.make("FrankaPickCube-v0")
    sim, largest = env.unwrapped.sim, np.zeros(7)
    for seed in range(20):
        env.reset(seed=seed)
        for action in random_actions(env, 100, seed):
            env.step(np.sign(action))
            largest = np.maximum(largest, np.abs(sim.dq) / franka_sim.MAX_JOINT_VELOCITY)
            assert np.all(sim.q > np.array(franka_sim.MIN_JOINT_POSITION) - 0.02)
            assert np.all(sim.q < np.array(franka_sim.MAX_JOINT_POSITION) + 0.02)
    assert 0.5 < largest.max() < 1.05


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gripper_opens_around_the_cube_in_30_steps(seed):
    """From closed fingers that press on the cube: why noise alone seldom finds the way out (--explore-prob)."""
    env = gym.make("FrankaPickCube-v0", max_episode_steps=1000).unwrapped
    env.reset(seed=seed)
    cube = env.cube.xpos.copy()

    def go(height: float, gripper: float, steps: int) -> list[float]:
        """The tcp's distance (m) to the cube after each step."""
        distances = []
        for _ in range(steps):
            move = (cube + (0.004, 0.005, height) - env.target) / env.action_scale
            env.step(np.clip([*move, gripper], -1, 1).astype(np.float32))
            distances.append(np.linalg.norm(env.cube.xpos - env.sim.tcp_position))
        return distances

    go(0.1, 1, 60)
    pressed = go(0.0, 1, 40)[-1]
    opening = go(0.0, -1, 40)
    assert min(opening[:10]) > pressed - 0.004  # not in 10 steps
    assert max(opening[31:]) < pressed - 0.006
    go(0.0, 1, 60)
    assert env.sim.holds(env.cube.id)


def test_gripper_width_speed_and_force():
    sim = FrankaSim(CUBE)
    for width in (0.0, 0.03, 0.08, 1.0):
        sim.set_gripper(width)
        sim.step(500)
        assert sim.gripper_width == pytest.approx(min(width, 0.08), abs=5e-4)
    sim.set_gripper(0.0, speed=0.1)
    sim.step(200)  # 0.4 s
    assert sim.gripper_width == pytest.approx(0.04, abs=3e-3)

    sim.reset_joints(franka_sim.HOME)
    sim.data.qpos[9:12] = sim.tcp_position
    sim.model.opt.gravity[:] = 0
    for force, felt in ((20.0, 20.0), (50.0, 50.0), (500.0, 70.0)):
        sim.set_gripper(0.0, force=force, speed=0.3)
        sim.step(400)
        assert pad_forces(sim) == pytest.approx([felt, felt], rel=0.03)
        assert sim.gripper_width == pytest.approx(0.04, abs=1e-3)
    assert sim.holds(sim.model.body("cube").id)
    sim.set_gripper(0.035, force=20.0)  # by as much less as the fingers are less than 10 mm off
    sim.step(400)
    assert pad_forces(sim) == pytest.approx([10.0, 10.0], rel=0.1)
    sim.reset_joints(franka_sim.HOME)
    for side in (-1, 1):  # one pad alone holds nothing
        sim.data.qpos[9:12] = sim.tcp_position + (0, side * 0.0205, 0)
        sim._refresh()
        assert not sim.holds(sim.model.body("cube").id) and sim.data.ncon > 0


def pad_forces(sim: FrankaSim) -> list[float]:
    """Normal force on each finger pad, N."""
    forces, wrench = dict.fromkeys(sim.pads, 0.0), np.empty(6)
    for i, contact in enumerate(sim.data.contact):
        for pad in set(contact.geom.tolist()) & set(sim.pads):
            mujoco.mj_contactForce(sim.model, sim.data, i, wrench)
            forces[pad] += wrench[0]
    return [*forces.values()]


def test_bad_arguments_of_the_robot():
    with pytest.raises(ValueError, match="unknown 'stifness', there are .*'stiffness'"):
        FrankaSim().set_impedance(stifness=1.0)
    gains = Impedance()
    FrankaSim(impedance=gains).set_impedance(stiffness=1.0)
    assert gains.stiffness == FrankaSim().impedance.stiffness == 2000.0  # nothing is shared


def test_robot_state_is_restored_bit_for_bit():
    sim = FrankaSim(CUBE)
    sim.set_target_pose([0.4, 0.0, 0.015])
    sim.set_impedance(stiffness=1500.0, clip=(0.02, 0.03, 0.04))
    sim.set_gripper(0.01, force=30.0, speed=0.2)
    sim.step(200)
    state, fresh = sim.get_state(), FrankaSim(CUBE)
    fresh.set_state(state)
    for a, b in ((sim, fresh),) * 3:
        a.step(50), b.step(50)
        assert np.array_equal(a.data.qpos, b.data.qpos) and np.array_equal(a.tcp_wrench, b.tcp_wrench)
    assert fresh.impedance.clip == [0.02, 0.03, 0.04]


# --- Environments -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.filterwarnings("ignore:.*A Box observation space (min|max)imum value is")
def test_gymnasium_finds_no_fault_with_states(task):
    check_env(gym.make(task).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.filterwarnings("ignore:.*A Box observation space (min|max)imum value is")
def test_gymnasium_finds_no_fault_with_images(task, opengl):
    env = gym.make(task, image_obs=True, image_size=32, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)
    obs, _ = env.reset(seed=0)
    measured = env.unwrapped.robot_observation()
    assert [*measured] == sorted(measured) and np.array_equal(obs["state"], flat(measured))
    sizes = {name: (value.shape, value.dtype) for name, value in obs.items()}
    state = 7 if task == "FrankaPickCube-v0" else 20
    image = ((32, 32, 3), np.uint8)
    assert sizes == {"state": ((state,), np.float32), "front": image, "wrist": image}
    assert env.render().shape == (480, 480, 3)
    env.close()


def test_spaces_are_serls():
    env = gym.make("FrankaPickCube-v0")
    assert {name: space.shape for name, space in env.observation_space.items()} == {
        "cube_pos": (3,),
        "gripper": (1,),
        "tcp_pos": (3,),
        "tcp_vel": (3,),
    }
    assert gym.spaces.flatdim(env.observation_space) == 10
    assert env.action_space == gym.spaces.Box(-1, 1, (4,), np.float32)
    assert env.spec.max_episode_steps == 100
    assert env.unwrapped.nstep == 10 and env.metadata["render_fps"] == 50
    peg = gym.make("FrankaPegInsert-v0")
    assert peg.action_space.shape == (6,) and peg.unwrapped.nstep == 50 and peg.metadata["render_fps"] == 10
    assert gym.make("FrankaPegInsert-v0", gripper_action=True).action_space.shape == (7,)
    assert gym.make("FrankaPickCube-v0", control_hz=10).unwrapped.nstep == 50
    assert gym.make("FrankaPickCube-v0", control_hz=30).unwrapped.nstep == 17


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_trajectory(task):
    global_state = np.random.get_state()[1].copy()  # noqa: NPY002
    runs = []
    for seed in (3, 3, 4):
        env = gym.make(task)
        obs, _ = env.reset(seed=seed)
        first, rest = flat(obs), rollout(env, random_actions(env, 60))
        obs, _ = env.reset()  # the generator goes on
        runs.append((first, rest, flat(obs)))
    assert all(np.array_equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))
    assert not np.array_equal(runs[0][0], runs[0][2])
    assert np.array_equal(np.random.get_state()[1], global_state)  # noqa: NPY002


@pytest.mark.parametrize("task", TASKS)
def test_state_is_restored_bit_for_bit_in_a_fresh_environment(task):
    env = gym.make(task).unwrapped
    env.reset(seed=5)
    for _ in range(35 if task == "FrankaPickCube-v0" else 7):  # into the middle of grasp or insertion
        env.step(env.expert_action())
    state, fresh = env.get_state(), gym.make(task).unwrapped
    assert all(isinstance(value, np.ndarray | str) for value in state.values())
    fresh.set_state({name: value.copy() if isinstance(value, np.ndarray) else value for name, value in state.items()})
    assert fresh.elapsed_steps == env.elapsed_steps
    assert np.array_equal(fresh.expert_action(), env.expert_action())
    actions = random_actions(env, 40)
    assert np.array_equal(rollout(env, actions), rollout(fresh, actions))
    assert np.array_equal(flat(env.reset()[0]), flat(fresh.reset()[0]))
    env.set_state(state)  # and back again in the same one
    again = rollout(env, actions)
    fresh.set_state(state)
    assert np.array_equal(again, rollout(fresh, actions))


def test_reward_is_serls_formula():
    env = gym.make("FrankaPickCube-v0").unwrapped
    env.reset(seed=0)
    tcp = env.sim.tcp_position
    for cube, lift in (
        ((0.0, 0.0, 0.02), 0.0),
        ((0.05, 0.0, 0.02), 0.0),
        ((0.0, 0.03, 0.12), 0.1),
        ((0, 0, 0.5), 0.48),
        ((0, 0, -0.5), 0.0),
    ):
        env.sim.data.qpos[9:12] = np.add(cube, (tcp[0], tcp[1], 0))
        env.sim._refresh()
        success, reward = env.evaluate()
        distance = np.sqrt(cube[0] ** 2 + cube[1] ** 2 + (cube[2] - tcp[2]) ** 2)
        assert reward == pytest.approx(0.3 * np.exp(-20 * distance) + 0.7 * min(lift / 0.2, 1), abs=2e-3)
        assert not success  # high up, but not held


def test_success_means_lifted_and_held():
    env = gym.make("FrankaPickCube-v0", reward_type="sparse").unwrapped
    env.reset(seed=0)
    heights, rewards, successes = [], [], []
    for _ in range(80):
        _, reward, terminated, truncated, info = env.step(env.expert_action())
        heights.append(env.cube.xpos[2] - 0.02), rewards.append(reward), successes.append(info["success"])
        assert not terminated and not truncated
    assert successes[-1] and rewards == [float(success) for success in successes]
    assert {height > 0.1 for height, success in zip(heights, successes, strict=True) if success} == {True}
    first = successes.index(True)
    assert heights[first - 1] <= 0.1 < heights[first]
    for _ in range(3):  # let go in the air
        _, reward, *_, info = env.step(np.array([0, 0, 0, -1], np.float32))
    assert env.cube.xpos[2] - 0.02 > 0.1 and not info["success"] and reward == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_episodes_end_by_time_or_on_demand_by_success(task):
    for ends in (False, True):
        env = gym.make(task, terminate_on_success=ends)
        env.reset(seed=0)
        for _ in range(100):
            *_, terminated, truncated, info = env.step(env.unwrapped.expert_action())
            if terminated or truncated:
                break
        assert info["success"] and (terminated, truncated) == (ends, not ends)
        assert (env.unwrapped.elapsed_steps < 100) == ends


def test_actions_move_the_target_within_the_workspace():
    env = gym.make("FrankaPickCube-v0").unwrapped
    env.reset(seed=0)
    start = np.array(env.target)
    env.step(np.array([0.2, -0.1, 0.5, 0.25]))
    env.step(np.array([0.2, -0.1, 0.5, 0.25]))  # from the target on, which the arm has not reached
    np.testing.assert_allclose(env.target, start + [0.04, -0.02, 0.1])
    np.testing.assert_allclose(env.sim.target_pose[:3], env.target)
    assert env.closure == 0.5 and env.sim.data.ctrl[12] == pytest.approx(0.04)
    for action, corner in (([9, 9, 9, 9], [0.6, 0.3, 0.5]), ([-9, -9, -9, -9], [0.2, -0.3, 0.012])):
        for _ in range(10):
            env.step(np.array(action))
        np.testing.assert_allclose(env.target, corner)
        assert env.closure == (action[3] > 0)
    env.reset(seed=0)
    env.step(np.array([9, 0, 0, 0]))
    assert env.target[0] - start[0] == pytest.approx(0.1)  # clipped to 1

    peg = gym.make("FrankaPegInsert-v0").unwrapped
    peg.reset(seed=0)
    start = np.array(peg.target)
    peg.step(np.array([0.5, -0.5, 0.5, 0.5, -0.5, 0.5]))
    np.testing.assert_allclose(peg.target, start + [0.01, -0.01, 0.01, 0.05, -0.05, 0.05])
    for _ in range(10):
        peg.step(np.ones(6))
    np.testing.assert_allclose(peg.target, [0.6, 0.1, 0.2, 0.1, 0.1, 0.8])
    np.testing.assert_allclose(rotation(peg.sim.target_pose[3:]), rotation(downwards(0.1, 0.1, 0.8)), atol=1e-9)


def test_bad_actions_and_options():
    env = gym.make("FrankaPickCube-v0").unwrapped
    env.reset(seed=0)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            env.step(np.array([0, bad, 0, 0]))
    with pytest.raises(ValueError, match=r"shape \(3,\), not \(4,\)"):
        env.step(np.zeros(3))
    for option, message in (
        ({"reward_type": "shaped"}, "'dense' or 'sparse'"),
        *(({"control_hz": hz}, "above 0 and at most 500") for hz in (1e4, 600, 0, -1, np.nan)),
        ({"cameras": ("side",)}, "there are .*'front'.*'wrist'"),
    ):
        with pytest.raises(ValueError, match=message):
            gym.make("FrankaPickCube-v0", **option)


def test_seeds_cover_the_ranges():
    env = gym.make("FrankaPickCube-v0").unwrapped
    cubes = np.array([env.reset(seed=seed)[0]["cube_pos"] for seed in range(200)])
    np.testing.assert_allclose(cubes.min(0), [0.25, -0.25, 0.02], atol=0.02)
    np.testing.assert_allclose(cubes.max(0), [0.55, 0.25, 0.02], atol=0.02)
    peg = gym.make("FrankaPegInsert-v0").unwrapped
    starts, holes = [], []
    for seed in range(100):
        holes.append(peg.reset(seed=seed)[0]["hole_pose"])
        starts.append(peg.target)
        assert peg.sim.holds(peg.peg.id) and peg.sim.grip_force == 60
        yaw = [np.arctan2(matrix[3], matrix[0]) for matrix in (peg.peg.xmat, peg.hole.xmat)]
        assert yaw == pytest.approx([peg.target[5], holes[-1][3]], abs=0.03)
        assert holes[-1][:3] == pytest.approx([*peg.hole.xpos[:2], 0.04])
        assert np.linalg.norm(peg.peg.xpos - peg.sim.tcp_position) == pytest.approx(0.02, abs=2e-3)
    np.testing.assert_allclose(np.ptp(starts, axis=0), [0.1, 0.1, 0.04, 0, 0, np.pi / 3], rtol=0.06)
    np.testing.assert_allclose(np.ptp(holes, axis=0), [0.08, 0.08, 0, 0.34], rtol=0.06, atol=1e-6)


def test_peg_needs_the_hole():
    env = gym.make("FrankaPegInsert-v0", reward_type="dense").unwrapped
    env.reset(seed=0)
    for _ in range(100):  # straight down: onto the block or beside it
        *_, info = env.step(np.array([0, 0, -1, 0, 0, 0]))
    assert not info["success"]
    cases = ((0.0, 0.031, 1.0), (0.0, 0.015, 0.5), (0.004, 0.015, 0.5), (0.006, 0.015, 0.0), (0.02, 0.035, 0.0))
    for off, deep, inserted in cases:
        middle = np.array([off, 0, env.top - deep + 0.035])  # of the peg, in the hole's frame
        env.sim.data.qpos[9:16] = [*(env.hole.xpos + env.hole.xmat.reshape(3, 3) @ middle), 1, 0, 0, 0]
        env.sim._refresh()
        assert env.tip_in_hole() == pytest.approx([off, 0, -deep])
        success, reward = env.evaluate()
        assert success == (inserted == 1)
        assert reward == pytest.approx(0.3 * np.exp(-20 * off) + 0.7 * inserted, abs=1e-3)

    env.sim.data.qpos[12:16] = np.cos(0.1), np.sin(0.1), 0, 0  # tilted about base x: its lower end goes to +y
    env.sim._refresh()
    tip = env.peg.xpos + 0.035 * np.array([0, np.sin(0.2), -np.cos(0.2)]) - env.hole.xpos - [0, 0, env.top]
    assert env.tip_in_hole() == pytest.approx(env.hole.xmat.reshape(3, 3).T @ tip)
    walls = [env.sim.model.geom(i) for i in np.flatnonzero(env.sim.model.geom_bodyid == env.hole.id)]
    axes = [int(np.abs(wall.pos[:2]).argmax()) for wall in walls]
    assert [abs(wall.pos[k]) - wall.size[k] for wall, k in zip(walls, axes)] == pytest.approx([0.0105] * 4)


def test_observations_are_what_is_there():
    for task in TASKS:
        env = gym.make(task).unwrapped
        for _ in range(2):
            env.reset(seed=1)
            for action in random_actions(env, 20):
                obs, *_ = env.step(action)
        sim = env.sim
        there = {"tcp_pos": sim.tcp_position, "tcp_pose": sim.tcp_pose, "tcp_vel": sim.tcp_velocity}
        there |= {"tcp_force": sim.tcp_wrench[:3], "tcp_torque": sim.tcp_wrench[3:]}
        there |= {"gripper": [1 - sim.gripper_width / 0.08], "cube_pos": sim.data.qpos[9:12]}
        for name in obs.keys() - {"hole_pose"}:
            assert obs[name] == pytest.approx(there[name][: len(obs[name])], abs=1e-6), name


def test_gains_of_the_tasks():
    """The tcp moves to the side at 0.9 m/s with the cube's and at 0.1 m/s with the peg's, which press with 20 N."""
    for task, least, most in (("FrankaPickCube-v0", 0.85, 1.0), ("FrankaPegInsert-v0", 0.09, 0.115)):
        env = gym.make(task).unwrapped
        env.reset(seed=0)
        env.sim.reset_joints(franka_sim.HOME)
        env.sim.set_target_pose(env.sim.tcp_position + (0, 0.3, 0))
        speeds = [env.sim.step(20) or env.sim.tcp_velocity[1] for _ in range(20)]
        assert least < max(speeds) < most
    env.sim.reset_pose([0.45, 0.2, 0.02], downwards(), width=0.0)
    env.sim.set_target_pose([0.45, 0.2, -0.2])
    env.sim.step(1000)
    assert env.sim.tcp_wrench[2] == pytest.approx(20, rel=0.03)


def test_peg_forces_are_felt():
    env = gym.make("FrankaPegInsert-v0").unwrapped
    obs, _ = env.reset(seed=0)
    assert obs["tcp_force"][2] == pytest.approx(-9.81 * 0.08, abs=0.3)  # the peg's weight
    for _ in range(60):
        obs, *_ = env.step(np.array([0, 0, -1, 0, 0, 0]))
    error = env.sim.tcp_position[2] - env.target[2]
    assert error > 0.002  # it presses on the table or on the block
    assert obs["tcp_force"][2] == pytest.approx(2000 * min(error, 0.01), abs=0.5)


@pytest.mark.parametrize(("task", "least"), [("FrankaPickCube-v0", 0.99), ("FrankaPegInsert-v0", 0.9)])
def test_expert_succeeds(task, least):
    env = gym.make(task, **({"gripper_action": True} if task == "FrankaPegInsert-v0" else {}))
    successes = []
    for seed in range(200):
        env.reset(seed=seed)
        done = False
        while not done:
            action = env.unwrapped.expert_action()
            assert env.action_space.contains(action)
            *_, truncated, info = env.step(action)
            done = truncated or (info["success"] and task == "FrankaPegInsert-v0")
        successes.append(info["success"])  # of the last step
    assert np.mean(successes) >= least


# --- Images -----------------------------------------------------------------------------------------------------------
def projected(sim: FrankaSim, camera: str, point: np.ndarray, size: int) -> np.ndarray:
    """(2,) row and column of a point in a size x size image."""
    camera = sim.model.camera(camera)
    local = sim.data.cam_xmat[camera.id].reshape(3, 3).T @ (point - sim.data.cam_xpos[camera.id])
    scale = size / 2 / np.tan(np.deg2rad(camera.fovy[0]) / 2)
    return size / 2 + scale * np.array([-local[1], local[0]]) / -local[2]


@pytest.mark.parametrize("camera", ["front", "wrist"])
def test_cube_is_seen_where_it_is(camera, opengl):
    env = gym.make("FrankaPickCube-v0", image_obs=True).unwrapped
    env.reset(seed=0)
    places = [(0.25, -0.25), (0.25, 0.25), (0.55, -0.25), (0.55, 0.25), (0.45, 0.0)]
    for place in places if camera == "front" else [(0.48, 0.0), (0.5, 0.03)]:
        images = []
        for x, y in ((5.0, 5.0), place):
            env.sim.data.qpos[9:12] = x, y, 0.02
            env.sim._refresh()
            images.append(env.observe()[camera].astype(int))
        changed = np.argwhere(np.abs(images[1] - images[0]).sum(2) > 60)  # (pixels, 2)
        assert len(changed) > 25
        np.testing.assert_allclose(changed.mean(0), projected(env.sim, camera, [*place, 0.02], 128), atol=3)
        assert images[1].std() > 20
    env.close()


def test_images_follow_the_arm_and_depend_on_nothing_else(opengl):
    env = gym.make("FrankaPickCube-v0", image_obs=True, image_size=64).unwrapped
    first, _ = env.reset(seed=0)
    moved, *_ = env.step(np.array([1, 1, -1, 0]))
    again, _ = env.reset(seed=0)
    for camera in env.cameras:
        assert np.array_equal(first[camera], again[camera])
        assert not np.array_equal(first[camera], moved[camera])
    env.close()
    assert gym.make("FrankaPickCube-v0", image_obs=True, cameras=("wrist",)).observation_space.keys() == {
        "state",
        "wrist",
    }


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own, without display and MUJOCO_GL."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=REPO, env=script_env(REPO, env), capture_output=True, text=True, timeout=60)


def test_states_need_no_opengl():
    run = python(
        "import sys, gymnasium as gym, franka_sim\n"
        "env = gym.make('FrankaPickCube-v0'); env.reset(seed=0); env.step(env.unwrapped.expert_action()); env.close()\n"
        "names = ('OpenGL', 'mujoco.egl', 'mujoco.osmesa', 'torch', 'imageio')\n"
        "print([name for name in sys.modules if name.startswith(names)])"
    )
    assert run.stdout == "[]\n", run.stderr


# What PyOpenGL does while mujoco is imported, when MUJOCO_GL names a library that is not there.
BROKEN = """
import sys
class Broken:
    def find_spec(self, name, *_):
        if name == "mujoco":
            raise AttributeError("'NoneType' object has no attribute 'glGetError'")
sys.meta_path.insert(0, Broken())
import franka_sim
"""
MISSING = "import ctypes.util\nctypes.util.find_library = lambda name: None\nimport franka_sim\n"


@pytest.mark.parametrize(
    ("code", "env"),
    [
        (MISSING + "franka_sim.FrankaSim().render('front', 8, 8)", {}),
        (MISSING + "franka_sim.FrankaSim().render('front', 8, 8)", {"DISPLAY": ":987"}),
        (MISSING + "franka_sim.FrankaSim().render('front', 8, 8)", {"MUJOCO_GL": "osmesa"}),
        (BROKEN, {"MUJOCO_GL": "osmesa"}),
        ("import franka_sim", {"MUJOCO_GL": "foo"}),
    ],
)
def test_missing_opengl_is_named_with_its_remedy(code, env):
    run = python(code, **env)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert "apt-get install -y libegl1 libgl1-mesa-dri" in last and "MUJOCO_GL" in last, run.stderr


# --- Script -----------------------------------------------------------------------------------------------------------
def test_script_tells_what_the_expert_does(tmp_path):
    for task in TASKS:
        run = run_script("franka_sim.py", "--env-id", task, "--episodes", 2, "--seed", 7, cwd=tmp_path)
        lines = run.stdout.splitlines()
        assert [line.split(":")[0] for line in lines] == ["seed 7", "seed 8", "No display"]
        assert all("success, first at step" in line for line in lines[:2]) and "--video" in lines[2]


def test_a_video_that_cannot_be_written_is_one_line(tmp_path, opengl):
    flags = ("--episodes", 1, "--video", "/proc/pick.mp4")
    finished = run_script("franka_sim.py", *flags, cwd=tmp_path, check=False)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("--video /proc/pick.mp4: ")


def test_script_writes_a_video(tmp_path, opengl):
    run_script("franka_sim.py", "--episodes", 1, "--video", "pick.mp4", cwd=tmp_path)
    video = imageio.get_reader(tmp_path / "pick.mp4")
    frames = list(video.iter_data())
    assert len(frames) == 100 and frames[0].shape == (480, 480, 3) and video.get_meta_data()["fps"] == 50
    assert np.abs(frames[0].astype(int) - frames[60]).mean() > 1  # the arm has moved


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--video", "nowhere/a.mp4"], "--video nowhere/a.mp4: give an .mp4 file in a folder that exists"),
        (["--video", "a.txt"], "--video a.txt: give an .mp4 file"),
        (["--episodes", "0"], "at least one episode"),
        (["--seed", "-1"], "no negative seed"),
        (["--env-id", "FrankaPour-v0"], "FrankaPickCube-v0"),
    ],
)
def test_bad_flags(flags, message, tmp_path):
    run = run_script("franka_sim.py", *flags, cwd=tmp_path, check=False)
    assert run.returncode != 0 and message in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
