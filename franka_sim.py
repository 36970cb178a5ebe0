"""A Franka arm in MuJoCo, with Cartesian impedance control, and two gymnasium tasks: pick up a cube, insert a peg."""

import ctypes.util
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces

mujoco_gl = os.environ.pop("MUJOCO_GL", None)  # set, it makes mujoco load OpenGL on import; `load_opengl` does so later
import mujoco  # noqa: E402

if mujoco_gl is not None:
    os.environ["MUJOCO_GL"] = mujoco_gl

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

# What the base, link 1 to 7, the hand and a finger look like, each in its own frame: class (colour), shape, its ends (or
# the middle of a box) and its size. Classes that end in _solid collide as well; the others are only seen.
SHAPES = {
    "link0": """
        dark box -0.045 0 0.006 | 0.105 0.085 0.006
        white box -0.085 0 0.045 | 0.055 0.06 0.034
        white cylinder 0 0 0.01 0 0 0.14 | 0.07
        dark cylinder 0 0 0.14 0 0 0.145 | 0.062""",
    "link1": """
        white capsule 0 0 -0.185 0 0 -0.06 | 0.062
        white cylinder 0 -0.07 0 0 0.07 0 | 0.066""",
    "link2": """
        grey cylinder 0 0 -0.082 0 0 0.082 | 0.055
        white capsule 0 -0.04 0 0 -0.17 0 | 0.06
        dark cylinder 0 -0.195 0 0 -0.2 0 | 0.055""",
    "link3": """
        white capsule 0 0 -0.11 0 0 -0.055 | 0.06
        white capsule 0 0 -0.06 0.075 0 -0.01 | 0.052
        white cylinder 0.0825 -0.065 0 0.0825 0.065 0 | 0.056""",
    "link4": """
        grey cylinder 0 0 -0.077 0 0 0.077 | 0.047
        white capsule -0.01 0.01 0 -0.0825 0.07 0 | 0.05
        white capsule -0.0825 0.07 0 -0.0825 0.115 0 | 0.058
        dark cylinder -0.0825 0.125 0 -0.0825 0.13 0 | 0.052""",
    "link5": """
        white capsule 0 0.005 -0.22 0 0.06 -0.1 | 0.052
        white capsule 0 0.06 -0.1 0 0.06 0 | 0.046
        white cylinder 0 -0.06 0 0 0.07 0 | 0.05""",
    "link6": """
        grey cylinder 0 0 -0.066 0 0 0.066 | 0.042
        white_solid capsule 0.01 0 0 0.075 0 0 | 0.05
        white cylinder 0.088 0 -0.055 0.088 0 0.055 | 0.05""",
    "link7": """
        grey_solid cylinder 0 0 0.05 0 0 0.095 | 0.043
        dark cylinder 0 0 0.095 0 0 0.107 | 0.036""",
    "hand": """
        dark_solid box 0 0 0.036 | 0.028 0.1 0.03
        grey box 0 0 0.064 | 0.02 0.095 0.004""",
    "finger": """
        grey_solid box 0 0.0145 0.011 | 0.0095 0.0085 0.011
        grey_solid box 0 0.0105 0.034 | 0.0085 0.0045 0.016
        pad box 0 0.004 0.045 | 0.009 0.004 0.009""",
}


def shapes_mjcf(name: str) -> str:
    """The MJCF geoms of one entry of `SHAPES`."""
    geoms = ""
    for line in SHAPES[name].strip().splitlines():
        look, size = line.split(" | ")
        material, shape, *numbers = look.split()
        place = f'{"fromto" if len(numbers) == 6 else "pos"}="{" ".join(numbers)}"'
        geoms += f'<geom class="{material}" type="{shape}" {place} size="{size}"/>'
    return geoms


def robot_mjcf() -> str:
    """The arm and the hand as one nested MJCF body, generated from the tables above; base at the origin, x forward."""
    open_tags, close_tags = "", ""
    for i, ((a, d, alpha), (mass, com, inertia)) in enumerate(zip(DH, INERTIAL, strict=True)):
        sin, cos = np.sin(alpha), np.cos(alpha)
        open_tags += f"""
        <body name="link{i + 1}" pos="{a} {-sin * d} {cos * d}" quat="{np.cos(alpha / 2)} {np.sin(alpha / 2)} 0 0" gravcomp="1">
          <joint name="joint{i + 1}" class="arm" range="{JOINT_RANGE[i][0]} {JOINT_RANGE[i][1]}"
            actuatorfrcrange="{-MAX_JOINT_TORQUE[i]} {MAX_JOINT_TORQUE[i]}" damping="0.5 0 {DRAG[i]}"/>
          <inertial mass="{mass}" pos="{com}" fullinertia="{inertia}"/>{shapes_mjcf(f"link{i + 1}")}"""
        close_tags += "</body>"
    fingers = "".join(
        f"""
        <body name="finger{i}" pos="0 0 0.0584" quat="{quat}" gravcomp="1">
          <joint name="finger{i}" class="finger"/>
          <inertial mass="0.015" pos="0 0.01 0.03" diaginertia="2.375e-6 2.375e-6 7.5e-7"/>
          {shapes_mjcf("finger")}
        </body>"""
        for i, quat in ((1, "1 0 0 0"), (2, "0 0 0 1"))
    )
    hand = f"""
        <body name="hand" pos="0 0 {FLANGE}" euler="0 0 {-np.pi / 4}" gravcomp="1">
          <inertial mass="0.73" pos="-0.01 0 0.03" diaginertia="0.001 0.0025 0.0017"/>{shapes_mjcf("hand")}
          <site name="tcp" pos="0 0 {TCP}" group="4"/>
          <camera name="wrist" pos="-0.085 0 0.015" xyaxes="0 1 0 0.72 0 -0.69" fovy="70"/>{fingers}
        </body>"""
    return f'<body name="link0">{shapes_mjcf("link0")}{open_tags}{hand}{close_tags}</body>'


def scene_mjcf(scene: str, dt: float, shadows: bool) -> str:
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
      <option timestep="{dt}" integrator="implicitfast" cone="elliptic" impratio="10" iterations="20"
        ls_iterations="20"/>
      <visual>
        <global offwidth="1280" offheight="1280"/>
        <quality shadowsize="{2048 * shadows}" offsamples="{8 * shadows}" numslices="24" numstacks="8"/>
        <headlight ambient="0.35 0.35 0.37" diffuse="0.3 0.3 0.3" specular="0 0 0"/>
        <map znear="0.01" zfar="20" shadowclip="1"/>
      </visual>
      <asset>
        <texture type="skybox" builtin="gradient" rgb1="0.93 0.95 0.97" rgb2="0.62 0.70 0.78" width="64" height="384"/>
        <material name="white" rgba="0.93 0.93 0.92 1" specular="0.4" shininess="0.6"/>
        <material name="grey" rgba="0.42 0.44 0.47 1" specular="0.4" shininess="0.5"/>
        <material name="dark" rgba="0.16 0.17 0.19 1" specular="0.5" shininess="0.6"/>
        <material name="table" rgba="0.80 0.74 0.66 1" specular="0.1"/>
      </asset>
      <default>
        <default class="arm"><joint armature="0.1"/></default>
        <default class="finger">
          <joint type="slide" axis="0 1 0" range="0 {MAX_WIDTH / 2}" armature="0.1"/>
        </default>
        <default class="seen"><geom contype="0" conaffinity="0"/>
          <default class="white"><geom material="white"/></default>
          <default class="grey"><geom material="grey"/></default>
          <default class="dark"><geom material="dark"/></default>
        </default>
        <default class="solid"><geom contype="1" conaffinity="0"/>
          <default class="white_solid"><geom material="white"/></default>
          <default class="grey_solid"><geom material="grey"/></default>
          <default class="dark_solid"><geom material="dark"/></default>
          <default class="pad">
            <geom material="dark" priority="1" condim="4" friction="1.2 0.02 0.0001" solref="0.005 1"/>
          </default>
        </default>
        <default class="object"><geom contype="2" conaffinity="3"/></default>
        <default class="fixed"><geom contype="2" conaffinity="1"/></default>
      </default>
      <worldbody>
        <light pos="0.9 -1.2 2.2" dir="-0.35 0.6 -1" diffuse="0.55 0.55 0.52" specular="0.3 0.3 0.3" directional="true"/>
        <camera name="front" pos="1.25 -0.42 0.68" xyaxes="0.4 0.917 0 -0.44 0.19 0.88" fovy="42"/>
        <geom name="table" class="fixed" type="box" size="0.55 0.7 0.02" pos="0.3 0 -0.02" material="table"/>
        <geom class="seen" type="box" size="0.05 0.05 0.35" pos="0.3 0 -0.39" material="grey"/>
        <geom name="floor" class="fixed" type="plane" size="4 4 0.1" pos="0 0 -0.74" rgba="0.72 0.75 0.78 1"/>
        <body name="target" mocap="true"><site name="target" group="4"/></body>
        <body name="target_rotation" mocap="true"><site name="target_rotation" group="4"/></body>
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

    def __init__(
        self, scene: str = "", dt: float = 0.002, impedance: Impedance | None = None, shadows: bool = False
    ):
        """`scene`: MJCF bodies of a task, placed in the world; `dt`: physics step, s."""
        self.model = mujoco.MjModel.from_xml_string(scene_mjcf(scene, dt, shadows))
        self.data = mujoco.MjData(self.model)
        self.tcp = self.model.site("tcp").id
        self.pads = {body.geomadr[0] + 2 for body in map(self.model.body, ("finger1", "finger2"))}
        self.tcp_position = self.data.site_xpos[self.tcp]  # (3,) view
        self._tcp_matrix = self.data.site_xmat[self.tcp]  # (9,) view
        self._velocity = np.zeros(6)  # angular, linear
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
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
        self.set_target_pose(self.tcp_position, self.tcp_pose[3:])

    def reset_pose(self, position: Sequence[float], quaternion: Sequence[float], width: float = MAX_WIDTH) -> None:
        """`reset_joints` to where the tcp has this pose and joint 3 is as at home, found by Newton's method."""
        wanted, actual, error = np.array(quaternion)[[3, 0, 1, 2]], np.empty(4), np.empty(6)
        free, jacobian = [0, 1, 3, 4, 5, 6], np.empty((6, self.model.nv))
        self.data.qpos[:7] = HOME
        for _ in range(20):
            self._refresh()
            mujoco.mju_mat2Quat(actual, self._tcp_matrix)
            mujoco.mju_subQuat(error[3:], wanted, actual)
            error[:3], error[3:] = position - self.tcp_position, self._tcp_matrix.reshape(3, 3) @ error[3:]
            mujoco.mj_jacSite(self.model, self.data, jacobian[:3], jacobian[3:], self.tcp)
            self.data.qpos[free] += np.linalg.solve(jacobian[:, free], error)
        limits = self.model.jnt_range[:7]
        if not (np.abs(error).max() < 1e-6 and np.all((limits[:, 0] < self.q) & (self.q < limits[:, 1]))):
            raise ValueError(f"reset_pose: the arm cannot reach {np.round(position, 3)} with {np.round(quaternion, 3)}")
        self.reset_joints(self.q, width)

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
        return np.concatenate([self.tcp_position, quaternion[[1, 2, 3, 0]]])

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
        data = self.data
        external = data.qfrc_smooth + data.qfrc_constraint - (data.qfrc_actuator + data.qfrc_passive - data.qfrc_bias)
        jacobian = np.empty((6, self.model.nv))
        mujoco.mj_jacSite(self.model, self.data, jacobian[:3], jacobian[3:], self.tcp)
        return np.linalg.pinv(jacobian[:, :7].T, rcond=1e-3) @ external[:7]

    def holds(self, body: int) -> bool:
        """Whether both finger pads touch the body with this id."""
        contact_geoms, geom_body = self.data.contact.geom, self.model.geom_bodyid  # (contacts, 2)
        touched = {g for pair in contact_geoms.tolist() for g in pair if body in geom_body[pair]}
        return self.pads <= touched

    def render(self, camera: str, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8 image of a camera; to be called from one thread only."""
        if (height, width) not in self._renderers:
            load_opengl()
            self._renderers[height, width] = mujoco.Renderer(self.model, height, width)
        renderer = self._renderers[height, width]
        mujoco.mj_camlight(self.model, self.data)
        renderer.update_scene(self.data, camera)
        return renderer.render()

    def close(self) -> None:
        """Free what rendering holds."""
        while self._renderers:
            self._renderers.popitem()[1].close()

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


@functools.cache
def load_opengl() -> None:
    """Load mujoco's OpenGL: what MUJOCO_GL says, else EGL or OSMesa (both without a display) where there is no display."""
    if sys.platform == "linux" and not any(map(os.environ.get, ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"))):
        found = [library for library in ("EGL", "OSMesa") if ctypes.util.find_library(library)]
        os.environ["MUJOCO_GL"] = found[0].lower() if found else "egl"
    try:
        importlib.reload(mujoco.rendering.classic.gl_context).GLContext(8, 8).free()
    except Exception as error:
        # whatever PyOpenGL raises for a library that is not there, often an AttributeError
        raise RuntimeError(
            f"Images need OpenGL, which failed to load (MUJOCO_GL={os.environ.get('MUJOCO_GL')}, {error}). On a machine "
            "without a display run: apt-get install -y libegl1 libgl1-mesa-dri (or libosmesa6, and set MUJOCO_GL=osmesa)"
        ) from error


# --- Environment ------------------------------------------------------------------------------
def box(*shape: int, low: float = -np.inf, high: float = np.inf) -> spaces.Box:
    return spaces.Box(low, high, shape, np.float32)


class FrankaEnv(gym.Env):
    """What the tasks share: options, spaces, the target that actions move, images, saving and restoring.

    A task gives the attributes below and `place`, `evaluate`, `task_observation` and `expert_action`.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 50}
    scene: str  # MJCF bodies
    impedance: Impedance
    workspace: tuple[tuple[float, float], ...]  # range of x, y, z (m) and maybe roll, pitch, yaw (rad) of the target
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
    ):
        """Keyword options of `gym.make`.

        reward_type: "dense", or "sparse" for 1 at success and 0 otherwise; control_hz: actions per second;
        terminate_on_success: end the episode there; image_obs: observe {state, one image per camera} instead of the
        task's state, image_size x image_size pixels; shadows: also antialiasing, for pictures, several times slower.
        """
        if reward_type not in ("dense", "sparse"):
            raise ValueError(f"reward_type must be 'dense' or 'sparse', not {reward_type!r}")
        self.reward_type, self.terminate_on_success, self.render_mode = reward_type, terminate_on_success, render_mode
        self.image_obs, self.image_size, self.cameras = image_obs, image_size, tuple(cameras)
        self.sim = sim = FrankaSim(self.scene, impedance=replace(self.impedance), shadows=shadows)
        self.nstep = round(1 / (control_hz * sim.model.opt.timestep))
        if self.nstep < 1:
            raise ValueError(f"control_hz={control_hz} is faster than the physics, {1 / sim.model.opt.timestep:.0f} Hz")
        known = [sim.model.camera(i).name for i in range(sim.model.ncam)]
        if unknown := set(self.cameras) - set(known):
            raise ValueError(f"cameras={self.cameras}: no camera {', '.join(sorted(unknown))}, there are {known}")
        self.metadata = self.metadata | {"render_fps": round(control_hz)}
        self.viewer = None
        self.action_space = box(len(self.workspace) + gripper_action, low=-1, high=1)
        self.target, self.closure, self.elapsed_steps = [0.0] * len(self.workspace), 0.0, 0
        self.place()
        robot_space = {name: box(value.size) for name, value in self.robot_observation().items()}
        self.observation_space = spaces.Dict(robot_space | self.task_space)
        if image_obs:
            image_space = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
            state_space = box(sum(space.shape[0] for space in robot_space.values()))
            self.observation_space = spaces.Dict({"state": state_space} | dict.fromkeys(self.cameras, image_space))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.sim.model, self.sim.data)
        self.elapsed_steps = 0
        self.place()
        if self.render_mode == "human":
            self.render()
        return self.observe(), {"success": False}

    def step(self, action: np.ndarray):
        values = self.checked(action)
        for i, (low, high) in enumerate(self.workspace):
            self.target[i] = min(max(self.target[i] + self.action_scale[i] * values[i], low), high)
        if len(values) > len(self.workspace):
            self.closure = min(max(self.closure + values[-1], 0.0), 1.0)
        self.sim.set_target_pose(self.target[:3], downwards(*self.target[3:]) if len(self.target) > 3 else None)
        self.sim.set_gripper((1 - self.closure) * MAX_WIDTH)
        self.sim.step(self.nstep)
        self.elapsed_steps += 1
        success, reward = self.evaluate()
        if self.reward_type == "sparse":
            reward = float(success)
        if self.render_mode == "human":
            self.render()
        return self.observe(), reward, success and self.terminate_on_success, False, {"success": success}

    def checked(self, action: np.ndarray) -> list[float]:
        """The action as floats within -1..1; raises ValueError for another shape, NaN or infinity."""
        values = np.asarray(action, dtype=np.float64)
        if values.shape != self.action_space.shape:
            raise ValueError(f"the action has shape {values.shape}, {type(self).__name__} takes {self.action_space.shape}")
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
        """What the robot itself measures, names in alphabetical order, which is also their order in `state`."""
        return {
            "gripper": np.array([1 - self.sim.gripper_width / MAX_WIDTH], np.float32),  # 1: closed
            "tcp_pos": self.sim.tcp_position.astype(np.float32),
            "tcp_vel": self.sim.tcp_velocity[:3].astype(np.float32),
        }

    def render(self) -> np.ndarray | None:
        """One (480, 480, 3) uint8 frame of the front camera, or with `render_mode="human"` the viewer's next frame."""
        if self.render_mode == "rgb_array":
            return self.sim.render("front", 480, 480)
        if self.viewer is None:
            import mujoco.viewer  # needs a display

            self.viewer = mujoco.viewer.launch_passive(self.sim.model, self.sim.data, show_left_ui=False)
            self.next_frame = time.monotonic()
        self.viewer.sync()
        self.next_frame = max(self.next_frame + self.nstep * self.sim.model.opt.timestep, time.monotonic())
        time.sleep(self.next_frame - time.monotonic())
        return None

    def close(self) -> None:
        self.sim.close()
        if self.viewer is not None:
            self.viewer.close()

    def get_state(self) -> dict[str, Any]:
        """Everything that `step` and the observations depend on, as a flat dict of arrays and text.

        gymnasium's TimeLimit wrapper counts for itself: give it `elapsed_steps` back on resuming.
        """
        task = {name: np.array(getattr(self, name)) for name in self.saved}
        return {**self.sim.get_state(), **task, "np_random": json.dumps(self.np_random.bit_generator.state)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `get_state` was called, also in another process."""
        self.sim.set_state(state)
        for name in self.saved:
            setattr(self, name, state[name].tolist())
        self.np_random.bit_generator.state = json.loads(state["np_random"])


def downwards(roll: float = 0.0, pitch: float = 0.0, yaw: float = 0.0) -> list[float]:
    """Quaternion x, y, z, w of a tcp that points down, turned by these angles (rad) about the base's x, y and z axis."""
    wxyz = np.empty(4)
    mujoco.mju_euler2Quat(wxyz, [roll + np.pi, pitch, yaw], "XYZ")
    return wxyz[[1, 2, 3, 0]].tolist()


class FrankaPickCube(FrankaEnv):
    """Pick up a 4 cm cube: SERL's PandaPickCube (serl/franka_sim/franka_sim/envs/panda_pick_gym_env.py)."""

    scene = """
        <body name="cube" pos="0.4 0 0.02">
          <freejoint/>
          <geom class="object" type="box" size="0.02 0.02 0.02" mass="0.1" condim="4" friction="1 0.01 0.0001"
            rgba="0.85 0.22 0.18 1"/>
        </body>"""
    # TASK: on the real arm start with SERL's gains. Here a wide clip lets the tcp run after targets that jump by 0.1 m: at
    # most 140 N and, with the joints' drag, about 0.7 m/s along an axis.
    impedance = Impedance(2000.0, 120.0, 300.0, 20.0, clip=(0.07, 0.07, 0.07), rotational_clip=(0.2, 0.2, 0.2))
    workspace = ((0.2, 0.6), (-0.3, 0.3), (0.012, 0.5))  # SERL's, except that the finger tips stay off the table
    action_scale = (0.1, 0.1, 0.1)
    task_space = {"cube_pos": box(3)}
    saved = (*FrankaEnv.saved, "start_height")
    cube_range = ((0.25, -0.25), (0.55, 0.25))  # x, y in m, SERL's

    def __init__(self, reward_type: Literal["dense", "sparse"] = "dense", control_hz: float = 50, **options: Any):
        super().__init__(reward_type, control_hz, gripper_action=True, **options)

    def place(self) -> None:
        self.cube = self.sim.data.body("cube")
        self.sim.data.qpos[9:11] = self.np_random.uniform(*self.cube_range)
        self.sim.reset_joints(HOME)
        self.target, self.closure, self.start_height = self.sim.tcp_position.tolist(), 0.0, self.cube.xpos.item(2)

    def evaluate(self) -> tuple[bool, float]:
        """Success (lifted by more than 0.1 m and held) and SERL's reward (panda_pick_gym_env.py:280)."""
        lift = self.cube.xpos.item(2) - self.start_height
        distance = float(np.linalg.norm(self.cube.xpos - self.sim.tcp_position))
        reward = 0.3 * float(np.exp(-20 * distance)) + 0.7 * min(max(lift / 0.2, 0.0), 1.0)
        return lift > 0.1 and self.sim.holds(self.cube.id), reward

    def task_observation(self) -> dict[str, np.ndarray]:
        return {"cube_pos": self.cube.xpos.astype(np.float32)}

    def expert_action(self) -> np.ndarray:
        """(4,) action of a scripted expert for the current state: above the cube, down, close, up."""
        tcp, goal = self.sim.tcp_position, self.cube.xpos.copy()
        off, above = float(np.hypot(*(goal - tcp)[:2])), float(tcp[2] - goal[2])  # m
        held = self.sim.holds(self.cube.id)
        close = held or (off < 0.01 and abs(above) < 0.012)
        if held:
            goal[:] = self.target[0], self.target[1], self.start_height + 0.22
        elif not close:
            goal[2] += min(max(4 * (off - 0.01), 0.0), 0.08)  # a funnel: come down only over the cube
        move = (tcp + np.clip(goal - tcp, -0.1, 0.1) - self.target) / self.action_scale
        return np.clip([*move, 1.0 if close else -1.0], -1, 1).astype(np.float32)


class FrankaPegInsert(FrankaEnv):
    """Insert a square 20 mm peg, held by friction between the fingers, 30 mm deep into a 21 mm hole.

    The arm has SERL's peg-insertion gains and action scale (serl_robot_infra/franka_env/envs/peg_env/config.py). The
    peg can slip and tilt in the grip. Start: tcp within 5 cm and 30 degrees of the middle of the workspace; the hole is
    within 4 cm of it and turned by up to 10 degrees.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 10}
    scene = """
        <body name="hole" mocap="true" pos="0.5 0 0">
          <geom class="fixed" type="box" size="0.02 0.05 0.02" pos="0.0305 0 0.02" friction="0.3" rgba="0.25 0.45 0.65 1"/>
          <geom class="fixed" type="box" size="0.02 0.05 0.02" pos="-0.0305 0 0.02" friction="0.3" rgba="0.25 0.45 0.65 1"/>
          <geom class="fixed" type="box" size="0.0105 0.02 0.02" pos="0 0.0305 0.02" friction="0.3" rgba="0.28 0.5 0.7 1"/>
          <geom class="fixed" type="box" size="0.0105 0.02 0.02" pos="0 -0.0305 0.02" friction="0.3" rgba="0.28 0.5 0.7 1"/>
        </body>
        <body name="peg" pos="0.5 0 0.1">
          <freejoint/>
          <geom class="object" type="box" size="0.01 0.01 0.035" mass="0.08" friction="0.3" rgba="0.95 0.72 0.2 1"/>
        </body>"""
    impedance = Impedance(clip=(0.005, 0.005, 0.01), rotational_clip=(0.05, 0.05, 0.05))
    workspace = ((0.4, 0.6), (-0.1, 0.1), (0.05, 0.2), (-0.1, 0.1), (-0.1, 0.1), (-0.8, 0.8))
    action_scale = (0.02, 0.02, 0.02, 0.1, 0.1, 0.1)
    task_space = {"hole_pose": box(4)}  # x, y, z of its upper edge (m), yaw (rad)
    depth, top, peg_tip, grip = 0.03, 0.04, 0.035, 0.02  # m: success, block, peg's half length and its middle below tcp

    def __init__(
        self,
        reward_type: Literal["dense", "sparse"] = "sparse",
        control_hz: float = 10,
        gripper_action: bool = False,
        **options: Any,
    ):
        """`gripper_action`: a seventh action opens and closes the gripper, which otherwise stays closed."""
        super().__init__(reward_type, control_hz, gripper_action, **options)

    def place(self) -> None:
        random, data = self.np_random, self.sim.data
        self.peg, self.hole = data.body("peg"), data.body("hole")
        x, y, self.hole_yaw = random.uniform((0.46, -0.04, -0.17), (0.54, 0.04, 0.17))
        data.mocap_pos[2] = x, y, 0
        data.mocap_quat[2] = np.cos(self.hole_yaw / 2), 0, 0, np.sin(self.hole_yaw / 2)
        x, y, z, yaw = random.uniform((0.45, -0.05, 0.12, -np.pi / 6), (0.55, 0.05, 0.16, np.pi / 6))
        self.target, self.closure = [x, y, z, 0.0, 0.0, yaw], 1.0
        self.sim.reset_pose(self.target[:3], downwards(0, 0, yaw), width=0.02)
        data.qpos[9:12] = x, y, z - self.grip
        data.qpos[12:16] = np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
        self.sim.set_gripper(0.0, force=60.0)
        self.sim.step(50)  # the fingers close on the peg

    def evaluate(self) -> tuple[bool, float]:
        tip = self.tip_in_hole()
        off, depth = float(np.hypot(tip[0], tip[1])), -float(tip[2])
        inserted = min(max(depth / self.depth, 0.0), 1.0) if off < 0.005 else 0.0
        return inserted >= 1.0, 0.3 * float(np.exp(-20 * off)) + 0.7 * inserted

    def tip_in_hole(self) -> np.ndarray:
        """(3,) lower end of the peg in the frame of the hole's upper edge, m."""
        tip = self.peg.xpos - self.peg_tip * self.peg.xmat[[2, 5, 8]]
        return self.hole.xmat.reshape(3, 3).T @ (tip - self.hole.xpos) - (0, 0, self.top)

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
        hole = self.hole
        return {"hole_pose": np.array([*hole.xpos[:2], self.top, np.arctan2(hole.xmat[3], hole.xmat[0])], np.float32)}

    def expert_action(self) -> np.ndarray:
        """(6,) or (7,) action of a scripted expert for the current state: over the hole, turn, wait for rest, down."""
        tcp, tip, peg, hole = self.sim.tcp_pose, self.tip_in_hole(), self.peg.xmat, self.hole.xmat
        turn = float(np.arctan2(hole[3], hole[0]) - np.arctan2(peg[3], peg[0]))  # rad
        aligned = np.hypot(tip[0], tip[1]) < 0.0006 and abs(turn) < 0.01
        goal = np.zeros(6)
        goal[:2] = tcp[:2] - hole.reshape(3, 3)[:2, :2] @ tip[:2]
        inside = tip[2] < -0.001
        goal[2] = tcp[2] + (-0.015 if inside else -0.01 if aligned else min(max(0.004 - tip[2], -0.03), 0.01))
        goal[5] = 2 * np.arctan2(tcp[4], tcp[3]) + turn
        move = (goal - self.target) / self.action_scale
        return np.clip([*move, 1.0][: self.action_space.shape[0]], -1, 1).astype(np.float32)


# Runs as a script too, where the classes are in __main__. TASK: register your own here.
gym.register("FrankaPickCube-v0", f"{__name__}:FrankaPickCube", max_episode_steps=100)
gym.register("FrankaPegInsert-v0", f"{__name__}:FrankaPegInsert", max_episode_steps=100)
