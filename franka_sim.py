"""A Franka in MuJoCo with Cartesian impedance control; two tasks: pick up a cube, insert a peg.

    python franka_sim.py                    # the scripted expert, in a window if there is a display
    python franka_sim.py --video pick.mp4   # without a display
    python franka_sim.py --env-id FrankaPegInsert-v0 --episodes 3

Expect: median steps_per_second >= 3000 (one core) [benchmarks/results/franka_sim_speed.csv contender=pick_states]
Expect: median ms_per_step < 20 (software OpenGL) [benchmarks/results/franka_sim_speed.csv contender=pick_two_cameras]
Expect: success_rate >= 0.99 [benchmarks/results/franka_sim_expert.csv env_id=FrankaPickCube-v0]
Expect: success_rate >= 0.9 [benchmarks/results/franka_sim_expert.csv env_id=FrankaPegInsert-v0]

FrankaPickCube-v0 is SERL's PandaPickCube (arXiv:2401.16013, serl/franka_sim, commit cd5f7e7), its
action, observation, reward, workspace, rates. Differs: home is 0.3 m over the table; a parallel
gripper, measured, not commanded; impedance without inverse dynamics; the seed is obeyed.
FrankaPegInsert-v0 follows SERL's real peg task: gains, action scale, 10 Hz, sparse reward.
New task: subclass FrankaTask as the two below do; `grep -n TASK: franka_sim.py` lists what to edit.
"""

import ctypes.util
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import tyro
from gymnasium import spaces

OPENGL_HELP = (
    "Without a display run: apt-get install -y libegl1 libgl1-mesa-dri (or: apt-get install -y libosmesa6, "
    "and MUJOCO_GL=osmesa). Without images no OpenGL is needed: leave MUJOCO_GL unset."
)
try:
    import mujoco
except (AttributeError, OSError, RuntimeError) as error:  # MUJOCO_GL: not installed, or unknown
    raise ImportError(f"MUJOCO_GL={os.environ.get('MUJOCO_GL')} does not load. {OPENGL_HELP}") from error


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    env_id: Literal["FrankaPickCube-v0", "FrankaPegInsert-v0"] = "FrankaPickCube-v0"
    """task that the scripted expert shows"""
    episodes: int = 5
    """how many"""
    seed: int = 0
    """seed of the first episode; the next ones count up"""
    video: Path | None = None
    """write this .mp4 file instead of opening a window"""


# --- Robot ------------------------------------------------------------------------------------------------------------
# By joint, frankarobotics.github.io/docs/robot_specifications.html: modified (Craig) DH parameters
# (Panda, FR3), the Panda's limits of position, velocity, torque. The hand is turned by -45 degrees.
DH_A = (0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088)  # m
DH_D = (0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0)  # m
DH_ALPHA = (0.0, -np.pi / 2, np.pi / 2, np.pi / 2, -np.pi / 2, np.pi / 2, np.pi / 2)  # rad
FLANGE, TCP = 0.107, 0.1034  # m, from joint 7 to the hand, from there to between the finger tips
MIN_JOINT_POSITION = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)  # rad
MAX_JOINT_POSITION = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)  # rad
MAX_JOINT_VELOCITY = (2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61)  # rad/s
MAX_JOINT_TORQUE = (87, 87, 87, 87, 12, 12, 12)  # Nm, without gravity, as for libfranka's commands
# MuJoCo has no limit of velocity. A drag that grows with speed cubed (Nm s3/rad3) stands in: at the
# limit it takes half the torque of the large motors, all of the wrist's; at half 1/16 and 1/8.
DRAG = [t / v**3 / (2 if t > 12 else 1) for t, v in zip(MAX_JOINT_TORQUE, MAX_JOINT_VELOCITY)]
MAX_WIDTH = 0.08  # m; Franka Hand product manual
MAX_GRIP_FORCE = 70.0  # N (continuous); the same
# mass (kg), centre of mass (m), inertia xx yy zz xy xz yz (kg m2) of link 1 to 7: identified by Gaz et al. 2019,
# doi:10.1109/LRA.2019.2931248, as in frankarobotics/franka_description robots/fer/inertials.yaml, hand and fingers too
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
# What the robot looks like: part, colour (+: it collides), shape, ends or middle | size; m, in its own frame
SHAPES = """
    link0  dark   box      -0.045 0 0.006                       | 0.105 0.085 0.006
    link0  white  box      -0.085 0 0.045                       | 0.055 0.06 0.034
    link0  white  cylinder 0 0 0.01 0 0 0.14                    | 0.07
    link0  dark   cylinder 0 0 0.14 0 0 0.145                   | 0.062
    link1  white  capsule  0 0 -0.185 0 0 -0.06                 | 0.062
    link1  white  cylinder 0 -0.07 0 0 0.07 0                   | 0.066
    link2  grey   cylinder 0 0 -0.082 0 0 0.082                 | 0.055
    link2  white  capsule  0 -0.04 0 0 -0.17 0                  | 0.06
    link2  dark   cylinder 0 -0.195 0 0 -0.2 0                  | 0.055
    link3  white  capsule  0 0 -0.11 0 0 -0.055                 | 0.06
    link3  white  capsule  0 0 -0.06 0.075 0 -0.01              | 0.052
    link3  white  cylinder 0.0825 -0.065 0 0.0825 0.065 0       | 0.056
    link4  grey   cylinder 0 0 -0.077 0 0 0.077                 | 0.047
    link4  white  capsule  -0.01 0.01 0 -0.0825 0.07 0          | 0.05
    link4  white  capsule  -0.0825 0.07 0 -0.0825 0.115 0       | 0.058
    link4  dark   cylinder -0.0825 0.125 0 -0.0825 0.13 0       | 0.052
    link5  white  capsule  0 0.005 -0.22 0 0.06 -0.1            | 0.052
    link5  white  capsule  0 0.06 -0.1 0 0.06 0                 | 0.046
    link5  white  cylinder 0 -0.06 0 0 0.07 0                   | 0.05
    link6  grey   cylinder 0 0 -0.066 0 0 0.066                 | 0.042
    link6  white+ capsule  0.01 0 0 0.075 0 0                   | 0.05
    link6  white  cylinder 0.088 0 -0.055 0.088 0 0.055         | 0.05
    link7  grey+  cylinder 0 0 0.05 0 0 0.095                   | 0.043
    link7  dark   cylinder 0 0 0.095 0 0 0.107                  | 0.036
    hand   dark+  box      0 0 0.036                            | 0.028 0.1 0.03
    hand   grey   box      0 0 0.064                            | 0.02 0.095 0.004
    finger grey+  box      0 0.0145 0.011                       | 0.0095 0.0085 0.011
    finger grey+  box      0 0.0105 0.034                       | 0.0085 0.0045 0.016
    finger pad+   box      0 0.004 0.045                        | 0.009 0.004 0.009
"""


def shapes_mjcf(part: str) -> str:
    """The MJCF geoms of one part in `SHAPES`."""
    mjcf = ""
    for line in SHAPES.strip().splitlines():
        look, size = line.split(" | ")
        name, material, shape, *place = look.split()
        if name == part:
            kind = "seen" if material[-1] != "+" else "pad" if material == "pad+" else "solid"
            looks = f'class="{kind}" material="{material.rstrip("+")}"'
            place = f'{"pos" if shape == "box" else "fromto"}="{" ".join(place)}"'
            mjcf += f'<geom {looks} type="{shape}" {place} size="{size}"/>'
    return mjcf


def robot_mjcf() -> str:
    """Arm and hand as one nested MJCF body, from these tables; base at the origin, x forward."""
    mjcf = f"""
        <body name="hand" pos="0 0 {FLANGE}" euler="0 0 {-np.pi / 4}" gravcomp="1">
          <inertial mass="0.73" pos="-0.01 0 0.03" diaginertia="0.001 0.0025 0.0017"/>
          {shapes_mjcf("hand")}
          <site name="tcp" pos="0 0 {TCP}" group="4"/>
          <camera name="wrist" pos="-0.08 0 0.058" xyaxes="0 1 0 0.6 0 -0.8" fovy="75"/>"""
    for i, quat in ((1, "1 0 0 0"), (2, "0 0 0 1")):
        mjcf += f"""
          <body name="finger{i}" pos="0 0 0.0584" quat="{quat}" gravcomp="1">
            <joint name="finger{i}" class="finger"/>
            <inertial mass="0.015" pos="0 0.01 0.03" diaginertia="2.375e-6 2.375e-6 7.5e-7"/>
            {shapes_mjcf("finger").replace('class="pad"', f'class="pad" name="pad{i}"')}
          </body>"""
    mjcf += "</body>"
    for i in reversed(range(7)):
        mass, com, inertia = INERTIAL[i]
        sin, cos, half = np.sin(DH_ALPHA[i]), np.cos(DH_ALPHA[i]), DH_ALPHA[i] / 2
        mjcf = f"""
        <body name="link{i + 1}" pos="{DH_A[i]} {-sin * DH_D[i]} {cos * DH_D[i]}"
            quat="{np.cos(half)} {np.sin(half)} 0 0" gravcomp="1">
          <joint name="joint{i + 1}" armature="0.1" range="{MIN_JOINT_POSITION[i]} {MAX_JOINT_POSITION[i]}"
            actuatorfrcrange="{-MAX_JOINT_TORQUE[i]} {MAX_JOINT_TORQUE[i]}" damping="0.5 0 {DRAG[i]}"/>
          <inertial mass="{mass}" pos="{com}" fullinertia="{inertia}"/>
          {shapes_mjcf(f"link{i + 1}")}{mjcf}
        </body>"""
    return f'<body name="link0">{shapes_mjcf("link0")}{mjcf}</body>'


def scene_mjcf(scene: str, dt: float, shadows: bool) -> str:
    """The whole MJCF text: options, looks, table, robot, the task's own bodies, the actuators."""
    springs = dampers = ""
    for i, target in enumerate(["target"] * 3 + ["target_rotation"] * 3):
        gear = " ".join("1" if i == k else "0" for k in range(6))
        axis = f'site="tcp" gear="{gear}" biastype="affine" gainprm="0"'
        springs += f'<general {axis} refsite="{target}" forcerange="-1 1"/>'
        dampers += f"<general {axis}/>"
    return f"""
    <mujoco model="franka">
      <compiler angle="radian" autolimits="true"/>
      <option timestep="{dt}" integrator="implicitfast" cone="elliptic" impratio="10" iterations="20"/>
      <statistic extent="1" center="0.3 0 0.3"/>
      <visual>
        <global offwidth="1280" offheight="1280"/>
        <quality shadowsize="{1024 * shadows}" offsamples="{4 * shadows}" numslices="24" numstacks="8"/>
        <headlight ambient="0.38 0.38 0.4" diffuse="0.35 0.35 0.35" specular="0 0 0"/>
        <map znear="0.01" zfar="10"/>
      </visual>
      <asset>
        <texture type="skybox" builtin="gradient" rgb1="0.93 0.95 0.97" rgb2="0.62 0.7 0.78" width="64" height="384"/>
        <material name="white" rgba="0.93 0.93 0.92 1" specular="0.4" shininess="0.6"/>
        <material name="grey" rgba="0.42 0.44 0.47 1" specular="0.4" shininess="0.5"/>
        <material name="dark" rgba="0.16 0.17 0.19 1" specular="0.5" shininess="0.6"/>
        <material name="pad" rgba="0.16 0.17 0.19 1" specular="0.1"/>
        <material name="table" rgba="0.8 0.74 0.66 1" specular="0.1"/>
      </asset>
      <default>
        <default class="seen"><geom contype="0" conaffinity="0"/></default>
        <default class="solid"><geom contype="1" conaffinity="0"/></default>
        <default class="pad">
          <geom contype="1" conaffinity="0" priority="1" condim="4" friction="1.2 0.02 0.0001" solref="0.005 1"/>
        </default>
        <default class="object"><geom contype="2" conaffinity="3"/></default>
        <default class="fixed"><geom contype="2" conaffinity="1" friction="0.3"/></default>
        <default class="finger"><joint type="slide" axis="0 1 0" range="0 {MAX_WIDTH / 2}" armature="0.1"/></default>
      </default>
      <worldbody>
        <light pos="0.9 -1.2 2.2" dir="-0.35 0.6 -1" diffuse="0.48 0.47 0.45" directional="true"/>
        <camera name="front" pos="1.25 -0.42 0.68" xyaxes="0.4 0.917 0 -0.388 0.169 0.906" fovy="44"/>
        <camera name="overview" pos="1.07 -1.34 0.71" xyaxes="0.866 0.5 0 -0.13 0.224 0.966"/>
        <geom name="table" class="fixed" type="box" size="0.55 0.7 0.02" pos="0.3 0 -0.02" material="table"/>
        <geom name="floor" class="fixed" type="plane" size="4 4 0.1" pos="0 0 -0.74" rgba="0.72 0.75 0.78 1"/>
        <body name="target" mocap="true"><site name="target" group="4"/></body>
        <body name="target_rotation" mocap="true"><site name="target_rotation" group="4"/></body>
        {robot_mjcf()}
        {scene}
      </worldbody>
      <tendon><fixed name="width"><joint joint="finger1" coef="1"/><joint joint="finger2" coef="1"/></fixed></tendon>
      <equality><joint joint1="finger1" joint2="finger2"/></equality>
      <actuator>
        {springs}{dampers}
        <general name="gripper" tendon="width" biastype="affine" ctrlrange="0 {MAX_WIDTH}"
          forcerange="-{MAX_GRIP_FORCE} {MAX_GRIP_FORCE}"/>
      </actuator>
    </mujoco>"""


@dataclass
class Impedance:
    """Gains of the Cartesian impedance controller; the defaults are SERL's on the real arm."""

    stiffness: float = 2000.0
    """N/m"""
    damping: float = 89.0
    """Ns/m"""
    rotational_stiffness: float = 150.0
    """Nm/rad"""
    rotational_damping: float = 7.0
    """Nms/rad"""
    clip: Sequence[float] = (0.01, 0.01, 0.01)
    """largest position error that counts, per base axis, m: force <= stiffness x clip, speed <= that / damping"""
    rotational_clip: Sequence[float] = (0.05, 0.05, 0.05)
    """the same for the rotation error, per target axis, rad"""
    nullspace_stiffness: float = 10.0
    """Nm/rad of joint 3 towards its place at home: holds the elbow; damping is 2 sqrt(stiffness)"""


class FrankaSim:
    """Physics and control of the arm and its gripper, without any task.

    The controller is the real arm's (serl_franka_controllers
    src/cartesian_impedance_controller.cpp:154-190), run by MuJoCo itself in every physics step:
    joint torque = J^T (-K clip(error) - D velocity) + posture + gravity, within the joint's limit.
    Six actuators pull the site `tcp` to the target (affine bias -K error, force range K x clip),
    six damp it. The target is two mocap bodies, one never turned: position errors are clipped by
    base axes. Differs from the real arm: the rotation error is a rotation vector (as franky's), not
    half of it (as SERL's); the posture is not projected into the nullspace, a spring pulls joint 3
    home. The other six suffice for any pose: at rest it shifts nothing, in motion it disturbs a little.
    All poses are in the base frame, in metres; quaternions are x, y, z, w as in scipy and SERL.
    """

    def __init__(self, scene: str = "", dt: float = 0.002, impedance: Impedance | None = None, shadows: bool = False):
        """`scene`: MJCF bodies of a task; `dt`: physics step, s; `shadows`: in images."""
        self.model = mujoco.MjModel.from_xml_string(scene_mjcf(scene, dt, shadows))
        self.data = mujoco.MjData(self.model)
        self.tcp = self.model.site("tcp").id
        self.pads = [self.model.geom("pad1").id, self.model.geom("pad2").id]
        self.tcp_position = self.data.site_xpos[self.tcp]  # (3,) view
        self._tcp_matrix = self.data.site_xmat[self.tcp]  # (9,) view, row by row
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        self.impedance = replace(impedance or Impedance())  # a copy
        self.set_impedance()
        self.set_gripper(MAX_WIDTH, force=40.0, speed=0.3)
        self.reset_joints(HOME)

    def set_impedance(self, **changes: float | Sequence[float]) -> None:
        """Change fields of `Impedance` for the next step. Raises ValueError for an unknown one."""
        for name, value in changes.items():
            if name not in Impedance.__dataclass_fields__:
                raise ValueError(f"set_impedance: unknown {name!r}, there are {[*Impedance.__dataclass_fields__]}")
            setattr(self.impedance, name, value)
        gains = self.impedance
        model = self.model
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
            self.data.mocap_quat[1] = np.take(quaternion, (3, 0, 1, 2))

    def set_gripper(self, width: float, force: float | None = None, speed: float | None = None) -> None:
        """Command the fingers' distance, 0 to 0.08 m; change force (N, <= 70) or speed (m/s)."""
        self.data.ctrl[12] = width
        if force is not None or speed is not None:
            self.grip_force = self.grip_force if force is None else min(force, MAX_GRIP_FORCE)
            self.grip_speed = self.grip_speed if speed is None else speed
            self.model.actuator_forcerange[12] = -self.grip_force, self.grip_force
            self.model.actuator_gainprm[12, 0] = self.grip_force / 0.01  # full from 10 mm off
            self.model.actuator_biasprm[12, 1] = -self.grip_force / 0.01
            self.model.dof_damping[7:9] = 2 * self.grip_force / self.grip_speed

    def step(self, nstep: int = 1) -> None:
        """Advance `nstep` physics steps of `dt`, then bring the kinematics up to date."""
        mujoco.mj_step(self.model, self.data, nstep)
        self._refresh()

    def _refresh(self) -> None:
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_comVel(self.model, self.data)

    def reset_joints(self, q: Sequence[float], width: float = MAX_WIDTH) -> None:
        """Put the arm at `q` (7, rad), gripper at `width` (m), at rest, the target at the tcp."""
        self.data.qpos[:7] = q
        self.data.qpos[7:9] = width / 2
        self.data.qvel[:9] = 0
        self.data.qacc_warmstart[:] = 0
        self.set_gripper(width)
        self._refresh()
        self.set_target_pose(self.tcp_position, self.tcp_pose[3:])

    def reset_pose(self, position: Sequence[float], quaternion: Sequence[float], width: float = MAX_WIDTH) -> None:
        """`reset_joints` to this tcp pose, joint 3 as at home. ValueError if it is out of reach."""
        wanted = np.take(quaternion, (3, 0, 1, 2))
        actual = np.empty(4)
        error = np.empty(6)
        jacobian = np.empty((6, self.model.nv))
        free = [0, 1, 3, 4, 5, 6]  # all joints but joint 3
        self.data.qpos[:7] = HOME
        for _ in range(20):  # Newton's method
            self._refresh()
            mujoco.mju_mat2Quat(actual, self._tcp_matrix)
            mujoco.mju_subQuat(error[3:], wanted, actual)
            error[:3] = position - self.tcp_position
            error[3:] = self._tcp_matrix.reshape(3, 3) @ error[3:]
            mujoco.mj_jacSite(self.model, self.data, jacobian[:3], jacobian[3:], self.tcp)
            self.data.qpos[free] += np.linalg.solve(jacobian[:, free], error)
        beyond = np.any(self.q < MIN_JOINT_POSITION) or np.any(self.q > MAX_JOINT_POSITION)
        if np.abs(error).max() > 1e-6 or beyond:
            raise ValueError(f"reset_pose: the arm cannot reach {np.round(position, 3)} with {np.round(quaternion, 3)}")
        self.reset_joints(self.q, width)

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
        return np.concatenate([self.tcp_position, quaternion[[1, 2, 3, 0]]])

    @property
    def target_pose(self) -> np.ndarray:
        """(7,) x, y, z (m) and quaternion x, y, z, w of the target."""
        return np.concatenate([self.data.mocap_pos[0], self.data.mocap_quat[1][[1, 2, 3, 0]]])

    @property
    def tcp_velocity(self) -> np.ndarray:
        """(6,) linear (m/s) and angular (rad/s) velocity of the tcp."""
        velocity = np.empty(6)  # angular, linear
        mujoco.mj_objectVelocity(self.model, self.data, mujoco.mjtObj.mjOBJ_SITE, self.tcp, velocity, 0)
        return velocity[[3, 4, 5, 0, 1, 2]]

    @property
    def tcp_wrench(self) -> np.ndarray:
        """(6,) force (N), torque (Nm) of the surroundings on the tcp, base frame, last step.
        As libfranka's O_F_ext_hat_K, with the other sign: joint torques that neither motors nor gravity explain (from
        contacts anywhere, a load in the grip, forces), by pinv of the transposed Jacobian."""
        explained = self.data.qfrc_actuator + self.data.qfrc_passive - self.data.qfrc_bias
        external = self.data.qfrc_smooth + self.data.qfrc_constraint - explained
        jacobian = np.empty((6, self.model.nv))
        mujoco.mj_jacSite(self.model, self.data, jacobian[:3], jacobian[3:], self.tcp)
        return np.linalg.pinv(jacobian[:, :7].T, rcond=1e-3) @ external[:7]

    @property
    def gripper_width(self) -> float:
        """Distance between the finger pads, m."""
        return float(self.data.qpos[7] + self.data.qpos[8])

    def holds(self, body: int) -> bool:
        """Whether both finger pads touch the body with this id."""
        mujoco.mj_collision(self.model, self.data)
        pairs = self.data.contact.geom  # (contacts, 2)
        pairs = pairs[(self.model.geom_bodyid[pairs] == body).any(1)]
        return all(pad in pairs for pad in self.pads)

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, as arrays."""
        physics = np.empty(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.model, self.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        state = {"physics": physics, "gripper": np.array([self.grip_force, self.grip_speed])}
        return state | {name: np.array(value) for name, value in asdict(self.impedance).items()}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on where `get_state` was called; `tcp_wrench` is right again after the next step."""
        self.set_impedance(**{name: state[name].tolist() for name in Impedance.__dataclass_fields__})
        self.set_gripper(0.0, *state["gripper"].tolist())
        mujoco.mj_setState(self.model, self.data, state["physics"], mujoco.mjtState.mjSTATE_INTEGRATION)
        self._refresh()

    def render(self, camera: str, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8 image of a camera; always call it from the same thread."""
        if (height, width) not in self._renderers:
            self._renderers[height, width] = new_renderer(self.model, height, width)
        mujoco.mj_camlight(self.model, self.data)
        self._renderers[height, width].update_scene(self.data, camera)
        return self._renderers[height, width].render()

    def close(self) -> None:
        """Free what rendering holds."""
        while self._renderers:
            self._renderers.popitem()[1].close()


def new_renderer(model: mujoco.MjModel, height: int, width: int) -> "mujoco.Renderer":
    """Start a renderer, on EGL or OSMesa where neither MUJOCO_GL nor a display is set."""
    chosen = any(map(os.environ.get, ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")))
    if sys.platform == "linux" and not chosen:
        os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "osmesa"
    # gl_context read MUJOCO_GL when mujoco was imported; where that failed, 3.8 has no Renderer.
    try:
        importlib.reload(importlib.import_module("mujoco.rendering.classic.gl_context"))
        return importlib.import_module("mujoco.rendering.classic.renderer").Renderer(model, height, width)
    except (AttributeError, ImportError, OSError, RuntimeError, mujoco.FatalError) as error:
        backend = os.environ.get("MUJOCO_GL", "glfw")
        raise RuntimeError(f"Images need OpenGL, and MUJOCO_GL={backend} does not load. {OPENGL_HELP}") from error


# --- Environment ------------------------------------------------------------------------------------------------------
def box(*shape: int, low: float = -np.inf, high: float = np.inf) -> spaces.Box:
    return spaces.Box(low, high, shape, np.float32)


class FrankaTask(gym.Env):
    """What tasks share. Each gives the attributes below, `place`, `evaluate`, `task_observation`, `expert_action`."""

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 50}
    scene: str  # MJCF bodies
    impedance: Impedance
    # Range of the target's x, y, z (m) and maybe roll, pitch, yaw (rad).
    workspace: tuple[tuple[float, float], ...]
    action_scale: tuple[float, ...]  # what an action of 1 adds to each of them
    task_space: dict[str, spaces.Box]  # observations beside the robot's own, only without images
    saved = ("target", "closure", "elapsed_steps")  # attributes that change during an episode

    def __init__(
        self,
        reward_type: Literal["dense", "sparse"],
        control_hz: float,
        gripper_action: bool,
        terminate_on_success: bool = False,
        image_obs: bool = False,
        image_size: int = 128,
        cameras: Sequence[str] = ("front", "wrist"),
        shadows: bool = False,
        render_mode: Literal["rgb_array", "human"] | None = None,
    ) -> None:
        """Keyword options of `gym.make`. `reward_type`: "dense", or "sparse", 1 at success, else 0;
        `control_hz`: actions per second; `gripper_action`: only where offered; `image_obs`: observe
        {state, one image per camera} of `image_size` x `image_size` pixels, not the task's state (info of a reset);
        `shadows`: and antialiasing, for pictures, many times slower. ValueError for nonsense."""
        if reward_type not in ("dense", "sparse"):
            raise ValueError(f"reward_type must be 'dense' or 'sparse', not {reward_type!r}")
        self.reward_type = reward_type
        self.terminate_on_success = terminate_on_success
        self.image_obs = image_obs
        self.image_size = image_size
        self.cameras = tuple(cameras)
        self.render_mode = render_mode
        self.viewer = None
        self.sim = sim = FrankaSim(self.scene, impedance=self.impedance, shadows=shadows)
        if not 0 < control_hz * sim.model.opt.timestep <= 1:
            raise ValueError(f"control_hz={control_hz} must be above 0 and at most {1 / sim.model.opt.timestep:.0f}")
        self.nstep = round(1 / (control_hz * sim.model.opt.timestep))
        known = {sim.model.camera(i).name for i in range(sim.model.ncam)}
        if not set(self.cameras) <= known:
            raise ValueError(f"cameras={self.cameras}: there are {sorted(known)}")
        self.metadata = self.metadata | {"render_fps": round(1 / (self.nstep * sim.model.opt.timestep))}
        self.target = [0.0] * len(self.workspace)
        self.closure = 0.0
        self.elapsed_steps = 0
        self.action_space = box(len(self.workspace) + gripper_action, low=-1, high=1)
        robot_space = {name: box(value.size) for name, value in self.robot_observation().items()}
        self.observation_space = spaces.Dict(robot_space | self.task_space)
        if image_obs:
            images = dict.fromkeys(self.cameras, spaces.Box(0, 255, (image_size, image_size, 3), np.uint8))
            state = box(sum(space.shape[0] for space in robot_space.values()))
            self.observation_space = spaces.Dict({"state": state} | images)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.sim.model, self.sim.data)
        self.elapsed_steps = 0
        self.place()
        if self.render_mode == "human":
            self.render()
        hidden = {"start": np.concatenate([*self.task_observation().values()])} if self.image_obs else {}
        return self.observe(), {"success": False} | hidden

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        values = self.checked(action)
        # The target moves on from itself, not from the measured pose.
        for i, (low, high) in enumerate(self.workspace):
            self.target[i] = min(max(self.target[i] + self.action_scale[i] * values[i], low), high)
        if len(values) > len(self.workspace):
            self.closure = min(max(self.closure + values[-1], 0.0), 1.0)
        turned = downwards(*self.target[3:]) if len(self.target) > 3 else None
        self.sim.set_target_pose(self.target[:3], turned)
        self.sim.set_gripper((1 - self.closure) * MAX_WIDTH)
        self.sim.step(self.nstep)
        self.elapsed_steps += 1
        success, reward = self.evaluate()
        if self.reward_type == "sparse":
            reward = float(success)
        if self.render_mode == "human":
            self.render()
        terminated = success and self.terminate_on_success
        return self.observe(), reward, terminated, False, {"success": success}

    def checked(self, action: np.ndarray) -> list[float]:
        """The action as floats within -1..1. Raises ValueError for another shape, NaN, infinity."""
        values = np.asarray(action, dtype=np.float64)
        if values.shape != self.action_space.shape:
            raise ValueError(f"the action has shape {values.shape}, not {self.action_space.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"the action is not finite: {values}")
        return [min(max(value, -1.0), 1.0) for value in values.tolist()]

    def observe(self) -> dict[str, np.ndarray]:
        robot = self.robot_observation()
        if not self.image_obs:
            return robot | self.task_observation()
        images = {camera: self.sim.render(camera, self.image_size, self.image_size) for camera in self.cameras}
        return {"state": np.concatenate([*robot.values()])} | images

    def robot_observation(self) -> dict[str, np.ndarray]:
        """What the robot itself measures, in alphabetical order, as it stands in `state` too."""
        return {
            "gripper": np.array([1 - self.sim.gripper_width / MAX_WIDTH], np.float32),  # 1: closed
            "tcp_pos": self.sim.tcp_position.astype(np.float32),
            "tcp_vel": self.sim.tcp_velocity[:3].astype(np.float32),
        }

    def render(self) -> np.ndarray | None:
        """One (480, 480, 3) uint8 frame of the front camera; for "human" the window's next."""
        if self.render_mode == "rgb_array":
            return self.sim.render("front", 480, 480)
        if self.render_mode == "human":
            if self.viewer is None:
                import mujoco.viewer  # needs a display

                others = threading.enumerate()
                self.shown = time.monotonic()
                self.viewer = mujoco.viewer.launch_passive(self.sim.model, self.sim.data)
                self.viewer_threads = set(threading.enumerate()) - set(others)
            self.viewer.sync()
            due = self.shown + self.nstep * self.sim.model.opt.timestep
            time.sleep(max(due - time.monotonic(), 0.0))
            self.shown = time.monotonic()
        return None

    def close(self) -> None:
        self.sim.close()
        if self.viewer is not None:
            self.viewer.close()
            for thread in self.viewer_threads:  # glfw crashes if the process ends before they do
                thread.join(timeout=5)

    def get_state(self) -> dict[str, Any]:
        """Everything that `step` and the observations depend on, as a flat dict of arrays and text.
        gymnasium's TimeLimit counts for itself: give it `elapsed_steps` back on resuming."""
        task = {name: np.array(getattr(self, name)) for name in self.saved}
        random_state = json.dumps(self.np_random.bit_generator.state)
        return {**self.sim.get_state(), **task, "np_random": random_state}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `get_state` was called, also in another process."""
        self.sim.set_state(state)
        for name in self.saved:
            setattr(self, name, state[name].tolist())
        self.np_random.bit_generator.state = json.loads(state["np_random"])


def downwards(roll: float = 0.0, pitch: float = 0.0, yaw: float = 0.0) -> np.ndarray:
    """(4,) quaternion x, y, z, w: tcp down, turned by these angles (rad) about base x, y, z."""
    wxyz = np.empty(4)
    mujoco.mju_euler2Quat(wxyz, [roll + np.pi, pitch, yaw], "XYZ")
    return wxyz[[1, 2, 3, 0]]


class FrankaPickCube(FrankaTask):
    """Pick up a 4 cm cube: SERL's PandaPickCube (serl/franka_sim/franka_sim/envs/panda_pick_gym_env.py)."""

    scene = """
        <body name="cube" pos="0.4 0 0.02">
          <freejoint/>
          <geom class="object" type="box" size="0.02 0.02 0.02" mass="0.1" condim="4" friction="1 0.01 0.0001"
            rgba="0.85 0.22 0.18 1"/>
        </body>"""
    # TASK: gains. The wide clip lets the tcp run after targets that jump by 0.1 m: at most 140 N at rest,
    # and, with the joints' drag, 0.5 m/s along x, 1 m/s along y. A real arm should start with SERL's.
    impedance = Impedance(2000.0, 120.0, 300.0, 20.0, clip=(0.07, 0.07, 0.07), rotational_clip=(0.2, 0.2, 0.2))
    workspace = ((0.2, 0.6), (-0.3, 0.3), (0.012, 0.5))  # SERL's, but the tips stay off the table
    action_scale = (0.1, 0.1, 0.1)
    task_space = {"cube_pos": box(3)}
    saved = (*FrankaTask.saved, "start_height")
    cube_range = ((0.25, -0.25), (0.55, 0.25))  # x, y in m, SERL's

    def __init__(self, reward_type: str = "dense", control_hz: float = 50, **options: Any) -> None:
        super().__init__(reward_type, control_hz, gripper_action=True, **options)
        self.cube = self.sim.data.body("cube")
        self.start_height = 0.0

    def place(self) -> None:
        self.sim.data.qpos[9:11] = self.np_random.uniform(*self.cube_range)
        self.sim.reset_joints(HOME)
        self.target = self.sim.tcp_position.tolist()
        self.closure = 0.0
        self.start_height = self.cube.xpos.item(2)

    def evaluate(self) -> tuple[bool, float]:
        """Success (lifted by over 0.1 m and held) and SERL's reward (panda_pick_gym_env.py:280)."""
        lift = self.cube.xpos.item(2) - self.start_height
        distance = float(np.linalg.norm(self.cube.xpos - self.sim.tcp_position))
        reward = 0.3 * float(np.exp(-20 * distance)) + 0.7 * min(max(lift / 0.2, 0.0), 1.0)
        return lift > 0.1 and self.sim.holds(self.cube.id), reward

    def task_observation(self) -> dict[str, np.ndarray]:
        return {"cube_pos": self.cube.xpos.astype(np.float32)}

    def expert_action(self) -> np.ndarray:
        """(4,) action of a scripted expert: above the cube, down, close, up."""
        tcp = self.sim.tcp_position
        goal = self.cube.xpos.copy()
        off = float(np.hypot(*(goal - tcp)[:2]))  # m
        above = float(tcp[2] - goal[2])  # m
        held = self.sim.holds(self.cube.id)
        close = held or (off < 0.01 and abs(above) < 0.012)
        if held:
            goal[:] = self.target[0], self.target[1], self.start_height + 0.22
        elif not close:
            goal[2] += min(max(4 * (off - 0.01), 0.0), 0.08)  # a funnel: down only over the cube
        move = (tcp + np.clip(goal - tcp, -0.1, 0.1) - self.target) / self.action_scale
        return np.clip([*move, 1.0 if close else -1.0], -1, 1).astype(np.float32)


class FrankaPegInsert(FrankaTask):
    """Insert a square 20 mm peg, held by friction between the fingers (it can slip and tilt), 30 mm
    deep into a 21 mm hole. Stiffness, damping and action scale are SERL's (serl_robot_infra/
    franka_env/envs/peg_env/config.py). Start: tcp within 5 cm and 30 degrees of the workspace's
    middle, the hole within 4 cm and 10 degrees."""

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 10}
    # TASK: bodies moved by `place`, not physics, are mocap bodies; the first two: the arm's target.
    scene = """
        <body name="hole" mocap="true">
          <geom class="fixed" type="box" size="0.02 0.05 0.02" pos="0.0305 0 0.02" rgba="0.3 0.5 0.7 1"/>
          <geom class="fixed" type="box" size="0.02 0.05 0.02" pos="-0.0305 0 0.02" rgba="0.3 0.5 0.7 1"/>
          <geom class="fixed" type="box" size="0.0105 0.02 0.02" pos="0 0.0305 0.02" rgba="0.3 0.5 0.7 1"/>
          <geom class="fixed" type="box" size="0.0105 0.02 0.02" pos="0 -0.0305 0.02" rgba="0.3 0.5 0.7 1"/>
        </body>
        <body name="peg">
          <freejoint/>
          <geom class="object" type="box" size="0.01 0.01 0.035" mass="0.08" friction="0.3" rgba="0.95 0.72 0.2 1"/>
        </body>"""
    # SERL clips at 3, 3, 10 mm and 0.02 rad.
    impedance = Impedance(clip=(0.005, 0.005, 0.01), rotational_clip=(0.05, 0.05, 0.05))
    workspace = ((0.4, 0.6), (-0.1, 0.1), (0.05, 0.2), (-0.1, 0.1), (-0.1, 0.1), (-0.8, 0.8))
    action_scale = (0.02, 0.02, 0.02, 0.1, 0.1, 0.1)
    task_space = {"hole_pose": box(4)}  # x, y, z of its upper edge (m), yaw (rad)
    top = 0.04  # m, height of the hole's upper edge
    depth = 0.03  # m, how far in the peg must be

    def __init__(
        self, reward_type: str = "sparse", control_hz: float = 10, gripper_action: bool = False, **options: Any
    ):
        """`gripper_action`: a seventh action opens and closes the gripper, else it stays closed."""
        super().__init__(reward_type, control_hz, gripper_action, **options)
        self.peg, self.hole = self.sim.data.body("peg"), self.sim.data.body("hole")

    def place(self) -> None:
        data = self.sim.data
        x, y, yaw = self.np_random.uniform((0.46, -0.04, -0.17), (0.54, 0.04, 0.17))
        data.mocap_pos[2] = (x, y, 0)
        data.mocap_quat[2] = (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
        low = (0.45, -0.05, 0.12, -np.pi / 6)
        high = (0.55, 0.05, 0.16, np.pi / 6)
        x, y, z, yaw = self.np_random.uniform(low, high).tolist()
        self.target = [x, y, z, 0.0, 0.0, yaw]
        self.closure = 1.0
        self.sim.reset_pose((x, y, z), downwards(yaw=yaw), width=0.02)
        data.qpos[9:12] = x, y, z - 0.02  # the peg's middle, 2 cm below the tcp
        data.qpos[12:16] = np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
        self.sim.set_gripper(0.0, force=60.0)
        self.sim.step(50)  # the fingers close on the peg

    def tip_in_hole(self) -> np.ndarray:
        """(3,) lower end of the peg in the frame of the hole's upper edge, m."""
        tip = self.peg.xpos - 0.035 * self.peg.xmat[[2, 5, 8]]
        return self.hole.xmat.reshape(3, 3).T @ (tip - self.hole.xpos) - (0, 0, self.top)

    def evaluate(self) -> tuple[bool, float]:
        """Success (in by `depth`) and a dense reward like the cube's: near the axis, then deep."""
        tip = self.tip_in_hole()
        off = float(np.hypot(tip[0], tip[1]))  # m
        inserted = min(max(-float(tip[2]) / self.depth, 0.0), 1.0) if off < 0.005 else 0.0
        return inserted == 1.0, 0.3 * float(np.exp(-20 * off)) + 0.7 * inserted

    def robot_observation(self) -> dict[str, np.ndarray]:
        wrench = self.sim.tcp_wrench.astype(np.float32)
        return {
            "gripper": super().robot_observation()["gripper"],
            "tcp_force": wrench[:3],
            "tcp_pose": self.sim.tcp_pose.astype(np.float32),
            "tcp_torque": wrench[3:],
            "tcp_vel": self.sim.tcp_velocity.astype(np.float32),
        }

    def task_observation(self) -> dict[str, np.ndarray]:
        x, y, _ = self.hole.xpos
        yaw = np.arctan2(self.hole.xmat[3], self.hole.xmat[0])
        return {"hole_pose": np.array([x, y, self.top, yaw], np.float32)}

    def expert_action(self) -> np.ndarray:
        """(6,) or (7,) action of a scripted expert: over the hole, turn, wait for rest, down."""
        tcp = self.sim.tcp_pose
        tip = self.tip_in_hole()
        peg, hole = self.peg.xmat, self.hole.xmat
        off = float(np.hypot(tip[0], tip[1]))  # m
        turn = float(np.arctan2(hole[3], hole[0]) - np.arctan2(peg[3], peg[0]))  # rad
        goal = np.zeros(6)
        goal[:2] = tcp[:2] - hole.reshape(3, 3)[:2, :2] @ tip[:2]
        if off < 0.002 and tip[2] < -0.001:
            goal[2] = tcp[2] - 0.015  # inside
        elif off < 0.0006 and abs(turn) < 0.01:
            goal[2] = tcp[2] - 0.01
        else:
            goal[2] = tcp[2] + min(max(0.004 + min(0.5 * off, 0.03) - tip[2], -0.03), 0.02)  # hover
        goal[5] = 2 * np.arctan2(tcp[4], tcp[3]) + turn
        move = (goal - self.target) / self.action_scale
        return np.clip([*move, 1.0][: self.action_space.shape[0]], -1, 1).astype(np.float32)


# TASK: register your own here. `__name__`, because this file is a script, too.
gym.register("FrankaPickCube-v0", f"{__name__}:FrankaPickCube", max_episode_steps=100)
gym.register("FrankaPegInsert-v0", f"{__name__}:FrankaPegInsert", max_episode_steps=100)


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    if args.episodes < 1 or args.seed < 0:
        raise SystemExit(f"--episodes {args.episodes} --seed {args.seed}: at least one episode, and no negative seed")
    if args.video and (args.video.suffix != ".mp4" or not args.video.parent.is_dir()):
        raise SystemExit(f"--video {args.video}: give an .mp4 file in a folder that exists")
    import imageio

    display = sys.platform != "linux" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    mode = "rgb_array" if args.video else "human" if display else None
    env = gym.make(args.env_id, render_mode=mode, shadows=mode == "rgb_array")
    writer = imageio.get_writer(args.video, fps=env.metadata["render_fps"]) if args.video else None
    try:
        for episode in range(args.episodes):
            _, info = env.reset(seed=args.seed + episode)
            episodic_return = 0.0
            first_success = None
            done = False
            while not done:
                _, reward, terminated, truncated, info = env.step(env.unwrapped.expert_action())
                done = terminated or truncated
                episodic_return += reward
                if info["success"] and first_success is None:
                    first_success = env.unwrapped.elapsed_steps
                if writer:
                    writer.append_data(env.render())
            outcome = f"success, first at step {first_success}" if info["success"] else "failure"
            print(f"seed {args.seed + episode}: return {episodic_return:.1f}, {outcome}")
    except (RuntimeError, OSError) as error:  # no OpenGL, or what ffmpeg says
        raise SystemExit(f"--video {args.video}: {str(error).splitlines()[0]}") from error
    finally:
        env.close()
        if writer:
            writer.close()
    if args.video:
        print(f"wrote {args.video}")
    elif mode is None:
        print("No display: --video FILE.mp4 shows what happened.")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
