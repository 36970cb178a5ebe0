"""A Robotiq 2F-85 gripper on a pseudo-terminal, for tests: Modbus RTU written from the manual, without any library.

    with MockRobotiq(tmp_path / "ttyUSB0", object_at=120) as gripper:
        ...                     # a driver opens that path; gripper.position, gripper.writes tell what happened
        gripper.silent = True   # it neither hears nor answers
        gripper.unplug()        # the port is gone; gripper.plug() brings it back

Registers, two bytes each, high byte first (2F-85 manual, section 4):
    0x03E8 action request | options    0x03E9 options | position    0x03EA speed | force       written
    0x07D0 status | reserved           0x07D1 fault | position echo 0x07D2 position | current  read
"""

import contextlib
import os
import select
import struct
import threading
import time
import tty
from pathlib import Path

SLAVE, OUTPUT, INPUT = 9, 0x03E8, 0x07D0
OPEN, CLOSED = 3, 228  # positions that the fingers reach, of 0 to 255


def crc(frame: bytes) -> bytes:
    """The two bytes that end a frame (Modbus over serial line, 6.2.2)."""
    value = 0xFFFF
    for byte in frame:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xA001 if value & 1 else 0)
    return struct.pack("<H", value)


class MockRobotiq:
    """The gripper, from plugging it in; one thread answers requests and moves the fingers."""

    def __init__(self, port: Path, object_at: int | None = None, activation_s: float = 0.3, delay_s: float = 0.02):
        """`port`: where the device appears; `object_at`: position at which the closing fingers meet something;
        `delay_s`: until a write shows in what is read."""
        self.port, self.object_at, self.activation_s, self.delay_s = Path(port), object_at, activation_s, delay_s
        self.silent, self.writes, self.reads = False, [], 0
        self.stuck = False  # the fingers do not move, and it says for ever that they do
        self.running, self.master = True, None
        self.power_up()
        self.plug()
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def power_up(self) -> None:
        """As after the power is switched on: not activated."""
        self.output = [0] * 6  # bytes of the three registers
        self.pending: list[tuple[float, list[int]]] = []
        self.position, self.fault, self.object_status, self.active_at = 100.0, 0, 0, None
        self.moved_at = time.monotonic()

    def __enter__(self) -> "MockRobotiq":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.running = False
        self.thread.join()
        self.unplug()

    def plug(self) -> None:
        master, slave = os.openpty()
        tty.setraw(master)
        tty.setraw(slave)
        self.port.unlink(missing_ok=True)
        self.port.symlink_to(os.ttyname(slave))
        self.slave, self.master = slave, master

    def unplug(self) -> None:
        if self.master is not None:
            master, self.master = self.master, None
            self.port.unlink(missing_ok=True)
            os.close(self.slave)
            time.sleep(0.02)  # the thread's select ends
            os.close(master)

    # --- the line
    def serve(self) -> None:
        with contextlib.suppress(PermissionError):  # where allowed: answer in time on a busy machine, too
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))  # of this thread alone
        buffer = b""
        while self.running:
            master = self.master
            if master is None:
                buffer = b""
                time.sleep(0.005)
                continue
            try:
                if not select.select([master], [], [], 0.005)[0]:
                    self.move()
                    buffer = b""  # a silence ends a frame
                    continue
                buffer += os.read(master, 512)
                if self.silent:
                    buffer = b""
                if len(buffer) > 2 and len(buffer) >= self.request_size(buffer):
                    self.move()
                    reply = self.reply(buffer[: self.request_size(buffer)])
                    buffer = b""
                    if reply:
                        os.write(master, reply + crc(reply))
            except (OSError, ValueError):  # unplugged meanwhile
                buffer = b""

    @staticmethod
    def request_size(frame: bytes) -> int:
        if frame[1] == 16:
            return 9 + frame[6] if len(frame) > 6 else 9
        if frame[1] == 23:
            return 13 + frame[10] if len(frame) > 10 else 13
        return 8

    def reply(self, frame: bytes) -> bytes | None:
        slave, function = frame[:2]
        if crc(frame[:-2]) != frame[-2:] or slave != SLAVE:
            return None
        if function in (3, 4):
            return self.read(function, *struct.unpack(">HH", frame[2:6]))
        if function == 16:
            start, count, _ = struct.unpack(">HHB", frame[2:7])
            return self.write(function, start, frame[7:-2]) or bytes([slave]) + struct.pack(">BHH", 16, start, count)
        if function == 23:
            read_start, read_count, start, _, _ = struct.unpack(">HHHHB", frame[2:11])
            return self.write(function, start, frame[11:-2]) or self.read(function, read_start, read_count)
        return bytes([slave, function | 0x80, 1])  # illegal function

    def read(self, function: int, start: int, count: int) -> bytes:
        registers = self.output + [0] * (2 * (INPUT - OUTPUT) - 6) + self.status()
        first = 2 * (start - OUTPUT)
        data = bytes(registers[first : first + 2 * count]) if first >= 0 else b""
        if len(data) != 2 * count:
            return bytes([SLAVE, function | 0x80, 2])  # illegal address
        self.reads += 1
        return bytes([SLAVE, function, len(data)]) + data

    def write(self, function: int, start: int, data: bytes) -> bytes | None:
        first = 2 * (start - OUTPUT)
        if not 0 <= first <= 6 - len(data):
            return bytes([SLAVE, function | 0x80, 2])
        newest = self.pending[-1][1] if self.pending else self.output
        output = newest[:first] + list(data) + newest[first + len(data) :]
        self.writes.append(output)
        self.pending.append((time.monotonic() + self.delay_s, output))
        return None

    # --- the gripper
    @property
    def activated(self) -> bool:
        return self.active_at is not None and time.monotonic() >= self.active_at

    def status(self) -> list[int]:
        """Six bytes: gOBJ gSTA gGTO gACT, reserved, gFLT, gPR, gPO, gCU."""
        action = self.output[0]
        state = 3 if self.activated else 1 if action & 1 else 0
        moving = action >> 3 & 1
        bits = (self.object_status if moving else 0) << 6 | state << 4 | moving << 3 | action & 1
        current = 30 if self.object_status in (1, 2) else 0
        return [bits, 0, self.fault, self.output[3], round(self.position), current]

    def move(self) -> None:
        now = time.monotonic()
        elapsed, self.moved_at = now - self.moved_at, now
        while self.pending and self.pending[0][0] <= now:
            before, self.output = self.output, self.pending.pop(0)[1]
            if not self.output[0] & 1:  # reset
                self.active_at, self.fault, self.object_status = None, 0, 0
            elif not before[0] & 1:
                self.active_at = now + self.activation_s
            if self.output[3] != before[3] or (self.output[0] ^ before[0]) & 8:
                self.object_status = 0
            if self.output[0] & 8 and not self.activated:
                self.fault = 7 if not self.output[0] & 1 else 5
        if self.fault == 5 and self.activated:
            self.fault = 0
        if not (self.activated and self.output[0] & 8) or self.fault or self.object_status or self.stuck:
            return
        goal = min(max(self.output[3], OPEN), CLOSED)
        step = (20 + 130 * self.output[4] / 255) / 85 * (CLOSED - OPEN) * elapsed  # 20 to 150 mm/s
        position = self.position + min(max(goal - self.position, -step), step)
        if self.object_at is not None and self.position <= self.object_at <= position and goal > self.object_at:
            self.position, self.object_status = float(self.object_at), 2
        else:
            self.position = position
            self.object_status = 3 if position == goal else 0
