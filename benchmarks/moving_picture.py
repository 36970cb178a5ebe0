"""Writes a GIF of the videos that runs left, side by side, such as the one at the top of README.md.

python benchmarks/moving_picture.py runs/PICK/video.mp4 runs/PEG/video.mp4      # needs two runs: assets/policies.gif
"""

from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import tyro
from PIL import Image
from run import REPO


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    videos: tyro.conf.Positional[tuple[Path, ...]]
    """mp4 files, of equal height"""
    output: Path = REPO / "assets" / "policies.gif"
    """file to write"""
    size: int = 256
    """height of the picture (pixels)"""
    fps: float = 12.5
    """frames per second, of real time"""
    seconds: float = 8.0
    """length; of a longer video only the beginning is shown"""
    colors: int = 255
    """in the GIF's palette"""


# --- Frames -----------------------------------------------------------------------------------------------------------
def read_frames(path: Path, fps: float, seconds: float, size: int) -> list[np.ndarray]:
    """The video's first seconds (H, W, 3), at this rate and height."""
    with imageio.get_reader(path) as video:
        stride = video.get_meta_data()["fps"] / fps
        frames = list(video.iter_data())
    kept = [frames[int(i)] for i in np.arange(0, len(frames), stride)][: round(seconds * fps)]
    width = round(size * kept[0].shape[1] / kept[0].shape[0])
    return [np.asarray(Image.fromarray(frame).resize((width, size), Image.Resampling.LANCZOS)) for frame in kept]


def side_by_side(videos: list[list[np.ndarray]]) -> list[np.ndarray]:
    """As long as the longest; shorter ones begin again."""
    length = max(map(len, videos))
    return [np.concatenate([video[t % len(video)] for video in videos], 1) for t in range(length)]


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    frames = side_by_side([read_frames(path, args.fps, args.seconds, args.size) for path in args.videos])
    # One palette for all frames: where nothing moves the bytes are equal, and the file stays small.
    some = Image.fromarray(np.concatenate(frames[:: len(frames) // 5]))
    palette = some.quantize(args.colors, Image.Quantize.MAXCOVERAGE)  # small coloured things keep their colour
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pictures[0].save(args.output, save_all=True, append_images=pictures[1:], duration=1000 / args.fps, loop=0)
    print(f"wrote {args.output}: {len(frames)} frames, {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
