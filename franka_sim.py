"""A Franka arm in MuJoCo, with Cartesian impedance control, and two gymnasium tasks: pick up a cube, insert a peg."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium import spaces

# --- Robot ------------------------------------------------------------------------------------
# Modified (Craig) DH parameters of the Panda and the FR3, a (m), d (m), alpha (rad), joint 1 to 7, frankarobotics.github.io
# /docs/robot_specifications.html; the flange is 0.107 m after joint 7, the hand is turned by -45 degrees on it, and the
# tcp lies 0.1034 m below, between the finger tips.
DH = (
    (0.0, 0.333, 0.0),
    (0.0, 0.0, -np.pi / 2),
    (0.0, 0.316, np.pi / 2),
    (0.0825, 0.0, np.pi / 2),
    (-0.0825, 0.384, -np.pi / 2),
    (0.0, 0.0, np.pi / 2),
    (0.088, 0.0, np.pi / 2),
)
FLANGE, TCP = 0.107, 0.1034  # m
JOINT_RANGE = (  # rad, same source
    (-2.8973, 2.8973),
    (-1.7628, 1.7628),
    (-2.8973, 2.8973),
    (-3.0718, -0.0698),
    (-2.8973, 2.8973),
    (-0.0175, 3.7525),
    (-2.8973, 2.8973),
)
MAX_JOINT_VELOCITY = (2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61)  # rad/s, same source
MAX_JOINT_TORQUE = (87, 87, 87, 87, 12, 12, 12)  # Nm, same source
# MuJoCo has no velocity limit. A drag that grows with the cube of speed stands in: at the limit it takes half the torque
# of the large motors and all of the wrist's, at half the limit 1/16 and 1/8, Nm s3/rad3.
DRAG = tuple(torque / v**3 / (2 if torque > 12 else 1) for torque, v in zip(MAX_JOINT_TORQUE, MAX_JOINT_VELOCITY, strict=True))
MAX_WIDTH, MAX_GRIP_FORCE = 0.08, 70.0  # m, N; Franka Hand product manual, continuous force
# mass (kg), centre of mass (m), inertia xx yy zz xy xz yz (kg m2) of link 1 to 7: identified by Gaz et al. 2019,
# doi:10.1109/LRA.2019.2931248, as in frankarobotics/franka_description robots/fer/inertials.yaml
INERTIAL = (
    (4.970684, "0.003875 0.002081 -0.04762", "0.70337 0.70661 0.009117 -0.000139 0.006772 0.019169"),
    (0.646926, "-0.003141 -0.02872 0.003495", "0.007962 0.02811 0.025995 -0.003925 0.010254 0.000704"),
    (3.228604, "0.027518 0.039252 -0.066502", "0.037242 0.036155 0.01083 -0.004761 -0.011396 -0.012805"),
    (3.587895, "-0.05317 0.104419 0.027454", "0.025853 0.019552 0.028323 0.007796 -0.001332 0.008641"),
    (1.225946, "-0.011953 0.041065 -0.038437", "0.035549 0.029474 0.008627 -0.002117 -0.004037 0.000229"),
    (1.666555, "0.060149 -0.014117 -0.010517", "0.001964 0.004354 0.005433 0.000109 -0.001158 0.000341"),
    (0.735522, "0.010517 -0.004252 0.061597", "0.012516 0.010027 0.004815 -0.000428 -0.001196 -0.000741"),
)
HOME = (0.0, -0.26, 0.0, -2.43, 0.0, 2.17, np.pi / 4)  # rad; the tcp points down at (0.45, 0, 0.3)

# Shapes of the base and of link 1 to 7, in the link's frame.
LINK_SHAPES = (
    '<geom class="visual" type="cylinder" fromto="0 0 0 0 0 0.14" size="0.07"/>',
    '<geom class="visual" type="capsule" fromto="0 0 -0.19 0 0 -0.05" size="0.06"/>'
    '<geom class="visual" type="capsule" fromto="0 -0.06 0 0 0.06 0" size="0.06"/>',
    '<geom class="visual" type="capsule" fromto="0 -0.06 0 0 -0.19 0" size="0.06"/>',
    '<geom class="visual" type="capsule" fromto="0 0 -0.12 0 0 -0.06" size="0.06"/>'
    '<geom class="visual" type="capsule" fromto="0.0825 -0.06 0 0.0825 0.06 0" size="0.055"/>',
    '<geom class="visual" type="capsule" fromto="-0.0825 0.07 0 -0.0825 0.12 0" size="0.06"/>',
    '<geom class="visual" type="capsule" fromto="0 0.03 -0.26 0 0.07 -0.05" size="0.05"/>',
    '<geom class="visual" type="capsule" fromto="0 0 -0.06 0 0 0.01" size="0.05"/>'
    '<geom class="robot" type="capsule" fromto="0 0 -0.06 0.088 0 0.02" size="0.05"/>',
    '<geom class="robot" type="cylinder" fromto="0 0 0.0 0 0 0.107" size="0.045"/>',
)
HAND_SHAPES = '<geom class="robot" type="box" size="0.03 0.1 0.033" pos="0 0 0.033"/>'
FINGER_SHAPES = """<geom class="robot" type="box" size="0.009 0.007 0.02" pos="0 0.0125 0.02"/>
<geom name="pad{i}" class="pad" type="box" size="0.009 0.004 0.009" pos="0 0.004 0.045"/>"""


def robot_mjcf() -> str:
    """The arm and the hand as one nested MJCF body, generated from the tables above; base at the origin, x forward."""
    open_tags, close_tags = "", ""
    for i, ((a, d, alpha), (mass, com, inertia)) in enumerate(zip(DH, INERTIAL, strict=True)):
        sin, cos = np.sin(alpha), np.cos(alpha)
        open_tags += f"""
        <body name="link{i + 1}" pos="{a} {-sin * d} {cos * d}" quat="{np.cos(alpha / 2)} {np.sin(alpha / 2)} 0 0" gravcomp="1">
          <joint name="joint{i + 1}" class="arm" range="{JOINT_RANGE[i][0]} {JOINT_RANGE[i][1]}"
            actuatorfrcrange="{-MAX_JOINT_TORQUE[i]} {MAX_JOINT_TORQUE[i]}" damping="0.5 0 {DRAG[i]}"/>
          <inertial mass="{mass}" pos="{com}" fullinertia="{inertia}"/>{LINK_SHAPES[i + 1]}"""
        close_tags += "</body>"
    fingers = "".join(
        f"""
        <body name="finger{i}" pos="0 0 0.0584" quat="{quat}" gravcomp="1">
          <joint name="finger{i}" class="finger"/>
          <inertial mass="0.015" pos="0 0.01 0.03" diaginertia="2.375e-6 2.375e-6 7.5e-7"/>
          {FINGER_SHAPES.format(i=i)}
        </body>"""
        for i, quat in ((1, "1 0 0 0"), (2, "0 0 0 1"))
    )
    hand = f"""
        <body name="hand" pos="0 0 {FLANGE}" euler="0 0 {-np.pi / 4}" gravcomp="1">
          <inertial mass="0.73" pos="-0.01 0 0.03" diaginertia="0.001 0.0025 0.0017"/>{HAND_SHAPES}
          <site name="tcp" pos="0 0 {TCP}"/>{fingers}
        </body>"""
    return f'<body name="link0">{LINK_SHAPES[0]}{open_tags}{hand}{close_tags}</body>'


def scene_mjcf(scene: str, dt: float) -> str:
    """The complete MJCF text: options, looks, table, robot, the task's own bodies and the actuators."""
    axes = [" ".join("1" if i == axis else "0" for i in range(6)) for axis in range(6)]
    springs = "".join(
        f'<general site="tcp" refsite="{"target" if i < 3 else "target_rotation"}" gear="{axis}" biastype="affine" '
        'gainprm="0" forcelimited="true" forcerange="-1 1"/>'
        for i, axis in enumerate(axes)
    )
    dampers = "".join(f'<general site="tcp" gear="{axis}" biastype="affine" gainprm="0"/>' for axis in axes)
    return f"""
    <mujoco model="franka">
      <compiler angle="radian" autolimits="true"/>
      <option timestep="{dt}" integrator="implicitfast" cone="elliptic" impratio="10" iterations="20" ls_iterations="20"/>
      <default>
        <default class="arm"><joint armature="0.1"/></default>
        <default class="finger">
          <joint type="slide" axis="0 1 0" range="0 {MAX_WIDTH / 2}" armature="0.1"/>
        </default>
        <default class="visual"><geom contype="0" conaffinity="0"/></default>
        <default class="robot"><geom contype="1" conaffinity="0"/></default>
        <default class="pad">
          <geom contype="1" conaffinity="0" priority="1" condim="4" friction="1.2 0.02 0.0001" solref="0.005 1"/>
        </default>
        <default class="object"><geom contype="2" conaffinity="3"/></default>
      </default>
      <worldbody>
        <light pos="1 -1 3" dir="-0.3 0.3 -1"/>
        <geom name="table" type="box" size="0.6 0.7 0.02" pos="0.35 0 -0.02" contype="2" conaffinity="1"/>
        <body name="target" mocap="true"><site name="target"/></body>
        <body name="target_rotation" mocap="true"><site name="target_rotation"/></body>
        {robot_mjcf()}
        {scene}
      </worldbody>
      <tendon>
        <fixed name="width"><joint joint="finger1" coef="1"/><joint joint="finger2" coef="1"/></fixed>
      </tendon>
      <equality><joint joint1="finger1" joint2="finger2"/></equality>
      <actuator>
        {springs}{dampers}
        <general name="gripper" tendon="width" biastype="affine" ctrlrange="0 {MAX_WIDTH}" forcelimited="true"
          forcerange="-{MAX_GRIP_FORCE} {MAX_GRIP_FORCE}"/>
      </actuator>
    </mujoco>"""


@dataclass
class Impedance:
    """Gains of the Cartesian impedance controller; the defaults are SERL's on the real arm (serl_franka_controllers)."""

    stiffness: float = 2000.0
    """N/m"""
    damping: float = 89.0
    """Ns/m"""
    rotational_stiffness: float = 150.0
    """Nm/rad"""
    rotational_damping: float = 7.0
    """Nms/rad"""
    clip: tuple[float, float, float] = (0.01, 0.01, 0.01)
    """largest position error that counts, per base axis, m: spring force <= stiffness x clip, speed <= that / damping"""
    rotational_clip: tuple[float, float, float] = (0.05, 0.05, 0.05)
    """largest rotation error that counts, per target axis, rad"""
    nullspace_stiffness: float = 10.0
    """Nm/rad of joint 3 towards home, which holds the elbow; its damping is 2 sqrt(stiffness)"""


class FrankaSim:
    """Physics and control of the arm and its gripper, without any task.

    The controller is that of the real arm (serl_franka_controllers src/cartesian_impedance_controller.cpp:154-190), run
    by MuJoCo itself in every physics step: joint torque = J^T (-K clip(error) - D velocity) + posture + gravity, where
    the torque of every joint is limited to 87 or 12 Nm. Six actuators pull the site `tcp` towards the mocap body
    `target` (affine bias -K, force range K x clip), six more damp it.
    Differs from the real arm: the posture is not projected into the nullspace. Instead one spring pulls joint 3 to its
    place at home. Every pose can be reached with joint 3 there, so that at rest the spring is slack and shifts nothing;
    in motion it disturbs the tcp a little. The rotation error is a rotation vector (as franky's), not half (as SERL's).
    All poses are in the base frame, metres; quaternions are x, y, z, w as in scipy and SERL.
    """

    def __init__(self, scene: str = "", dt: float = 0.002, impedance: Impedance | None = None):
        """`scene`: MJCF bodies of a task, placed in the world; `dt`: physics step, s."""
        self.model = mujoco.MjModel.from_xml_string(scene_mjcf(scene, dt))
        self.data = mujoco.MjData(self.model)
        self.tcp = self.model.site("tcp").id
        self.pads = {self.model.geom("pad1").id, self.model.geom("pad2").id}
        self._tcp_position = self.data.site_xpos[self.tcp]  # (3,) view
        self._tcp_matrix = self.data.site_xmat[self.tcp]  # (9,) view
        self._velocity = np.zeros(6)  # angular, linear
        self.impedance = impedance or Impedance()
        self.set_impedance()
        self.set_gripper(MAX_WIDTH, force=40.0, speed=0.3)
        self.reset_joints(HOME)

    # Control
    def set_impedance(self, **changes: Any) -> None:
        """Change any field of `Impedance`, from the next physics step on."""
        for name, value in changes.items():
            if name not in Impedance.__dataclass_fields__:
                raise ValueError(f"set_impedance: unknown field {name!r}, use one of {[*Impedance.__dataclass_fields__]}")
            setattr(self.impedance, name, value)
        gains, model = self.impedance, self.model
        stiffness = np.repeat([gains.stiffness, gains.rotational_stiffness], 3)  # (6,)
        max_force = stiffness * np.concatenate([gains.clip, gains.rotational_clip])  # (6,)
        model.actuator_biasprm[:6, 1] = -stiffness
        model.actuator_forcerange[:6] = np.stack([-max_force, max_force], 1)
        model.actuator_biasprm[6:12, 2] = -np.repeat([gains.damping, gains.rotational_damping], 3)
        model.jnt_stiffness[2] = gains.nullspace_stiffness
        model.dof_damping[2] = 2 * np.sqrt(gains.nullspace_stiffness)

    def set_target_pose(self, position: Sequence[float], quaternion: Sequence[float] | None = None) -> None:
        """Move the target to `position` (x, y, z in m) and, if given, `quaternion` (x, y, z, w)."""
        self.data.mocap_pos[0] = position
        if quaternion is not None:
            x, y, z, w = quaternion
            self.data.mocap_quat[1] = w, x, y, z

    @property
    def target_pose(self) -> np.ndarray:
        """(7,) x, y, z (m) and quaternion x, y, z, w of the target."""
        return np.concatenate([self.data.mocap_pos[0], self.data.mocap_quat[1][[1, 2, 3, 0]]])

    def set_gripper(self, width: float, force: float | None = None, speed: float | None = None) -> None:
        """Command the distance between the fingers (m), and change the force (N, each finger) or speed (m/s) it uses."""
        self.data.ctrl[12] = width
        if force is not None or speed is not None:
            model = self.model
            force = min(force or model.actuator_forcerange[12, 1], MAX_GRIP_FORCE)
            speed = speed or 2 * model.actuator_forcerange[12, 1] / model.dof_damping[7]
            model.actuator_forcerange[12] = -force, force
            model.actuator_gainprm[12, 0] = force / 0.01  # full force from 10 mm of error on
            model.actuator_biasprm[12, 1] = -force / 0.01
            model.dof_damping[7:9] = 2 * force / speed

    def step(self, nstep: int = 1) -> None:
        """Advance `nstep` physics steps of `dt` and bring the kinematics up to date with the result."""
        mujoco.mj_step(self.model, self.data, nstep)
        self._refresh()

    def _refresh(self) -> None:
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_comVel(self.model, self.data)

    def reset_joints(self, q: Sequence[float], width: float = MAX_WIDTH) -> None:
        """Put the arm at `q` (7, rad) and the gripper at `width`, at rest, with the target at the tcp."""
        self.data.qpos[:7] = q
        self.data.qpos[7:9] = width / 2
        self.data.qvel[:9] = 0
        self.data.qacc_warmstart[:] = 0
        self.data.ctrl[12] = width
        self._refresh()
        self.set_target_pose(self._tcp_position, self.tcp_pose[3:])

    # State
    @property
    def q(self) -> np.ndarray:
        """(7,) joint positions, rad."""
        return self.data.qpos[:7].copy()

    @property
    def dq(self) -> np.ndarray:
        """(7,) joint velocities, rad/s."""
        return self.data.qvel[:7].copy()

    @property
    def tcp_pose(self) -> np.ndarray:
        """(7,) x, y, z (m) and quaternion x, y, z, w of the tcp."""
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, self._tcp_matrix)
        return np.concatenate([self._tcp_position, quaternion[[1, 2, 3, 0]]])

    @property
    def tcp_velocity(self) -> np.ndarray:
        """(6,) linear (m/s) and angular (rad/s) velocity of the tcp, base frame."""
        mujoco.mj_objectVelocity(self.model, self.data, mujoco.mjtObj.mjOBJ_SITE, self.tcp, self._velocity, 0)
        return np.concatenate([self._velocity[3:], self._velocity[:3]])

    @property
    def gripper_width(self) -> float:
        """Distance between the finger pads, m."""
        return float(self.data.qpos[7] + self.data.qpos[8])

    @property
    def tcp_wrench(self) -> np.ndarray:
        """(6,) force (N) and torque (Nm) of the surroundings on the tcp, base frame, at the last physics step.

        As libfranka's O_F_ext_hat_K: the joint torques that neither motors nor gravity explain (contacts anywhere on the
        arm and the hand, applied forces), mapped to the tcp by the pseudo-inverse of the Jacobian's transpose.
        """
        external = np.zeros(self.model.nv)
        mujoco.mj_xfrcAccumulate(self.model, self.data, external)
        external += self.data.qfrc_constraint + self.data.qfrc_applied
        jacobian = np.empty((6, self.model.nv))
        mujoco.mj_jacSite(self.model, self.data, jacobian[:3], jacobian[3:], self.tcp)
        return np.linalg.pinv(jacobian[:, :7].T, rcond=1e-3) @ external[:7]

    def touching(self, body: int) -> bool:
        """Whether both finger pads touch the body."""
        contact_geoms, geom_body = self.data.contact.geom, self.model.geom_bodyid  # (contacts, 2)
        touched = {g for pair in contact_geoms.tolist() for g in pair if body in geom_body[pair]}
        return self.pads <= touched

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, as plain arrays."""
        physics = np.empty(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.model, self.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        gripper = np.array([self.model.actuator_forcerange[12, 1], self.model.dof_damping[7]])
        return {"physics": physics, "gripper": gripper, **{k: np.array(v) for k, v in asdict(self.impedance).items()}}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on exactly where `get_state` was called."""
        self.set_impedance(**{name: state[name].tolist() for name in Impedance.__dataclass_fields__})
        force, damping = state["gripper"].tolist()
        self.set_gripper(0.0, force, 2 * force / damping)
        mujoco.mj_setState(self.model, self.data, state["physics"], mujoco.mjtState.mjSTATE_INTEGRATION)
        self._refresh()


# --- Environments -----------------------------------------------------------------------------
class FrankaEnv(gym.Env):
    """What both tasks share: the simulated robot, options, action checks, saving and restoring."""

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 50}
    scene: str
    impedance: Impedance
    task_state: tuple[str, ...]  # attributes that `step` changes

    def __init__(
        self,
        reward_type: Literal["dense", "sparse"],
        control_hz: float,
        terminate_on_success: bool = False,
        image_obs: bool = False,
        image_size: int = 128,
        cameras: Sequence[str] = ("front", "wrist"),
        render_mode: str | None = None,
    ):
        if reward_type not in ("dense", "sparse"):
            raise ValueError(f"reward_type must be 'dense' or 'sparse', not {reward_type!r}")
        self.reward_type, self.terminate_on_success = reward_type, terminate_on_success
        self.image_obs, self.image_size, self.cameras, self.render_mode = image_obs, image_size, cameras, render_mode
        self.sim = FrankaSim(self.scene, impedance=replace(self.impedance))
        self.nstep = round(1 / (control_hz * self.sim.model.opt.timestep))
        self.metadata = self.metadata | {"render_fps": round(control_hz)}

    def get_state(self) -> dict[str, Any]:
        """Everything that `step` and the observations depend on, as a flat dict of arrays, numbers and text.

        gymnasium's TimeLimit wrapper counts for itself: give it `elapsed_steps` back on resuming.
        """
        task = {name: np.array(getattr(self, name)) for name in self.task_state}
        return {**self.sim.get_state(), **task, "np_random": json.dumps(self.np_random.bit_generator.state)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `get_state` was called, also in another process."""
        self.sim.set_state(state)
        for name in self.task_state:
            setattr(self, name, state[name].tolist())
        self.np_random.bit_generator.state = json.loads(state["np_random"])

    def checked(self, action: np.ndarray) -> list[float]:
        """The action as floats within -1..1; raises ValueError for another shape, NaN or infinity."""
        values = np.asarray(action, dtype=np.float64)
        if values.shape != self.action_space.shape:
            raise ValueError(f"action has shape {values.shape}, {type(self).__name__} takes {self.action_space.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"action is not finite: {values}")
        return [min(max(value, -1.0), 1.0) for value in values.tolist()]


def box(*shape: int, low: float = -np.inf, high: float = np.inf) -> spaces.Box:
    return spaces.Box(low, high, shape, np.float32)


class FrankaPickCube(FrankaEnv):
    """Pick up a 4 cm cube: SERL's PandaPickCube (serl/franka_sim/franka_sim/envs/panda_pick_gym_env.py)."""

    scene = """
        <body name="cube" pos="0.4 0 0.02">
          <freejoint/>
          <geom name="cube" class="object" type="box" size="0.02 0.02 0.02" mass="0.1" condim="4"
            friction="1 0.01 0.0001" rgba="0.85 0.25 0.2 1"/>
        </body>"""
    # TASK: on the real arm start with SERL's 2000 N/m and 10 mm clip. Here a softer spring with a wide clip lets the tcp
    # run after targets that jump by 0.1 m: at most 120 N and 1 m/s.
    impedance = Impedance(2000.0, 120.0, 300.0, 20.0, clip=(0.07, 0.07, 0.07), rotational_clip=(0.2, 0.2, 0.2))
    workspace = ((0.2, 0.6), (-0.3, 0.3), (0.012, 0.5))  # m; SERL's, except that the finger tips stay off the table
    task_state = ("target", "closure", "start_height", "elapsed_steps")
    cube_range = ((0.25, -0.25), (0.55, 0.25))  # m, SERL's
    action_scale = 0.1  # m of target per step at an action of 1

    def __init__(self, reward_type: Literal["dense", "sparse"] = "dense", control_hz: float = 50, **options: Any):
        super().__init__(reward_type, control_hz, **options)
        self.action_space = box(4, low=-1, high=1)
        state = {"gripper": box(1, low=0, high=1), "tcp_pos": box(3), "tcp_vel": box(3)}
        self.observation_space = spaces.Dict({"cube_pos": box(3), **state})
        self.cube = self.sim.model.body("cube").id
        self.cube_qpos = self.sim.data.joint(self.sim.model.body_jntadr[self.cube]).qpos  # (7,) view
        self.cube_pos = self.sim.data.xpos[self.cube]  # (3,) view
        self.tcp_pos = self.sim.data.site_xpos[self.sim.tcp]  # (3,) view

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.sim.model, self.sim.data)
        self.cube_qpos[:2] = self.np_random.uniform(*self.cube_range)
        self.sim.reset_joints(HOME)
        self.target, self.closure = self.tcp_pos.tolist(), 0.0
        self.start_height, self.elapsed_steps = float(self.cube_pos[2]), 0
        return self.observe(), {"success": False}

    def step(self, action: np.ndarray):
        *move, grip = self.checked(action)
        for i, (delta, (low, high)) in enumerate(zip(move, self.workspace, strict=True)):
            self.target[i] = min(max(self.target[i] + self.action_scale * delta, low), high)
        self.closure = min(max(self.closure + grip, 0.0), 1.0)
        self.sim.data.mocap_pos[0] = self.target
        self.sim.data.ctrl[12] = (1 - self.closure) * MAX_WIDTH
        self.sim.step(self.nstep)
        self.elapsed_steps += 1
        lift = float(self.cube_pos[2]) - self.start_height
        success = lift > 0.1 and self.sim.touching(self.cube)
        reward = float(success)
        if self.reward_type == "dense":
            distance = float(np.linalg.norm(self.cube_pos - self.tcp_pos))
            reward = 0.3 * np.exp(-20 * distance) + 0.7 * min(max(lift / 0.2, 0.0), 1.0)
        return self.observe(), float(reward), self.terminate_on_success and success, False, {"success": success}

    def observe(self) -> dict[str, np.ndarray]:
        sim = self.sim
        mujoco.mj_objectVelocity(sim.model, sim.data, mujoco.mjtObj.mjOBJ_SITE, sim.tcp, sim._velocity, 0)
        return {
            "cube_pos": self.cube_pos.astype(np.float32),
            "gripper": np.array([min(max(1 - sim.gripper_width / MAX_WIDTH, 0.0), 1.0)], np.float32),
            "tcp_pos": self.tcp_pos.astype(np.float32),
            "tcp_vel": sim._velocity[3:].astype(np.float32),
        }

    def expert_action(self) -> np.ndarray:
        """Above the cube, down, close, up: a function of the current state."""
        to_cube = self.cube_pos - self.tcp_pos
        off = float(np.hypot(to_cube[0], to_cube[1]))
        goal = self.cube_pos.copy()
        gripped = self.sim.touching(self.cube)
        near = off < 0.01 and abs(to_cube[2]) < 0.012
        if gripped:
            goal[:] = self.target[0], self.target[1], self.start_height + 0.22
        elif not near:
            goal[2] += min(max(4 * (off - 0.01), 0), 0.08)
        lead = np.clip(goal - self.tcp_pos, -0.1, 0.1)
        move = (self.tcp_pos + lead - self.target) / self.action_scale
        return np.clip(np.append(move, 1.0 if gripped or near else -1.0), -1, 1).astype(np.float32)


gym.register("FrankaPickCube-v0", f"{__name__}:FrankaPickCube", max_episode_steps=100)
